import json
import runpy
import subprocess
import time
from pathlib import Path

import pytest

from hdscale.cli import exit_code
from hdscale.preflight import bandwidth
from hdscale.preflight.bandwidth import launch_all_reduce

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "launch/preflight.py"


@pytest.fixture
def preflight(monkeypatch, capsys):
    """Run the command on this machine; return its exit code, output and errors."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)

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


@pytest.fixture
def launcher_environment(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def test_all_reduces_of_two_ranks_are_timed_under_the_real_launcher(launcher_environment):
    rates, error = launch_all_reduce(SCRIPT, None, 2)
    assert error == ""
    assert [(rate.among, rate.ranks) for rate in rates] == [("all ranks", 2)] * 2
    assert 10**6 == rates[0].num_bytes <= rates[1].num_bytes <= 64 * 10**6
    assert all(rate.seconds > 0 and rate.bus_bandwidth > 0 for rate in rates)


def patient_until(started):
    """A process whose first patience ends when the script has started, however long that takes."""

    class Launcher(subprocess.Popen):
        def communicate(self, *args, **kwargs):
            if not hasattr(self, "given_up") and "timeout" in kwargs:
                self.given_up = True
                while not (started.exists() and started.read_text().endswith("\n")):
                    assert self.poll() is None
                    time.sleep(0.05)
                raise subprocess.TimeoutExpired(self.args, kwargs["timeout"])
            return super().communicate(*args, **kwargs)

    return Launcher


def test_a_launch_that_fails_or_hangs_says_why(launcher_environment, tmp_path, monkeypatch):
    script = tmp_path / "fails.py"
    script.write_text("import sys; print('RuntimeError: no route', file=sys.stderr); sys.exit(1)\n")
    assert launch_all_reduce(script, None, 1) == ([], "RuntimeError: no route")
    started = tmp_path / "pid"
    monkeypatch.setattr(bandwidth.subprocess, "Popen", patient_until(started))
    script.write_text(f"import os, time; open({str(started)!r}, 'w').write(f'{{os.getpid()}}\\n'); time.sleep(3600)\n")
    rates, error = launch_all_reduce(script, None, 1)
    assert rates == []
    assert error.startswith("no result within 420 seconds; see whether the machines reach each other")
    stat = Path(f"/proc/{started.read_text().strip()}/stat")
    assert not stat.exists() or ") Z" in stat.read_text()  # ended, if nobody has waited for it


def test_a_question_from_another_machine_is_answered_in_one_line(preflight):
    question = {"precision": "fp32", "shards": None, "split": "train", "run_root": None, "mark": None}
    code, out, _ = preflight("--facts", json.dumps(question))
    assert code == 0
    assert json.loads(out.removeprefix("hdscale-facts "))["cpus"] >= 1
