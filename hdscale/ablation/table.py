"""What a table of the paper is: rows with the paper's figures and the recipe that makes ours."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from hdscale.errors import UserError


class Paper(NamedTuple):
    """The paper's figures of a row: COCO by Mask-RCNN, and ADE20K."""

    ap_box: float
    ap_mask: float
    miou: float | None = None


class Row(NamedTuple):
    """One row of a table, or one curve of a figure.

    Overrides are `key=value` as launch/train.py takes them, on the scale's recipe. A value may be a word that the scale
    knows: a teacher (`@mae`, `@deit`, `@clip`, `@dino`, `@mae_weak`), a number of epochs (`@ablation`, `@main`,
    `@stage`, `@long`), or the student of another row, which is trained first (`@student:KEY`).
    """

    key: str  # for --rows and folder names
    name: str  # as the paper prints it
    overrides: tuple[str, ...] = ()
    paper: Paper | None = None
    demo: tuple[str, ...] = ()  # overrides of a student of 4 layers
    full: tuple[str, ...] = ()  # overrides at the paper's scale, such as another method's own optimiser
    model: str = ""  # a teacher that is measured as it is, such as `@mae`: nothing is trained
    against: str = ""  # row it is compared with; empty: the table's reference


class Table(NamedTuple):
    """A table or a figure."""

    key: str  # `8`, `fig1`
    title: str
    reference: str  # key of the row that others are compared with
    rows: tuple[Row, ...]
    base: tuple[str, ...] = ()  # overrides of all rows, before their own
    notes: tuple[str, ...] = ()  # what the paper leaves open here, and what is not measured
    demo_notes: tuple[str, ...] = ()

    @property
    def is_figure(self) -> bool:
        """Whether the paper shows curves over layers."""
        return self.key.startswith("fig")

    @property
    def heading(self) -> str:
        """`Table 8: ...` or `Figure 1: ...`."""
        kind = f"Figure {self.key.removeprefix('fig')}" if self.is_figure else f"Table {self.key}"
        return f"{kind}: {self.title}"

    def row(self, key: str) -> Row:
        """Return the row of this key."""
        return next(row for row in self.rows if row.key == key)

    def compared_with(self, row: Row) -> str:
        """Return the key of the row that a row is compared with; its own, where it is a reference itself."""
        return row.against or self.reference

    def select(self, keys: Sequence[str]) -> tuple[Row, ...]:
        """Return the named rows in the table's order, all of them for no name.

        Raises:
            UserError: the table has no such row.
        """
        known = [row.key for row in self.rows]
        for key in keys:
            if key not in known:
                raise UserError(f"--rows: table {self.key} has no row {key!r}; its rows are {', '.join(known)}")
        return tuple(row for row in self.rows if not keys or row.key in keys)
