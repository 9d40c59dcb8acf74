"""What ranks leave to others: their processes, their shared memory, and the time that others wait for them."""

import json
import os
import signal

import pytest

from tests.helpers.launcher import ROOT, deepspeed, environment, is_running, running, until


@pytest.fixture(scope="module")
def left_alone(tmp_path_factory):
    """What two ranks have seen of themselves; then their launcher is killed."""
    folder = tmp_path_factory.mktemp("left-alone")
    command = deepspeed(ROOT / "tests/engine/ranks_scenario.py", folder, ranks=2)
    with (
        (folder / "log").open("w") as log,
        running(command, cwd=ROOT, env=environment(), stdout=log, stderr=log) as process,
    ):
        answers = [folder / f"{rank}.json" for rank in range(2)]
        until(lambda: process.poll() is not None or all(path.exists() for path in answers), "two ranks")
        assert process.poll() is None, (folder / "log").read_text()[-4000:]
        found = [json.loads(path.read_text()) for path in answers]
        os.kill(found[0]["launcher"], signal.SIGKILL)
        yield found


def test_ranks_end_with_a_launcher_that_is_killed(left_alone):
    for rank in left_alone:
        assert rank["when_it_dies"] == signal.SIGTERM  # otherwise they wait without an end
        until(lambda pid=rank["pid"]: not is_running(pid), "a rank to end without its launcher")


def test_the_names_of_deepspeed_s_buffers_are_taken_back(left_alone):
    for rank in left_alone:
        assert rank["mapped"]  # so there were names
        assert rank["named"] == []


def test_a_collective_is_given_up_within_a_quarter_of_an_hour_but_not_while_a_host_reads_a_shard(left_alone):
    for rank in left_alone:
        assert 60 <= rank["timeout"] <= 15 * 60
