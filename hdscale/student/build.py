"""The student: a timm vision transformer of random weights that sees kept patches only."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import timm
import torch
from timm.layers.layer_scale import LayerScale
from torch import Tensor, nn

from hdscale.config.sections import StudentConfig
from hdscale.errors import UserError
from hdscale.student.init import draw_weights
from hdscale.types import ViTOutput
from hdscale.vit.build import create_vit, num_heads, patch_size, weight_dtype
from hdscale.vit.encoder import LayerOutput, Outputs, Recompute, ViTEncoder
from hdscale.vit.position import sincos_position_embedding
from hdscale.vit.preprocess import Preprocess

STATE_PREFIX = "encoder.model."
"""What timm's parameter names are prefixed with in a student's state dict."""


class Student(nn.Module):
    """A ViT with its preprocessing: uint8 images in, final patch tokens and what the relation layers give out."""

    def __init__(self, encoder: ViTEncoder, preprocess: Preprocess) -> None:
        super().__init__()
        model = encoder.model
        self.encoder = encoder
        self.preprocess = preprocess
        self.embed_dim = int(model.embed_dim)
        self.depth = len(model.blocks)
        self.num_heads = num_heads(model)
        self.num_prefix_tokens = int(model.num_prefix_tokens)
        self.has_cls = model.cls_token is not None
        self.patch_size = patch_size(model)
        self.grid_size = int(model.patch_embed.grid_size[0])

    def forward(self, images: Tensor, keep_indices: Tensor | None = None) -> ViTOutput:
        """Run every block on the P prefix tokens and the kept patches only.

        Args:
            images: (B, 3, H, W) uint8.
            keep_indices: (B, K) int64 ascending; None: all N patches.
        """
        return self.encoder(self.preprocess(images, weight_dtype(self.encoder.model)), keep_indices)


def build_student(
    config: StudentConfig,
    img_size: int,
    *,
    seed: int,
    relation_layers: Sequence[int] = (),
    layer_output: LayerOutput = "relation",
    checkpoint_every: int | None = None,
    checkpoint_fn: Callable[..., Any] | None = None,
) -> Student:
    """Build a student with weights by `init` and, unless `pos_embed` is none, MAE's fixed position embedding.

    Args:
        config: the recipe's section.
        img_size: side of the views in pixels.
        seed: of the weights; the caller's random state is left alone.
        relation_layers: blocks that give `layer_output`, 0-indexed, negative from the end.
        layer_output: of `hdscale.vit.encoder.Outputs`; the recipe's `relation.target`.
        checkpoint_every: recompute every n-th block in the backward pass; left out: the section's.
        checkpoint_fn: `f(function, *tensors)`, which recomputes; left out: torch's, non-reentrant.

    Raises:
        UserError: no such model, or sizes that do not fit each other.
    """
    arch = student_arch(config, img_size)
    model = create_vit("student.model", {**arch, "drop_path_rate": config.drop_path}, seed=seed)
    _check_sizes(model, img_size)
    num_prefix = 0 if model.no_embed_class else model.num_prefix_tokens
    embedding = sincos_position_embedding(model.embed_dim, model.patch_embed.grid_size[0], num_prefix)
    # A buffer of the same name: it is never trained, and the state dict still fits timm's model.
    del model.pos_embed
    model.register_buffer("pos_embed", embedding if config.pos_embed == "sincos" else torch.zeros_like(embedding))
    mask_token = None
    if config.mask_tokens == "encoder":
        mask_token = nn.Parameter(
            0.02 * torch.randn(1, 1, model.embed_dim, generator=torch.Generator().manual_seed(seed))
        )
    recompute = Recompute(config.checkpoint_every if checkpoint_every is None else checkpoint_every)
    if checkpoint_fn is not None:
        recompute = recompute._replace(function=checkpoint_fn)
    outputs = Outputs(relation_layers, layer_output)
    encoder = ViTEncoder(model, outputs, recompute=recompute, mask_token=mask_token)
    draw_weights(encoder, model.blocks, config.init, seed=seed, stream="student")
    return Student(encoder, Preprocess(img_size, config.mean, config.std))


def student_arch(config: StudentConfig, img_size: int) -> dict[str, Any]:
    """Return the arguments with which `create_vit` builds the student's ViT for its weights.

    They are `timm.create_model`'s, and `rel_pos_bias` for a student with one. Drop-path is left out: it is a setting of
    training, not of the weights.
    """
    arch: dict[str, Any] = {"model_name": config.model, "img_size": img_size, "num_classes": 0}
    sizes = {name: getattr(config, name) for name in ("patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio")}
    arch.update({name: value for name, value in sizes.items() if value is not None})
    if config.rel_pos_bias:
        arch["rel_pos_bias"] = True
    if config.layer_scale is not None:
        arch["init_values"] = config.layer_scale
    elif _has_layer_scale(config.model):
        arch["init_values"] = 0.0  # timm reads 0 as none (MAE's ViT has none); a None would mean the named model's
    return arch


def student_grid_size(config: StudentConfig, img_size: int) -> int:
    """Return the patches along one side of a view, without building the student's weights.

    Raises:
        UserError: no such model, or sizes that do not fit each other.
    """
    with torch.device("meta"):
        model = create_vit("student.model", student_arch(config, img_size))
    _check_sizes(model, img_size)
    return int(model.patch_embed.grid_size[0])


@functools.cache
def _has_layer_scale(name: str) -> bool:
    if not timm.is_model(name):
        return False  # create_vit says so
    with torch.device("meta"):
        model = timm.create_model(name)
    return any(isinstance(module, LayerScale) for module in model.modules())


def _check_sizes(model: Any, img_size: int) -> None:
    side = patch_size(model)
    if img_size % side:
        raise UserError(f"data.img_size must be a multiple of the student's patch size {side}, got {img_size}")
    if model.embed_dim % 4:
        raise UserError(f"student.embed_dim must be a multiple of 4 (position embedding), got {model.embed_dim}")
    if model.pos_embed is None or model.attn_pool is not None:
        raise UserError(
            "student.model must have position embeddings and no attention pooling, which distillation would not train; "
            "choose a plain ViT such as vit_large_patch16_224"
        )
