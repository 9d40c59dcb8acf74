"""Attention statistics of a whole network, layer by layer and head by head."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hdscale.analysis.attention import attention_from_qk, head_distance, normalized_mutual_information
from hdscale.types import Batch, ViTOutput


class AttentionCurves(NamedTuple):
    """One number per relation layer, in order of depth, and head: means over queries and images."""

    head_distance: tuple[tuple[float, ...], ...]  # (layers, A) pixels
    nmi: tuple[tuple[float, ...], ...]  # (layers, A) in [0, 1]


class OverHeads(NamedTuple):
    """What the heads of one layer have in common and how far apart they are."""

    mean: float
    deviation: float  # standard deviation of these heads, which are all there are: no correction for a sample
    smallest: float
    largest: float


def over_heads(layers: Sequence[Sequence[float]]) -> list[OverHeads]:
    """Sum up (layers, A) numbers layer by layer; the mean alone cannot tell heads that differ from heads that agree."""
    found = []
    for heads in layers:
        mean = statistics.fmean(heads)
        # Not `pstdev`, which fails on the NaN of a student that diverged.
        deviation = math.sqrt(statistics.fmean((value - mean) ** 2 for value in heads))
        found.append(OverHeads(mean, deviation, min(heads), max(heads)))
    return found


def attention_curves(
    encode: Callable[[Tensor], ViTOutput],
    loader: Iterable[Batch],
    *,
    num_images: int,
    num_prefix_tokens: int,
    grid_size: int,
    patch_size: int,
) -> AttentionCurves:
    """Average head distance and NMI of every head of the relation layers over queries and images.

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
        distances.append([head_distance(a, grid_size, patch_size) * len(images) for a in attention])
        mutual_info.append([normalized_mutual_information(a) * len(images) for a in attention])
        seen += len(images)
        if seen == num_images:
            break
    assert seen, "the loader gave no batch"
    return AttentionCurves(_means(distances, seen), _means(mutual_info, seen))


def _means(sums: list[list[Tensor]], num_images: int) -> tuple[tuple[float, ...], ...]:
    """Turn sums over images, (A,) per batch and layer, into means, per layer and head."""
    return tuple(tuple((torch.stack(layer).sum(dim=0) / num_images).tolist()) for layer in zip(*sums, strict=True))
