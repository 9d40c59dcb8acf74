"""Numbers of a run: `metrics.jsonl` and TensorBoard, written by the first rank. The one file that knows TensorBoard."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

from torch.utils.tensorboard import SummaryWriter

from hdscale.staging import staged

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

METRICS_FILE = "metrics.jsonl"
TENSORBOARD_FOLDER = "tensorboard"


class MetricsWriter:
    """Appends one JSON object a logged step and mirrors its numbers to TensorBoard."""

    def __init__(self, run_folder: Path, start_step: int) -> None:
        path = run_folder / METRICS_FILE
        # Lines of steps that a resumed run makes again would stand there twice.
        kept = [line for line in read_metrics(run_folder) if line["step"] <= start_step]
        with staged(path) as temporary:
            temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
        self._file = path.open("a", buffering=1)
        self._tensorboard = SummaryWriter(str(run_folder / TENSORBOARD_FOLDER), purge_step=start_step + 1)

    def write(self, metrics: Mapping[str, Any]) -> None:
        """Write one logged step; a figure that is unknown or not finite is null."""
        metrics = {name: value if _is_figure(value) else None for name, value in metrics.items()}
        self._file.write(json.dumps(metrics) + "\n")
        for name, value in metrics.items():
            if name != "step" and value is not None:
                self._tensorboard.add_scalar(f"train/{name}", value, metrics["step"])

    def close(self) -> None:
        """Flush both files."""
        self._file.close()
        self._tensorboard.close()


def _is_figure(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def read_metrics(run_folder: Path) -> list[dict[str, Any]]:
    """Read a run's logged steps; empty when there are none."""
    path = run_folder / METRICS_FILE
    if not path.is_file():
        return []
    # A killed run may leave half a line at the end.
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]


def write_curves(run_folder: Path, curves: Sequence[Mapping[str, float]]) -> None:
    """Add curves to a run's TensorBoard folder: the n-th mapping holds the points at n, such as at layer n."""
    with SummaryWriter(str(run_folder / TENSORBOARD_FOLDER)) as writer:
        for place, points in enumerate(curves):
            for tag, value in points.items():
                writer.add_scalar(tag, value, place)
