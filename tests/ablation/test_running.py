import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hdscale.ablation.jobs import Job, RowJobs
from hdscale.ablation.running import Failures, Launcher, Stopped, adopt_teachers, run_jobs
from hdscale.ablation.scales import SCALES
from hdscale.ablation.table import Row
from hdscale.config.loading import dump_recipe, load_recipe
from hdscale.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
DEMO = SCALES["demo"]


def make_jobs(folder, key, *names):
    jobs = tuple(Job(name, "script.py", (), folder / name) for name in names)
    return RowJobs(Row(key, key), 0, load_recipe(None), jobs, folder / "runs")


def test_what_is_done_is_skipped_and_a_failing_row_does_not_stop_the_others(tmp_path):
    all_jobs = [
        make_jobs(tmp_path, "a", "shared", "a"),
        make_jobs(tmp_path, "b", "shared", "broken", "b"),
        make_jobs(tmp_path, "c", "shared", "broken", "c"),
        make_jobs(tmp_path, "d", "done", "d"),
        make_jobs(tmp_path, "e", "teacher that was deleted", "done"),
    ]
    (tmp_path / "done").write_text("")
    ran, finished, failures = [], [], Failures()

    def run(job):
        ran.append(job.name)
        if job.name == "broken":
            return "broken: no luck"
        job.marker.write_text("")
        return None

    run_jobs(all_jobs, run, lambda row_jobs: finished.append(row_jobs.row.key), failures)
    assert ran == ["shared", "a", "broken", "d"]  # the job that two rows need is tried once
    assert finished == ["a", "d", "e"]
    assert failures.reasons == {"b, seed 0": "broken: no luck", "c, seed 0": "broken: no luck"}
    # The next start does what is left.
    ran.clear()
    run_jobs(all_jobs, run, finished.append, Failures())
    assert ran == ["broken"]


def test_a_row_that_cannot_be_measured_is_a_failed_one(tmp_path):
    failures = Failures()

    def finished(row_jobs):
        raise UserError("val.manifest.json is missing")

    run_jobs([make_jobs(tmp_path, "a")], lambda job: None, finished, failures)
    assert failures.reasons == {"a, seed 0": "val.manifest.json is missing"}


def script_job(folder, code, **changed):
    script = folder / "script.py"
    script.write_text(code)
    return Job("the job", str(script), (), folder / "out/marker", on_ranks=False)._replace(**changed)


def test_a_job_s_output_is_in_its_log_and_its_last_error_in_the_reason(tmp_path):
    launcher = Launcher(DEMO, 2, None, tmp_path / "logs")
    failing = script_job(tmp_path, "print('error: no shards')\nprint('bye')\nraise SystemExit(2)")
    log = tmp_path / "logs/the-job.log"
    assert launcher.run(failing) == f"the job: error: no shards (log: {log})"
    assert log.read_text() == "error: no shards\nbye\n"
    # Exit code 0 alone proves nothing: a killed launcher ends with it.
    assert launcher.run(script_job(tmp_path, "")) == f"the job: exit code 0 (log: {log})"


def test_a_job_without_marker_of_its_own_gets_one(tmp_path):
    job = script_job(tmp_path, "", marks=True)
    assert Launcher(DEMO, 2, None, tmp_path / "logs").run(job) is None
    assert job.is_done


def test_the_demo_s_jobs_run_on_the_cpu_with_this_hdscale(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    code = "import json, os, hdscale; print(json.dumps([hdscale.__file__, dict(os.environ)]))"
    Launcher(DEMO, 2, None, tmp_path / "logs").run(script_job(tmp_path, code))
    file, env = json.loads((tmp_path / "logs/the-job.log").read_text())
    assert file == str(ROOT / "hdscale/__init__.py")
    assert env["CUDA_VISIBLE_DEVICES"] == ""
    assert env["DS_ACCELERATOR"] == "cpu"
    assert "RANK" not in env


def test_two_launches_get_different_ports_and_the_hostfile(tmp_path):
    launcher = Launcher(SCALES["b-in1k"], 8, Path("hosts"), tmp_path)
    job = Job("train", "launch/train.py", ("run.name=a",), tmp_path / "DONE")
    words = launcher.command(job, 1234)
    assert words[0] == sys.executable
    assert words[2:] == [
        *("--quiet", "--master_port", "1234", "--hostfile", "hosts", "--num_gpus", "8"),
        *(str(ROOT / "launch/train.py"), "run.name=a"),
    ]


STOPPING = """
import os, sys
from pathlib import Path
from hdscale.ablation.running import Stopped, _wait
folder, first = Path(sys.argv[1]), sys.argv[2]
try:
    with (folder / "log").open("w") as log:
        _wait([sys.executable, str(folder / first)], dict(os.environ), log, has_ranks=first == "runner.py")
except Stopped:
    sys.exit(75)
"""
# As DeepSpeed's on one machine: the first process knows no signal, the second one starts the ranks.
RUNNER = "import subprocess, sys\nsubprocess.run([sys.executable, {!r}])\n"
RANK = """
import signal, sys, time
from pathlib import Path
def save(number, frame):
    Path(__file__).with_name("asked").write_text("")
    while not Path(__file__).with_name("go").exists():
        time.sleep(0.01)
    Path(__file__).with_name("saved").write_text(signal.Signals(number).name)
    sys.exit(75)
signal.signal(signal.SIGTERM, save)
signal.signal(signal.SIGUSR1, save)
Path(__file__).with_name("started").write_text("")
time.sleep(600)
"""


def wait_for(file, process):
    """Wait until a file is there; minutes end a hang, and the end of the process that would make it ends the wait."""
    limit = time.monotonic() + 600
    while not file.exists():
        assert process.poll() is None, f"exit code {process.returncode} before {file.name}"
        assert time.monotonic() < limit, f"no {file.name}"
        time.sleep(0.05)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize(("first", "asked_by"), [("rank.py", "SIGTERM"), ("runner.py", "SIGUSR1")])
def test_a_stop_waits_until_the_running_job_has_saved(first, asked_by, number, tmp_path):
    (tmp_path / "parent.py").write_text(STOPPING)
    (tmp_path / "runner.py").write_text(RUNNER.format(str(tmp_path / "launch.py")))
    (tmp_path / "launch.py").write_text(RUNNER.format(str(tmp_path / "rank.py")))
    (tmp_path / "rank.py").write_text(RANK)
    command = [sys.executable, str(tmp_path / "parent.py"), str(tmp_path), first]
    parent = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, start_new_session=True)
    wait_for(tmp_path / "started", parent)
    os.killpg(parent.pid, number)  # what Ctrl-C on a terminal does
    wait_for(tmp_path / "asked", parent)
    assert parent.poll() is None
    (tmp_path / "go").write_text("")
    assert parent.wait(600) == 75
    assert (tmp_path / "saved").read_text() == asked_by


def test_teachers_of_an_earlier_demo_are_taken_when_they_are_the_same(tmp_path):
    trainings = {}
    for name in ("mae", "supervised"):
        found = tmp_path / "demo" / name
        found.mkdir(parents=True)
        trainings[name] = DEMO.trained[name]._replace(found_at=found)
        recipe = load_recipe(DEMO.trained[name].recipe, ["schedule.epochs=3"] if name == "supervised" else [])
        (found / "recipe.yaml").write_text(dump_recipe(recipe))
        for file in ("environment.json", "encoder.safetensors"):
            (found / file).write_text(name)
    scale, output = DEMO._replace(trained=trainings), tmp_path / "out"
    adopt_teachers(scale, output, None)
    assert not output.exists()  # neither is done
    for name in ("mae", "supervised"):
        (tmp_path / "demo" / name / "DONE").write_text("")
    adopt_teachers(scale, output, None)
    assert (output / "teachers/mae/encoder.safetensors").read_text() == "mae"
    assert (output / "teachers/mae/DONE").exists()
    assert [path.name for path in (output / "teachers").iterdir()] == ["mae"]  # the other one was trained otherwise


def test_a_signal_between_a_command_s_start_and_the_wait_for_it_is_heeded_in_the_wait(monkeypatch, tmp_path):
    def start(*arguments, **options):
        started.append(popen(*arguments, **options))
        signal.raise_signal(signal.SIGTERM)
        return started[0]

    started, popen = [], subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", start)
    job = script_job(tmp_path, "import time; time.sleep(60)")  # a signal that is lost is seen when it ends
    before = signal.signal(signal.SIGTERM, lambda number, frame: pytest.fail("nobody has taken the signal"))
    try:
        with pytest.raises(Stopped):
            Launcher(DEMO, 2, None, tmp_path / "logs").run(job)
        assert started[0].returncode == -signal.SIGTERM
    except KeyboardInterrupt:
        pytest.fail("the signal came through while nobody knew of the command")
    finally:
        signal.signal(signal.SIGTERM, before)
        started[0].kill()
        started[0].wait()
