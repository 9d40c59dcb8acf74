"""What a run has trained, read from its folder."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from hdscale.config.loading import load_run_recipe
from hdscale.config.recipe import Recipe
from hdscale.runs.checkpoint import require_checkpoint
from hdscale.runs.metrics import read_metrics


class TrainedRun(NamedTuple):
    """What a run folder says about its student."""

    folder: Path
    recipe: Recipe
    weights: Mapping[str, Tensor]  # of the newest checkpoint
    step: int  # of that checkpoint
    images_per_second: float | None  # of training, over all ranks


def read_run(folder: Path) -> TrainedRun:
    """Read a run folder's recipe, newest checkpoint and speed.

    Raises:
        UserError: it is no run folder, or has no checkpoint that is whole.
    """
    recipe, checkpoint = load_run_recipe(folder), require_checkpoint(folder)
    rates = [line["images_per_second"] for line in read_metrics(folder)]
    return TrainedRun(
        folder, recipe, checkpoint.module_state(), checkpoint.step, statistics.median(rates) if rates else None
    )
