"""One forward for every timm vision transformer: tokens, queries and keys out, nothing computed that nobody wants."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from timm.layers.attention import Attention
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hdscale.errors import UserError
from hdscale.types import ViTOutput
from hdscale.vit.pruning import KeptQueryBlock, prune_after, split_last_block
from hdscale.vit.tokens import take_rows, token_rows

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from timm.models.vision_transformer import VisionTransformer

Final = Literal["norm", "pre_norm", "projected"]

# Without the check that both passes save tensors of the same shapes: ZeRO-3 may have a parameter gathered in one and
# emptied in the other pass. Results are equal all the same: random states are kept and the same modules run.
recompute: Callable[..., Any] = partial(checkpoint, use_reentrant=False, determinism_check="none")


class ViTEncoder(nn.Module):
    """A timm VisionTransformer that gives patch tokens, Q and K of chosen blocks, and tokens between blocks.

    Blocks run as modules and keep their fused attention; Q and K are taken on their way into it.
    """

    def __init__(
        self,
        model: VisionTransformer,
        *,
        relation_layers: Sequence[int] = (),
        stage_layers: Sequence[int] = (),
        stage_at: Literal["output", "input"] = "output",
        final: Final | None = "norm",
        tokens: Literal["kept", "full"] = "kept",
        checkpoint_every: int = 0,
        prune: bool = False,
        checkpoint_fn: Callable[..., Any] | None = None,
        mask_token: nn.Parameter | None = None,
    ) -> None:
        """Wrap a model and, to prune it, change it.

        Args:
            model: its head stays only where `final` is projected, if pruned.
            relation_layers: 0-indexed blocks, negative from the end, whose Q and K are given in this order.
            stage_layers: 0-indexed blocks, negative from the end, whose patch tokens are given in this order.
            stage_at: give those at the blocks' output or at their input.
            final: last block's patch tokens after the final norm, before it, or after norm and head; None: not at all.
            tokens: what `keep_indices` does. `kept` (students): drop the other patches before the first block. `full`
                (teachers): all patches go through, and Q, K and final tokens of the kept ones come out.
            checkpoint_every: recompute every n-th block in the backward pass of training; 0: none.
            prune: delete what these arguments leave unused (frozen models only: parameters are split and copied).
            checkpoint_fn: `f(function, *tensors)`, which recomputes; left out: torch's, non-reentrant.
            mask_token: (1, 1, D), which stands for the patches outside `keep_indices` where `tokens` is kept: all N
                patches go through, final tokens are of all, and Q and K of the kept ones come out.

        Raises:
            UserError: a layer that the model does not have, or a kind of attention without plain Q and K.
        """
        super().__init__()
        depth = len(model.blocks)
        self.relation_layers = resolve_layers(relation_layers, depth, "relation.layers")
        self.stage_layers = resolve_layers(stage_layers, depth, "mask.layers")
        self.stage_at = stage_at
        self.final: Final | None = final
        self.tokens = tokens
        self.checkpoint_every = checkpoint_every
        self.checkpoint_fn = checkpoint_fn or recompute
        self.mask_token = mask_token
        self.num_prefix_tokens = int(model.num_prefix_tokens)
        for layer in self.relation_layers:
            _check_attention(model.blocks[layer])
        self.model = model
        if prune:
            self._prune()

    def forward(self, images: Tensor, keep_indices: Tensor | None = None) -> ViTOutput:
        """Run the model once.

        Args:
            images: (B, 3, H, W) normalised, in the model's dtype.
            keep_indices: (B, K) int64 ascending; None: all N patches.

        Returns:
            Patch tokens and, of all tokens with the P prefix tokens first, Q and K: of the kept patches where
            `keep_indices` is given. Stage tokens are of all N patches where `tokens` is full.
        """
        x = self.model.patch_embed(images)
        if self.mask_token is not None and keep_indices is not None:
            x = _hide_others(x, keep_indices, self.mask_token)
        # DeepSpeed leaves buffers, such as a student's position embedding, in float32.
        x = self.model._pos_embed(x).to(images.dtype)  # (B, P + N, D)
        rows = None if keep_indices is None else token_rows(keep_indices, self.num_prefix_tokens)
        seen = None  # rows of the tokens that go through the blocks; None: all
        if rows is not None and self.tokens == "kept" and self.mask_token is None:
            x, seen, rows = take_rows(x, rows), rows, None
        bias = None if self.rel_pos_bias is None else self.rel_pos_bias(seen).to(x.dtype)
        x = self.model.norm_pre(x)
        queries, keys, stages = {}, {}, {}
        for index, block in enumerate(self.model.blocks):
            if self.stage_at == "input" and index in self.stage_layers:
                stages[index] = x
            x, *taken = self._run_block(index, block, x, rows, bias)
            if taken:
                queries[index], keys[index] = taken
            if self.stage_at == "output" and index in self.stage_layers:
                stages[index] = x
        if self.stage_at == "input":
            stages.setdefault(len(self.model.blocks), x)  # a pruned model may end just before a stage
        prefix, patches = self._finish(x, rows if self.mask_token is None else None)
        return ViTOutput(
            patch_tokens=patches,
            queries=tuple(queries[layer] for layer in self.relation_layers),
            keys=tuple(keys[layer] for layer in self.relation_layers),
            stage_tokens=tuple(stages[layer][:, self.num_prefix_tokens :] for layer in self.stage_layers),
            prefix_tokens=prefix,
            attention_bias=bias,
        )

    @property
    def rel_pos_bias(self) -> nn.Module | None:
        """The model's bias of all blocks' attention, see hdscale.vit.rel_pos."""
        return getattr(self.model, "rel_pos_bias", None)

    def _run_block(
        self, index: int, block: nn.Module, x: Tensor, rows: Tensor | None, bias: Tensor | None
    ) -> tuple[Tensor, ...]:
        """Return the block's tokens and, for a relation layer, Q and K of the wanted rows."""
        function = partial(_tapped, block) if index in self.relation_layers else block
        if isinstance(block, KeptQueryBlock):
            x, *taken = _as_tuple(function(x, rows, bias))
            if taken and rows is not None:
                taken[1] = take_rows(taken[1], rows)  # its queries are of the wanted rows already
            return x, *taken
        inputs = (x,) if bias is None else (x, bias)
        every = self.checkpoint_every
        if every and self.training and torch.is_grad_enabled() and (index + 1) % every == 0:
            x, *taken = _as_tuple(self.checkpoint_fn(function, *inputs))
        else:
            x, *taken = _as_tuple(function(*inputs))
        return x, *(tensor if rows is None else take_rows(tensor, rows) for tensor in taken)

    def _finish(self, x: Tensor, rows: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """Turn the last block's tokens into prefix tokens (B, P, D) and patch tokens (B, N or K, T)."""
        if self.final is None:
            return None, None
        if rows is not None and not isinstance(self.model.blocks[-1], KeptQueryBlock):
            x = take_rows(x, rows)
        if self.final != "pre_norm":
            x = self.model.fc_norm(self.model.norm(x))  # timm moves the final norm behind the pooling in some models
        prefix, patches = x[:, : self.num_prefix_tokens], x[:, self.num_prefix_tokens :]
        return prefix, self.model.head(patches) if self.final == "projected" else patches

    def _prune(self) -> None:
        model, depth = self.model, len(self.model.blocks)
        offset = 1 if self.stage_at == "output" else 0
        model.attn_pool = None
        if self.final != "projected":
            model.head = nn.Identity()
        if self.final is None:
            num_whole = max([*self.relation_layers, *(layer + offset for layer in self.stage_layers)], default=0)
            prune_after(model, num_whole, query_key_next=num_whole in self.relation_layers)
            return
        if self.final == "pre_norm":
            model.norm, model.fc_norm = nn.Identity(), nn.Identity()
        if self.tokens == "full" and depth not in [layer + offset for layer in self.stage_layers]:
            split_last_block(model)


def resolve_layers(layers: Sequence[int], depth: int, field: str) -> tuple[int, ...]:
    """Count negative layers from the end.

    Raises:
        UserError: a layer that a model of this depth does not have.
    """
    for layer in layers:
        if not -depth <= layer < depth:
            raise UserError(
                f"{field} must be between {-depth} and {depth - 1} for a model of {depth} blocks, got {layer}"
            )
    return tuple(layer % depth for layer in layers)


def _hide_others(x: Tensor, keep_indices: Tensor, mask_token: Tensor) -> Tensor:
    """Put the mask token (1, 1, D) in the place of all patches (B, N, D) but the kept ones (B, K)."""
    kept = torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device).scatter(1, keep_indices, True)
    return torch.where(kept.unsqueeze(-1), x, mask_token.to(x.dtype))


def _check_attention(block: nn.Module) -> None:
    attn = getattr(block, "attn", None)
    if type(attn) is not Attention:
        raise UserError(
            f"relation.layers need blocks with timm's Attention, got {type(block).__name__} with "
            f"{type(attn).__name__}; choose another model"
        )


def _as_tuple(output: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (output,) if isinstance(output, Tensor) else output


def _tapped(block: nn.Module, *args: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Run a block and return its tokens, Q and K (B, A, S, E) as its attention uses them.

    Hooks live for this call only, so that nothing keeps the tensors and a recomputed call takes its own.
    """
    queries: list[Tensor] = []
    keys: list[Tensor] = []
    attn = cast("Attention", block.attn)
    hooks = [attn.q_norm.register_forward_hook(_into(queries)), attn.k_norm.register_forward_hook(_into(keys))]
    try:
        x = block(*args)
    finally:
        for hook in hooks:
            hook.remove()
    return x, queries[0], keys[0]


def _into(taken: list[Tensor]) -> Callable[[nn.Module, Any, Tensor], None]:
    def hook(_module: nn.Module, _args: Any, output: Tensor) -> None:
        taken.append(output)

    return hook
