"""The training loop: one for distillation and for pretraining a teacher."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, TextIO

import torch

from hdscale.cli import EXIT_DONE, EXIT_STOPPED
from hdscale.data.loader import RankShare, TrainLoader
from hdscale.data.order import build_order, positions_of
from hdscale.engine.ranks import Ranks
from hdscale.engine.zero_internals import Engine
from hdscale.engine.zero_state import gather_shard, optimizer_state
from hdscale.hashing import hash64
from hdscale.progress import Progress
from hdscale.runs.checkpoint import save_checkpoint
from hdscale.runs.metrics import MetricsWriter
from hdscale.student.drop_path import draw_drop_path
from hdscale.training.gradient_norms import GradientNorms
from hdscale.training.meter import Meter, log_line, progress_text
from hdscale.training.quarantine import Quarantine
from hdscale.training.run import Session
from hdscale.training.stop import StopFlag
from hdscale.types import Batch, LossTerms

_MAX_SKIPPED = 30
"""In a row. A dynamic loss scale that starts at 2**16 may need 17 to come down to 1."""


def train_run(session: Session, stream: TextIO | None = None) -> int:
    """Train to the end of the schedule or until a stop; return the exit code.

    Args:
        session: a started run.
        stream: where the first rank shows progress.
    """
    run, is_first = session.run, session.ranks.is_first
    start, total = run.start_step, run.schedule.total_steps
    if start >= run.end_step:
        if stream is not None and is_first:
            print(f"{run.folder}: step {start} of {total} is done already", file=stream)
        return EXIT_DONE if start >= total else EXIT_STOPPED
    batches = iter(run_loader(session, start, run.end_step))
    metrics = MetricsWriter(run.folder, start) if is_first else None
    with Progress(run.recipe.run.name, total, "steps", stream if is_first else None, start) as progress:
        done = train(session, batches, metrics, progress, StopFlag())
    if metrics is not None:
        metrics.close()
    return EXIT_DONE if done == total else EXIT_STOPPED


def run_loader(session: Session, start_step: int, end_step: int) -> TrainLoader:
    """Return this rank's micro-batches of steps start_step .. end_step - 1."""
    run, ranks = session.run, session.ranks
    recipe = run.recipe
    return TrainLoader(
        run.shards,
        build_order(run.shards.index, recipe.data, recipe.run.seed),
        recipe.data,
        recipe.run.seed,
        RankShare(ranks.rank, ranks.world_size, recipe.optim.global_batch_size, recipe.optim.micro_batch_size),
        range(start_step, end_step),
        session.look_up_masks,
    )


def train(
    session: Session, batches: Iterator[Batch], metrics: MetricsWriter | None, progress: Progress, stop: StopFlag
) -> int:
    """Train from the run's start step to its end step, or until a stop is asked for.

    Args:
        session: a started run.
        batches: this rank's micro-batches from the start step on.
        metrics: the first rank's writer, None elsewhere.
        progress: told of each step, and of what was logged.
        stop: shared between ranks.

    Returns:
        The number of optimizer steps done; a checkpoint of that step is on disk.

    Raises:
        UserError: too many samples are bad; a checkpoint of the last step is on disk.
    """
    run, engine, ranks = session.run, session.engine, session.ranks
    recipe = run.recipe
    meter = Meter(ranks)
    norms = GradientNorms(engine, recipe, ranks, accumulation=run.accumulation)
    quarantine = _quarantine(session)
    step = run.start_step
    skipped = _Skipped(engine.skipped_steps, 0)
    while step < run.end_step:
        _set_lr(engine, run.schedule.lr(step))
        for micro_step in range(run.accumulation):
            set_drop_path(session, step, micro_step)
            batch = meter.wait_for(batches)
            quarantine.add(batch.bad)
            with norms.beside(step + 1):
                meter.add(train_step(session, to_device(batch, ranks)))
        step += 1
        skipped = _count_skipped(engine, skipped)
        progress(1)
        stopping = stop.any_rank()
        last = step == run.end_step or stopping
        logging = last or step % recipe.log.every_steps == 0
        saving = last or step % recipe.checkpoint.every_steps == 0
        error = quarantine.gather(step) if logging or saving else None
        if logging:
            reading, measured = meter.read(), norms.read()
            if metrics is not None:
                metrics.write(log_line(session, reading, step, len(quarantine.sample_ids)) | measured)
                progress(0, progress_text(reading))
        if saving or error:
            _save(session, step, quarantine.sample_ids)
            meter.restart_clock()
        if error:
            raise error
        if stopping:
            break
    return step


def train_step(session: Session, batch: Batch) -> LossTerms:
    """Run one micro-step on a batch on the device; return device tensors and never wait for the device.

    `engine.step()` updates weights only at DeepSpeed's accumulation boundary.
    """
    engine = session.engine
    terms = engine(*session.ask_teachers(batch))
    engine.backward(terms.total)
    engine.step()
    return LossTerms(*(term.detach() for term in terms))


def set_drop_path(session: Session, step: int, micro_step: int) -> None:
    """Decide from where we are which branches the next forward drops: a resumed run needs no saved random state.

    Nothing else in training is drawn from torch's generator.
    """
    run, ranks = session.run, session.ranks
    recipe = run.recipe
    if recipe.student.drop_path_per == "rank":
        torch.manual_seed(int(hash64(recipe.run.seed, step, micro_step, ranks.rank)) >> 1)
        return
    micro_batch_size = recipe.optim.micro_batch_size
    positions = positions_of(step, ranks.rank, ranks.world_size, micro_batch_size, run.accumulation)[micro_step]
    draw_drop_path(session.engine.module, recipe.run.seed, positions, ranks.device)


def to_device(batch: Batch, ranks: Ranks) -> Batch:
    """Copy what the device computes on; ids, views and epochs stay with the CPU, which draws random masks from them."""
    if ranks.device.type == "cpu":
        return batch
    moved = {
        name: value.to(ranks.device, non_blocking=True)
        for name in ("images", "labels", "keep_indices")
        if (value := getattr(batch, name)) is not None
    }
    return batch._replace(**moved)


class _Skipped(NamedTuple):
    total: int
    in_a_row: int


def _count_skipped(engine: Engine, before: _Skipped) -> _Skipped:
    """Count the steps that DeepSpeed has left out on all ranks because a gradient was not finite.

    Raises:
        FloatingPointError: too many in a row: the run would go on for ever without learning.
    """
    now = engine.skipped_steps
    in_a_row = before.in_a_row + 1 if now > before.total else 0
    if in_a_row > _MAX_SKIPPED:
        raise FloatingPointError(
            f"{in_a_row} steps in a row had gradients that are not finite; the weights are unchanged since: lower "
            "optim.lr, or use run.precision=fp32, and start again from the last checkpoint"
        )
    return _Skipped(now, in_a_row)


def _set_lr(engine: Engine, lr: float) -> None:
    for group in engine.optimizer.param_groups:
        group["lr"] = lr


def _quarantine(session: Session) -> Quarantine:
    run = session.run
    known = [] if run.checkpoint is None else run.checkpoint.state["quarantine"]
    return Quarantine(run.folder, run.shards, run.recipe.data, session.ranks, known=known, start_step=run.start_step)


def _save(session: Session, step: int, bad_samples: list[int]) -> None:
    run, engine, ranks = session.run, session.engine, session.ranks
    state = {
        "step": step,
        "cursor": step * run.recipe.optim.global_batch_size,
        **optimizer_state(engine),
        "quarantine": bad_samples,
        "cls_in_loss": getattr(engine.module, "cls_in_loss", False),  # for export: the recipe cannot know
        "fingerprints": run.fingerprints,
    }
    shard = gather_shard(engine, ranks.rank, ranks.world_size)
    keep = run.recipe.checkpoint.keep
    save_checkpoint(run.folder, shard, state, rank=ranks.rank, world_size=ranks.world_size, keep=keep)
