"""Losses, rates and shares of time between two log lines."""

from __future__ import annotations

import resource
import time
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.distributed as dist

from hdscale.engine.collectives import watch_collectives
from hdscale.types import Batch, LossTerms

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hdscale.engine.ranks import Ranks


class Reading(NamedTuple):
    """What the meter has seen between two log lines; shares are of this rank's time."""

    losses: LossTerms  # means over steps and ranks
    images_per_second: float  # of all ranks
    data_wait: float
    communication: float
    sent_bytes: float  # by this rank in DeepSpeed's collectives, a micro-step


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


def name_limit(reading: Reading) -> str:
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
