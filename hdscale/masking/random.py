"""Random masks (Table 8) that need no store: a pure function of seed, epoch or view, and sample."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from hdscale.hashing import hash64

_STREAM = 0x6D61736B
"""Keeps these hashes apart from those that the views draw of the same seed, number and sample."""


def random_keep_indices(
    sample_ids: np.ndarray | Tensor, numbers: int | np.ndarray | Tensor, num_patches: int, num_keep: int, seed: int
) -> Tensor:
    """Keep the patches whose hashes rank lowest.

    Args:
        sample_ids: (B,) rows of the index.
        numbers: what a sample's masks differ by, its epoch or its augmented view: (B,), or one for all.
        num_patches: N.
        num_keep: K.
        seed: the run's seed.

    Returns:
        (B, K) int64, ascending, on the CPU.
    """
    assert 1 <= num_keep <= num_patches, f"cannot keep {num_keep} of {num_patches} patches"
    samples = np.asarray(torch.as_tensor(sample_ids).cpu())
    number_of_each = np.broadcast_to(np.asarray(torch.as_tensor(numbers).cpu()), samples.shape)
    ranks = hash64(seed, _STREAM, number_of_each[:, None], samples[:, None], np.arange(num_patches))  # (B, N)
    order = np.argsort(ranks, axis=1, kind="stable")
    return torch.from_numpy(np.sort(order[:, :num_keep], axis=1).astype(np.int64))
