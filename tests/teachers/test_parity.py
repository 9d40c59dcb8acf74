"""The teachers of the paper's tables against the libraries' own forward, from a file of weights to the last layer.

Names, patch sizes and input sizes are the real ones; depth and width are cut.
"""

from functools import partial
from types import SimpleNamespace

import open_clip
import pytest
import timm
import torch
import torch.nn.functional as F
from open_clip.model import CLIPVisionCfg, _build_vision_tower, resize_pos_embed

from hdscale.config.recipe import TeacherConfig
from hdscale.teachers.build import build_teacher
from hdscale.vit.encoder import ViTEncoder
from tests.helpers.tensors import close

SMALL = {"embed_dim": 48, "depth": 3, "num_heads": 3, "num_classes": 0}
TIMM = [
    "vit_base_patch16_224.mae",
    "deit_base_patch16_224.fb_in1k",
    "deit_base_distilled_patch16_224.fb_in1k",
    "vit_base_patch16_224.dino",
    "vit_base_patch14_dinov2.lvd142m",
    "vit_base_patch14_reg4_dinov2.lvd142m",
    "vit_giant_patch14_dinov2.lvd142m",
    "vit_base_patch32_clip_quickgelu_224.openai",
    "vit_base_patch16_clip_224.laion2b",
    "vit_large_patch14_clip_quickgelu_224.openai",
    "eva02_base_patch14_224.mim_in22k",
    "eva02_base_patch16_clip_224.merged2b",
    "eva02_tiny_patch14_224.mim_in22k",
]
every_name = pytest.mark.parametrize("name", TIMM)
KEEP = torch.tensor([[0, 3, 5, 15], [1, 2, 9, 10]])
MASKED = {"img_size": 64, "patch_size": 16}


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randint(0, 256, (2, 3, 160, 160), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def library_model(name: str, **changes) -> torch.nn.Module:
    """timm's own small model, with weights that hide nothing."""
    torch.manual_seed(0)
    model = timm.create_model(name, **SMALL, **changes).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


@pytest.fixture
def teacher_of(monkeypatch, tmp_path):
    """Write a model's weights to a file, and build the teacher that a recipe names with it."""

    def build(name, model, **arguments):
        torch.save(model.state_dict(), tmp_path / "weights.pth")
        with monkeypatch.context() as patched:
            patched.setattr(timm, "create_model", partial(timm.create_model, **SMALL))
            return build_teacher(TeacherConfig(name=f"timm:{name}/{tmp_path}/weights.pth"), **arguments)

    return build


def attended(model, x, monkeypatch):
    """Final tokens, and Q and K that the library hands to its attention kernel, block by block."""
    seen = []
    kernel = F.scaled_dot_product_attention

    def recording(query, key, value, **arguments):
        seen.append((query, key))
        return kernel(query, key, value, **arguments)

    with monkeypatch.context() as patched, torch.no_grad():
        patched.setattr(F, "scaled_dot_product_attention", recording)
        return model.fc_norm(model.forward_features(x)), seen


def interpolated(model: torch.nn.Module, grid: int) -> torch.Tensor:
    """Position embeddings at another grid: patches bicubically, prefix tokens as they are."""
    prefix = 0 if model.no_embed_class else model.num_prefix_tokens
    old = model.patch_embed.grid_size
    patches = model.pos_embed[:, prefix:].unflatten(1, old).permute(0, 3, 1, 2)
    patches = F.interpolate(patches, (grid, grid), mode="bicubic", antialias=True)
    return torch.cat([model.pos_embed[:, :prefix], patches.flatten(2).transpose(1, 2)], dim=1)


@every_name
@pytest.mark.parametrize("grid", [None, 10])
def test_features_queries_and_keys_of_a_timm_teacher_equal_timm_s(name, grid, teacher_of, monkeypatch, images):
    native = library_model(name)
    teacher = teacher_of(name, native, grid_size=grid, relation_layers=(0, 1, 2))
    reference = native
    if grid is not None:
        reference = library_model(name, img_size=grid * native.patch_embed.patch_size[0])
        reference.load_state_dict({**native.state_dict(), "pos_embed": interpolated(native, grid)})
    tokens, expected = attended(reference, teacher.preprocess(images, torch.float32), monkeypatch)
    output = teacher(images)
    assert close(output.patch_tokens, tokens[:, native.num_prefix_tokens :])
    assert len(output.queries) == len(expected) == 3
    for query, key, (their_query, their_key) in zip(output.queries, output.keys, expected, strict=True):
        assert close(query, their_query)
        assert close(key, their_key)
    assert teacher.preprocess.mean == timm.get_pretrained_cfg(name).mean


@every_name
def test_a_pruned_timm_teacher_gives_the_kept_rows_of_timm_s_tokens(name, teacher_of, images):
    native = library_model(name)
    feature = teacher_of(name, native, role="feature", grid_size=4)
    whole = teacher_of(name, native, grid_size=4)
    expected = whole(images).patch_tokens.gather(1, KEEP[:, :, None].expand(-1, -1, 48))
    assert close(feature(images, KEEP).patch_tokens, expected)


@every_name
def test_kept_tokens_equal_timm_s_full_forward_with_an_attention_mask(name):
    model = library_model(name, **MASKED)
    num_prefix = model.num_prefix_tokens
    allowed = torch.zeros(2, 1, 1, num_prefix + 16, dtype=torch.bool)
    allowed[..., :num_prefix] = True
    for image, indices in enumerate(KEEP):
        allowed[image, :, :, num_prefix + indices] = True
    allowed = allowed.expand(-1, -1, num_prefix + 16, -1)
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        tokens = model.fc_norm(model.forward_features(x, attn_mask=allowed))[:, num_prefix:]
        expected = torch.stack([one[indices] for one, indices in zip(tokens, KEEP, strict=True)])
        assert close(ViTEncoder(model)(x, KEEP).patch_tokens, expected)


@pytest.mark.parametrize("name", ["ViT-B-32", "ViT-B-16", "ViT-L-14", "ViT-L-14-quickgelu"])
@pytest.mark.parametrize("grid", [None, 10])
@pytest.mark.parametrize("target", ["norm", "projected"])
def test_features_queries_and_keys_of_an_open_clip_teacher_equal_open_clip_s(
    name, grid, target, monkeypatch, tmp_path, images
):
    config = open_clip.get_model_config(name)
    vision = {**config["vision_cfg"], "layers": 3, "width": 128}
    monkeypatch.setattr(open_clip, "get_model_config", lambda _name: {**config, "vision_cfg": vision})

    def tower_of(size):
        torch.manual_seed(0)
        settings = CLIPVisionCfg(**{**vision, "image_size": size, "output_tokens": True})
        return _build_vision_tower(config["embed_dim"], settings, config.get("quick_gelu", False)).eval()

    tower = tower_of(vision["image_size"])
    with torch.no_grad():
        for parameter in tower.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    state = {f"visual.{key}": tensor for key, tensor in tower.state_dict().items()}
    torch.save(state, tmp_path / "open_clip_pytorch_model.bin")
    teacher = build_teacher(
        TeacherConfig(name=f"open_clip:{name}/{tmp_path}/open_clip_pytorch_model.bin", target=target),
        grid_size=grid,
        relation_layers=(0, 1, 2),
    )
    if grid is not None:
        tower = tower_of(grid * vision["patch_size"])
        resize_pos_embed(state, SimpleNamespace(visual=tower))
        tower.load_state_dict({key.removeprefix("visual."): tensor for key, tensor in state.items()})
    normed = []
    for block in tower.transformer.resblocks:
        block.ln_1.register_forward_hook(lambda _module, _args, output: normed.append(output))
    with torch.no_grad():
        _, tokens = tower(teacher.preprocess(images, torch.float32))
        expected = tokens @ tower.proj if target == "projected" else tokens
        output = teacher(images)
        assert close(output.patch_tokens, expected)
        for layer, block in enumerate(tower.transformer.resblocks):
            flat = F.linear(normed[layer], block.attn.in_proj_weight, block.attn.in_proj_bias)
            query, key, _ = (part.unflatten(-1, (2, 64)).transpose(1, 2) for part in flat.chunk(3, dim=-1))
            assert close(output.queries[layer], query)
            assert close(output.keys[layer], key)
