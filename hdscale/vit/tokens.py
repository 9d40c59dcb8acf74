"""Choose tokens: prefix tokens (class, registers) come first and always stay."""

from __future__ import annotations

import torch
from torch import Tensor


def token_rows(keep_indices: Tensor, num_prefix_tokens: int) -> Tensor:
    """Return the places of prefix tokens and kept patches among all tokens: (B, K) to (B, P + K)."""
    prefix = torch.arange(num_prefix_tokens, device=keep_indices.device).expand(len(keep_indices), -1)
    return torch.cat([prefix, keep_indices + num_prefix_tokens], dim=1)


def take_rows(x: Tensor, rows: Tensor) -> Tensor:
    """Gather tokens (B, S, D) or per-head tokens (B, A, S, E) at rows (B, R)."""
    index = rows.unsqueeze(-1) if x.ndim == 3 else rows[:, None, :, None]
    return x.gather(-2, index.expand(*x.shape[:-2], -1, x.shape[-1]))


def other_indices(keep_indices: Tensor, num_patches: int) -> Tensor:
    """Return the patches that were dropped: (B, K) of N to (B, N - K) int64 ascending."""
    batch, num_keep = keep_indices.shape
    dropped = keep_indices.new_ones(batch, num_patches).scatter(1, keep_indices, 0)
    return dropped.argsort(dim=1, descending=True, stable=True)[:, : num_patches - num_keep]


def compared_tokens(x: Tensor, num_prefix_tokens: int, *, cls: bool) -> Tensor:
    """Drop registers, and the class token unless `cls`: (..., P + K, E) to (..., S, E), S = K or 1 + K.

    Whatever is compared goes through it: row by row, student and teacher speak of the same tokens.
    """
    if not cls:
        return x[..., num_prefix_tokens:, :]
    return x if num_prefix_tokens == 1 else torch.cat([x[..., :1, :], x[..., num_prefix_tokens:, :]], dim=-2)
