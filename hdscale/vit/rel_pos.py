"""One relative position bias for the attention of all blocks (FD, after BEiT), on a timm model that has none."""

from __future__ import annotations

from typing import Any

import torch
from timm.layers.pos_embed_rel import RelPosBias
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from hdscale.errors import UserError


class SharedRelPosBias(RelPosBias):
    """timm's table of a learnt bias for each head and offset, with three more for the class token.

    Its `forward` gives the bias: ZeRO-3 gathers a parameter for its own module's forward only.
    """

    def __init__(self, grid_size: int, num_heads: int) -> None:
        """Start from no bias at all (BEiT, FD)."""
        with torch.random.fork_rng(devices=[]):  # timm draws random values first
            super().__init__((grid_size, grid_size), num_heads, prefix_tokens=1)
        nn.init.zeros_(self.relative_position_bias_table)

    def forward(self, rows: Tensor | None = None) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Return what is added to the logits: (1, A, 1 + N, 1 + N), or (B, A, R, R) at rows (B, R) of the tokens."""
        bias = self.get_bias()
        if rows is None:
            return bias
        return bias[0][:, rows.unsqueeze(2), rows.unsqueeze(1)].transpose(0, 1)  # (A, B, R, R) to (B, A, R, R)


def add_rel_pos_bias(field: str, model: VisionTransformer) -> None:
    """Give a model a bias that `ViTEncoder` uses, in place; timm's own forward does not know it.

    Raises:
        UserError: the model has no class token, or registers.
    """
    if model.cls_token is None or model.num_prefix_tokens != 1:
        raise UserError(
            f"{field} must have a class token and no registers for rel_pos_bias, got {model.num_prefix_tokens} prefix "
            "tokens; choose a plain ViT such as vit_base_patch16_224, or set student.rel_pos_bias=false"
        )
    attn: Any = model.blocks[0].attn
    model.rel_pos_bias = SharedRelPosBias(int(model.patch_embed.grid_size[0]), int(attn.num_heads))


def resize_rel_pos_bias(model: VisionTransformer | Eva) -> None:
    """Interpolate the bias to the grid that `model.set_input_size` has given the model, if it has a bias."""
    bias = getattr(model, "rel_pos_bias", None)
    if bias is not None:
        bias.set_window_size(model.patch_embed.grid_size)
