"""Masks as bits: one row per sample, 1 = kept."""

from __future__ import annotations

import numpy as np


def row_bytes(num_patches: int) -> int:
    """Return how many bytes hold one sample's mask."""
    return -(-num_patches // 8)


def pack_indices(keep_indices: np.ndarray, num_patches: int) -> np.ndarray:
    """Turn (n, K) indices of kept patches into (n, ceil(N / 8)) uint8, lowest patch in the lowest bit."""
    kept = np.zeros((len(keep_indices), num_patches), dtype=bool)
    np.put_along_axis(kept, keep_indices, True, axis=1)
    return np.packbits(kept, axis=1, bitorder="little")


def unpack_indices(packed: np.ndarray, num_patches: int, num_keep: int) -> np.ndarray:
    """Turn (n, ceil(N / 8)) uint8 back into (n, K) int64, ascending; each row must have K bits set."""
    kept = np.unpackbits(packed, axis=1, count=num_patches, bitorder="little")
    return np.nonzero(kept)[1].astype(np.int64).reshape(len(packed), num_keep)


def rows_with_other_count(packed: np.ndarray, num_patches: int, num_keep: int) -> np.ndarray:
    """Return the rows of (n, ceil(N / 8)) uint8 that do not keep exactly K of the N patches."""
    kept = np.unpackbits(packed, axis=1, bitorder="little")
    wrong = (kept.sum(axis=1) != num_keep) | kept[:, num_patches:].any(axis=1)
    return np.nonzero(wrong)[0]
