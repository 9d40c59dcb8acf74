import json
import runpy
import subprocess

import pytest

from hdscale.cli import exit_code
from hdscale.preflight import bandwidth
from hdscale.preflight.bandwidth import launch_all_reduce
from tests.helpers.launcher import LIMIT, ROOT, is_running, until

SCRIPT = ROOT / "launch/preflight.py"


@pytest.fixture
def preflight(unlaunched, capsys):
    """Run the command on this machine; return its exit code, output and errors."""

    def command(*words):
        code = exit_code(runpy.run_path(str(SCRIPT))["main"], [str(word) for word in words])
        return code, *capsys.readouterr()

    return command


def test_this_machine_is_checked_and_a_failure_comes_with_its_way_out(preflight, world, tmp_path):
    code, out, _ = preflight("--shards", world.folder / "shards", "--run-root", tmp_path / "runs")
    assert code == 0
    assert "ok, 60 samples" in out
    assert "What to do" not in out
    code, out, _ = preflight("--shards", tmp_path)
    assert code == 2
    assert out.splitlines()[-1].startswith(f"here: shards: {tmp_path} holds no shards")
    assert "make_shards.py" in out.splitlines()[-1]


def test_a_bad_hostfile_is_one_line(preflight, tmp_path):
    (tmp_path / "hosts").write_text("node1\n")
    code, out, err = preflight("--hostfile", tmp_path / "hosts")
    assert (code, out) == (2, "")
    assert err == f"error: {tmp_path}/hosts, line 1 must be `HOST slots=GPUS`, got 'node1'\n"


def test_it_is_not_for_the_launcher(preflight, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    code, _, err = preflight()
    assert (code, err) == (2, "error: start preflight.py with python: it starts the launcher itself\n")


@pytest.mark.usefixtures("unlaunched")
def test_all_reduces_of_two_ranks_are_timed_under_the_real_launcher(monkeypatch):
    monkeypatch.setattr(bandwidth, "_PATIENCE", LIMIT)
    rates, error = launch_all_reduce(SCRIPT, None, 2)
    assert error == ""
    assert [(rate.among, rate.ranks) for rate in rates] == [("all ranks", 2)] * 2
    assert 10**6 == rates[0].num_bytes <= rates[1].num_bytes <= 64 * 10**6
    assert all(rate.seconds > 0 and rate.bus_bandwidth > 0 for rate in rates)


@pytest.mark.usefixtures("unlaunched")
def test_a_launch_that_fails_says_why(tmp_path, monkeypatch):
    monkeypatch.setattr(bandwidth, "_PATIENCE", LIMIT)
    script = tmp_path / "fails.py"
    script.write_text("import sys; print('RuntimeError: no route', file=sys.stderr); sys.exit(1)\n")
    assert launch_all_reduce(script, None, 1) == ([], "RuntimeError: no route")


def impatient_from(pid_file):
    """A process that is waited for until the script runs, however long that takes, and then as long as it takes."""

    class Launcher(subprocess.Popen):
        def communicate(self, *args, timeout=None, **kwargs):
            if timeout is not None and not hasattr(self, "given_up"):
                self.given_up = True
                until(lambda: self.poll() is not None or is_written(pid_file), "the script to start")
                assert self.poll() is None, super().communicate()[1]
                raise subprocess.TimeoutExpired(self.args, timeout)
            return super().communicate(*args, timeout=LIMIT, **kwargs)

    return Launcher


def is_written(pid_file):
    return pid_file.exists() and pid_file.read_text().endswith("\n")


@pytest.mark.usefixtures("unlaunched")
def test_a_launch_that_hangs_is_given_up_with_its_ranks(tmp_path, monkeypatch):
    script, pid_file = tmp_path / "hangs.py", tmp_path / "pid"
    monkeypatch.setattr(bandwidth.subprocess, "Popen", impatient_from(pid_file))
    hang = "import os, pathlib, signal; pathlib.Path({!r}).write_text(f'{{os.getpid()}}\\n'); signal.pause()\n"
    script.write_text(hang.format(str(pid_file)))
    rates, error = launch_all_reduce(script, None, 1)
    assert rates == []
    assert error.startswith(
        f"no result within {bandwidth._PATIENCE} seconds; see whether the machines reach each other"
    )
    until(lambda: not is_running(int(pid_file.read_text())), "the rank to end")


def test_a_question_from_another_machine_is_answered_in_one_line(preflight):
    question = {"precision": "fp32", "shards": None, "split": "train", "run_root": None, "mark": None}
    code, out, _ = preflight("--facts", json.dumps(question))
    assert code == 0
    assert json.loads(out.removeprefix("hdscale-facts "))["cpus"] >= 1
