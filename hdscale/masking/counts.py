"""How many patches a ratio keeps: the one home of that rounding."""

from __future__ import annotations

import math


def num_kept(num_patches: int, keep_ratio: float) -> int:
    """Round `num_patches * keep_ratio` down, but keep at least one patch.

    A ratio such as 0.29 of 100, or 66 / 196 of 196, lands a rounding error below the integer it means; the small
    allowance gives the integer.
    """
    return max(1, math.floor(num_patches * keep_ratio + 1e-6))
