"""Attention statistics of a whole network, layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from hdscale.analysis.attention import attention_from_qk, head_distance, normalized_mutual_information
from hdscale.types import Batch, ViTOutput


class AttentionCurves(NamedTuple):
    """One number per relation layer, in order of depth: means over heads, queries and images."""

    head_distance: tuple[float, ...]  # pixels
    nmi: tuple[float, ...]  # in [0, 1]


def attention_curves(
    encode: Callable[[Tensor], ViTOutput],
    loader: Iterable[Batch],
    *,
    num_images: int,
    num_prefix_tokens: int,
    grid_size: int,
    patch_size: int,
) -> AttentionCurves:
    """Average head distance and NMI of the relation layers.

    Args:
        encode: (B, 3, H, W) uint8 to an output with Q and K of all tokens.
        loader: held-out views.
        num_images: the first so many of them; all when there are fewer.
        num_prefix_tokens: P.
        grid_size: patches along one side.
        patch_size: side of a patch in pixels.
    """
    distances, mutual_info, seen = [], [], 0
    for batch in loader:
        images = batch.images[: num_images - seen]
        with torch.no_grad():
            output = encode(images)
        attention = [
            attention_from_qk(query, key, num_prefix_tokens, output.attention_bias)
            for query, key in zip(output.queries, output.keys, strict=True)
        ]
        distances.append(_layer_means([head_distance(a, grid_size, patch_size) for a in attention]) * len(images))
        mutual_info.append(_layer_means([normalized_mutual_information(a) for a in attention]) * len(images))
        seen += len(images)
        if seen == num_images:
            break
    assert seen, "the loader gave no batch"
    return AttentionCurves(_mean(distances, seen), _mean(mutual_info, seen))


def _layer_means(values: list[Tensor]) -> Tensor:
    """Average over heads: per layer (A,), to (layers,)."""
    return torch.stack([value.mean() for value in values])


def _mean(sums: list[Tensor], count: int) -> tuple[float, ...]:
    return tuple((torch.stack(sums).sum(dim=0) / count).tolist())
