"""The checks of all machines as one table, and what to do about those that fail."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hdscale.cluster.device import Check
from hdscale.grid import grid

_CELL = 34  # letters in a cell of the table


def render(columns: Mapping[str, Sequence[Check]]) -> str:
    """Return a table of checks by machine, machines that are alike in one column, and what to do about failures."""
    groups: dict[Any, list[str]] = {}
    for machine, checks in columns.items():
        groups.setdefault(tuple((check.name, check.ok) for check in checks), []).append(machine)
    heads = {
        names[0]: names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} like it"
        for names in groups.values()
    }
    rows = list(dict.fromkeys(check.name for machine in heads for check in columns[machine]))
    cells = {machine: {check.name: _cell(check) for check in columns[machine]} for machine in heads}
    lines = [[row, *(cells[machine].get(row, "") for machine in heads)] for row in rows]
    text = grid(["", *heads.values()], lines, align="<" * (1 + len(heads)))
    failures = [
        f"{machine}: {check.name}: {check.found}; {check.what_to_do}"
        for machine, checks in columns.items()
        for check in checks
        if check.ok is False
    ]
    return "\n".join([*text, *(["", "What to do:", *failures] if failures else [])])


def _cell(check: Check) -> str:
    if check.ok is False:
        return "FAILS"
    text = f"ok, {check.found}" if check.ok else check.found
    return text if len(text) <= _CELL else text[: _CELL - 3] + "..."
