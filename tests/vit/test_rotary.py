"""timm's `Eva`: EVA-02, DINOv3 and other transformers whose positions are rotations of Q and K."""

import pytest
import timm
import torch

from hdscale.errors import UserError
from hdscale.vit.build import create_teacher_vit
from hdscale.vit.encoder import Outputs, ViTEncoder
from tests.helpers.tensors import close

SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 4, "num_heads": 3, "num_classes": 0}
KINDS = {
    "EVA-02: split qkv, SwiGLU with norm": ("eva02_base_patch14_224", {}),
    "EVA-02 CLIP: norm inside the attention": ("eva02_base_patch16_clip_224", {}),
    "EVA-02 small: fused qkv, SwiGLU": ("eva02_small_patch14_224", {}),
    "EVA-02 enormous: post-norm, no rotation": ("eva02_enormous_patch14_clip_224", {}),
    "EVA-01: no rotation": ("eva_giant_patch14_224", {}),
    "q and k norm": ("eva02_base_patch14_224", {"qk_norm": True}),
    "layer scale": ("eva02_small_patch14_224", {"init_values": 0.5}),
    "DINOv3: registers, half rotation, no absolute positions": ("vit_small_patch16_dinov3", {}),
    "PE: fused qkv, norm before": ("vit_pe_core_base_patch16_224", {}),
    "mixed: a rotation of its own in each block and head": ("vit_small_patch16_rope_mixed_224", {}),
    "shared keys": (
        "vit_small_patch16_rope_224",
        {"qkv_fused": False, "num_kv_heads": 1, "qk_norm": True},
    ),
}
every_kind = pytest.mark.parametrize("kind", KINDS)
KEEP = torch.tensor([[0, 3, 5, 15], [1, 2, 9, 10], [4, 5, 6, 7]])


def model_of(kind: str) -> torch.nn.Module:
    name, more = KINDS[kind]
    torch.manual_seed(0)
    model = create_teacher_vit("name", {"model_name": name, **SIZES, **more}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def images(side: int = 32) -> torch.Tensor:
    return torch.randn(3, 3, side, side, generator=torch.Generator().manual_seed(1))


def rows_of(tensor: torch.Tensor, num_prefix: int, dim: int) -> torch.Tensor:
    rows = [list(range(num_prefix)) + [num_prefix + int(index) for index in indices] for indices in KEEP]
    return torch.stack([one.index_select(dim - 1, torch.tensor(row)) for one, row in zip(tensor, rows, strict=True)])


def attended(model: torch.nn.Module, x: torch.Tensor, monkeypatch) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Q and K that the library hands to its attention kernel, block by block."""
    seen = []
    kernel = torch.nn.functional.scaled_dot_product_attention

    def recording(query, key, value, **arguments):
        seen.append((query, key))
        return kernel(query, key, value, **arguments)

    with monkeypatch.context() as patched:
        patched.setattr(torch.nn.functional, "scaled_dot_product_attention", recording)
        model.forward_features(x)
    return seen


@every_kind
@pytest.mark.parametrize("side", [32, 48])
def test_tokens_queries_and_keys_are_those_that_timm_s_own_forward_uses(kind, side, monkeypatch):
    model = model_of(kind)
    if side != 32:
        model.set_input_size((side, side))
    x = images(side)
    with torch.no_grad():
        reference = model.fc_norm(model.forward_features(x))[:, model.num_prefix_tokens :]
        expected = attended(model, x, monkeypatch)
        ours = ViTEncoder(model, Outputs(relation_layers=(0, 1, 2, 3)))(x)
    assert close(ours.patch_tokens, reference)
    for query, key, (their_query, their_key) in zip(ours.queries, ours.keys, expected, strict=True):
        assert close(query, their_query)
        assert close(key, their_key)


@every_kind
def test_kept_tokens_equal_a_full_forward_that_cannot_look_at_the_others(kind, monkeypatch):
    model = model_of(kind)
    num_prefix = model.num_prefix_tokens
    hidden = torch.full((3, 1, num_prefix + 16, num_prefix + 16), float("-inf"))
    for image, indices in enumerate(KEEP):
        hidden[image, :, :, num_prefix + indices] = 0
        hidden[image, :, :, :num_prefix] = 0
    with torch.no_grad():
        output = ViTEncoder(model, Outputs(relation_layers=(0, 2)))(images(), KEEP)
        reference = model.fc_norm(model.forward_features(images(), attn_mask=hidden))
        first_query, first_key = attended(model, images(), monkeypatch)[0]
    assert close(output.patch_tokens, rows_of(reference, num_prefix, 1)[:, num_prefix:])
    assert close(output.queries[0], rows_of(first_query, num_prefix, 2))
    assert close(output.keys[0], rows_of(first_key, num_prefix, 2))


@every_kind
@pytest.mark.parametrize("final", ["norm", None])
def test_a_pruned_teacher_equals_the_whole_one_and_gives_the_kept(kind, final):
    model = model_of(kind)
    outputs = Outputs((-3, -2), stage_layers=(0, 1), final=final)
    with torch.no_grad():
        whole = ViTEncoder(model, outputs, tokens="full")(images())
        pruned = ViTEncoder(model, outputs, tokens="full", prune=True)(images(), KEEP)
    assert (pruned.patch_tokens is None) == (final is None)
    if final is not None:
        assert close(pruned.patch_tokens, rows_of(whole.patch_tokens, 0, 1))
    for name in ("queries", "keys"):
        for ours, reference in zip(getattr(pruned, name), getattr(whole, name), strict=True):
            assert close(ours, rows_of(reference, model.num_prefix_tokens, 2))
    for ours, reference in zip(pruned.stage_tokens, whole.stage_tokens, strict=True):
        assert close(ours, reference)


@every_kind
def test_patches_dropped_between_blocks_take_their_rotations_along(kind):
    def first_half(tokens):
        return torch.arange(tokens.shape[1] // 2).expand(len(tokens), -1)

    def every_second(tokens):
        return torch.arange(0, tokens.shape[1], 2).expand(len(tokens), -1)

    model = model_of(kind)
    choices = iter((every_second, first_half))
    with torch.no_grad():
        outputs = Outputs(relation_layers=(3,), stage_layers=(0, 2))
        output = ViTEncoder(model, outputs, tokens="full", drop=lambda tokens: next(choices)(tokens))(images())
        x = model.patch_embed(images())
        x, rope = model._pos_embed(x)
        x = model.norm_pre(x)
        patches = torch.arange(16)
        for index, block in enumerate(model.blocks):
            own = rope[index] if model.rope_mixed else rope
            x = block(x, rope=None if rope is None else own[..., patches, :])
            if index in (0, 2):
                stay = torch.arange(0, 16, 2) if index == 0 else torch.arange(4)
                patches = patches[stay]
                x = torch.cat([x[:, : model.num_prefix_tokens], x[:, model.num_prefix_tokens + stay]], dim=1)
        reference = model.fc_norm(model.norm(x))[:, model.num_prefix_tokens :]
    assert output.keep_indices.tolist() == [[0, 2, 4, 6]] * 3
    assert close(output.patch_tokens, reference)


def test_a_model_of_dynamic_input_size_becomes_one_of_fixed_size_with_equal_tokens():
    dynamic = timm.create_model("vit_small_patch16_dinov3", **SIZES).eval()
    fixed = create_teacher_vit("name", {"model_name": "vit_small_patch16_dinov3", **SIZES}).eval()
    assert (dynamic.dynamic_img_size, fixed.dynamic_img_size) == (True, False)
    fixed.load_state_dict(dynamic.state_dict())
    with torch.no_grad():
        assert close(fixed.forward_features(images()), dynamic.forward_features(images()))


def test_other_architectures_are_refused_as_teachers_in_one_line():
    with pytest.raises(UserError, match=r"name must be a timm VisionTransformer or Eva, got a Beit; choose") as caught:
        create_teacher_vit("name", {"model_name": "beit_base_patch16_224", "depth": 1})
    assert "\n" not in str(caught.value)
