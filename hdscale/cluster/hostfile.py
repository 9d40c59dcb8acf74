"""The hosts of a run, as the launcher reads them from a file."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from hdscale.errors import UserError


class Host(NamedTuple):
    """One line of a hostfile."""

    name: str
    slots: int  # ranks that it takes: its GPUs


def read_hostfile(path: Path) -> list[Host]:
    """Read DeepSpeed's format: one `HOST slots=GPUS` per line, empty lines and lines that start with # aside.

    Raises:
        UserError: naming file, line and rule.
    """
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        raise UserError(
            f"--hostfile {path} cannot be read ({reason}): write one line `HOST slots=GPUS` a machine"
        ) from error
    hosts: dict[str, Host] = {}
    for number, line in enumerate(lines, 1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        match = re.fullmatch(r"(\S+)\s+slots=(\d+)(\s.*)?", line)  # what follows is for others, such as MPI
        where = f"{path}, line {number}"
        if match is None:
            raise UserError(f"{where} must be `HOST slots=GPUS`, got {line!r}")
        name, slots = match[1], int(match[2])
        if name.startswith("-"):
            raise UserError(f"{where}: a host's name must not start with -, got {name!r}")
        if slots < 1:
            raise UserError(
                f"{where}: slots must be at least 1, got {slots}: leave the line out to use no GPU of {name}"
            )
        if name in hosts:
            raise UserError(f"{where}: {name} must have one line only: add its slots up")
        hosts[name] = Host(name, slots)
    if not hosts:
        raise UserError(f"{path} names no host: write one line `HOST slots=GPUS` a machine")
    return list(hosts.values())
