"""DeepSpeed's launcher: how commands start it, and what it keeps to itself.

It takes `--hostfile` out of the arguments, and a hostfile that is not there makes it fall back to a local run with a
warning. A person who named a hostfile wants those hosts or an error. Its second stage, one process per host, gets the
hosts as `--world_info`. Both are read from the command lines of our ancestors.
"""

from __future__ import annotations

import base64
import binascii
import json
import os
import shutil
import socket
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from hdscale.errors import UserError
from hdscale.provenance import ROOT

_PROC = Path("/proc")
_OF_A_RANK = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
"""Variables by which a process knows that it is a rank, and which one."""


def deepspeed_command(
    script: Path,
    arguments: Sequence[str],
    *,
    port: int | None,
    num_gpus: int | None = None,
    hostfile: Path | None = None,
    quiet: bool = True,
) -> list[str]:
    """Return the command line that starts a script on ranks.

    Args:
        script: what each rank runs.
        arguments: of the script.
        port: where the ranks meet, from `free_port`; None: the command as a person would type it.
        num_gpus: ranks per host; None: as the hostfile says.
        hostfile: None: this machine alone.
        quiet: without the launcher's own log; not for a person.

    Raises:
        UserError: DeepSpeed's launcher is not installed.
    """
    words = ["deepspeed"]
    if port is not None:
        words = [sys.executable, _deepspeed_script(), *(["--quiet"] if quiet else []), "--master_port", str(port)]
    if hostfile is not None:
        words += ["--hostfile", str(hostfile)]
    if num_gpus is not None:
        words += ["--num_gpus", str(num_gpus)]
    return [*words, str(script), *arguments]


def _deepspeed_script() -> str:
    """Return DeepSpeed's launcher: the one beside this Python, or the one on the PATH."""
    beside = Path(sys.executable).parent / "deepspeed"
    found = str(beside) if beside.is_file() else shutil.which("deepspeed")
    if found is None:
        raise UserError("the command deepspeed is not installed: pip install -r requirements.txt")
    return found


def free_port() -> int:
    """Return a port that nobody uses: two launches on one machine must not meet at the launcher's default port."""
    with socket.socket() as free:
        free.bind(("", 0))  # on all interfaces, as rank 0 will
        return free.getsockname()[1]


def launch_environment(*, on_cpu: bool = False) -> dict[str, str]:
    """Return what a command of hdscale's is started with: this process's environment, and this very hdscale.

    Args:
        on_cpu: hide the GPUs, and keep ranks that share the cores from taking all of them each.
    """
    env = {name: value for name, value in os.environ.items() if name not in _OF_A_RANK}
    # The launcher's workers must find this hdscale, and ninja beside this Python.
    env["PYTHONPATH"] = python_path(ROOT, env)
    env["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), env.get("PATH", "")])
    env.setdefault("TOKENIZERS_PARALLELISM", "false")
    if on_cpu:
        env |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "PYTHONWARNINGS": "ignore::FutureWarning"}
        env.setdefault("OMP_NUM_THREADS", "1")
    return env


def python_path(folder: Path, environment: Mapping[str, str]) -> str:
    """Return a PYTHONPATH on which a folder comes before what is there already."""
    return os.pathsep.join([str(folder), *filter(None, [environment.get("PYTHONPATH")])])


def add_own_tools_to_path() -> None:
    """Put this Python's folder on the PATH: DeepSpeed looks for ninja there.

    A process that was started over SSH has not activated its virtual environment; it would find no ninja, or the
    system's, whose log differs, so that the same ops are compiled again and again.
    """
    folder, path = str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)
    if folder not in path.split(os.pathsep):
        os.environ["PATH"] = f"{folder}{os.pathsep}{path}"


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


def started_by_launcher() -> bool:
    """Whether this process is one of a launcher's ranks."""
    return "RANK" in os.environ


def planned_world_size() -> int:
    """Return how many ranks the launcher has started, before they meet."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def planned_hosts(world_size: int, command_lines: list[list[str]] | None = None) -> list[str | None]:
    """Return the host that each rank was meant to run on, whether it got there or not.

    Args:
        world_size: number of ranks.
        command_lines: those of the launcher and its parents; None: read from /proc.

    Returns:
        One name per rank: from DeepSpeed's launcher, or from HDSCALE_HOSTS, comma-separated names of hosts with equal
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
