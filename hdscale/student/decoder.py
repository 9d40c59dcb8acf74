"""Transformer blocks between student and head: the asymmetric decoder of Section 2, removed at export."""

from __future__ import annotations

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from hdscale.config.sections import StudentConfig
from hdscale.errors import UserError
from hdscale.student.build import Student
from hdscale.student.init import draw_weights
from hdscale.vit.encoder import with_queries_and_keys
from hdscale.vit.position import sincos_position_embedding
from hdscale.vit.tokens import compared_tokens, take_rows, token_rows

_EPS = 1e-6


class TransformerDecoder(nn.Module):
    """A narrow ViT behind the student (dBOT, MAE): prefix tokens and patches, with positions of their own, in order."""

    pos_embed: Tensor

    def __init__(
        self,
        embed_dim: int,
        decoder_dim: int,
        depth: int,
        num_heads: int,
        *,
        grid_size: int,
        num_prefix_tokens: int,
        drop_path: float,
        mask_tokens: bool,
    ) -> None:
        """Draw random weights from torch's generator.

        Args:
            embed_dim: D, the student's width.
            decoder_dim: width of the blocks; a Linear stands before them where it is not D.
            depth: blocks.
            num_heads: of their attention.
            grid_size: patches along one side.
            num_prefix_tokens: P.
            drop_path: stochastic depth of the last block, rising linearly from 0 (dBOT: as the student's).
            mask_tokens: put a learnt token where the student saw nothing. Without, it decodes the places it is given.
        """
        super().__init__()
        self.decoder_dim = decoder_dim
        self.num_prefix_tokens = num_prefix_tokens
        self.num_patches = grid_size**2
        self.embed = nn.Identity() if decoder_dim == embed_dim else nn.Linear(embed_dim, decoder_dim)
        self.register_buffer("pos_embed", sincos_position_embedding(decoder_dim, grid_size, num_prefix_tokens))
        rates = [drop_path * index / max(1, depth - 1) for index in range(depth)]
        self.blocks = nn.ModuleList(Block(decoder_dim, num_heads, qkv_bias=True, drop_path=rate) for rate in rates)
        self.norm = nn.LayerNorm(decoder_dim, eps=_EPS)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        # Only where it is used: a parameter without a gradient stalls ZeRO.
        self.mask_token = nn.Parameter(torch.randn(1, 1, decoder_dim) * 0.02) if mask_tokens else None

    def forward(
        self, prefix_tokens: Tensor, patch_tokens: Tensor, keep_indices: Tensor | None, *, cls: bool = False
    ) -> Tensor:
        """Decode.

        Args:
            prefix_tokens: (B, P, D) of the student.
            patch_tokens: (B, K, D) of the kept patches, or (B, N, D) of all.
            keep_indices: (B, K) int64 ascending; None: all patches.
            cls: give the class token, too.

        Returns:
            (B, K or N, decoder width): with mask tokens, of all N patches. With `cls`, one row more, which comes first.
        """
        x = self._start(prefix_tokens, patch_tokens, keep_indices)
        for block in self.blocks:
            x = block(x)
        return self.norm(compared_tokens(x, self.num_prefix_tokens, cls=cls))

    def queries_and_keys(
        self, prefix_tokens: Tensor, patch_tokens: Tensor
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Return Q and K of every block, each (B, A, P + N, E), of a student's tokens (B, P, D) and (B, N, D)."""
        x, layers = self._start(prefix_tokens, patch_tokens, None), []
        for block in self.blocks:
            x, *taken = with_queries_and_keys(block, x)
            layers.append(taken)
        return tuple(query for query, _ in layers), tuple(key for _, key in layers)

    def _start(self, prefix_tokens: Tensor, patch_tokens: Tensor, keep_indices: Tensor | None) -> Tensor:
        """Return what goes into the first block: (B, P + K or N, width)."""
        x = self.embed(torch.cat([prefix_tokens, patch_tokens], dim=1))
        if self.mask_token is not None and keep_indices is not None:
            x = self._fill(x, keep_indices)
        positions = self.pos_embed.to(x.dtype)  # DeepSpeed leaves buffers in float32
        if keep_indices is not None and x.shape[1] != positions.shape[1]:
            rows = token_rows(keep_indices, self.num_prefix_tokens)
            positions = take_rows(positions.expand(len(x), -1, -1), rows)
        return x + positions

    def _fill(self, x: Tensor, keep_indices: Tensor) -> Tensor:
        """Put mask tokens where nothing was seen: (B, P + K, width) to (B, P + N, width) in the image's order."""
        assert self.mask_token is not None
        prefix, seen = x[:, : self.num_prefix_tokens], x[:, self.num_prefix_tokens :]
        everywhere = self.mask_token.to(x.dtype).expand(len(x), self.num_patches, -1)
        places = keep_indices.unsqueeze(-1).expand_as(seen)
        return torch.cat([prefix, everywhere.scatter(1, places, seen)], dim=1)


def decoder_behind(
    encoder: Student,
    dim: int,
    depth: int,
    heads: int,
    *,
    drop_path: float,
    mask_tokens: bool,
    seed: int,
    section: str,
) -> TransformerDecoder:
    """Build the decoder of an encoder's tokens, with weights as PyTorch and `TransformerDecoder` draw them.

    Args:
        encoder: whose prefix and patch tokens come in.
        dim: width of the blocks.
        depth: blocks.
        heads: of their attention.
        drop_path: as `TransformerDecoder` takes it.
        mask_tokens: as `TransformerDecoder` takes it.
        seed: of the weights; the caller's random state is left alone.
        section: of the recipe, which named the sizes, for messages.

    Raises:
        UserError: the width is no multiple of the heads, or of the 4 parts of a sin-cos embedding.
    """
    if dim % heads or dim % 4:
        raise UserError(
            f"{section}.decoder_dim must be a multiple of 4 and of {section}.decoder_heads {heads}, got {dim}"
        )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return TransformerDecoder(
            encoder.embed_dim,
            dim,
            depth,
            heads,
            grid_size=encoder.grid_size,
            num_prefix_tokens=encoder.num_prefix_tokens,
            drop_path=drop_path,
            mask_tokens=mask_tokens,
        )


def build_decoder(config: StudentConfig, student: Student, *, seed: int) -> TransformerDecoder | None:
    """Build the blocks of `student.decoder: transformer`; None for other decoders.

    Raises:
        UserError: the width is no multiple of the heads, or of the 4 parts of a sin-cos embedding.
    """
    if config.decoder != "transformer":
        return None
    decoder = decoder_behind(
        student,
        config.decoder_dim or student.embed_dim,
        config.decoder_depth,
        config.decoder_heads or student.num_heads,
        drop_path=config.drop_path,
        mask_tokens=config.mask_tokens == "decoder",
        seed=seed,
        section="student",
    )
    draw_weights(decoder, decoder.blocks, config.init, seed=seed, stream="decoder")
    return decoder
