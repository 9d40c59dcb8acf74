"""Accuracy on held-out samples with the error that their number leaves, and differences with theirs."""

from __future__ import annotations

import math
from typing import NamedTuple


class Accuracy(NamedTuple):
    """Share of held-out samples that a classifier gets right."""

    accuracy: float  # in [0, 1]
    standard_error: float  # of that share: sqrt(p (1 - p) / num)
    num: int  # held-out samples


def accuracy_of(correct: int, num: int) -> Accuracy:
    """Return the share of `num` samples, at least 1, and its binomial standard error."""
    share = correct / num
    return Accuracy(share, math.sqrt(share * (1 - share) / num), num)


class Difference(NamedTuple):
    """One measured figure less another, in the unit of both."""

    value: float
    standard_error: float

    @property
    def is_clear(self) -> bool:
        """Whether it is at least twice its standard error."""
        return self.value != 0 and abs(self.value) >= 2 * self.standard_error
