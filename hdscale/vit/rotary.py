"""Rotary position embeddings of timm's `Eva`, patch by patch.

A rotation is (L or 1, B or 1, A or 1, N, R): of each block, image and head or of all of them, and of N patches. Prefix
tokens are not rotated.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.layers.pos_embed_sincos import apply_rot_embed_cat
from torch import Tensor

from hdscale.vit.tokens import take_rows


def as_rotation(rope: Tensor | None, *, by_block: bool) -> Tensor | None:
    """Give timm's (N, R), or (L, A, N, R) with `by_block`, all five axes; None, of a model without, stays None."""
    if rope is None:
        return None
    return rope[:, None] if by_block else rope[None, None, None]


def take_rotation(rotation: Tensor | None, keep_indices: Tensor) -> Tensor | None:
    """Take the rotations of chosen patches (B, K): (L or 1, B, A or 1, K, R)."""
    if rotation is None:
        return None
    batch = len(keep_indices)
    return torch.stack([take_rows(block.expand(batch, -1, -1, -1), keep_indices) for block in rotation])


def rotation_of(rotation: Tensor | None, layer: int) -> Tensor | None:
    """Return one block's rotation (B or 1, A or 1, N, R)."""
    return None if rotation is None else rotation[min(layer, len(rotation) - 1)]


def as_attended(attn: Any, query: Tensor, key: Tensor, rope: Tensor | None) -> tuple[Tensor, Tensor]:
    """Do to Q and K (B, A, P + N, E) what timm's attention does to them behind its q/k norm.

    Args:
        attn: an `Attention`, `EvaAttention` or `AttentionRope`.
        query: what `attn.q_norm` gave.
        key: what `attn.k_norm` gave, with fewer heads where queries share them.
        rope: the block's rotation; None: it has none.

    Returns:
        Q and K of equally many heads.
    """
    if rope is not None:
        query, key = _rotated(attn, query, rope), _rotated(attn, key, rope)
    groups = getattr(attn, "num_kv_groups", 1)
    return query, key if groups == 1 else key.repeat_interleave(groups, dim=1)


def _rotated(attn: Any, x: Tensor, rope: Tensor) -> Tensor:
    prefix, patches = x[:, :, : attn.num_prefix_tokens], x[:, :, attn.num_prefix_tokens :]
    return torch.cat([prefix, apply_rot_embed_cat(patches, rope, half=attn.rotate_half)], dim=2)
