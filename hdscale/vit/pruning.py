"""Blocks without the parts nobody looks at, for frozen models: built once, before an engine takes the model."""

from __future__ import annotations

from typing import TypeGuard, cast

import torch
import torch.nn.functional as F
from timm.layers.attention import Attention
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from hdscale.vit.build import ViT
from hdscale.vit.tokens import take_rows


class QueryKeyAttention(nn.Module):
    """The query and key half of an attention layer."""

    def __init__(self, attn: Attention) -> None:
        super().__init__()
        self.num_heads = attn.num_heads
        self.qk = _part_of(attn.qkv, 0, 2)
        self.q_norm = attn.q_norm
        self.k_norm = attn.k_norm

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return Q and K, each (B, A, S, E), of normalised tokens (B, S, D)."""
        query, key = self.qk(x).unflatten(2, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return self.q_norm(query), self.k_norm(key)


class QueryKeyBlock(nn.Module):
    """A block of which only Q and K are used: `norm1` and two thirds of `qkv`."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.norm1 = block.norm1
        self.attn = QueryKeyAttention(cast("Attention", block.attn))

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Compute Q and K, which a hook on `q_norm` and `k_norm` takes, and hand the tokens (B, S, D) through."""
        del bias  # of logits, which nobody computes here
        self.attn(self.norm1(x))
        return x


class KeptQueryAttention(nn.Module):
    """Attention in which some tokens ask and all tokens answer."""

    def __init__(self, attn: Attention) -> None:
        super().__init__()
        self.num_heads = attn.num_heads
        self.q = _part_of(attn.qkv, 0, 1)
        self.kv = _part_of(attn.qkv, 1, 3)
        self.q_norm = attn.q_norm
        self.k_norm = attn.k_norm
        self.norm = attn.norm
        self.proj = attn.proj

    def forward(self, asking: Tensor, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Attend from tokens (B, R, D) to tokens (B, S, D), logits plus `bias` (B or 1, A, R, S); returns (B, R, D)."""
        query = self.q_norm(self.q(asking).unflatten(2, (self.num_heads, -1)).transpose(1, 2))  # (B, A, R, E)
        key, value = self.kv(x).unflatten(2, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)  # (B, A, S, E)
        x = F.scaled_dot_product_attention(query, self.k_norm(key), value, attn_mask=bias)
        return self.proj(self.norm(x.transpose(1, 2).flatten(2)))


class KeptQueryBlock(nn.Module):
    """A last block that finishes only the tokens someone wants: K and V of all, everything else of those."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.norm1 = block.norm1
        self.attn = KeptQueryAttention(cast("Attention", block.attn))
        self.ls1 = block.ls1
        self.norm2 = block.norm2
        self.mlp = block.mlp
        self.ls2 = block.ls2

    def forward(self, x: Tensor, rows: Tensor | None, bias: Tensor | None = None) -> Tensor:
        """Return tokens (B, R, D) of the wanted rows (B, R) out of (B, S, D); all rows when None.

        `bias` (B or 1, A, S, S) is added to the logits.
        """
        normed = self.norm1(x)
        asking = normed
        if rows is not None:
            x, asking = take_rows(x, rows), take_rows(normed, rows)
            bias = None if bias is None else take_rows(bias.expand(len(rows), -1, -1, -1), rows)
        x = x + self.ls1(self.attn(asking, normed, bias))
        return x + self.ls2(self.mlp(self.norm2(x)))


def is_plain(block: nn.Module) -> TypeGuard[Block]:
    """Tell whether a block is timm's standard one: norm, attention, norm, MLP, and no gate."""
    return type(block) is Block and type(block.attn) is Attention and getattr(block.attn, "gate", None) is None


def prune_after(model: ViT, num_whole: int, *, query_key_next: bool) -> None:
    """Delete everything behind the first `num_whole` blocks; of the next block, its Q and K may stay.

    Args:
        model: changed in place.
        num_whole: blocks that are needed whole.
        query_key_next: keep Q and K of block number `num_whole`.
    """
    blocks = list(model.blocks)
    kept = blocks[:num_whole]
    if query_key_next:
        next_block = blocks[num_whole]
        kept.append(QueryKeyBlock(next_block) if is_plain(next_block) else next_block)
    if isinstance(model, VisionTransformer):
        model.blocks = nn.Sequential(*kept)
    else:
        model.blocks = nn.ModuleList(kept)
    model.norm = nn.Identity()
    model.fc_norm = nn.Identity()


def split_last_block(model: ViT) -> None:
    """Let the last block finish wanted tokens only, in place; a block that is not timm's standard one stays whole."""
    last = model.blocks[-1]
    if is_plain(last):
        model.blocks[-1] = KeptQueryBlock(last)


def _part_of(qkv: nn.Linear, start: int, stop: int) -> nn.Linear:
    """Copy thirds `start` to `stop` of a fused query-key-value layer."""
    third = qkv.out_features // 3
    rows = slice(start * third, stop * third)
    part = nn.Linear(
        qkv.in_features,
        (stop - start) * third,
        bias=qkv.bias is not None,
        device=qkv.weight.device,
        dtype=qkv.weight.dtype,
    )
    with torch.no_grad():
        part.weight.copy_(qkv.weight[rows])
        if qkv.bias is not None:
            part.bias.copy_(qkv.bias[rows])
    return part
