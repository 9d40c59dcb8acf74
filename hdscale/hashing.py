"""Fixed integer hashes, and digests of files and values.

Order, views and random masks must not change with a library's version: `numpy.random.Generator` streams may change
between NumPy releases; the integer hashes are written out and never will.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

_GOLDEN = 0x9E3779B97F4A7C15
_MIX1 = 0xBF58476D1CE4E5B9
_MIX2 = 0x94D049BB133111EB
_64_BITS = 0xFFFFFFFFFFFFFFFF


def splitmix64(values: np.ndarray) -> np.ndarray:
    """Mix 64-bit integers: the output function of splitmix64 (Steele, Lea, Flood 2014).

    Args:
        values: any shape, uint64.

    Returns:
        The same shape, uint64; a bijection of the input.
    """
    with np.errstate(over="ignore"):
        z = values + np.uint64(_GOLDEN)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(_MIX1)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(_MIX2)
        return z ^ (z >> np.uint64(31))


def hash64(*parts: int | np.ndarray) -> np.ndarray:
    """Hash integers, or broadcastable arrays of them, to uint64; the order of the parts matters."""
    state = np.zeros((), dtype=np.uint64)
    for part in parts:
        word = np.asarray(part).astype(np.int64).view(np.uint64) if isinstance(part, np.ndarray) else _word(part)
        state = splitmix64(state ^ word)
    return state


def hash_int(*parts: int) -> int:
    """Return `hash64` of integers as a Python integer: a few of them cost a tenth of NumPy's calls."""
    return extend_hash(0, *parts)


def extend_hash(state: int, *parts: int) -> int:
    """Hash further integers into what `hash_int` has returned for those before them."""
    for part in parts:
        z = ((state ^ part) + _GOLDEN) & _64_BITS
        z = ((z ^ (z >> 30)) * _MIX1) & _64_BITS
        z = ((z ^ (z >> 27)) * _MIX2) & _64_BITS
        state = z ^ (z >> 31)
    return state


def _word(part: int) -> np.ndarray:
    return np.asarray(part & _64_BITS, dtype=np.uint64)


def uniform(bits: np.ndarray) -> np.ndarray:
    """Turn uint64 hashes into float64 in [0, 1), from their upper 53 bits."""
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def uniform_int(bits: int) -> float:
    """Turn one hash into a number in [0, 1), as `uniform` does."""
    return (bits >> 11) * 2.0**-53


def json_digest(value: Any) -> str:
    """Return the sha256 of a JSON-able value, independent of key order and spacing."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """Return the sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def short_value(value: Any, write: Callable[[Any], str] = str) -> str:
    """Write a value for a message: of a sha256 the first 12 digits, of anything else what `write` makes of it."""
    is_digest = isinstance(value, str) and len(value) == 64
    return f"sha256 {value[:12]}..." if is_digest else write(value)
