"""The summary: one table over pixels, untrained student, teachers and students, and which students really differ."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

from hdscale.analysis.curves import over_heads
from hdscale.evaluation.accuracy import Accuracy, Difference
from hdscale.evaluation.measure import SummaryRow
from hdscale.grid import grid

LAST_LAYERS = 3
"""Layers in the table, which is to stay narrow; TensorBoard and the JSON file have all of them, and NMI by head."""

_NOTHING = "-"


def student_differences(rows: Sequence[SummaryRow]) -> dict[tuple[str, str], Difference]:
    """Compare every two students; the errors are taken as independent, which overstates them on shared samples.

    Returns:
        By the names of both, how much more of the held-out samples the first one gets right, as a share.
    """
    students = [row for row in rows if row.role == "student"]
    return {
        (later.name, earlier.name): Difference(
            later.knn.accuracy - earlier.knn.accuracy,
            math.hypot(later.knn.standard_error, earlier.knn.standard_error),
        )
        for earlier, later in itertools.combinations(students, 2)
    }


def render_knn(result: Accuracy, neighbors: int, num_train: int) -> str:
    """Return one k-NN result as a line of text."""
    return (
        f"k-NN accuracy {_percent(result)} % (k = {neighbors}, {result.num} held-out samples, "
        f"{num_train} training samples)"
    )


def render_probe(result: Accuracy, num_train: int) -> str:
    """Return one linear probe's result as a line of text."""
    return f"linear probe accuracy {_percent(result)} % ({result.num} held-out samples, {num_train} training samples)"


def render_summary(rows: Sequence[SummaryRow], *, neighbors: int) -> str:
    """Return the table and the comparison of students as plain text."""
    depth = min((LAST_LAYERS, *(len(row.curves.nmi) for row in rows if row.curves is not None)))
    header = ("model", "k-NN %", "head distance px", "sd over heads", "NMI", "images/s")
    lines = grid(header, [_cells(row, depth) for row in rows], ruled=True)
    lines += [
        "",
        f"last {depth} layers: head distance and NMI are means over heads, sd is the head distance's deviation",
    ]
    lines += [f"k-NN: k = {neighbors}, {rows[0].knn.num} held-out samples, accuracy +- its standard error"]
    lines += [_sentence(*names, difference) for names, difference in student_differences(rows).items()]
    return "\n".join(lines)


def summary_json(rows: Sequence[SummaryRow]) -> dict[str, Any]:
    """Return the same, and the curves of all layers, as JSON-able values.

    Accuracies are shares; `head_distance` and `nmi` are means over heads by layer, `..._by_head` are (layers, A).
    """
    return {
        "rows": [
            {
                "name": row.name,
                "role": row.role,
                "knn": row.knn._asdict(),
                **_curves_json(row),
                "images_per_second": row.images_per_second,
            }
            for row in rows
        ],
        "differences": [
            {
                "first": first,
                "second": second,
                "accuracy": difference.value,
                "standard_error": difference.standard_error,
                "is_clear": difference.is_clear,
            }
            for (first, second), difference in student_differences(rows).items()
        ],
    }


def curve_scalars(rows: Sequence[SummaryRow]) -> list[dict[str, float]]:
    """Return TensorBoard tags and values, one dict per layer: charts over layers, not over steps.

    Means over heads, and standard deviations over heads.
    """
    layers: list[dict[str, float]] = []
    for row in rows:
        if row.curves is None:
            continue
        place = row.name.replace(" ", "_")
        layers += [{} for _ in range(len(layers), len(row.curves.nmi))]
        for name, values in row.curves._asdict().items():
            for scalars, heads in zip(layers, over_heads(values), strict=False):
                scalars[f"{name}_by_layer/{place}"] = heads.mean
                scalars[f"{name}_sd_over_heads_by_layer/{place}"] = heads.deviation
    return layers


def _cells(row: SummaryRow, depth: int) -> tuple[str, ...]:
    figures = [_NOTHING] * 3
    if row.curves is not None:
        distances, nmis = (over_heads(values[-depth:]) for values in row.curves)
        figures = [
            " ".join(f"{heads.mean:5.1f}" for heads in distances),
            " ".join(f"{heads.deviation:4.1f}" for heads in distances),
            " ".join(f"{heads.mean:.2f}" for heads in nmis),
        ]
    rate = _NOTHING if row.images_per_second is None else f"{row.images_per_second:.0f}"
    return row.name, _percent(row.knn), *figures, rate


def _curves_json(row: SummaryRow) -> dict[str, Any]:
    if row.curves is None:
        return dict.fromkeys(("head_distance", "nmi", "head_distance_by_head", "nmi_by_head"))
    curves = row.curves._asdict()
    means = {name: [heads.mean for heads in over_heads(values)] for name, values in curves.items()}
    return means | {f"{name}_by_head": [list(heads) for heads in values] for name, values in curves.items()}


def _percent(result: Accuracy) -> str:
    return f"{100 * result.accuracy:.1f} +- {100 * result.standard_error:.1f}"


def _sentence(first: str, second: str, difference: Difference) -> str:
    text = (
        f"{first} against {second}: {100 * difference.value:+.1f} points, "
        f"standard error {100 * difference.standard_error:.1f}"
    )
    return text if difference.is_clear else f"{text}: no difference"
