"""launch/slurm/train.sbatch under stand-ins for `srun` and `scontrol`, and the same training under torchrun."""

import contextlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.launcher import LIMIT, ROOT, environment, run, running, torchrun, until

JOB = ROOT / "launch/slurm/train.sbatch"

# Starts the tasks of --ntasks-per-node on each host, as srun does by blocks; its exit code is the highest of theirs.
SRUN = """#!/bin/bash
printf '%s\\n' "$@" >"$STAND_IN/srun"
while [[ $1 == --* ]]; do shift; done
for ((task = 0; task < SLURM_NTASKS; task++)); do
    SLURM_PROCID=$task SLURM_LOCALID=$((task % SLURM_NTASKS_PER_NODE)) "$@" &
    pids+=($!)
done
printf '%s\\n' "${pids[@]}" >"$STAND_IN/pids.part"
mv "$STAND_IN/pids.part" "$STAND_IN/pids"
for pid in "${pids[@]}"; do
    wait "$pid"
    code=$?
    ((code > highest)) && highest=$code
done
exit "${highest:-0}"
"""
SCONTROL = """#!/bin/bash
echo "$*" >>"$STAND_IN/scontrol"
[[ $* == "show hostnames node[1-2]" ]] && printf '%s\\n' $HOSTS
true
"""


def job_at_a_free_port():
    """Return a job's number such that nobody holds its port: 10000 and the number modulo 20000."""
    while True:
        job = random.SystemRandom().randrange(1_000_000, 2_000_000)
        with contextlib.suppress(OSError), socket.socket() as free:
            free.bind(("0.0.0.0", 10_000 + job % 20_000))
            return job


@pytest.fixture
def submit(tmp_path):
    """Return a function that starts the job as sbatch does: at the submitted folder, with Slurm's variables.

    Its tasks end with the test.
    """
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (bin_folder / name).write_text(text)
        (bin_folder / name).chmod(0o755)

    def start(*words, folder, job, hosts=("localhost",), tasks_per_node=2):
        slurm = {
            "PATH": f"{bin_folder}:{Path(sys.executable).parent}:{os.environ['PATH']}",
            "STAND_IN": str(tmp_path),
            "HOSTS": " ".join(hosts),
            "SLURM_JOB_ID": str(job),
            "SLURM_JOB_NODELIST": "node[1-2]",
            "SLURM_NTASKS": str(len(hosts) * tasks_per_node),
            "SLURM_NTASKS_PER_NODE": str(tasks_per_node),
            "SLURM_CPUS_PER_TASK": "5",
        }
        # sbatch runs a copy, so that the file's own place says nothing.
        copy = shutil.copy(JOB, tmp_path / "slurm_script")
        output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        command = ["bash", str(copy), *map(str, words)]
        return tasks.enter_context(running(command, cwd=folder, env=environment(**slurm), **output))

    with contextlib.ExitStack() as tasks:
        yield start


def finished(process):
    out, _ = process.communicate(timeout=LIMIT)
    return process.returncode, out


def requeued(tmp_path):
    return [line for line in (tmp_path / "scontrol").read_text().splitlines() if line.startswith("requeue")]


@pytest.fixture
def checkout(tmp_path):
    """A checkout whose launch/train.py writes down what it was given, and ends as the test says."""
    folder = tmp_path / "checkout"
    (folder / "launch").mkdir(parents=True)
    (folder / ".venv/bin").mkdir(parents=True)
    (folder / ".venv/bin/activate").write_text("export ACTIVATED=yes\n")
    names = ["RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "HDSCALE_HOSTS"]
    (folder / "launch/train.py").write_text(
        "import json, os, pathlib, sys\n"
        f"seen = {{name: os.environ[name] for name in {[*names, 'ACTIVATED']}}}\n"
        "seen['argv'] = sys.argv[1:]\n"
        "pathlib.Path('rank-' + seen['RANK']).write_text(json.dumps(seen))\n"
        "sys.exit(json.loads(pathlib.Path('codes').read_text())[int(seen['RANK'])])\n"
    )
    return folder


def test_every_task_learns_its_rank_and_the_arguments_arrive_whole(submit, checkout, tmp_path):
    (checkout / "codes").write_text("[0, 0, 0, 0]")
    words = ["--ds_config", "my configs/zero2.json", "run.name=it's $HOME", "optim.betas=[0.9, 0.95]", ""]
    code, out = finished(submit(*words, folder=checkout, hosts=("node1", "node2"), job=7654321))
    assert (code, out) == (0, "")
    for rank in range(4):
        assert json.loads((checkout / f"rank-{rank}").read_text()) == {
            "RANK": str(rank),
            "WORLD_SIZE": "4",
            "LOCAL_RANK": str(rank % 2),
            "LOCAL_WORLD_SIZE": "2",
            "MASTER_ADDR": "node1",
            "MASTER_PORT": "24321",
            "HDSCALE_HOSTS": "node1,node2",
            "ACTIVATED": "yes",
            "argv": words,
        }
    options = (tmp_path / "srun").read_text().splitlines()
    assert options[: options.index("bash")] == [
        "--distribution=block",
        "--cpus-per-task=5",
        "--kill-on-bad-exit=0",
        "--wait=60",
    ]
    assert requeued(tmp_path) == []


@pytest.mark.parametrize(
    ("codes", "words", "code", "again"),
    [
        ([75, 75], [], 75, ["requeue 123456"]),
        ([75, 75], ["run.name=a", "schedule.stop_after=5"], 75, []),
        ([75, 137], [], 137, []),
        ([2, 2], [], 2, []),
        ([0, 0], [], 0, []),
    ],
)
def test_a_job_that_stopped_with_a_checkpoint_comes_back(codes, words, code, again, submit, checkout, tmp_path):
    (checkout / "codes").write_text(json.dumps(codes))
    assert finished(submit(*words, folder=checkout, job=123456))[0] == code
    assert requeued(tmp_path) == again


def test_the_job_asks_for_the_signal_in_time_to_save(tmp_path):
    wanted = [line.split()[1] for line in JOB.read_text().splitlines() if line.startswith("#SBATCH")]
    assert {"--signal=USR1@120", "--requeue", "--open-mode=append", "--ntasks-per-node=8"} <= set(wanted)
    assert subprocess.run(["bash", "-n", str(JOB)], check=False).returncode == 0


def losses(folder):
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def recipe(world, root, name, epochs):
    overrides = ["mask.source=online", "schedule.warmup_epochs=0", f"schedule.epochs={epochs}"]
    return ["--recipe", str(world.recipe), f"run.root={root}", f"run.name={name}", *overrides]


def test_slurm_and_torchrun_train_alike(submit, world, tmp_path):
    root = tmp_path / "runs of today"
    two_steps = 0.54  # of 60 samples in batches of 16
    code, out = finished(submit(*recipe(world, root, "slurm", two_steps), folder=ROOT, job=job_at_a_free_port()))
    assert code == 0, out
    assert requeued(tmp_path) == []
    assert (root / "slurm/DONE").exists()
    done = run(torchrun("launch/train.py", *recipe(world, root, "torchrun", two_steps), ranks=2))
    assert done.returncode == 0, done.stderr[-3000:]
    assert (root / "torchrun/DONE").exists()
    assert len(losses(root / "slurm")) == 2
    assert losses(root / "slurm") == losses(root / "torchrun")
    assert json.loads((root / "torchrun/environment.json").read_text())["world_size"] == 2


def test_slurm_s_signal_saves_a_checkpoint_and_brings_the_job_back(submit, world, tmp_path):
    root = tmp_path / "runs"
    job = job_at_a_free_port()
    process = submit(*recipe(world, root, "long", 2000), folder=ROOT, job=job)
    metrics = root / "long/metrics.jsonl"
    until(
        lambda: process.poll() is not None or (metrics.exists() and metrics.read_text().count("\n") >= 2),
        "two steps",
    )
    assert process.poll() is None, process.communicate()[0]
    for pid in (tmp_path / "pids").read_text().split():  # the tasks' own processes: the shell has become Python
        os.kill(int(pid), signal.SIGUSR1)
    code, out = finished(process)
    assert code == 75, out
    assert requeued(tmp_path) == [f"requeue {job}"]
    steps = len(losses(root / "long"))
    assert steps >= 2
    assert (root / "long/checkpoints/latest").read_text().strip() == f"step-{steps:09d}"
    assert not (root / "long/DONE").exists()
