"""The training loop: one for distillation and for pretraining a teacher."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, TextIO

import torch

from hdscale.cli import EXIT_DONE, EXIT_STOPPED
from hdscale.data.loader import TrainLoader
from hdscale.data.order import build_order
from hdscale.engine.zero_state import gather_shard, optimizer_state
from hdscale.flops import peak_flops
from hdscale.hashing import hash64
from hdscale.progress import Progress
from hdscale.runs.checkpoint import save_checkpoint
from hdscale.runs.metrics import MetricsWriter
from hdscale.training.meter import Meter, name_limit, peak_memory_gb
from hdscale.training.quarantine import Quarantine
from hdscale.training.stop import StopFlag
from hdscale.types import Batch, LossTerms

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from hdscale.config.recipe import CheckpointConfig, LogConfig
    from hdscale.data.samples import MaskLookup
    from hdscale.engine.ranks import Ranks
    from hdscale.engine.zero_internals import Engine
    from hdscale.training.run import Run
    from hdscale.training.schedule import Schedule
    from hdscale.types import Batch


_MAX_SKIPPED = 30
"""In a row. A dynamic loss scale that starts at 2**16 may need 17 to come down to 1."""


class Plan(NamedTuple):
    """How far to go and in what portions."""

    schedule: Schedule
    start_step: int
    end_step: int
    accumulation: int
    global_batch_size: int
    num_samples: int
    seed: int
    flops_per_image: float | None
    peak_flops: float | None


class Trainer(NamedTuple):
    """Everything that a run holds between steps; `prepare` turns a batch into the engine's arguments."""

    engine: Engine
    prepare: Callable[[Batch], tuple[Any, ...]]
    ranks: Ranks
    plan: Plan
    run_folder: Path
    fingerprints: dict[str, Any]
    log: LogConfig
    checkpoint: CheckpointConfig
    progress: Progress
    quarantine: Quarantine


def train_step(engine: Engine, prepare: Callable[[Batch], tuple[Any, ...]], batch: Batch) -> LossTerms:
    """Run one micro-step; return device tensors and never wait for the device.

    `engine.step()` updates weights only at DeepSpeed's accumulation boundary.
    """
    terms = engine(*prepare(batch))
    engine.backward(terms.total)
    engine.step()
    return LossTerms(*(term.detach() for term in terms))


def train(trainer: Trainer, batches: Iterator[Batch], metrics: MetricsWriter | None, stop: StopFlag) -> int:
    """Train from `plan.start_step` to `plan.end_step`, or until a stop is asked for.

    Args:
        trainer: engine and settings.
        batches: this rank's micro-batches from the start step on.
        metrics: the first rank's writer, None elsewhere.
        stop: shared between ranks.

    Returns:
        The number of optimizer steps done; a checkpoint of that step is on disk.

    Raises:
        UserError: too many samples are bad; a checkpoint of the last step is on disk.
    """
    plan = trainer.plan
    meter = Meter(trainer.ranks)
    step = plan.start_step
    skipped = _Skipped(trainer.engine.skipped_steps, 0)
    while step < plan.end_step:
        _set_lr(trainer.engine, plan.schedule.lr(step))
        for micro_step in range(plan.accumulation):
            seed_everything(plan.seed, step, micro_step, trainer.ranks.rank)
            batch = meter.wait_for(batches)
            trainer.quarantine.add(batch.bad)
            meter.add(train_step(trainer.engine, trainer.prepare, to_device(batch, trainer.ranks)))
        step += 1
        skipped = _count_skipped(trainer.engine, skipped)
        trainer.progress(1)
        stopping = stop.any_rank()
        last = step == plan.end_step or stopping
        logging = last or step % trainer.log.every_steps == 0
        saving = last or step % trainer.checkpoint.every_steps == 0
        error = trainer.quarantine.gather(step) if logging or saving else None
        if logging:
            _log(trainer, meter, metrics, step)
        if saving or error:
            _save(trainer, step)
            meter.restart_clock()
        if error:
            raise error
        if stopping:
            break
    return step


def seed_everything(seed: int, step: int, micro_step: int, rank: int) -> None:
    """Seed drop-path from where we are, so that a resumed run needs no saved random state."""
    torch.manual_seed(int(hash64(seed, step, micro_step, rank)) >> 1)


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


def _log(trainer: Trainer, meter: Meter, metrics: MetricsWriter | None, step: int) -> None:
    reading = meter.read()
    losses, rate, plan = reading.losses, reading.images_per_second, trainer.plan
    if metrics is None:
        return
    samples = step * plan.global_batch_size
    norm = trainer.engine.get_global_grad_norm()
    mfu = None
    if plan.flops_per_image and plan.peak_flops:
        mfu = rate * plan.flops_per_image / (plan.peak_flops * trainer.ranks.world_size)
    line = {
        "step": step,
        "epoch": samples / plan.num_samples,
        "samples_seen": samples,
        "loss": losses.total,
        "loss_feature": losses.feature,
        "loss_relation": losses.relation,
        "lr": plan.schedule.lr(step - 1),
        "grad_norm": None if norm is None else float(norm),
        "loss_scale": float(trainer.engine.optimizer.loss_scale),
        "skipped_steps": trainer.engine.skipped_steps,
        "images_per_second": rate,
        "data_wait": reading.data_wait,
        "communication": reading.communication,
        "sent_gb": reading.sent_bytes * plan.accumulation / 1e9,
        "bad_samples": len(trainer.quarantine.sample_ids),
        "mfu": mfu,
        "flops_per_image": plan.flops_per_image,
        "memory_gb": peak_memory_gb(trainer.ranks),
    }
    metrics.write(line)
    trainer.progress(0, f"loss {losses.total:.4f}, {rate:.1f} images/s{name_limit(reading)}")


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


def _save(trainer: Trainer, step: int) -> int:
    state = {
        "step": step,
        "cursor": step * trainer.plan.global_batch_size,
        **optimizer_state(trainer.engine),
        "quarantine": trainer.quarantine.sample_ids,
        "fingerprints": trainer.fingerprints,
    }
    shard = gather_shard(trainer.engine, trainer.ranks.rank, trainer.ranks.world_size)
    save_checkpoint(
        trainer.run_folder,
        shard,
        state,
        rank=trainer.ranks.rank,
        world_size=trainer.ranks.world_size,
        keep=trainer.checkpoint.keep,
    )
    return step


def train_run(
    run: Run,
    engine: Engine,
    ranks: Ranks,
    prepare: Callable[[Batch], tuple[Any, ...]],
    *,
    look_up_masks: MaskLookup | None = None,
    stream: TextIO | None = None,
) -> int:
    """Train to the end of the schedule or until a stop; return the exit code.

    Args:
        run: what was checked.
        engine: from `start_engine`.
        ranks: this process.
        prepare: turns a batch on the device into the engine's arguments.
        look_up_masks: looks stored masks up by sample ids and views, inside the loader.
        stream: where the first rank shows progress.
    """
    recipe, total = run.recipe, run.schedule.total_steps
    start = 0 if run.checkpoint is None else run.checkpoint.step
    end = min(total, recipe.schedule.stop_after or total)
    if start >= end:
        if stream is not None and ranks.is_first:
            print(f"{run.folder}: step {start} of {total} is done already", file=stream)
        return EXIT_DONE if start >= total else EXIT_STOPPED
    loader = run_loader(run, ranks, start, end, look_up_masks)
    metrics = MetricsWriter(run.folder, start) if ranks.is_first else None
    with Progress(recipe.run.name, total, "steps", stream if ranks.is_first else None, start) as progress:
        trainer = Trainer(
            engine,
            prepare,
            ranks,
            _plan(run, ranks, start, end),
            run.folder,
            run.fingerprints,
            recipe.log,
            recipe.checkpoint,
            progress,
            _quarantine(run, ranks),
        )
        done = train(trainer, iter(loader), metrics, StopFlag())
    if metrics is not None:
        metrics.close()
    return EXIT_DONE if done == total else EXIT_STOPPED


def run_loader(run: Run, ranks: Ranks, start_step: int, end_step: int, look_up_masks: MaskLookup | None) -> TrainLoader:
    """Return this rank's micro-batches of steps start_step .. end_step - 1."""
    recipe = run.recipe
    return TrainLoader(
        run.shards,
        build_order(run.shards.index, recipe.data, recipe.run.seed),
        recipe.data,
        recipe.run.seed,
        global_batch_size=recipe.optim.global_batch_size,
        micro_batch_size=recipe.optim.micro_batch_size,
        rank=ranks.rank,
        world_size=ranks.world_size,
        start_step=start_step,
        num_steps=end_step - start_step,
        look_up_masks=look_up_masks,
    )


def _quarantine(run: Run, ranks: Ranks) -> Quarantine:
    checkpoint = run.checkpoint
    known, step = ([], 0) if checkpoint is None else (checkpoint.state["quarantine"], checkpoint.step)
    return Quarantine(run.folder, run.shards, run.recipe.data, ranks, known=known, start_step=step)


def _plan(run: Run, ranks: Ranks, start: int, end: int) -> Plan:
    name = torch.cuda.get_device_name(ranks.device) if ranks.device.type == "cuda" else "cpu"
    return Plan(
        schedule=run.schedule,
        start_step=start,
        end_step=end,
        accumulation=run.accumulation,
        global_batch_size=run.recipe.optim.global_batch_size,
        num_samples=run.shards.num_samples,
        seed=run.recipe.run.seed,
        flops_per_image=run.flops_per_image,
        peak_flops=peak_flops(name, run.precision),
    )
