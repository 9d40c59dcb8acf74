"""How long a run is, in optimizer steps, and the learning rate at each."""

from __future__ import annotations

import math
from typing import NamedTuple

from hdscale.config.sections import OptimConfig, ScheduleConfig
from hdscale.errors import UserError


class Schedule(NamedTuple):
    """Linear warm-up, then a cosine, as a pure function of the step."""

    total_steps: int
    warmup_steps: int
    peak_lr: float
    min_lr: float

    def lr(self, step: int) -> float:
        """Return the learning rate of optimizer step `step`, counted from 0."""
        if step < self.warmup_steps:
            return self.peak_lr * (step + 1) / self.warmup_steps
        progress = (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps)
        return self.min_lr + (self.peak_lr - self.min_lr) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def build_schedule(schedule: ScheduleConfig, optim: OptimConfig, num_samples: int) -> Schedule:
    """Count optimizer steps: floor(epochs * samples / global batch); batches straddle epochs.

    Raises:
        UserError: not one global batch in the whole run.
    """
    total = math.floor(schedule.epochs * num_samples / optim.global_batch_size)
    if total < 1:
        raise UserError(
            f"schedule.epochs {schedule.epochs:g} of {num_samples} samples are less than one global batch: "
            f"lower optim.global_batch_size {optim.global_batch_size} or raise schedule.epochs"
        )
    warmup = math.floor(schedule.warmup_epochs * num_samples / optim.global_batch_size)
    return Schedule(total, min(warmup, total - 1), optim.lr, schedule.min_lr)
