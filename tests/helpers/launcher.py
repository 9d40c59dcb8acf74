"""Processes that tests launch: command lines, environment, and waiting for what they do."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from hdscale.cluster.launcher import deepspeed_command, free_port, launch_environment
from hdscale.provenance import ROOT

LIMIT = 1200.0  # seconds: only ends a hang, on whatever machine


def deepspeed(script, *words, ranks):
    """Return the command that starts a script on ranks of this machine, at a port of its own."""
    return deepspeed_command(Path(script), list(map(str, words)), port=free_port(), num_gpus=ranks, quiet=False)


def torchrun(*words, ranks):
    """Return the same for PyTorch's launcher."""
    where = ["--nproc_per_node", str(ranks), "--master_port", str(free_port())]
    return [sys.executable, "-m", "torch.distributed.run", *where, *map(str, words)]


def environment(**more):
    """Return what a launched process gets: what other tests of this process have set must not reach the ranks."""
    return launch_environment() | {"OMP_NUM_THREADS": "1"} | more


def run(command):
    """Run a command at the repository's root to its end; return it with its output as text."""
    return subprocess.run(
        command, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False, timeout=LIMIT
    )


@contextlib.contextmanager
def running(command, **options):
    """Yield a running command, which leads a process group; what is left of the group ends with the block."""
    process = subprocess.Popen(command, start_new_session=True, **options)
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def until(condition, what):
    """Wait for an event."""
    deadline = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.02)


def is_running(pid):
    """Whether the process runs; nobody may have waited for one that has ended."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat.rpartition(")")[2].split()[0] not in "ZX"


def until_ended(processes):
    """Wait for processes that end by themselves; kill those that do not, and fail."""
    _, left = psutil.wait_procs(processes, timeout=LIMIT)
    for process in left:
        process.kill()
    assert not left, f"waited in vain for the end of {left}"


@pytest.fixture
def unlaunched(monkeypatch):
    """No launcher has started this process, and what it launches finds this checkout."""
    wanted = environment()
    for name in os.environ.keys() - wanted.keys():  # those by which a process knows that it is a rank
        monkeypatch.delenv(name)
    for name in ("OMP_NUM_THREADS", "PYTHONPATH"):
        monkeypatch.setenv(name, wanted[name])
