"""What sits between student and feature teacher during training, and is removed at export."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hdscale.config.sections import StudentConfig
from hdscale.errors import UserError


class FeatureHead(nn.Module):
    """Student tokens (B, S, D) to the feature teacher's width (B, S, T): one Linear, or nothing."""

    def __init__(self, embed_dim: int, target_dim: int, *, linear: bool, seed: int) -> None:
        """Draw small random weights from a generator of its own.

        Args:
            embed_dim: D.
            target_dim: T; equal to D without the Linear.
            linear: project, or hand through.
            seed: of the weights.
        """
        super().__init__()
        assert linear or embed_dim == target_dim
        self.proj = nn.Linear(embed_dim, target_dim) if linear else nn.Identity()
        if isinstance(self.proj, nn.Linear):
            nn.init.normal_(self.proj.weight, std=0.02, generator=torch.Generator().manual_seed(seed))
            nn.init.zeros_(self.proj.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        """Project every token."""
        return self.proj(tokens)


def build_layer_heads(num_layers: int, embed_dim: int, target_dim: int, *, seed: int) -> nn.ModuleList | None:
    """Build a Linear from student to teacher width for each of several layers; None where the widths are equal."""
    if embed_dim == target_dim:
        return None
    # Seeds of their own: equal heads would be trained from the same place.
    heads = [FeatureHead(embed_dim, target_dim, linear=True, seed=seed + 1 + layer) for layer in range(num_layers)]
    return nn.ModuleList(heads)


def build_head(config: StudentConfig, embed_dim: int, target_dim: int, *, seed: int) -> FeatureHead:
    """Build the head that `student.decoder` names; of a transformer decoder, the Linear behind its blocks.

    Args:
        config: the recipe's section.
        embed_dim: width of what comes in: the student's, or its decoder's.
        target_dim: width of the feature teacher's tokens.
        seed: of the weights.

    Raises:
        UserError: `identity` between different widths.
    """
    if config.decoder == "identity" and embed_dim != target_dim:
        raise UserError(
            f"student.decoder identity needs equal widths, the student has {embed_dim} and the feature teacher "
            f"{target_dim}; set student.decoder=linear"
        )
    return FeatureHead(embed_dim, target_dim, linear=config.decoder != "identity", seed=seed)
