"""k-NN on mean-pooled patch tokens: how good features are without training anything on them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hdscale.evaluation.accuracy import Accuracy, accuracy_of
from hdscale.types import Batch

_CELLS = 1 << 26
"""Similarities computed at once: 256 MB."""


class Features(NamedTuple):
    """What classifiers of frozen features learn from, and what they are judged by; on the CPU."""

    train: Tensor  # (M, D) float32
    train_labels: Tensor  # (M,) int64
    val: Tensor  # (V, D) float32
    val_labels: Tensor  # (V,) int64


def knn_accuracy(
    train_features: Tensor, train_labels: Tensor, val_features: Tensor, val_labels: Tensor, k: int
) -> Accuracy:
    """Classify held-out features by the majority of their k nearest training features.

    Nearness is cosine similarity in float32; equally near neighbours rank by their row. A tie of votes goes to the
    class of the nearest neighbour among the tied classes.

    Args:
        train_features: (M, D).
        train_labels: (M,) int64.
        val_features: (V, D), V at least 1.
        val_labels: (V,) int64.
        k: neighbours that vote; all M when there are fewer.
    """
    assert min(len(train_features), len(val_features)) > 0, "k-NN needs samples on both sides"
    train = F.normalize(train_features.float(), dim=1)
    chunk = max(1, _CELLS // len(train))
    correct = 0
    for start in range(0, len(val_features), chunk):
        val = F.normalize(val_features[start : start + chunk].float(), dim=1)
        predicted = _majority(train_labels[_nearest(val @ train.T, min(k, len(train)))])
        correct += int((predicted == val_labels[start : start + chunk]).sum())
    return accuracy_of(correct, len(val_features))


def _nearest(similarity: Tensor, k: int) -> Tensor:
    """Return the k nearest rows of each held-out sample (V, M) as (V, k), nearest first, equally near ones by row."""
    values, rows = similarity.topk(k, dim=1)
    rows = rows.sort(dim=1).values
    order = similarity.gather(1, rows).argsort(dim=1, descending=True, stable=True)
    nearest = rows.gather(1, order)
    # topk may choose any of several rows that are as near as the last one; sorting everything is slow, but stable.
    tied = (similarity >= values[:, -1:]).sum(dim=1) > k
    if tied.any():
        nearest[tied] = similarity[tied].argsort(dim=1, descending=True, stable=True)[:, :k]
    return nearest


def _majority(votes: Tensor) -> Tensor:
    """Return the most frequent label of each row (V, k); of equally frequent ones, the first in the row."""
    counts = (votes.unsqueeze(2) == votes.unsqueeze(1)).sum(dim=2)  # (V, k): votes for each position's label
    first = counts.argmax(dim=1, keepdim=True)  # argmax returns the first of equal maxima
    return votes.gather(1, first).squeeze(1)


def extract_features(
    encode: Callable[[Tensor], Tensor], loader: Iterable[Batch], progress: Callable[[int], None] | None = None
) -> tuple[Tensor, Tensor]:
    """Run an encoder over a loader.

    Args:
        encode: (B, 3, H, W) uint8 to features (B, D).
        loader: batches of held-out views.
        progress: told how many images were done since it was last called.

    Returns:
        (V, D) float32 features and (V,) int64 labels, on the CPU.
    """
    features, labels = [], []
    with torch.no_grad():
        for batch in loader:
            features.append(encode(batch.images).float().cpu())
            labels.append(batch.labels.cpu())
            if progress is not None:
                progress(len(batch.images))
    assert features, "the loader gave no batch"
    return torch.cat(features), torch.cat(labels)


def pooled(patch_tokens: Tensor) -> Tensor:
    """Average patch tokens: (B, N, D) to (B, D)."""
    return patch_tokens.float().mean(dim=1)


def raw_pixels(images: Tensor) -> Tensor:
    """Take pixels as features: (B, 3, H, W) uint8 to (B, 3 H W) float32 in [0, 1]."""
    return images.flatten(1).float() / 255
