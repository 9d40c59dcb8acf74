"""One forward for every timm vision transformer: tokens, queries and keys out, nothing computed that nobody wants."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple, cast

import torch
from timm.layers.attention import Attention, AttentionRope
from timm.models.eva import Eva, EvaAttention
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hdscale.errors import UserError
from hdscale.types import ViTOutput
from hdscale.vit.build import ViT
from hdscale.vit.pruning import KeptQueryBlock, prune_after, split_last_block
from hdscale.vit.rotary import as_attended, as_rotation, rotation_of, take_rotation
from hdscale.vit.tokens import take_rows, token_rows

Final = Literal["norm", "pre_norm", "projected"]
LayerOutput = Literal["relation", "attention", "features"]

# Without the check that both passes save tensors of the same shapes: ZeRO-3 may have a parameter gathered in one and
# emptied in the other pass. Results are equal all the same: random states are kept and the same modules run.
recompute_by_torch: Callable[..., Any] = partial(checkpoint, use_reentrant=False, determinism_check="none")


class Outputs(NamedTuple):
    """What a `ViTEncoder` gives; blocks are 0-indexed, negative from the end."""

    relation_layers: Sequence[int] = ()
    """Blocks that give `layer_output`, in this order."""
    layer_output: LayerOutput = "relation"
    """`relation`: Q and K; `attention`: the attention's output, before it is added to the tokens; `features`: the
    block's output."""
    stage_layers: Sequence[int] = ()
    """Blocks whose patch tokens are given, in this order."""
    stage_at: Literal["output", "input"] = "output"
    """Give those at the blocks' output or at their input."""
    final: Final | None = "norm"
    """The last block's patch tokens after the final norm, before it, or after norm and head; None: not at all."""
    project_prefix: bool = False
    """Where `final` is projected, prefix tokens are, too."""


class Recompute(NamedTuple):
    """Activation checkpointing: which blocks run again in the backward pass of training."""

    every: int = 0  # every n-th block; 0: none
    function: Callable[..., Any] = recompute_by_torch  # `f(function, *tensors)`


class _Carried(NamedTuple):
    """What goes along with the tokens from block to block."""

    rotation: Tensor | None  # of each patch, in models with rotary embeddings
    bias: Tensor | None  # (B or 1, A, S, S): added to the attention logits of the tokens that are there
    kept: Tensor | None  # (B, N'): which patches are still there, in a model that drops some


class ViTEncoder(nn.Module):
    """A timm VisionTransformer or Eva that gives patch tokens, Q and K of chosen blocks, and tokens between blocks.

    Blocks run as modules and keep their fused attention; Q and K are taken on their way into it.
    """

    def __init__(
        self,
        model: ViT,
        outputs: Outputs = Outputs(),  # noqa: B008 - immutable
        *,
        tokens: Literal["kept", "full"] = "kept",
        prune: bool = False,
        recompute: Recompute = Recompute(),  # noqa: B008 - immutable
        drop: Callable[[Tensor], Tensor] | None = None,
        mask_token: nn.Parameter | None = None,
    ) -> None:
        """Wrap a model and, to prune it, change it.

        Args:
            model: if pruned, its head stays only where `outputs.final` is projected.
            outputs: what to give; as the encoder's attribute, its layers are counted from 0.
            tokens: what `keep_indices` does. `kept` (students): drop the other patches before the first block. `full`
                (teachers): all patches go through, and Q, K and final tokens of the kept ones come out.
            prune: delete what these arguments leave unused (frozen models only: parameters are split and copied).
            recompute: activation checkpointing.
            drop: takes the patch tokens (B, N', T) of a stage layer and returns which of them stay, (B, K') int64
                ascending; the others go no further (PCAE). Everything that is given is then of the patches that stay
                to the end, and `keep_indices` names them.
            mask_token: (1, 1, D), which stands for the patches outside `keep_indices` where `tokens` is kept: all N
                patches go through, final tokens are of all, and relation layers give those of the kept ones.

        Raises:
            UserError: a layer that the model does not have, or a kind of attention without plain Q and K.
        """
        super().__init__()
        depth = len(model.blocks)
        self.outputs = outputs._replace(
            relation_layers=resolve_layers(outputs.relation_layers, depth, "relation.layers"),
            stage_layers=resolve_layers(outputs.stage_layers, depth, "mask.layers"),
        )
        self.tokens = tokens
        self.recompute = recompute
        self.drop = drop
        self.mask_token = mask_token
        self.num_prefix_tokens = int(model.num_prefix_tokens)
        if outputs.layer_output == "relation":
            for layer in self.outputs.relation_layers:
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
            Patch tokens and, of all tokens with the P prefix tokens first, what the relation layers give: of the kept
            patches where `keep_indices` is given. Stage tokens are of all N patches where `tokens` is full, or of those
            that no stage before has dropped.
        """
        assert self.drop is None or keep_indices is None, "a model that drops patches chooses them itself"
        wanted = self.outputs
        x, rotation = self._embed(images, keep_indices)
        rows = None if keep_indices is None else token_rows(keep_indices, self.num_prefix_tokens)
        seen = None  # rows of the tokens that go through the blocks; None: all
        if rows is not None and keep_indices is not None and self.tokens == "kept" and self.mask_token is None:
            x, seen, rows, rotation = take_rows(x, rows), rows, None, take_rotation(rotation, keep_indices)
        carried = _Carried(rotation, self._bias(seen, x), None if self.drop is None else self._all_patches(x))
        x = self.model.norm_pre(x)
        taken: dict[int, tuple[list[Tensor], Tensor | None]] = {}
        stages: dict[int, Tensor] = {}
        for index, block in enumerate(self.model.blocks):
            if wanted.stage_at == "input" and index in wanted.stage_layers:
                stages[index] = x
                x, carried = self._dropped(x, carried)
            x, *here = self._run_block(index, block, x, rows, carried)
            if here:
                taken[index] = here, carried.kept
            if wanted.stage_at == "output" and index in wanted.stage_layers:
                stages[index] = x
                x, carried = self._dropped(x, carried)
        if wanted.stage_at == "input" and len(self.model.blocks) in wanted.stage_layers:  # pruned just before a stage
            stages[len(self.model.blocks)] = x
            x, carried = self._dropped(x, carried)
        layers = [self._cut_to_kept(*taken[layer], carried.kept) for layer in wanted.relation_layers]
        with_qk = wanted.layer_output == "relation"
        prefix, patches = self._finish(x, rows if self.mask_token is None else None)
        return ViTOutput(
            patch_tokens=patches,
            queries=tuple(query for query, _ in layers) if with_qk else (),
            keys=tuple(key for _, key in layers) if with_qk else (),
            stage_tokens=tuple(stages[layer][:, self.num_prefix_tokens :] for layer in wanted.stage_layers),
            layer_tokens=() if with_qk else tuple(tokens for (tokens,) in layers),
            keep_indices=carried.kept,
            prefix_tokens=prefix,
            attention_bias=carried.bias,
        )

    @property
    def rel_pos_bias(self) -> nn.Module | None:
        """What gives the bias of all blocks' attention logits; None: the model has none."""
        return getattr(self.model, "rel_pos_bias", None)

    def _bias(self, rows: Tensor | None, x: Tensor) -> Tensor | None:
        """Return the bias between the tokens at these rows (B, S), or between all, in the tokens' dtype."""
        return None if self.rel_pos_bias is None else self.rel_pos_bias(rows).to(x.dtype)

    def _embed(self, images: Tensor, keep_indices: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return all tokens (B, P + N, D) and, of a model with rotary embeddings, the rotation of each patch."""
        x = self.model.patch_embed(images)
        if self.mask_token is not None and keep_indices is not None:
            x = _hide_others(x, keep_indices, self.mask_token)
        rotation = None
        if isinstance(self.model, Eva):
            x, rope = self.model._pos_embed(x)
            rotation = as_rotation(rope, by_block=self.model.rope_mixed)
        else:
            x = self.model._pos_embed(x)
        # DeepSpeed leaves buffers, such as a student's position embedding, in float32.
        return x.to(images.dtype), rotation

    def _all_patches(self, x: Tensor) -> Tensor:
        return torch.arange(x.shape[1] - self.num_prefix_tokens, device=x.device).expand(len(x), -1)

    def _dropped(self, x: Tensor, carried: _Carried) -> tuple[Tensor, _Carried]:
        """Drop patches at a stage, if the model does: tokens (B, P + K', T) and what goes along with them."""
        if self.drop is None or carried.kept is None:
            return x, carried
        staying = self.drop(x[:, self.num_prefix_tokens :])
        x = take_rows(x, token_rows(staying, self.num_prefix_tokens))
        kept = carried.kept.gather(1, staying)
        bias = self._bias(token_rows(kept, self.num_prefix_tokens), x)
        return x, _Carried(take_rotation(carried.rotation, staying), bias, kept)

    def _cut_to_kept(self, tensors: Sequence[Tensor], there: Tensor | None, kept: Tensor | None) -> Sequence[Tensor]:
        """Cut what a relation layer gave of the patches `there` (B, N') down to those kept in the end (B, K)."""
        if there is None or kept is None or there.shape == kept.shape:
            return tensors
        rows = token_rows(torch.searchsorted(there.contiguous(), kept.contiguous()), self.num_prefix_tokens)
        return [take_rows(tensor, rows) for tensor in tensors]

    def _run_block(
        self, index: int, block: nn.Module, x: Tensor, rows: Tensor | None, carried: _Carried
    ) -> tuple[Tensor, ...]:
        """Return the block's tokens and, for a relation layer, its output of the wanted rows."""
        wanted, every = self.outputs, self.recompute.every
        function = partial(_LAYER_RUNNERS[wanted.layer_output], block) if index in wanted.relation_layers else block
        if carried.rotation is not None:
            function = partial(function, rope=rotation_of(carried.rotation, index))
        if isinstance(block, KeptQueryBlock):
            x, *taken = _as_tuple(function(x, rows, carried.bias))
            if len(taken) == 2 and rows is not None:
                taken[1] = take_rows(taken[1], rows)  # keys: everything else is of the wanted rows already
            return x, *taken
        inputs = (x,) if carried.bias is None else (x, carried.bias)
        if every and self.training and torch.is_grad_enabled() and (index + 1) % every == 0:
            x, *taken = _as_tuple(self.recompute.function(function, *inputs))
        else:
            x, *taken = _as_tuple(function(*inputs))
        return x, *(tensor if rows is None else take_rows(tensor, rows) for tensor in taken)

    def _finish(self, x: Tensor, rows: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """Turn the last block's tokens into prefix tokens (B, P, D) and patch tokens (B, N or K, T)."""
        final = self.outputs.final
        if final is None:
            return None, None
        if rows is not None and not isinstance(self.model.blocks[-1], KeptQueryBlock):
            x = take_rows(x, rows)
        if final != "pre_norm":
            x = self.model.fc_norm(self.model.norm(x))  # timm moves the final norm behind the pooling in some models
        if final == "projected" and self.outputs.project_prefix:
            x = self.model.head(x)  # once: ZeRO-3 gathers a module's weights for each call
        prefix, patches = x[:, : self.num_prefix_tokens], x[:, self.num_prefix_tokens :]
        if final == "projected" and not self.outputs.project_prefix:
            patches = self.model.head(patches)
        return prefix, patches

    def _prune(self) -> None:
        model, depth, wanted = self.model, len(self.model.blocks), self.outputs
        stage_ends = [layer + (wanted.stage_at == "output") for layer in wanted.stage_layers]
        model.attn_pool = None
        if wanted.final != "projected":
            model.head = nn.Identity()
        if wanted.final is None:
            with_qk = wanted.layer_output == "relation"
            relation_ends = [layer + (not with_qk) for layer in wanted.relation_layers]
            num_whole = max([*relation_ends, *stage_ends], default=0)
            prune_after(model, num_whole, query_key_next=with_qk and num_whole in wanted.relation_layers)
            return
        if wanted.final == "pre_norm":
            model.norm, model.fc_norm = nn.Identity(), nn.Identity()
        if self.tokens == "full" and depth not in stage_ends:
            split_last_block(model)


def resolve_layers(layers: Sequence[int], depth: int, field: str) -> tuple[int, ...]:
    """Count negative layers from the end.

    Raises:
        UserError: a layer that a model of this depth does not have, or one that is named twice.
    """
    for layer in layers:
        if not -depth <= layer < depth:
            raise UserError(
                f"{field} must be between {-depth} and {depth - 1} for a model of {depth} blocks, got {layer}"
            )
    resolved = tuple(layer % depth for layer in layers)
    if len(set(resolved)) != len(resolved):
        raise UserError(
            f"{field} must name different blocks, got {list(layers)}, which are {list(resolved)} of {depth} blocks: "
            "leave one of each pair out"
        )
    return resolved


def _hide_others(x: Tensor, keep_indices: Tensor, mask_token: Tensor) -> Tensor:
    """Put the mask token (1, 1, D) in the place of all patches (B, N, D) but the kept ones (B, K)."""
    kept = torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device).scatter(1, keep_indices, True)
    return torch.where(kept.unsqueeze(-1), x, mask_token.to(x.dtype))


def _check_attention(block: nn.Module) -> None:
    attn = getattr(block, "attn", None)
    if type(attn) not in (Attention, AttentionRope, EvaAttention):
        raise UserError(
            f"relation.layers need blocks with timm's Attention, got {type(block).__name__} with "
            f"{type(attn).__name__}; choose another model"
        )


def _as_tuple(output: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (output,) if isinstance(output, Tensor) else output


def with_queries_and_keys(block: nn.Module, *args: Tensor | None, rope: Tensor | None = None) -> tuple[Tensor, ...]:
    """Run a block and return its tokens, Q and K (B, A, S, E) as its attention uses them."""
    attn = cast("Attention", block.attn)
    x, query, key = _hooked(block, (attn.q_norm, attn.k_norm), args, rope)
    return x, *as_attended(attn, query, key, rope)


def _with_attention_output(block: nn.Module, *args: Tensor | None, rope: Tensor | None = None) -> tuple[Tensor, ...]:
    """Run a block and return its tokens, and what its attention adds to them (B, S, T), not yet scaled."""
    return _hooked(block, (cast("nn.Module", block.attn),), args, rope)


def _with_output(block: nn.Module, *args: Tensor | None, rope: Tensor | None = None) -> tuple[Tensor, ...]:
    """Run a block and return its tokens twice: to go on with, and to be given."""
    (x,) = _hooked(block, (), args, rope)
    return x, x


_LAYER_RUNNERS = {"relation": with_queries_and_keys, "attention": _with_attention_output, "features": _with_output}


def _hooked(
    block: nn.Module, modules: Sequence[nn.Module], args: Sequence[Tensor | None], rope: Tensor | None
) -> tuple[Tensor, ...]:
    """Run a block and return its tokens and the outputs of modules in it.

    Hooks live for this call only, so that nothing keeps the tensors and a recomputed call takes its own.
    """
    taken: list[list[Tensor]] = [[] for _ in modules]
    hooks = [module.register_forward_hook(_append_to(outputs)) for module, outputs in zip(modules, taken, strict=True)]
    try:
        x = block(*args) if rope is None else block(*args, rope=rope)
    finally:
        for hook in hooks:
            hook.remove()
    return x, *(outputs[0] for outputs in taken)


def _append_to(outputs: list[Tensor]) -> Callable[[nn.Module, Any, Tensor], None]:
    def hook(_module: nn.Module, _args: Any, output: Tensor) -> None:
        outputs.append(output)

    return hook
