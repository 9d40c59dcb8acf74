"""Losses, rates and shares of time between two log lines."""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from hdscale.engine.collectives import watch_collectives
from hdscale.engine.ranks import Ranks
from hdscale.flops import peak_flops
from hdscale.training.run import Session
from hdscale.types import Batch, LossTerms


class Reading(NamedTuple):
    """What the meter has seen between two log lines; shares are of this rank's time."""

    losses: LossTerms  # means over steps and ranks
    images_per_second: float  # of all ranks
    data_wait: float
    communication: float
    sent_bytes: float  # by this rank in DeepSpeed's collectives, per micro-step


class Meter:
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
        """Take the next micro-batch, and note how long it took to come."""
        start = time.perf_counter()
        batch = next(batches)
        self._waited += time.perf_counter() - start
        self._images += len(batch.images)
        return batch

    def add(self, terms: LossTerms) -> None:
        """Add a micro-step's losses; they stay on the device."""
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

    def read(self) -> Reading:
        """Reduce over ranks and start anew; this waits for the device."""
        means = self._sums / max(1, self._count)
        dist.all_reduce(means)
        traffic = self._collectives.read()
        elapsed = time.perf_counter() - self._started
        reading = Reading(
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


def log_line(session: Session, reading: Reading, step: int, bad_samples: int) -> dict[str, Any]:
    """Return one line of `metrics.jsonl`.

    Args:
        session: the run, after `step` optimizer steps.
        reading: of the meter, since the last line.
        step: optimizer steps done.
        bad_samples: samples in quarantine so far.
    """
    run, engine, ranks = session.run, session.engine, session.ranks
    samples = step * run.recipe.optim.global_batch_size
    norm = engine.get_global_grad_norm()
    return {
        "step": step,
        "epoch": samples / run.shards.num_samples,
        "samples_seen": samples,
        "loss": reading.losses.total,
        "loss_feature": reading.losses.feature,
        "loss_relation": reading.losses.relation,
        "lr": run.schedule.lr(step - 1),
        "grad_norm": None if norm is None else float(norm),
        "loss_scale": float(engine.optimizer.loss_scale),
        "skipped_steps": engine.skipped_steps,
        "images_per_second": reading.images_per_second,
        "data_wait": reading.data_wait,
        "communication": reading.communication,
        "sent_gb": reading.sent_bytes * run.accumulation / 1e9,
        "bad_samples": bad_samples,
        "mfu": _model_flops_utilisation(session, reading.images_per_second),
        "flops_per_image": session.flops_per_image,
        "flops_over_one_teacher": session.flops_over_one_teacher,
        "memory_gb": peak_memory_gb(ranks),
    }


def _model_flops_utilisation(session: Session, images_per_second: float) -> float | None:
    """Return the share of the devices' peak that training uses; None where the device's peak is not known."""
    device = session.ranks.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    peak = peak_flops(name, session.run.precision)
    if not session.flops_per_image or not peak:
        return None
    return images_per_second * session.flops_per_image / (peak * session.ranks.world_size)


def progress_text(reading: Reading) -> str:
    """Return the loss, the rate, and what takes more than half of the time, if it is not the computation."""
    text = f"loss {reading.losses.total:.4f}, {reading.images_per_second:.1f} images/s"
    if reading.communication > 0.5:
        return f"{text}, communication is the limit ({reading.communication:.0%} of the time in collectives)"
    if reading.data_wait > 0.5:
        return f"{text}, data is the limit ({reading.data_wait:.0%} of the time waiting for it)"
    return text


def peak_memory_gb(ranks: Ranks) -> float:
    """Return this process's peak: allocated GPU memory, or resident memory on a CPU; 10^9 bytes."""
    if ranks.device.type == "cuda":
        return torch.cuda.max_memory_allocated(ranks.device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
