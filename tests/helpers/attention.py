"""Batches of random images, and the attention figures of one of them by loops in float64."""

import numpy as np
import torch

from hdscale.types import Batch

GRID, PREFIX = 3, 1


def make_batches(sizes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for size in sizes:
        images = torch.randint(0, 256, (size, 3, 24, 24), dtype=torch.uint8, generator=generator)
        ids = torch.arange(size)
        batches.append(Batch(images, ids, ids, ids, ids, None))
    return batches


def reference_figures(query, key, patch_size):
    """Head distance and NMI of one image and layer, (A,) each; loops in float64."""
    distances, mutual_info = [], []
    for q, k in zip(query.double().numpy(), key.double().numpy(), strict=True):
        logits = q @ k.T / np.sqrt(q.shape[-1])
        attention = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
        attention = attention[PREFIX:, PREFIX:] / attention[PREFIX:, PREFIX:].sum(axis=1, keepdims=True)
        places = np.array([(y, x) for y in range(GRID) for x in range(GRID)]) * patch_size
        between = np.sqrt(((places[:, None] - places[None]) ** 2).sum(-1))
        distances.append((attention * between).sum(axis=1).mean())
        joint = attention / len(attention)
        marginal = joint.sum(axis=0)
        information = (joint * np.log(joint / (marginal[None] / len(attention)))).sum()
        entropies = -(marginal * np.log(marginal)).sum() * np.log(len(attention))
        mutual_info.append(information / np.sqrt(entropies))
    return np.array(distances), np.array(mutual_info)


def reference_means(queries, keys, patch_size):
    """The same of (B, A, P + N, E), averaged over images."""
    figures = [reference_figures(q, k, patch_size) for q, k in zip(queries, keys, strict=True)]
    return np.mean([d for d, _ in figures], axis=0), np.mean([i for _, i in figures], axis=0)
