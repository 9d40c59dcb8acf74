"""What the DeepSpeed launcher keeps to itself: read from the command lines of our ancestors.

The launcher takes `--hostfile` out of the arguments, and a hostfile that is not there makes it fall back to a local
run with a warning. A person who named a hostfile wants those hosts or an error.
"""

from __future__ import annotations

import os
from pathlib import Path

from hdscale.errors import UserError

_PROC = Path("/proc")


def check_hostfile(command_lines: list[list[str]] | None = None) -> None:
    """Refuse to start when the launcher was given a hostfile that does not exist.

    Args:
        command_lines: those of the launcher and its parents; None: read from /proc.

    Raises:
        UserError: naming the hostfile.
    """
    for arguments in ancestor_command_lines() if command_lines is None else command_lines:
        hostfile = _hostfile_argument(arguments)
        if hostfile is not None and not Path(hostfile).is_file():
            raise UserError(
                f"--hostfile {hostfile} does not exist: the launcher would train on this machine alone; "
                "write one line `HOST slots=GPUS` a machine, or leave --hostfile out"
            )


def ancestor_command_lines() -> list[list[str]]:
    """Return the argument lists of the parent process, its parent, and so on; empty where there is no /proc."""
    found: list[list[str]] = []
    pid = os.getppid()
    while pid > 1:
        try:
            found.append((_PROC / str(pid) / "cmdline").read_bytes().decode(errors="replace").split("\0")[:-1])
            # The second field, the command's name, is in parentheses and may hold spaces.
            stat = (_PROC / str(pid) / "stat").read_text()
        except OSError:
            break
        pid = int(stat.rpartition(")")[2].split()[1])
    return found


def _hostfile_argument(arguments: list[str]) -> str | None:
    """Return the value of --hostfile or -H of a `deepspeed` command line, up to the user's script."""
    start = next((i for i, word in enumerate(arguments[:3]) if Path(word).name in ("deepspeed", "ds")), None)
    if start is None:
        return None
    for i, word in enumerate(arguments[start + 1 :], start + 1):
        if word in ("-H", "--hostfile"):
            return arguments[i + 1] if i + 1 < len(arguments) else None
        if word.startswith("--hostfile="):
            return word.partition("=")[2]
        if word.endswith(".py"):
            break
    return None
