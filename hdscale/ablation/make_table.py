"""One table from its rows to its file."""

from __future__ import annotations

import contextlib
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, TextIO

import torch

from hdscale.ablation.jobs import JobBuilder, RowJobs, Settings
from hdscale.ablation.measuring import Measures, measure_row
from hdscale.ablation.rendering import Report, render_csv, render_markdown
from hdscale.ablation.results import RowResult
from hdscale.ablation.running import Failures, Launcher, Stopped, adopt_teachers, run_jobs, say
from hdscale.ablation.table import Row
from hdscale.cli import EXIT_DONE, EXIT_FAILED, EXIT_STOPPED
from hdscale.errors import UserError
from hdscale.evaluation.held_out import open_held_out
from hdscale.staging import staged


class Ablation(NamedTuple):
    """A table that is to be made."""

    settings: Settings
    rows: Sequence[Row]
    seeds: int
    command: str  # as the person typed it, for the table's file

    def jobs(self) -> list[RowJobs]:
        """Resolve the rows under all seeds."""
        return JobBuilder(self.settings).build(self.rows, self.seeds)

    def jobs_done(self) -> list[RowJobs]:
        """Resolve the table's other rows, as far as they are trained: its file goes on showing them."""
        builder = JobBuilder(self.settings)
        done = []
        for row in self.settings.table.rows:
            if row in self.rows or row.model:
                continue
            with contextlib.suppress(UserError):  # a row that nobody asked for may not fit the arguments
                done += [row_jobs for row_jobs in builder.build([row], self.seeds) if row_jobs.is_done]
        return done


def ablate(ablation: Ablation, launcher: Launcher, stream: TextIO | None) -> int:
    """Train and measure what is not done yet; write the table after every row.

    Returns:
        The exit code: 0 when all rows are there, 1 when one has failed, 75 when stopped.

    Raises:
        UserError: before anything is trained, or the folder cannot be written.
    """
    settings = ablation.settings
    scale, output = settings.scale, settings.output
    asked = ablation.jobs()
    all_jobs = [*ablation.jobs_done(), *asked]
    if not scale.shards:  # the user's own: what is missing must not be found out after hours
        open_held_out(asked[0].recipe.data, asked[0].recipe.evaluation)
    _make_folder(output)
    adopt_teachers(scale, output, stream)
    device = torch.device("cuda" if torch.cuda.is_available() and not scale.on_cpu else "cpu")
    measures: dict[str, Measures] = {}
    failures = Failures()

    def finished(row_jobs: RowJobs) -> None:
        measures[row_jobs.label] = measure_row(
            row_jobs, output / "measures", train_samples=scale.train_samples, device=device, stream=stream
        )
        _write(ablation, all_jobs, measures, failures)

    try:
        run_jobs(all_jobs, launcher.run, finished, failures)
    except (Stopped, KeyboardInterrupt):  # while a row was trained, or while one was measured
        say(stream, "stopped; the same command continues where it was")
        return EXIT_STOPPED
    _write(ablation, all_jobs, measures, failures)
    for label, reason in failures.reasons.items():
        say(stream, f"failed: row {label}: {reason}")
    return EXIT_FAILED if failures.reasons else EXIT_DONE


def table_files(settings: Settings) -> tuple[Path, Path]:
    """Return where Markdown and CSV are written."""
    name = settings.table.key if settings.table.is_figure else f"table-{settings.table.key}"
    return settings.output / f"{name}.md", settings.output / f"{name}.csv"


def _write(
    ablation: Ablation, all_jobs: Sequence[RowJobs], measures: Mapping[str, Measures], failures: Failures
) -> None:
    settings = ablation.settings
    table, scale = settings.table, settings.scale
    results = []
    for row in table.rows:
        own = [row_jobs for row_jobs in all_jobs if row_jobs.row is row and row_jobs.label in measures]
        if not own and row not in ablation.rows:
            continue
        folders = tuple(row_jobs.folder.name for row_jobs in own if row_jobs.folder is not None)
        results.append(RowResult(row, folders, tuple(measures[row_jobs.label] for row_jobs in own)))
    words = " ".join(
        override for result in results for override in (*table.base, *result.row.overrides, result.row.model)
    )
    stand_ins = [note for name, note in scale.stand_ins.items() if f"@{name}" in words]
    notes = [*scale.notes, *stand_ins, *(table.demo_notes if scale.is_demo else ())]
    report = Report(table, results, ablation.seeds, ablation.command, notes, failures.reasons, _machine())
    for path, text in zip(table_files(settings), (render_markdown(report), render_csv(report)), strict=True):
        with staged(path) as temporary:
            temporary.write_text(text)


def _make_folder(output: Path) -> None:
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {output} cannot be made ({error.strerror}): choose another folder") from error


def _machine() -> str:
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    return f"{os.cpu_count()} cores of {_cpu_name()}"


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # Linux only
        lines = []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.machine()
