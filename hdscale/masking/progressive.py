"""Progressive redundant token masking (Eq. 4): at a few depths of the teacher, drop the tokens most like the rest."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hdscale.config.sections import MaskConfig
from hdscale.errors import UserError
from hdscale.masking.counts import num_kept


def keep_least_redundant(patch_tokens: Tensor, num_keep: int) -> Tensor:
    """Keep the tokens least similar to the mean of all of them (PCAE).

    Args:
        patch_tokens: (B, N, T), any floating type.
        num_keep: how many of the N to keep.

    Returns:
        (B, num_keep) int64, ascending. Of equally similar tokens the lowest indices are kept.
    """
    assert 1 <= num_keep <= patch_tokens.shape[1], f"cannot keep {num_keep} of {patch_tokens.shape[1]} tokens"
    with torch.no_grad():
        # Sums in float64, of the values as they are: in float32 the order of additions, which differs between devices
        # and batch sizes, would decide close calls.
        tokens = patch_tokens.double()
        center = tokens.mean(dim=1, keepdim=True)  # (B, 1, T)
        norms = tokens.norm(dim=-1) * center.norm(dim=-1)
        similarity = (tokens * center).sum(dim=-1) / norms.clamp_min(torch.finfo(torch.float64).tiny)  # (B, N)
        order = similarity.argsort(dim=1, stable=True)
        return order[:, :num_keep].sort(dim=1).values


def progressive_keep_indices(stage_tokens: Sequence[Tensor], keep_ratio: float) -> Tensor:
    """Drop redundant tokens stage by stage; each stage chooses among the tokens the stage before it kept (Eq. 4).

    Args:
        stage_tokens: per stage (B, N, T), all N patch tokens; widths may differ between stages.
        keep_ratio: share of the remaining tokens each stage keeps: 196 -> 137 -> 95 -> 66 at 0.7.

    Returns:
        (B, K) int64, ascending.
    """
    assert stage_tokens, "progressive masking needs at least one stage"
    first = stage_tokens[0]
    kept = torch.arange(first.shape[1], device=first.device).expand(first.shape[0], -1)  # (B, N)
    for tokens in stage_tokens:
        remaining = tokens.gather(1, kept.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))
        kept = kept.gather(1, keep_share(remaining, keep_ratio))
    return kept


def keep_share(patch_tokens: Tensor, keep_ratio: float) -> Tensor:
    """Keep a share of the tokens (B, N, T), those least similar to the mean of all: (B, K) int64, ascending."""
    return keep_least_redundant(patch_tokens, num_kept(patch_tokens.shape[1], keep_ratio))


def stage_layers(depth: int, layers: Sequence[int] | None = None) -> tuple[int, ...]:
    """Return the 0-indexed blocks at which tokens are dropped: `layers`, or 0, L/3 and 2L/3 (Section 4.1).

    Raises:
        UserError: a layer that the teacher does not have, or layers that do not rise.
    """
    if layers is None:
        return (0, depth // 3, 2 * depth // 3)
    if not layers or min(layers) < 0 or max(layers) >= depth or sorted(set(layers)) != list(layers):
        raise UserError(
            f"mask.layers must be rising block numbers from 0 to {depth - 1} of the relation teacher, "
            f"got {list(layers)}: leave it out for [0, {depth // 3}, {2 * depth // 3}]"
        )
    return tuple(layers)


def patches_by_block(mask: MaskConfig, num_patches: int, depth: int) -> list[int] | None:
    """Return how many patches each block of the relation teacher runs on; None for a teacher that drops none.

    Args:
        mask: drops patches in the teacher where `in_teacher` says so.
        num_patches: N.
        depth: blocks of the relation teacher.
    """
    if mask.in_teacher != "drop":
        return None
    counts, stages = [], stage_layers(depth, mask.layers)
    for block in range(depth):
        if mask.at == "input" and block in stages:
            num_patches = num_kept(num_patches, mask.stage_keep_ratio)
        counts.append(num_patches)
        if mask.at == "output" and block in stages:
            num_patches = num_kept(num_patches, mask.stage_keep_ratio)
    return counts


def expected_num_keep(mask: MaskConfig, num_patches: int, depth: int) -> int | None:
    """Return how many of `num_patches` the student sees, or None when it sees all of them unmasked.

    Args:
        mask: its strategy and ratio count.
        num_patches: N, of student and teachers alike.
        depth: blocks of the relation teacher; only `progressive` depends on it.
    """
    if mask.strategy == "none":
        return None
    if mask.strategy != "progressive":
        return num_kept(num_patches, mask.keep_ratio)
    for _ in stage_layers(depth, mask.layers):
        num_patches = num_kept(num_patches, mask.stage_keep_ratio)
    return num_patches
