"""Layouts of released weights that timm's own converters do not take, renamed to layouts that they do."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

State = dict[str, Tensor]

_OPENAI_ONLY = {"input_resolution", "context_length", "vocab_size"}

_Rules = tuple[tuple[str, str], ...]

# transformers' ViT, ViTMAE, DeiT, Dinov2 and Dinov2WithRegisters, to the names of their original releases.
_VIT_RULES: _Rules = (
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.distillation_token$", "dist_token"),
    (r"^embeddings\.", ""),
    (r"^layernorm\.", "norm."),
    (r"^encoder\.layer\.", "blocks."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.attention\.attention\.(query|key|value)\.", r".attn.\1."),
    (r"\.attention\.output\.dense\.", ".attn.proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
    (r"\.mlp\.weights_in\.", ".mlp.w12."),
    (r"\.mlp\.weights_out\.", ".mlp.w3."),
    (r"\.layer_scale([12])\.lambda1$", r".ls\1.gamma"),
)
# transformers' CLIPModel, CLIPVisionModel and CLIPVisionModelWithProjection, to OpenAI's names.
_CLIP_RULES: _Rules = (
    (r"^embeddings\.class_embedding$", "class_embedding"),
    (r"^embeddings\.patch_embedding\.", "conv1."),
    (r"^embeddings\.position_embedding\.weight$", "positional_embedding"),
    (r"^pre_layrnorm\.", "ln_pre."),
    (r"^post_layernorm\.", "ln_post."),
    (r"^encoder\.layers\.", "transformer.resblocks."),
    (r"\.self_attn\.([qkv])_proj\.", r".attn.\1."),
    (r"\.self_attn\.out_proj\.", ".attn.out_proj."),
    (r"\.layer_norm([12])\.", r".ln_\1."),
    (r"\.mlp\.fc1\.", ".mlp.c_fc."),
    (r"\.mlp\.fc2\.", ".mlp.c_proj."),
)
_PARTS = {"query": 0, "key": 1, "value": 2, "q": 0, "k": 1, "v": 2}


def is_openai(state: Mapping[str, Tensor]) -> bool:
    """Tell whether weights are OpenAI's CLIP as released: trained with quick-GELU, which no weight shows."""
    return state.keys() >= _OPENAI_ONLY


def known_layout(state: State) -> State:
    """Rename tensors to a layout that timm's converters take; parts that are no vision backbone may be left out."""
    if all(name.startswith("module.") for name in state):
        state = _below("module.", state)
    if any(name.startswith("backbone.") for name in state):  # DINO's and DINOv2's training, beside their heads
        state = _below("backbone.", state)
    state = {re.sub(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.", name): tensor for name, tensor in state.items()}
    for name in state:
        if name.endswith("embeddings.patch_embeddings.projection.weight"):
            return _from_transformers_vit(state, name.removesuffix("embeddings.patch_embeddings.projection.weight"))
        if name.endswith("vision_model.embeddings.class_embedding"):
            return _from_transformers_clip(state, name.removesuffix("embeddings.class_embedding"))
        if name.startswith("visual.trunk."):
            return _from_open_clip_trunk(state)
    return state


def _below(prefix: str, state: State) -> State:
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def _from_open_clip_trunk(state: State) -> State:
    found = _below("visual.trunk.", state)
    projection = state.get("visual.head.proj.weight")
    if projection is not None:
        found["head.weight"] = projection
        found["head.bias"] = state.get("visual.head.proj.bias", torch.zeros(len(projection)))
    return found


def _from_transformers_vit(state: State, prefix: str) -> State:
    own = {
        name: tensor
        for name, tensor in _below(prefix, state).items()
        if not name.startswith(("decoder.", "classifier.", "pooler."))
    }
    return _with_fused_qkv(_renamed(own, _VIT_RULES), "attn.qkv.")


def _from_transformers_clip(state: State, prefix: str) -> State:
    own = _below(prefix, state)
    own.pop("embeddings.position_ids", None)
    renamed = _with_fused_qkv(_renamed(own, _CLIP_RULES), "attn.in_proj_")
    if "visual_projection.weight" in state:
        renamed["proj"] = state["visual_projection.weight"].T
    return {f"visual.{name}": tensor for name, tensor in renamed.items()}


def _renamed(state: State, rules: _Rules) -> State:
    renamed = {}
    for name, tensor in state.items():
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        renamed[name] = tensor
    return renamed


def _with_fused_qkv(state: State, fused: str) -> State:
    """Join query, key and value of each block; one that lacks a part keeps its names and is found to be left over."""
    found: State = {}
    parts: dict[str, dict[int, str]] = {}
    for name, tensor in state.items():
        match = re.fullmatch(r"(.*\.)attn\.(query|key|value|q|k|v)\.(weight|bias)", name)
        if match is None:
            found[name] = tensor
        else:
            parts.setdefault(match[1] + fused + match[3], {})[_PARTS[match[2]]] = name
    for name, three in parts.items():
        if len(three) == 3:
            found[name] = torch.cat([state[three[part]] for part in range(3)])
        else:
            found.update({one: state[one] for one in three.values()})
    return found
