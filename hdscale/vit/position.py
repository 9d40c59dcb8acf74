"""Fixed position embeddings."""

from __future__ import annotations

import torch
from torch import Tensor


def sincos_position_embedding(embed_dim: int, grid_size: int, num_prefix_tokens: int = 0) -> Tensor:
    """Compute MAE's fixed 2D sine-cosine embedding (He et al. 2021).

    The first half of the channels tells the column (x), the second half the row (y); in each half sines come first.

    Args:
        embed_dim: D, a multiple of 4.
        grid_size: patches along one side; N is its square.
        num_prefix_tokens: rows of zeros put before the patches (class token).

    Returns:
        (1, P + N, D) float32.
    """
    assert embed_dim % 4 == 0, f"{embed_dim} channels cannot be split into sin and cos of two axes"
    frequencies = 10000.0 ** -(torch.arange(embed_dim // 4, dtype=torch.float64) / (embed_dim // 4))
    angles = torch.arange(grid_size, dtype=torch.float64)[:, None] * frequencies  # (grid, D / 4)
    axis = torch.cat([angles.sin(), angles.cos()], dim=1)  # (grid, D / 2)
    columns = axis[None, :, :].expand(grid_size, -1, -1)
    rows = axis[:, None, :].expand(-1, grid_size, -1)
    patches = torch.cat([columns, rows], dim=-1).flatten(0, 1)  # (N, D)
    return torch.cat([patches.new_zeros(num_prefix_tokens, embed_dim), patches]).float().unsqueeze(0)
