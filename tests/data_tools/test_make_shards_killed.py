"""Runs that are killed at any moment, and parts that run at the same time."""

import hashlib
import os
import random
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


def kill_at_random_moments(kills, begin, written, moments):
    """Kill a run's process group after zero to a few more shards, again and again; return how many runs were killed.

    Args:
        kills: how often.
        begin: starts a run.
        written: lists the shards that it has written.
        moments: a random.Random.
    """
    for killed in range(kills):
        process = begin()
        goal = len(list(written())) + moments.randrange(8)
        while len(list(written())) < goal and process.poll() is None:
            time.sleep(0.001)
        time.sleep(moments.uniform(0, 0.02))
        if process.poll() is not None:
            return killed
        workers = psutil.Process(process.pid).children(recursive=True)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        psutil.wait_procs(workers)
    return kills


def test_ten_kills_change_no_byte(undisturbed, tmp_path):
    arguments, expected = undisturbed
    output = tmp_path / "shards"
    assert (
        kill_at_random_moments(10, lambda: start(arguments, output), lambda: output.glob("*.tar"), random.Random(0))
        == 10
    )
    assert start(arguments, output).wait() == 0
    assert digests(output) == expected


def test_killed_parts_that_run_at_the_same_time_change_no_byte(undisturbed, tmp_path):
    arguments, expected = undisturbed
    output = tmp_path / "shards"
    steady = start(arguments, output, "--part", "1/2")

    def second():
        return start(arguments, output, "--part", "2/2")

    assert kill_at_random_moments(3, second, lambda: output.glob("*[13579].tar"), random.Random(1)) == 3
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
