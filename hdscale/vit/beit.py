"""A ViT with a shared relative position bias as timm's Beit, and back.

Beit is the class of timm's that holds such a bias. It has no bias of keys, which adds the same to all logits of a query
and so changes no attention: that third of `qkv.bias` is left out, and comes back as zeros.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import timm
import torch
from torch import Tensor

from hdscale.errors import UserError

_BEIT, _VIT = "beit_base_patch16_224", "vit_base_patch16_224"
_BEIT_SETTINGS = {
    "use_shared_rel_pos_bias": True,
    "use_rel_pos_bias": False,
    "use_abs_pos_emb": True,
    "global_pool": "token",  # keeps the final norm before the pooling
}
_SIZES = ("img_size", "num_classes", "patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio", "init_values")


def is_beit(arch: Mapping[str, Any]) -> bool:
    """Tell whether a file's arch is what `to_beit` gives."""
    return arch["model_name"] == _BEIT and all(arch.get(name) == value for name, value in _BEIT_SETTINGS.items())


def to_beit(sizes: Mapping[str, Any], state: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return timm's arguments and weights of the Beit that gives the same tokens.

    Args:
        sizes: all of img_size, num_classes, patch_size, embed_dim, depth, num_heads, mlp_ratio and init_values.
        state: of timm's VisionTransformer with a `SharedRelPosBias`.

    Raises:
        UserError: the ViT has parts that Beit has not.
    """
    arch = {"model_name": _BEIT, **{name: sizes[name] for name in _SIZES}, **_BEIT_SETTINGS}
    found: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name.endswith("attn.qkv.bias"):
            query, _, value = tensor.chunk(3)
            block = name.removesuffix("qkv.bias")
            found |= {f"{block}q_bias": query.clone(), f"{block}v_bias": value.clone()}
        else:
            found[re.sub(r"ls([12])\.gamma$", r"gamma_\1", name)] = tensor
    with torch.device("meta"):
        wanted = timm.create_model(**arch).state_dict()
    strange = [name for name in sorted(wanted.keys() | found.keys()) if _shape(wanted, name) != _shape(found, name)]
    if strange:
        raise UserError(
            f"student.rel_pos_bias: timm's Beit, which holds such a bias, does not fit the student ({strange[0]}); "
            "choose a plain student.model such as vit_base_patch16_224"
        )
    return arch, found


def from_beit(arch: Mapping[str, Any], state: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Undo `to_beit`: return `create_vit`'s arguments and weights."""
    found: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name.endswith("attn.q_bias"):
            value = state[name.removesuffix("q_bias") + "v_bias"]
            found[name.removesuffix("q_bias") + "qkv.bias"] = torch.cat([tensor, torch.zeros_like(tensor), value])
        elif not name.endswith("attn.v_bias"):
            found[re.sub(r"gamma_([12])$", r"ls\1.gamma", name)] = tensor
    return {"model_name": _VIT, **{name: arch[name] for name in _SIZES}, "rel_pos_bias": True}, found


def _shape(state: Mapping[str, Tensor], name: str) -> torch.Size | None:
    return state[name].shape if name in state else None
