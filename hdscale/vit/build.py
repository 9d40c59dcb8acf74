"""Create timm vision transformers by name, without a download unless asked for one."""

from __future__ import annotations

import difflib
from typing import Any

import timm
import torch
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer

from hdscale.errors import UserError
from hdscale.vit.rel_pos import add_rel_pos_bias

ViT = VisionTransformer | Eva
"""What `ViTEncoder` runs. timm's `Eva` stands for EVA-02, DINOv3 and other transformers with rotary embeddings."""


def create_vit(field: str, arch: dict[str, Any], *, pretrained: bool = False, seed: int = 0) -> VisionTransformer:
    """Create the model that `timm.create_model(**arch)` gives, in float32 on the CPU.

    Args:
        field: the recipe's field that named the model, for messages.
        arch: `model_name` and sizes that replace the named model's; `rel_pos_bias: True` adds to timm's model what
            `student.rel_pos_bias` says.
        pretrained: load timm's weights, from its cache or the network.
        seed: of the random initial weights; the caller's random state is left alone.

    Raises:
        UserError: timm has no such model, or it is no VisionTransformer, or its sizes or weights do not work.
    """
    model = _create(field, arch, pretrained=pretrained, seed=seed)
    if not isinstance(model, VisionTransformer):
        raise UserError(f"{field} must be a timm VisionTransformer, got a {type(model).__name__}; choose a vit_* model")
    _check_parts(field, model)
    return model


def create_teacher_vit(field: str, arch: dict[str, Any], *, pretrained: bool = False, seed: int = 0) -> ViT:
    """Create what `create_vit` creates, or a transformer with rotary embeddings.

    Raises:
        UserError: timm has no such model, or it is neither class, or its sizes or weights do not work.
    """
    model = _create(field, arch, pretrained=pretrained, seed=seed)
    if not isinstance(model, VisionTransformer | Eva):
        raise UserError(
            f"{field} must be a timm VisionTransformer or Eva, got a {type(model).__name__}; choose a vit_*, "
            "deit* or eva* model"
        )
    if model.dynamic_img_size:  # DINOv3's default; the input size of a teacher is known
        model = _create(field, {**arch, "dynamic_img_size": False}, pretrained=pretrained, seed=seed)
        assert isinstance(model, VisionTransformer | Eva)
    _check_parts(field, model)
    return model


def patch_size(model: ViT) -> int:
    """Return the side of a patch in pixels."""
    return int(model.patch_embed.patch_size[0])


def img_size(model: ViT) -> int:
    """Return the side of the square input in pixels."""
    size: Any = model.patch_embed.img_size
    return int(size[0])


def num_heads(model: ViT) -> int:
    """Return the attention heads of a block."""
    attn: Any = model.blocks[0].attn
    return int(attn.num_heads)


def weight_dtype(model: ViT) -> torch.dtype:
    """Return the dtype the model computes in; true for a parameter that ZeRO-3 has partitioned, too."""
    return model.patch_embed.proj.weight.dtype


def _create(field: str, arch: dict[str, Any], *, pretrained: bool, seed: int) -> torch.nn.Module:
    name = arch["model_name"]
    has_bias = arch.get("rel_pos_bias", False)
    arch = {key: value for key, value in arch.items() if key != "rel_pos_bias"}
    if not timm.is_model(name):
        close = difflib.get_close_matches(name.split(".")[0], timm.list_models(), n=3)
        hint = f"did you mean {', '.join(close)}?" if close else "timm.list_models() names them"
        raise UserError(f"{field} must be a timm model, got {name}; {hint}")
    try:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            model = timm.create_model(**arch, pretrained=pretrained)
    except (AssertionError, RuntimeError, TypeError, OSError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{field}: timm cannot create {_call(arch, pretrained)}: {reason}") from error
    if has_bias and isinstance(model, VisionTransformer):  # others are refused by the caller
        add_rel_pos_bias(field, model)
    return model


def _check_parts(field: str, model: ViT) -> None:
    block = model.blocks[0]
    if not isinstance(getattr(block, "attn", None), torch.nn.Module):
        raise UserError(
            f"{field} must have blocks of one attention and one MLP, got {type(block).__name__}; choose a plain ViT "
            "such as vit_base_patch16_224"
        )
    if not isinstance(model.patch_embed.proj, torch.nn.Conv2d):
        raise UserError(f"{field} must cut its patches by one convolution, got a stem of several layers")
    rows, columns = model.patch_embed.grid_size
    if rows != columns or model.dynamic_img_size:
        raise UserError(f"{field} must have a fixed square grid of patches, got {rows} x {columns}")


def _call(arch: dict[str, Any], pretrained: bool) -> str:
    sizes = "".join(f", {key}={value}" for key, value in arch.items() if key != "model_name")
    return f"{arch['model_name']}{sizes}{', pretrained' if pretrained else ''}"
