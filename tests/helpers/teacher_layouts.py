"""Released layouts written out, with random weights, and a vision transformer written out that reads them."""

import torch
import torch.nn.functional as F

DIM, HEADS, DEPTH, PATCH, GRID, HIDDEN = 48, 3, 2, 8, 4, 96
SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "mlp_ratio": 2, "num_classes": 0}

# Names of what a transformer is made of; `{}` is a block's number. `qkv` is one fused layer, or three names.
_TIMM_BLOCK = {
    "norm1": "blocks.{}.norm1.",
    "qkv": "blocks.{}.attn.qkv.",
    "proj": "blocks.{}.attn.proj.",
    "norm2": "blocks.{}.norm2.",
    "fc1": "blocks.{}.mlp.fc1.",
    "fc2": "blocks.{}.mlp.fc2.",
}
_TIMM = {"cls": "cls_token", "pos": "pos_embed", "patch": "patch_embed.proj.", "norm": "norm.", **_TIMM_BLOCK}
_DINOV2 = {**_TIMM, "ls1": "blocks.{}.ls1.gamma", "ls2": "blocks.{}.ls2.gamma", "mask_token": "mask_token"}
_HF_EMBEDDINGS = {
    "cls": "embeddings.cls_token",
    "pos": "embeddings.position_embeddings",
    "patch": "embeddings.patch_embeddings.projection.",
    "norm": "layernorm.",
}
_HF_ATTENTION = {
    "qkv": [f"encoder.layer.{{}}.attention.attention.{part}." for part in ("query", "key", "value")],
    "proj": "encoder.layer.{}.attention.output.dense.",
}
_HF_VIT = {
    **_HF_EMBEDDINGS,
    **_HF_ATTENTION,
    "norm1": "encoder.layer.{}.layernorm_before.",
    "norm2": "encoder.layer.{}.layernorm_after.",
    "fc1": "encoder.layer.{}.intermediate.dense.",
    "fc2": "encoder.layer.{}.output.dense.",
}
_HF_DINOV2 = {
    **_HF_EMBEDDINGS,
    **_HF_ATTENTION,
    "norm1": "encoder.layer.{}.norm1.",
    "norm2": "encoder.layer.{}.norm2.",
    "fc1": "encoder.layer.{}.mlp.fc1.",
    "fc2": "encoder.layer.{}.mlp.fc2.",
    "ls1": "encoder.layer.{}.layer_scale1.lambda1",
    "ls2": "encoder.layer.{}.layer_scale2.lambda1",
    "mask_token": "embeddings.mask_token",
}
_CLIP = {
    "cls": "class_embedding",
    "pos": "positional_embedding",
    "patch": "conv1.",
    "pre": "ln_pre.",
    "norm": "ln_post.",
    "norm1": "transformer.resblocks.{}.ln_1.",
    "qkv": "transformer.resblocks.{}.attn.in_proj_",
    "proj": "transformer.resblocks.{}.attn.out_proj.",
    "norm2": "transformer.resblocks.{}.ln_2.",
    "fc1": "transformer.resblocks.{}.mlp.c_fc.",
    "fc2": "transformer.resblocks.{}.mlp.c_proj.",
}
_HF_CLIP = {
    "cls": "embeddings.class_embedding",
    "pos": "embeddings.position_embedding.weight",
    "patch": "embeddings.patch_embedding.",
    "pre": "pre_layrnorm.",
    "norm": "post_layernorm.",
    "norm1": "encoder.layers.{}.layer_norm1.",
    "qkv": [f"encoder.layers.{{}}.self_attn.{part}_proj." for part in "qkv"],
    "proj": "encoder.layers.{}.self_attn.out_proj.",
    "norm2": "encoder.layers.{}.layer_norm2.",
    "fc1": "encoder.layers.{}.mlp.fc1.",
    "fc2": "encoder.layers.{}.mlp.fc2.",
}
_SWIGLU = {"w12": "blocks.{}.mlp.w12.", "w3": "blocks.{}.mlp.w3."}
_HF_SWIGLU = {"w12": "encoder.layer.{}.mlp.weights_in.", "w3": "encoder.layer.{}.mlp.weights_out."}


def _without_mlp(names):
    return {part: name for part, name in names.items() if part not in ("fc1", "fc2")}


NAMES = {
    "timm": _TIMM,
    "distilled": {**_TIMM, "dist": "dist_token"},
    "deit3": {**_TIMM, "ls1": "blocks.{}.gamma_1", "ls2": "blocks.{}.gamma_2", "patch_pos": "pos_embed"},
    "dinov2": _DINOV2,
    "dinov2_reg": {**_DINOV2, "registers": "register_tokens"},
    "dinov2_giant": {**_without_mlp(_DINOV2), **_SWIGLU},
    "clip": _CLIP,
    "hf_vit": _HF_VIT,
    "hf_dinov2": _HF_DINOV2,
    "hf_dinov2_reg": {**_HF_DINOV2, "registers": "embeddings.register_tokens"},
    "hf_dinov2_giant": {**_without_mlp(_HF_DINOV2), **_HF_SWIGLU},
    "hf_clip": _HF_CLIP,
}
del NAMES["deit3"]["pos"]

_NORMS, _SCALES = ("norm", "norm1", "norm2", "pre"), ("ls1", "ls2")
_LINEAR = {
    "qkv": (3 * DIM, DIM),
    "proj": (DIM, DIM),
    "fc1": (HIDDEN, DIM),
    "fc2": (DIM, HIDDEN),
    "w12": (2 * HIDDEN, DIM),
    "w3": (DIM, HIDDEN),
}


def random_state(layout: str, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Random weights under the layout's names."""
    names = NAMES[layout]
    clip = layout.endswith("clip")
    generator = torch.Generator().manual_seed(0)
    state = {}

    def put(name, *shape, mean=0.0):
        state[name] = (torch.randn(shape, generator=generator) * 0.2 + mean).to(dtype)

    for part, name in names.items():
        if part in ("cls", "mask_token", "dist"):
            put(name, *((DIM,) if clip else (1, DIM) if "embeddings.mask" in name else (1, 1, DIM)))
        elif part in ("pos", "patch_pos"):
            rows = GRID**2 + (part == "pos") + ("dist" in names)
            put(name, *((rows, DIM) if clip else (1, rows, DIM)))
        elif part == "registers":
            put(name, 1, 4, DIM)
        elif part == "patch":
            put(f"{name}weight", DIM, 3, PATCH, PATCH)
            if not clip:
                put(f"{name}bias", DIM)
        else:
            for block in range(DEPTH) if part not in ("norm", "pre") else (0,):
                _put_layer(put, part, name, block)
    return state


def _put_layer(put, part, name, block):
    if part in _SCALES:
        put(name.format(block), DIM, mean=1.0)
    elif part in _NORMS:
        put(f"{name}weight".format(block), DIM, mean=1.0)
        put(f"{name}bias".format(block), DIM)
    else:
        rows, columns = _LINEAR[part]
        for one in name if isinstance(name, list) else [name]:
            share = rows // 3 if isinstance(name, list) else rows
            put(f"{one}weight".format(block), share, columns)
            put(f"{one}bias".format(block), share)


def patch_tokens(
    state: dict[str, torch.Tensor], layout: str, images: torch.Tensor, *, quick_gelu: bool = False
) -> torch.Tensor:
    """Run the transformer whose weights these are: (B, 3, 32, 32) to final patch tokens (B, 16, 48)."""
    names = NAMES[layout]
    eps = 1e-5 if layout.endswith("clip") else 1e-6
    state = {name: tensor.float() for name, tensor in state.items()}

    def norm(x, part, block=0):
        name = names[part].format(block)
        return F.layer_norm(x, (DIM,), state[f"{name}weight"], state[f"{name}bias"], eps)

    def linear(x, part, block):
        one = names[part] if isinstance(names[part], list) else [names[part]]
        return torch.cat(
            [F.linear(x, state[f"{n}weight".format(block)], state[f"{n}bias".format(block)]) for n in one], dim=-1
        )

    def scaled(x, part, block):
        return x * state[names[part].format(block)] if part in names else x

    patch = names["patch"]
    x = F.conv2d(images, state[f"{patch}weight"], state.get(f"{patch}bias"), stride=PATCH).flatten(2).transpose(1, 2)
    first = [state[names[part]].view(1, 1, DIM).expand(len(x), 1, DIM) for part in ("cls", "dist") if part in names]
    if "patch_pos" in names:
        x = torch.cat([*first, x + state[names["patch_pos"]]], dim=1)
    else:
        x = torch.cat([*first, x], dim=1) + state[names["pos"]]
    if "registers" in names:
        x = torch.cat([x[:, :1], state[names["registers"]].expand(len(x), -1, -1), x[:, 1:]], dim=1)
    if "pre" in names:
        x = norm(x, "pre")
    for block in range(DEPTH):
        query, key, value = (
            part.unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for part in linear(norm(x, "norm1", block), "qkv", block).chunk(3, dim=-1)
        )
        attention = (query @ key.transpose(-1, -2) / (DIM // HEADS) ** 0.5).softmax(-1)
        mixed = (attention @ value).transpose(1, 2).flatten(2)
        x = x + scaled(linear(mixed, "proj", block), "ls1", block)
        y = norm(x, "norm2", block)
        if "w12" in names:
            gate, up = linear(y, "w12", block).chunk(2, dim=-1)
            y = linear(F.silu(gate) * up, "w3", block)
        else:
            y = linear(y, "fc1", block)
            y = linear(y * torch.sigmoid(1.702 * y) if quick_gelu else F.gelu(y), "fc2", block)
        x = x + scaled(y, "ls2", block)
    return norm(x, "norm")[:, -(GRID**2) :]
