"""Two figures per attention head: how far it looks, and how much its attention depends on the query.

Prefix tokens (class, registers) have no place in the image: remove them with `drop_prefix` first.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def attention_from_qk(query: Tensor, key: Tensor, num_prefix_tokens: int = 0, bias: Tensor | None = None) -> Tensor:
    """Compute attention between patches: softmax(QK^T / sqrt(E)) over all tokens, then without prefix tokens.

    Args:
        query: (B, A, P + N, E), as the attention uses it, not yet scaled.
        key: (B, A, P + N, E).
        num_prefix_tokens: P.
        bias: (B or 1, A, P + N, P + N), which the attention adds to its logits; None: nothing.

    Returns:
        (B, A, N, N) float32, rows summing to 1.
    """
    with torch.autocast(query.device.type, enabled=False):
        logits = query.float() @ key.float().transpose(-2, -1) / math.sqrt(query.shape[-1])  # (B, A, P + N, P + N)
        if bias is not None:
            logits = logits + bias.float()
        # Leaving prefix keys out of the softmax is the same as renormalising, without dividing by a row's small rest.
        return logits[..., num_prefix_tokens:, num_prefix_tokens:].softmax(dim=-1)


def drop_prefix(attention: Tensor, num_prefix_tokens: int) -> Tensor:
    """Remove prefix tokens and renormalise the rows.

    Args:
        attention: (B, A, P + N, P + N), rows summing to 1.
        num_prefix_tokens: P.

    Returns:
        (B, A, N, N), rows summing to 1; a row that looked at prefix tokens only becomes uniform.
    """
    patches = attention[..., num_prefix_tokens:, num_prefix_tokens:]
    rest = patches.sum(dim=-1, keepdim=True)
    return torch.where(rest > 0, patches / rest, 1 / patches.shape[-1])


def head_distance(attention: Tensor, grid_size: int | tuple[int, int], patch_size: int | tuple[int, int]) -> Tensor:
    """Average head distance: how far from itself a query looks, weighted by attention (Section 2.1).

    Args:
        attention: (B, A, N, N) from query (third axis) to key, rows summing to 1.
        grid_size: patches down and across, one number for a square grid; N is their product.
        patch_size: pixels.

    Returns:
        (A,) float64: pixels, the mean over queries and images. The distance of a token to itself is 0.
    """
    rows, columns = grid_size if isinstance(grid_size, tuple) else (grid_size, grid_size)
    height, width = patch_size if isinstance(patch_size, tuple) else (patch_size, patch_size)
    assert attention.shape[-1] == rows * columns, f"{attention.shape[-1]} patches do not fill {rows} x {columns}"
    y, x = torch.meshgrid(
        torch.arange(rows, device=attention.device, dtype=torch.float64) * height,
        torch.arange(columns, device=attention.device, dtype=torch.float64) * width,
        indexing="ij",
    )
    places = torch.stack([y.flatten(), x.flatten()], dim=-1)  # (N, 2)
    offsets = places[:, None] - places[None, :]
    distance = offsets.square().sum(dim=-1).sqrt()  # (N, N), exactly 0 on the diagonal
    return (attention.double() * distance).sum(dim=-1).mean(dim=(0, 2))


def normalized_mutual_information(attention: Tensor) -> Tensor:
    """Mutual information of query and key over the root of their entropies: I(q, k) / sqrt(H(q) H(k)), p(q) = 1 / N.

    Section 2.1. 0: every query looks at the same places; 1: each query looks at a place of its own.

    Args:
        attention: (B, A, N, N) from query (third axis) to key, rows summing to 1.

    Returns:
        (A,) float64: computed for each image, then averaged over images; 0 where H(k) or H(q) is 0.
    """
    conditional = attention.double()  # (B, A, N, N): p(k | q)
    marginal = conditional.mean(dim=-2, keepdim=True)  # (B, A, 1, N): p(k)
    key_entropy = -torch.xlogy(marginal, marginal).sum(dim=(-2, -1))  # (B, A)
    query_entropy = math.log(attention.shape[-2])
    # Entropies subtracted would lose the digits of a small difference; the sum of p log(p / q) keeps them.
    ratio = torch.where(conditional > 0, conditional / marginal.clamp_min(torch.finfo(torch.float64).tiny), 1.0)
    information = torch.xlogy(conditional, ratio).sum(dim=-1).mean(dim=-1)  # (B, A)
    product = key_entropy * query_entropy
    root = product.clamp_min(torch.finfo(torch.float64).tiny).sqrt()
    normalized = torch.where(product > 0, information / root, 0.0)
    return normalized.mean(dim=0)
