"""Runs that are killed at many moments, and parts that run at the same time."""

import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

from data_tools.make_shards import main
from tests.helpers.launcher import until_ended

ROOT = Path(__file__).resolve().parents[2]
NUM_PICTURES = 400


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Small JPEGs and the arguments that pack them, and the digests of what an undisturbed run writes."""
    folder = tmp_path_factory.mktemp("killed")
    generator = np.random.default_rng(0)
    for number in range(NUM_PICTURES):
        path = folder / "pictures" / f"class{number % 7}" / f"{number:03d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (24, 32, 3), dtype=np.uint8)).save(path)
    arguments = ["--source", "imagefolder", "--input", str(folder / "pictures"), "--samples-per-shard", "2"]
    arguments += ["--val-fraction", "0.2", "--resize-short", "16"]
    assert main([*arguments, "--workers", "1", "--output", str(folder / "whole")]) == 0
    return arguments, digests(folder / "whole")


def digests(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def start(arguments, output, *more):
    command = [sys.executable, "data_tools/make_shards.py", *arguments, "--output", str(output), "--workers", "2"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen([*command, *more], cwd=ROOT, env=environment, start_new_session=True)


def kill_at_chosen_moments(begin, written, staged, goals):
    """Kill a run's process group again and again; fail where a run ends before its moment.

    Args:
        begin: starts a run.
        written: lists the shards that it has written.
        staged: lists the shards that have only a temporary name.
        goals: per kill, how many more shards there are to be, and whether one more is to be half-written then.
    """
    for more, half_written in goals:
        process = begin()
        goal = len(list(written())) + more
        while process.poll() is None:
            if len(list(written())) >= goal and (not half_written or list(staged())):
                break
            time.sleep(0.0005)  # looks again, however long that takes
        assert process.poll() is None, "it ended before the moment of its kill"
        workers = psutil.Process(process.pid).children(recursive=True)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        until_ended(workers)


def test_ten_kills_change_no_byte(undisturbed, tmp_path):
    arguments, expected = undisturbed
    output = tmp_path / "shards"
    kill_at_chosen_moments(
        lambda: start(arguments, output),
        lambda: output.glob("*.tar"),
        lambda: output.glob(".*.tar.*.tmp"),
        [
            (0, False),
            (0, True),
            (1, False),
            (2, True),
            (7, False),
            (0, True),
            (3, True),
            (5, False),
            (1, True),
            (4, True),
        ],
    )
    assert start(arguments, output).wait() == 0
    assert digests(output) == expected


def test_killed_parts_that_run_at_the_same_time_change_no_byte(undisturbed, tmp_path):
    arguments, expected = undisturbed
    output = tmp_path / "shards"
    steady = start(arguments, output, "--part", "1/2")

    def second():
        return start(arguments, output, "--part", "2/2")

    kill_at_chosen_moments(
        second,
        lambda: output.glob("*[13579].tar"),
        lambda: output.glob(".*[13579].tar.*.tmp"),
        [(2, False), (1, True), (5, True)],
    )
    assert second().wait() == 0
    assert steady.wait() == 0
    assert main([*arguments, "--output", str(output), "--finish"]) == 0
    assert digests(output) == expected


def test_parts_may_begin_at_the_same_moment(undisturbed, tmp_path):
    arguments, expected = undisturbed
    parts = [start(arguments, tmp_path / "shards", "--part", f"{number}/3") for number in (1, 2, 3)]
    assert [process.wait() for process in parts] == [0, 0, 0]
    assert main([*arguments, "--output", str(tmp_path / "shards"), "--finish"]) == 0
    assert digests(tmp_path / "shards") == expected
