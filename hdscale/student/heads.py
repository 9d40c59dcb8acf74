"""What sits between student and feature teacher during training, and is removed at export."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from hdscale.config.sections import StudentConfig
from hdscale.errors import UserError
from hdscale.student.init import Init, draw_head

_EPS = 1e-6


class FeatureHead(nn.Module):
    """Student tokens (B, S, D) to a teacher's width (B, S, T): one Linear, behind a norm or alone, or nothing."""

    def __init__(
        self, embed_dim: int, target_dim: int, *, init: Init, seed: int, linear: bool = True, norm: bool = False
    ) -> None:
        """Draw the Linear's weights from a generator of its own.

        Args:
            embed_dim: D.
            target_dim: T; equal to D without the Linear.
            init: `student.init`.
            seed: of the weights.
            linear: project, or hand through.
            norm: put a norm of the student's kind first, for tokens that come from between its blocks.
        """
        super().__init__()
        assert linear or embed_dim == target_dim
        self.norm = nn.LayerNorm(embed_dim, eps=_EPS) if norm else nn.Identity()
        self.proj: nn.Module = nn.Identity()
        if linear:
            with torch.random.fork_rng(devices=[]):  # PyTorch draws first
                self.proj = nn.Linear(embed_dim, target_dim)
            draw_head(self.proj, init, seed=seed)

    def forward(self, tokens: Tensor) -> Tensor:
        """Project every token."""
        return self.proj(self.norm(tokens))


def build_layer_heads(
    num_layers: int,
    embed_dim: int,
    target_dim: int,
    *,
    token_head: Literal["norm_linear", "width"],
    init: Init,
    seed: int,
) -> nn.ModuleList | None:
    """Build what stands between student and teacher tokens at each of several layers.

    Args:
        num_layers: relation layers.
        embed_dim: D.
        target_dim: T, width of the relation teacher.
        token_head: `relation.token_head`.
        init: `student.init`.
        seed: of the weights.

    Returns:
        One head per layer; None where the tokens are compared as they are.
    """
    norm = token_head == "norm_linear"
    if not norm and embed_dim == target_dim:
        return None
    # Seeds of their own: equal heads would be trained from the same place.
    heads = [
        FeatureHead(embed_dim, target_dim, init=init, seed=seed + 1 + layer, norm=norm) for layer in range(num_layers)
    ]
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
    return FeatureHead(embed_dim, target_dim, init=config.init, seed=seed, linear=config.decoder != "identity")
