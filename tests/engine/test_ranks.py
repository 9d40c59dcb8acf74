"""What ranks leave to others: their processes, their shared memory, and the time that others wait for them."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 300  # seconds: only ends a hang


def until(condition, what):
    deadline = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def is_running(pid):
    """Whether the process runs; nobody may have waited for one that has ended."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat.rpartition(")")[2].split()[0] not in "ZX"


@pytest.fixture(scope="module")
def left_alone(tmp_path_factory):
    """What two ranks have seen of themselves; then their launcher is killed."""
    folder = tmp_path_factory.mktemp("left-alone")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ours = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    env = {key: value for key, value in os.environ.items() if key not in ours}
    env |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    launcher = [sys.executable, str(Path(sys.executable).parent / "deepspeed"), "--num_gpus", "2"]
    command = [*launcher, "--master_port", str(port), str(ROOT / "tests/engine/left_alone.py"), str(folder)]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=log, stderr=log, start_new_session=True)
    try:
        answers = [folder / f"{rank}.json" for rank in range(2)]
        until(lambda: process.poll() is not None or all(path.exists() for path in answers), "two ranks")
        assert process.poll() is None, (folder / "log").read_text()[-4000:]
        found = [json.loads(path.read_text()) for path in answers]
        os.kill(found[0]["launcher"], signal.SIGKILL)
        yield found
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_ranks_end_with_a_launcher_that_is_killed(left_alone):
    for rank in left_alone:
        until(lambda pid=rank["pid"]: not is_running(pid), "a rank to end without its launcher")


def test_the_names_of_deepspeed_s_buffers_are_taken_back(left_alone):
    for rank in left_alone:
        assert rank["mapped"]  # so there were names
        assert rank["named"] == []


def test_a_collective_is_given_up_within_a_quarter_of_an_hour_but_not_while_a_host_reads_a_shard(left_alone):
    for rank in left_alone:
        assert 60 <= rank["timeout"] <= 15 * 60
