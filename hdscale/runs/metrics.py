"""Numbers of a run: `metrics.jsonl` and TensorBoard, written by the first rank. The one file that knows TensorBoard."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from hdscale.runs.step_log import StepLog, read_step_log

METRICS_FILE = "metrics.jsonl"
TENSORBOARD_FOLDER = "tensorboard"


class MetricsWriter:
    """Appends one JSON object per logged step and mirrors its numbers to TensorBoard."""

    def __init__(self, run_folder: Path, start_step: int) -> None:
        self._log = StepLog(run_folder / METRICS_FILE, start_step)
        self._tensorboard = SummaryWriter(str(run_folder / TENSORBOARD_FOLDER), purge_step=start_step + 1)

    def write(self, metrics: Mapping[str, Any]) -> None:
        """Write one logged step; a figure that is unknown or not finite is null."""
        metrics = {name: value if _is_figure(value) else None for name, value in metrics.items()}
        self._log.append(metrics)
        for name, value in metrics.items():
            if name != "step" and value is not None:
                self._tensorboard.add_scalar(f"train/{name}", value, metrics["step"])

    def close(self) -> None:
        """Flush TensorBoard's file; lines are on the disk at once."""
        self._tensorboard.close()


def _is_figure(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def read_metrics(run_folder: Path) -> list[dict[str, Any]]:
    """Read a run's logged steps; empty when there are none."""
    return read_step_log(run_folder / METRICS_FILE)


def write_curves(run_folder: Path, curves: Sequence[Mapping[str, float]]) -> None:
    """Add curves to a run's TensorBoard folder: the n-th mapping holds the points at n, such as at layer n."""
    with SummaryWriter(str(run_folder / TENSORBOARD_FOLDER)) as writer:
        for place, points in enumerate(curves):
            for tag, value in points.items():
                writer.add_scalar(tag, value, place)
