"""Run the commands of a table one after another, each once, and go on where one fails."""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import NamedTuple, TextIO

import psutil

from hdscale.ablation.jobs import Job, RowJobs, teacher_folder, teacher_recipe
from hdscale.ablation.scales import Scale, Training
from hdscale.cluster.launcher import deepspeed_command, free_port, launch_environment
from hdscale.config.loading import ENVIRONMENT_FILE, RECIPE_FILE, changed_fields, load_run_recipe
from hdscale.errors import UserError
from hdscale.provenance import ROOT

_TEACHER_FILES = (RECIPE_FILE, ENVIRONMENT_FILE, "encoder.safetensors", "DONE")
_STOP_SECONDS = 120.0
"""For a checkpoint of a large student to be written."""


class Stopped(Exception):
    """A person or a scheduler has asked to stop; the running command has ended, with its checkpoint."""


class Launcher(NamedTuple):
    """How jobs are started."""

    scale: Scale
    ranks: int  # of one machine
    hostfile: Path | None
    logs: Path
    stream: TextIO | None = None  # where it is shown what runs

    def command(self, job: Job, port: int | None = None) -> list[str]:
        """Return the job's command line; without a port, as a person would type it."""
        script = ROOT / job.script
        if not job.on_ranks:
            return [sys.executable if port else "python", str(script), *job.arguments]
        return deepspeed_command(script, job.arguments, port=port, num_gpus=self.ranks, hostfile=self.hostfile)

    def run(self, job: Job) -> str | None:
        """Run a job to its end; return None, or in one line why it failed.

        Raises:
            Stopped: SIGINT or SIGTERM came; the job has had them, too.
        """
        log = self.logs / f"{job.name.replace(' ', '-')}.log"
        say(self.stream, f"{job.name}: running, log in {log}")
        started = time.monotonic()
        try:
            log.parent.mkdir(parents=True, exist_ok=True)
            with log.open("w") as file:
                command = self.command(job, free_port())
                has_ranks = job.on_ranks and self.hostfile is None
                code = _wait(command, launch_environment(on_cpu=self.scale.on_cpu), file, has_ranks=has_ranks)
        except OSError as error:
            raise UserError(f"--output: {log} cannot be written ({error.strerror}): choose another folder") from error
        if code == 0 and job.marks:
            job.marker.parent.mkdir(parents=True, exist_ok=True)
            job.marker.write_text("")
        say(self.stream, f"{job.name}: {time.monotonic() - started:.0f} s, exit code {code}")
        return None if code == 0 and job.is_done else f"{job.name}: {_reason(log, code)}"


class Failures:
    """Which rows have failed and why."""

    def __init__(self) -> None:
        self.reasons: dict[str, str] = {}  # by the label of row and seed

    def add(self, label: str, reason: str) -> None:
        """Note a row's first reason."""
        self.reasons.setdefault(label, reason)


def run_jobs(
    all_jobs: Sequence[RowJobs],
    run: Callable[[Job], str | None],
    finished: Callable[[RowJobs], None],
    failures: Failures,
) -> None:
    """Run what rows need and is not done yet, in order; a row whose job fails is noted, and the next one begins.

    Args:
        all_jobs: of rows under their seeds.
        run: runs a job and says why it failed; `Launcher.run`.
        finished: told of each row whose jobs are done; a `UserError` of its is the row's failure.
        failures: noted here.
    """
    broken: dict[Path, str] = {}  # by marker: a job that has failed is not tried again for the next row
    for row_jobs in all_jobs:
        reason = None
        for job in row_jobs.jobs:
            if row_jobs.is_done or job.is_done:
                continue
            reason = broken.get(job.marker) or run(job)
            if reason is not None:
                broken[job.marker] = reason
                break
        if reason is None:
            try:
                finished(row_jobs)
            except UserError as error:
                reason = str(error)
        if reason is not None:
            failures.add(row_jobs.label, reason)


def listing(all_jobs: Sequence[RowJobs], launcher: Launcher) -> str:
    """Return all rows and, below each, the commands that are first needed for it."""
    shown: set[Path] = set()
    lines = []
    for row_jobs in all_jobs:
        lines.append(f"# {row_jobs.label}: {row_jobs.row.name}")
        for job in row_jobs.jobs:
            if job.marker in shown:
                continue
            shown.add(job.marker)
            lines.append(f"{'# done already: ' if job.is_done else ''}{shlex.join(launcher.command(job))}")
    return "\n".join(lines)


def adopt_teachers(scale: Scale, output: Path, stream: TextIO | None) -> None:
    """Copy teachers that an earlier `make demo` has trained by the same recipe, instead of training them again."""
    for name, training in scale.trained.items():
        target = teacher_folder(name, training, output)
        if training.found_at is None or target.exists() or not _is_same(training, output):
            continue
        staging = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        staging.mkdir(parents=True)
        for file in _TEACHER_FILES:
            shutil.copy(training.found_at / file, staging)
        staging.rename(target)
        say(stream, f"teacher {name}: taken from {training.found_at}")


def _is_same(training: Training, output: Path) -> bool:
    found = training.found_at
    if found is None or not all((found / file).is_file() for file in _TEACHER_FILES):
        return False
    return not changed_fields(load_run_recipe(found), teacher_recipe(training, output))


def _wait(command: list[str], env: dict[str, str], log: TextIO, *, has_ranks: bool) -> int:
    """Run a command; on Ctrl-C or SIGTERM to this process stop it, too, and wait until it has saved.

    It has a session of its own: Ctrl-C must not kill DeepSpeed's launcher, whose workers would go on without it.
    """
    child = None
    try:
        with _interrupted_by(signal.SIGINT, signal.SIGTERM, signal.SIGHUP) as heed:
            child = subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
            heed()
            return child.wait()
    except KeyboardInterrupt:
        if child is None:  # in a thread other than the main one nothing is held back
            raise
        _stop(psutil.Process(child.pid), has_ranks=has_ranks)
        child.wait()
        raise Stopped from None


def _stop(command: psutil.Process, *, has_ranks: bool) -> None:
    """Ask a command to stop and wait for its whole family.

    Of the launcher's processes (it starts a second one, which starts the ranks) the ranks are asked: they agree on a
    step, save and leave, and the others follow. SIGTERM would end the first one alone, on one machine.
    """
    with contextlib.suppress(psutil.NoSuchProcess):
        family = command.children(recursive=True)
        ranks = [rank for child in command.children() for rank in child.children()] if has_ranks else []
        for process in ranks or [*family, command]:
            process.send_signal(signal.SIGUSR1 if ranks else signal.SIGTERM)
        psutil.wait_procs(family, timeout=_STOP_SECONDS)


@contextlib.contextmanager
def _interrupted_by(*numbers: signal.Signals) -> Iterator[Callable[[], None]]:
    """Let signals interrupt the block as Ctrl-C does; threads other than the main one cannot change that.

    They are held back until the block calls what it is given: one between a command's start and the wait for it would
    leave the command without anybody who knows of it.
    """
    came, heeded = [], []

    def interrupt(number: int, frame: FrameType | None) -> None:
        came.append(number)
        if heeded:
            raise KeyboardInterrupt

    def heed() -> None:
        heeded.append(True)
        if came:
            raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield heed
        return
    before = {number: signal.signal(number, interrupt) for number in numbers}
    try:
        yield heed
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _reason(log: Path, code: int) -> str:
    """Return the last thing that the log says about an error."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines()]
    told = [line for line in lines if line.startswith("error") or "Error: " in line]
    return f"{told[-1] if told else f'exit code {code}'} (log: {log})"


def say(stream: TextIO | None, text: str) -> None:
    """Write a line where somebody wants to read it; None: nobody does."""
    if stream is not None:
        print(text, file=stream, flush=True)
