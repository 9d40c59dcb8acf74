"""What the launcher keeps to itself: read from the command lines of our ancestors.

DeepSpeed's takes `--hostfile` out of the arguments, and a hostfile that is not there makes it fall back to a local run
with a warning. A person who named a hostfile wants those hosts or an error. Its second stage, one process a host, gets
the hosts as `--world_info`.
"""

from __future__ import annotations

import base64
import binascii
import json
import os
import shutil
import socket
import sys
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


def planned_hosts(world_size: int, command_lines: list[list[str]] | None = None) -> list[str | None]:
    """Return the host that each rank was meant to run on, whether it got there or not.

    Args:
        world_size: number of ranks.
        command_lines: as for `check_hostfile`.

    Returns:
        A name a rank: from DeepSpeed's launcher, or from HDSCALE_HOSTS, comma-separated names of hosts with equal
        numbers of consecutive ranks (launch/slurm/train.sbatch). None for each where neither is there (torchrun).
    """
    for arguments in ancestor_command_lines() if command_lines is None else command_lines:
        for word in arguments:
            if word.startswith("--world_info="):
                slots = _decode_world_info(word.partition("=")[2])
                hosts = [host for host, devices in slots.items() for _ in devices]
                if len(hosts) == world_size:
                    return list(hosts)
    named = [name for name in os.environ.get("HDSCALE_HOSTS", "").split(",") if name]
    if named and world_size % len(named) == 0:
        return [named[rank * len(named) // world_size] for rank in range(world_size)]
    return [None] * world_size


def _decode_world_info(text: str) -> dict[str, list[int]]:
    """Decode {host: [device, ...]}; ranks count through it. Empty for what DeepSpeed did not write."""
    try:
        return json.loads(base64.urlsafe_b64decode(text))
    except (binascii.Error, ValueError):
        return {}


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


def add_own_tools_to_path() -> None:
    """Put this Python's folder on the PATH: DeepSpeed looks for ninja there.

    A process that was started over SSH has not activated its virtual environment; it would find no ninja, or the
    system's, whose log differs, so that the same ops are compiled again and again.
    """
    folder, path = str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)
    if folder not in path.split(os.pathsep):
        os.environ["PATH"] = f"{folder}{os.pathsep}{path}"


def deepspeed_script() -> str:
    """Return DeepSpeed's launcher: the one beside this Python, or the one on the PATH."""
    beside = Path(sys.executable).parent / "deepspeed"
    found = str(beside) if beside.is_file() else shutil.which("deepspeed")
    if found is None:
        raise UserError("the command deepspeed is not installed: pip install -r requirements.txt")
    return found


def free_port() -> int:
    """Two launches on one machine must not meet at the launcher's default port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
