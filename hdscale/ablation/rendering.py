"""A table as Markdown and as CSV: the paper's figures beside ours, and sentences about what differs."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

from hdscale.ablation.results import Figure, Part, RowResult, difference, pairs, paper_difference
from hdscale.ablation.table import Table
from hdscale.analysis.curves import OverHeads
from hdscale.grid import markdown_grid

_NOTHING = "-"
_FIGURES = {  # name: (how a sentence calls it, its unit, decimals)
    "knn": ("k-NN", " points", 1),
    "probe": ("linear probe", " points", 1),
    "head_distance": ("head distance", " px", 1),
    "nmi": ("NMI", "", 2),
}
_OF_HEADS = ("head_distance", "nmi")
_PARTS: tuple[Part, ...] = ("curves", "decoder_curves")


class Report(NamedTuple):
    """What stands in a table's file."""

    table: Table
    results: Sequence[RowResult]
    seeds: int
    command: str  # that makes it
    notes: Sequence[str] = ()  # of the scale
    failures: Mapping[str, str] = {}  # by row and seed
    machine: str = ""


def render_markdown(report: Report) -> str:
    """Return the whole page."""
    table = report.table
    lines = [f"# {table.heading}", "", f"`{report.command}`{_made_with(report)}", ""]
    lines += _main_table(report)
    if table.is_figure:
        for name in _OF_HEADS:
            lines += ["", *_layer_table(report, name, "mean"), "", *_layer_table(report, name, "deviation")]
    lines += ["", _caption(report), ""]
    lines += [f"- {note}" for note in (*report.notes, *table.notes)]
    if compared := _sentences(report):
        lines += ["", "## Differences", "", *(f"- {sentence}" for sentence in compared)]
    if report.failures:
        lines += ["", "## Failed", "", *(f"- {label}: {reason}" for label, reason in report.failures.items())]
    return "\n".join(lines) + "\n"


def render_csv(report: Report) -> str:
    """Return one line per row, numbers unrounded; accuracies in percent, what is unknown is empty.

    In the columns `..._by_head` semicolons stand between layers and spaces between heads, seed after seed.
    """
    text = io.StringIO()
    columns = [column for name in _FIGURES for column in (name, f"{name}_spread", f"{name}_standard_error")]
    header = ["table", "row", "name", "seeds", "paper_ap_box", "paper_ap_mask", "paper_miou", *columns]
    header += ["gflops_per_image", "flops_over_one_teacher", "images_per_second"]
    header += [f"{name}_by_{layer}" for layer in ("layer", "decoder_layer") for name in _OF_HEADS]
    header += ["runs"]
    # Their cells are long: after all others.
    header += [f"{name}_by_{head}" for head in ("head", "decoder_head") for name in _OF_HEADS]
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    for result in report.results:
        figures = [result.figure(name) or (None, None, None) for name in _FIGURES]
        writer.writerow(
            [
                report.table.key,
                result.row.key,
                result.row.name,
                len(result.measures),
                *(result.row.paper or (None, None, None)),
                *(value for figure in figures for value in figure),
                result.cost("gflops"),
                result.cost("over_one_teacher"),
                result.cost("images_per_second"),
                *(
                    _numbers([layer.mean for layer in result.by_layer(name, part)])
                    for part in _PARTS
                    for name in _OF_HEADS
                ),
                " ".join(result.folders),
                *(
                    "; ".join(_numbers(heads) for heads in result.by_head(name, part))
                    for part in _PARTS
                    for name in _OF_HEADS
                ),
            ]
        )
    return text.getvalue()


def _main_table(report: Report) -> list[str]:
    papers = [result.row.paper for result in report.results]
    has_paper = any(paper is not None for paper in papers)
    has_miou = any(paper is not None and paper.miou is not None for paper in papers)
    header = [
        "row",
        *(["paper: AP box", "paper: AP mask"] if has_paper else []),
        *(["paper: mIoU"] if has_miou else []),
    ]
    header += ["k-NN %", "linear probe %", "head distance px", "px over heads: sd (range)"]
    header += ["NMI", "NMI over heads: sd (range)", "GFLOP a step and image", "times one teacher", "images/s"]
    rows = []
    for result in report.results:
        paper = result.row.paper
        shown = [_NOTHING, _NOTHING, _NOTHING] if paper is None else [_number(value, 1) for value in paper]
        cells = [result.row.name, *shown[: 2 * has_paper], *shown[2 : 2 + has_miou]]
        for name, (_, _, decimals) in _FIGURES.items():
            cells.append(_cell(result.figure(name), decimals))
            if name in _OF_HEADS:
                cells.append(_heads_cell(result.by_layer(name), decimals))
        cells += [_significant(result.cost("gflops")), _number(result.cost("over_one_teacher"), 2)]
        cells += [_number(result.cost("images_per_second"), 0)]
        rows.append(cells)
    return markdown_grid(header, rows)


def _layer_table(report: Report, name: str, over_heads: Literal["mean", "deviation"]) -> list[str]:
    """Curves over layers, one column per layer; rows of fewer layers have empty cells at the end."""
    called, unit, decimals = _FIGURES[name]
    curves = []
    for result in report.results:
        curves.append((result.row.name, [getattr(layer, over_heads) for layer in result.by_layer(name)]))
        if decoder := result.by_layer(name, "decoder_curves"):
            curves.append((f"{result.row.name}: its decoder", [getattr(layer, over_heads) for layer in decoder]))
    depth = max((len(curve) for _, curve in curves), default=0)
    kind = "" if over_heads == "mean" else ", sd over heads"
    header = [f"{called}{unit}{kind}, layer", *(str(layer) for layer in range(1, depth + 1))]
    return markdown_grid(
        header,
        [
            [title, *(_number(value, decimals) for value in curve), *[_NOTHING] * (depth - len(curve))]
            for title, curve in curves
        ],
    )


def _caption(report: Report) -> str:
    trained = [result for result in report.results if result.measures]
    num = trained[0].measures[0].knn.num if trained else 0
    spread = (
        f"+- is the deviation over {report.seeds} seeds"
        if report.seeds > 1
        else "+- is the standard error of the held-out samples (one seed: how far another would be is unknown)"
    )
    seeds = ": sd is the mean over seeds, the range that of all seeds" if report.seeds > 1 else ""
    return (
        f"Ours: accuracy on {num} held-out samples, {spread}; head distance and NMI of the last layer, mean over "
        f"heads, and its heads' standard deviation (smallest .. largest){seeds}; GFLOP with the teachers', and how "
        "many times those of the feature teacher alone without masks (the paper's Appendix D: about 1.2 times the "
        "time, ViT-B without masks). The paper's figures are COCO and ADE20K after fine-tuning, which are not measured "
        "here."
    )


def _made_with(report: Report) -> str:
    revisions = sorted(
        {
            str(measures.environment.get("git_revision"))
            for result in report.results
            for measures in result.measures
            if measures.environment is not None
        }
    )
    commit = f", commit {' and '.join(revisions)}" if revisions else ""
    return f"{commit}{f', on {report.machine}' if report.machine else ''}"


def _sentences(report: Report) -> list[str]:
    sentences = []
    for result, reference in pairs(report.table, report.results):
        parts = []
        for name, (called, unit, decimals) in _FIGURES.items():
            found = difference(result, reference, name)
            if found is None:
                continue
            text = f"{called} {found.value:+.{decimals}f}{unit}"
            verdict = f"standard error {found.standard_error:.{decimals}f}" if found.is_clear else "no difference"
            parts.append(f"{text} ({verdict})")
        paper = paper_difference(result.row, reference.row)
        if paper is not None:
            parts.append(f"the paper: AP box {paper[0]:+.1f}, AP mask {paper[1]:+.1f}")
        sentences.append(f"{result.row.name} against {reference.row.name}: {'; '.join(parts)}.")
    if sentences:
        source = f"{report.seeds} seeds, which is itself rough" if report.seeds > 1 else "held-out samples alone"
        sentences.append(f"No difference: under twice the standard error, of {source}.")
    return sentences


def _cell(figure: Figure | None, decimals: int) -> str:
    if figure is None:
        return _NOTHING
    spread = "" if figure.spread is None else f" +- {figure.spread:.{decimals}f}"
    return f"{figure.mean:.{decimals}f}{spread}"


def _heads_cell(layers: Sequence[OverHeads], decimals: int) -> str:
    if not layers:
        return _NOTHING
    _, deviation, smallest, largest = (f"{value:.{decimals}f}" for value in layers[-1])
    return f"{deviation} ({smallest} .. {largest})"


def _numbers(values: Sequence[float]) -> str:
    return " ".join(f"{value:.6g}" for value in values)


def _number(value: float | None, decimals: int) -> str:
    return _NOTHING if value is None else f"{value:.{decimals}f}"


def _significant(value: float | None) -> str:
    return _NOTHING if value is None else f"{value:.3g}"
