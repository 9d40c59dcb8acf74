"""Tables as lines of text, for terminals and for Markdown files."""

from __future__ import annotations

from collections.abc import Sequence


def grid(
    header: Sequence[str], rows: Sequence[Sequence[str]], *, align: str | None = None, ruled: bool = False
) -> list[str]:
    """Lay out a table as plain text: columns as wide as their widest cells, two spaces apart.

    Args:
        header: one title per column.
        rows: one cell per column.
        align: one `<` (flush left) or `>` (flush right) per column; None: the first one left, all others right.
        ruled: put dashes between header and rows.

    Returns:
        Lines without spaces at their ends.
    """
    lines = _padded([header, *rows], align)
    if ruled:
        lines.insert(1, ["-" * len(title) for title in lines[0]])
    return ["  ".join(line).rstrip() for line in lines]


def markdown_grid(header: Sequence[str], rows: Sequence[Sequence[str]], *, padded: bool = True) -> list[str]:
    """Lay out a Markdown table.

    Args:
        header: one title per column.
        rows: one cell per column.
        padded: show columns in line also where the source is read, the first one flush left, all others flush right.

    Returns:
        Lines, in whose rows `|` is escaped.
    """
    lines = [header, *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    if not padded:
        return [
            f"| {' | '.join(header)} |",
            f"|{'---|' * len(header)}",
            *(f"| {' | '.join(row)} |" for row in lines[1:]),
        ]
    lines = _padded(lines, None)
    first, *others = (len(title) for title in lines[0])
    lines.insert(1, ["-" * first, *(f"{'-' * (width - 1)}:" for width in others)])
    return [f"| {' | '.join(line)} |" for line in lines]


def _padded(lines: Sequence[Sequence[str]], align: str | None) -> list[list[str]]:
    """Fill all cells of a column up to the same width."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    align = align or "<" + ">" * (len(widths) - 1)
    return [[f"{cell:{side}{width}}" for cell, side, width in zip(line, align, widths, strict=True)] for line in lines]
