"""Figures of a row over its seeds, and which differences between rows are more than their errors."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from typing import Literal, NamedTuple

from hdscale.ablation.measuring import Measures
from hdscale.ablation.table import Paper, Row, Table
from hdscale.analysis.curves import OverHeads, over_heads
from hdscale.evaluation.accuracy import Difference

Part = Literal["curves", "decoder_curves"]
"""The student's own layers, or its decoder's."""


class Figure(NamedTuple):
    """One number of a row."""

    mean: float  # over seeds
    spread: float | None  # deviation over seeds; with one seed the standard error of held-out samples, or nothing
    standard_error: float | None  # of the mean; None: unknown


class RowResult(NamedTuple):
    """What the table shows of a row."""

    row: Row
    folders: tuple[str, ...]  # names of its run folders, by seed
    measures: tuple[Measures, ...]  # by seed; empty when the row failed or is not trained yet

    def figure(self, name: str) -> Figure | None:
        """Return one of `knn`, `probe`, `head_distance` and `nmi`; None: unknown.

        The first two are in percent, `head_distance` in pixels; it and `nmi` are of the last layer, means over heads.
        """
        if not self.measures:
            return None
        values = [_value(measures, name) for measures in self.measures]
        mean = statistics.fmean(values)
        sampling = _sampling_error(self.measures[0], name)
        if len(values) == 1:
            return Figure(mean, sampling, sampling)
        spread = statistics.stdev(values)
        # Seeds that agree to the last sample say nothing about how far others would be.
        error = spread / math.sqrt(len(values)) if spread > 0 else sampling
        return Figure(mean, spread, error)

    def by_head(self, name: str, part: Part = "curves") -> list[list[float]]:
        """Return `head_distance` or `nmi` of all heads by layer of the student, or of its decoder; seed after seed."""
        return [list(itertools.chain(*layer)) for layer in zip(*self._seeds(name, part), strict=True)]

    def by_layer(self, name: str, part: Part = "curves") -> list[OverHeads]:
        """Sum up the heads of every layer of the student, or of its decoder.

        Mean and deviation are taken within each seed, whose heads are no one else's, and averaged over seeds; smallest
        and largest are of the heads of all seeds.
        """
        layers = zip(*(over_heads(curves) for curves in self._seeds(name, part)), strict=True)
        return [_over_seeds(layer) for layer in layers]

    def cost(self, name: str) -> float | None:
        """Return `gflops`, `over_one_teacher` or `images_per_second`, the mean over seeds; None: unknown, or no run."""
        values = [value for measures in self.measures if (value := getattr(measures, name)) is not None]
        return statistics.fmean(values) if values else None

    def _seeds(self, name: str, part: Part) -> list[tuple[tuple[float, ...], ...]]:
        """List (layers, A) by seed."""
        return [getattr(of, name) for measures in self.measures if (of := getattr(measures, part)) is not None]


def difference(result: RowResult, reference: RowResult, name: str) -> Difference | None:
    """Compare two rows; the errors are taken as independent. None where a figure or its error is unknown."""
    ours, theirs = result.figure(name), reference.figure(name)
    if ours is None or theirs is None or ours.standard_error is None or theirs.standard_error is None:
        return None
    return Difference(ours.mean - theirs.mean, math.hypot(ours.standard_error, theirs.standard_error))


def pairs(table: Table, results: Sequence[RowResult]) -> list[tuple[RowResult, RowResult]]:
    """List trained rows with the trained rows they are compared with; same runs under two names are no pair."""
    there = {result.row.key: result for result in results if result.measures and not result.row.model}
    found = []
    for result in there.values():
        reference = there.get(table.compared_with(result.row))
        if reference is not None and reference.folders != result.folders:
            found.append((result, reference))
    return found


def paper_difference(row: Row, reference: Row) -> tuple[float, float] | None:
    """Return the paper's difference in AP box and AP mask."""
    ours: Paper | None = row.paper
    theirs: Paper | None = reference.paper
    return None if ours is None or theirs is None else (ours.ap_box - theirs.ap_box, ours.ap_mask - theirs.ap_mask)


def _over_seeds(layer: Sequence[OverHeads]) -> OverHeads:
    means, deviations, smallest, largest = zip(*layer, strict=True)
    return OverHeads(statistics.fmean(means), statistics.fmean(deviations), min(smallest), max(largest))


def _value(measures: Measures, name: str) -> float:
    if name in ("knn", "probe"):
        return 100 * getattr(measures, name).accuracy
    return over_heads(getattr(measures.curves, name))[-1].mean


def _sampling_error(measures: Measures, name: str) -> float | None:
    return 100 * getattr(measures, name).standard_error if name in ("knn", "probe") else None
