"""k-NN on mean-pooled patch tokens: how good features are without training anything on them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from hdscale.types import Batch

_CHUNK = 1024
"""Held-out rows compared at once: bounds the similarity matrix."""


class KnnResult(NamedTuple):
    """Accuracy on held-out samples."""

    accuracy: float  # share in [0, 1]
    standard_error: float  # of that share: sqrt(p (1 - p) / num)
    num: int  # held-out samples


def knn_accuracy(
    train_features: Tensor, train_labels: Tensor, val_features: Tensor, val_labels: Tensor, k: int
) -> KnnResult:
    """Classify held-out features by the majority of their k nearest training features.

    Nearness is cosine similarity in float32; equally near neighbours rank by their row. A tie of votes goes to the class
    of the nearest neighbour among the tied classes.

    Args:
        train_features: (M, D).
        train_labels: (M,) int64.
        val_features: (V, D), V at least 1.
        val_labels: (V,) int64.
        k: neighbours that vote; all M when there are fewer.
    """
    assert len(train_features) and len(val_features), "k-NN needs samples on both sides"
    train = F.normalize(train_features.float(), dim=1)
    correct = 0
    for start in range(0, len(val_features), _CHUNK):
        val = F.normalize(val_features[start : start + _CHUNK].float(), dim=1)
        order = torch.argsort(val @ train.T, dim=1, descending=True, stable=True)[:, :k]  # (chunk, k), nearest first
        predicted = _majority(train_labels[order])
        correct += int((predicted == val_labels[start : start + _CHUNK]).sum())
    accuracy = correct / len(val_features)
    error = math.sqrt(accuracy * (1 - accuracy) / len(val_features))
    return KnnResult(accuracy, error, len(val_features))


def _majority(votes: Tensor) -> Tensor:
    """Return the most frequent label of each row (V, k); of equally frequent ones, the first in the row."""
    counts = (votes.unsqueeze(2) == votes.unsqueeze(1)).sum(dim=2)  # (V, k): votes for each position's label
    first = counts.argmax(dim=1, keepdim=True)  # argmax returns the first of equal maxima
    return votes.gather(1, first).squeeze(1)


def extract_features(encode: Callable[[Tensor], Tensor], loader: Iterable[Batch]) -> tuple[Tensor, Tensor]:
    """Run an encoder over a loader.

    Args:
        encode: (B, 3, H, W) uint8 to features (B, D).
        loader: batches of held-out views.

    Returns:
        (V, D) float32 features and (V,) int64 labels, on the CPU.
    """
    features, labels = [], []
    with torch.no_grad():
        for batch in loader:
            features.append(encode(batch.images).float().cpu())
            labels.append(batch.labels.cpu())
    assert features, "the loader gave no batch"
    return torch.cat(features), torch.cat(labels)


def pooled(patch_tokens: Tensor) -> Tensor:
    """Average patch tokens: (B, N, D) to (B, D)."""
    return patch_tokens.float().mean(dim=1)


def raw_pixels(images: Tensor) -> Tensor:
    """Take pixels as features: (B, 3, H, W) uint8 to (B, 3 H W) float32 in [0, 1]."""
    return images.flatten(1).float() / 255
