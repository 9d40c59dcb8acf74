"""All tables by the name that a person types."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hdscale.ablation.paper_figures import PAPER_FIGURES
from hdscale.ablation.paper_tables import PAPER_TABLES
from hdscale.errors import UserError

if TYPE_CHECKING:
    from hdscale.ablation.table import Table

TABLES = {table.key: table for table in (*PAPER_TABLES, *PAPER_FIGURES)}


def find_table(key: str) -> Table:
    """Return a table.

    Raises:
        UserError: there is none of this name.
    """
    if key not in TABLES:
        raise UserError(f"table must be one of {', '.join(TABLES)}, got {key}")
    return TABLES[key]
