"""The training loop: one for distillation and for pretraining a teacher."""

from __future__ import annotations

import resource
import time
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist

from hdscale.engine.collectives import watch_collectives
from hdscale.engine.zero_state import gather_shard, optimizer_state
from hdscale.hashing import hash64
from hdscale.runs.checkpoint import save_checkpoint
from hdscale.types import Batch, LossTerms

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from hdscale.config.recipe import CheckpointConfig, LogConfig
    from hdscale.engine.ranks import Ranks
    from hdscale.engine.zero import Engine
    from hdscale.progress import Progress
    from hdscale.runs.metrics import MetricsWriter
    from hdscale.training.quarantine import Quarantine
    from hdscale.training.schedule import Schedule
    from hdscale.training.stop import StopFlag


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
    meter = _Meter(trainer.ranks)
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


class _Reading(NamedTuple):
    """What the meter has seen between two log lines; shares are of this rank's time."""

    losses: LossTerms  # means over steps and ranks
    images_per_second: float  # of all ranks
    data_wait: float
    communication: float
    sent_bytes: float  # by this rank in DeepSpeed's collectives, a micro-step


class _Meter:
    """Sums losses on the device and seconds on the host between two log lines."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._collectives = watch_collectives()
        self._sums = torch.zeros(len(LossTerms._fields), device=ranks.device)
        self._count = 0  # micro-steps in the sums
        self._waited = 0.0
        self._started = time.perf_counter()
        self._images = 0
        self._timed = 0  # micro-steps since the clock was started

    def wait_for(self, batches: Iterator[Batch]) -> Batch:
        start = time.perf_counter()
        batch = next(batches)
        self._waited += time.perf_counter() - start
        self._images += len(batch.images)
        return batch

    def add(self, terms: LossTerms) -> None:
        self._sums += torch.stack([term.float() for term in terms])
        self._count += 1
        self._timed += 1

    def restart_clock(self) -> None:
        """Leave the time since the last log line out of the rates (a checkpoint was written), and the traffic."""
        self._collectives.read()
        self._started = time.perf_counter()
        self._waited = 0.0
        self._images = 0
        self._timed = 0

    def read(self) -> _Reading:
        """Reduce over ranks and start anew; this waits for the device."""
        means = self._sums / max(1, self._count)
        dist.all_reduce(means)
        traffic = self._collectives.read()
        elapsed = time.perf_counter() - self._started
        reading = _Reading(
            LossTerms(*(means / self._ranks.world_size).tolist()),
            self._images * self._ranks.world_size / elapsed,
            self._waited / elapsed,
            traffic.seconds / elapsed,
            traffic.total.sent_bytes / max(1, self._timed),
        )
        self._sums.zero_()
        self._count = 0
        self.restart_clock()
        return reading


def _log(trainer: Trainer, meter: _Meter, metrics: MetricsWriter | None, step: int) -> None:
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
    trainer.progress(0, f"loss {losses.total:.4f}, {rate:.1f} images/s{_limit(reading)}")


def _limit(reading: _Reading) -> str:
    """Name what takes more than half of the time, if it is not the computation."""
    if reading.communication > 0.5:
        return f", communication is the limit ({reading.communication:.0%} of the time in collectives)"
    if reading.data_wait > 0.5:
        return f", data is the limit ({reading.data_wait:.0%} of the time waiting for it)"
    return ""


def peak_memory_gb(ranks: Ranks) -> float:
    """Return this process's peak: allocated GPU memory, or resident memory on a CPU; 10^9 bytes."""
    if ranks.device.type == "cuda":
        return torch.cuda.max_memory_allocated(ranks.device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


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
