"""JSON lines by step: what a run writes down as it goes, and takes back where it resumes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hdscale.staging import staged


class StepLog:
    """Appends one JSON object per line, each with its `step`; one process writes."""

    def __init__(self, path: Path, start_step: int) -> None:
        """Go on after a step: lines of later ones, which a resumed run makes again, would stand there twice."""
        self._path = path
        if path.is_file():
            kept = [line for line in read_step_log(path) if line["step"] <= start_step]
            with staged(path) as temporary:
                temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))

    def append(self, line: Mapping[str, Any]) -> None:
        """Write one line; other processes see it at once."""
        with self._path.open("a") as file:
            file.write(json.dumps(line) + "\n")


def read_step_log(path: Path) -> list[dict[str, Any]]:
    """Read all lines; empty when there is no such file."""
    if not path.is_file():
        return []
    # A killed run may leave half a line at the end.
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
