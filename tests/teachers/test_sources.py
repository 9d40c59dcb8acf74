import argparse

import open_clip
import pytest
import timm
import torch
from open_clip.model import CLIPVisionCfg, _build_vision_tower

from hdscale.config.recipe import TeacherConfig
from hdscale.errors import UserError
from hdscale.teachers.build import build_teacher
from hdscale.teachers.sources import load_source
from hdscale.teachers.weights import fit_state, read_state

TINY_CLIP = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "layers": 3, "width": 48, "head_width": 16, "patch_size": 8},
    "text_cfg": {},
}


@pytest.fixture
def clip_config(monkeypatch, request):
    config = {**TINY_CLIP, **getattr(request, "param", {})}
    monkeypatch.setattr(open_clip, "list_models", lambda: ["tiny", "tiny-b"])
    monkeypatch.setattr(open_clip, "get_model_config", lambda _name: config)
    return config


@pytest.mark.parametrize("clip_config", [{}, {"quick_gelu": True}], indirect=True)
@pytest.mark.parametrize("target", ["norm", "projected"])
def test_an_open_clip_tower_becomes_a_timm_model_with_equal_tokens(clip_config, target, tmp_path, images):
    torch.manual_seed(0)
    tower = _build_vision_tower(24, CLIPVisionCfg(**clip_config["vision_cfg"]), clip_config.get("quick_gelu", False))
    tower.eval().output_tokens = True
    torch.save({"state_dict": {f"module.visual.{k}": v for k, v in tower.state_dict().items()}}, tmp_path / "clip.pt")
    config = TeacherConfig(source="open_clip", name="tiny", weights=str(tmp_path / "clip.pt"), target=target)
    teacher = build_teacher(config)
    with torch.no_grad():
        _, tokens = tower(teacher.preprocess(images, torch.float32))  # open_clip's patch tokens, behind ln_post
        reference = tokens @ tower.proj if target == "projected" else tokens
    ours = teacher(images).patch_tokens
    assert (ours - reference).norm() <= 1e-5 * reference.norm()
    assert teacher.target_dim == ours.shape[-1]
    assert teacher.preprocess.mean == open_clip.OPENAI_DATASET_MEAN


@pytest.mark.parametrize(
    ("name", "tag", "sizes", "act"),
    [
        ("ViT-B-32", "laion2b_s34b_b79k", (768, 12, 12, 32), "GELU"),
        ("ViT-B-16", "openai", (768, 12, 12, 16), "QuickGELU"),
        ("ViT-L-14-quickgelu", "random", (1024, 24, 16, 14), "QuickGELU"),
        ("ViT-H-14", "random", (1280, 32, 16, 14), "GELU"),
    ],
)
def test_open_clip_names_and_tags_give_the_right_shapes_and_activation(name, tag, sizes, act, monkeypatch):
    monkeypatch.setattr("hdscale.teachers.sources._open_clip_path", lambda *_args: "no file")
    monkeypatch.setattr("hdscale.teachers.sources.read_state", lambda *_args: {})
    monkeypatch.setattr("hdscale.teachers.sources.fit_state", lambda *_args, **_kwargs: None)
    with torch.device("meta"):
        model = load_source(TeacherConfig(source="open_clip", name=name, weights=tag), "feature_teacher").model
    attn, mlp = model.blocks[0].attn, model.blocks[0].mlp
    assert (model.embed_dim, len(model.blocks), attn.num_heads, model.patch_embed.patch_size[0]) == sizes
    assert type(mlp.act).__name__ == act


def test_a_timm_teacher_takes_its_normalisation_from_timm():
    source = load_source(TeacherConfig(name="vit_tiny_patch16_224.augreg_in21k", weights="random"), "feature_teacher")
    assert (source.mean, source.std) == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    assert source.model.num_classes == 0


@pytest.mark.parametrize("layout", ["plain", "mae", "module"])
def test_checkpoints_of_others_are_unwrapped_and_their_heads_left(layout, tmp_path):
    torch.manual_seed(1)
    state = timm.create_model("vit_tiny_patch16_224", num_classes=7).state_dict()
    if layout == "mae":
        state = {"model": {**state, "decoder_embed.weight": torch.ones(1)}, "args": argparse.Namespace(lr=1)}
    elif layout == "module":
        state = {"state_dict": {f"module.{name}": tensor for name, tensor in state.items()}}
    torch.save(state, tmp_path / "weights.pth")
    config = TeacherConfig(name="vit_tiny_patch16_224", weights=str(tmp_path / "weights.pth"))
    loaded = load_source(config, "feature_teacher").model.state_dict()
    torch.manual_seed(1)
    expected = timm.create_model("vit_tiny_patch16_224", num_classes=7).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.items())


def test_position_embeddings_of_another_grid_are_interpolated():
    torch.manual_seed(0)
    sizes = {"patch_size": 8, "embed_dim": 48, "depth": 1, "num_heads": 3, "num_classes": 0}
    big, small = (timm.create_model("vit_tiny_patch16_224", img_size=side, **sizes) for side in (48, 32))
    fit_state(small, big.state_dict(), source="here")
    prefix, patches = big.pos_embed[:, :1], big.pos_embed[:, 1:].unflatten(1, (6, 6)).permute(0, 3, 1, 2)
    resized = torch.nn.functional.interpolate(patches, (4, 4), mode="bicubic", antialias=True)
    assert torch.equal(small.pos_embed, torch.cat([prefix, resized.flatten(2).transpose(1, 2)], dim=1))


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"name": "vit_tny_patch16_224"}, r"relation_teacher\.name must be a timm model, .* did you mean"),
        (
            {"name": "swin_tiny_patch4_window7_224"},
            r"relation_teacher\.name must be a timm VisionTransformer or Eva, got a Swin",
        ),
        ({"name": "vit_tiny_patch16_224", "target": "projected"}, r"relation_teacher\.target projected needs a CLIP"),
        (
            {"source": "open_clip", "name": "ViT-L-15"},
            r"relation_teacher\.name must be an open_clip model, got ViT-L-15; did",
        ),
        (
            {"source": "open_clip", "name": "RN50"},
            r"relation_teacher\.name: the vision tower of RN50 is no transformer",
        ),
        (
            {"source": "open_clip", "name": "ViT-B-16-SigLIP"},
            r"timm's own vit_base_patch16_siglip_224; set source to timm",
        ),
        ({"source": "open_clip", "name": "coca_ViT-B-32"}, r"coca_ViT-B-32 uses attentional_pool"),
        (
            {"source": "open_clip", "name": "ViT-B-32", "weights": "opnai"},
            r"relation_teacher\.weights must be .* tag of .*openai.*, got opnai",
        ),
        (
            {"name": "vit_tiny_patch16_224", "weights": "gone.pth"},
            r"relation_teacher\.weights: there is no file gone\.pth",
        ),
        (
            {"source": "file", "weights": "gone.safetensors"},
            r"relation_teacher\.weights: there is no file gone\.safetensors",
        ),
    ],
)
def test_teachers_that_are_not_there_are_refused_in_one_line(section, message, monkeypatch):
    with pytest.raises(UserError, match=message) as caught:
        load_source(TeacherConfig(**{"weights": "random", **section}), "relation_teacher")
    assert "\n" not in str(caught.value)


def test_a_download_that_fails_is_the_users_to_mend(monkeypatch):
    def offline(_about):
        raise FileNotFoundError("no\nnetwork")

    monkeypatch.setattr(open_clip.pretrained, "download_pretrained", offline)
    config = TeacherConfig(source="open_clip", name="ViT-B-32", weights="openai")
    with pytest.raises(UserError, match=r"feature_teacher\.weights: cannot download ViT-B-32 openai: no network"):
        load_source(config, "feature_teacher")


@pytest.mark.parametrize("name", ["text.pth", "text.safetensors"])
def test_a_file_without_tensors_is_refused(name, tmp_path):
    (tmp_path / name).write_text("not tensors")
    with pytest.raises(UserError, match=r"weights: .*text.* is neither a safetensors file nor a torch checkpoint"):
        read_state(tmp_path / name, "weights")
    torch.save({"epoch": 3}, tmp_path / "empty.pth")
    with pytest.raises(UserError, match=r"empty\.pth must hold tensors by name"):
        read_state(tmp_path / "empty.pth", "weights")


def test_weights_of_another_model_are_refused_with_the_first_names(tiny_model):
    state = dict(tiny_model.state_dict())
    del state["norm.weight"], state["norm.bias"]
    state["extra"] = torch.ones(1)
    state["blocks.0.attn.proj.bias"] = torch.ones(3)
    with pytest.raises(UserError) as caught:
        fit_state(tiny_model, state, source="feature_teacher.weights: a.pth")
    assert str(caught.value) == (
        "feature_teacher.weights: a.pth does not fit the model: missing: norm.bias, norm.weight; left over: extra; "
        "of another shape: blocks.0.attn.proj.bias (3,) for (48,); name the model that the file was made with"
    )


def test_long_lists_of_names_are_cut(tiny_model):
    with pytest.raises(UserError, match=r"missing: blocks\.0\.attn\.proj\.bias, .* and 50 more; name"):
        fit_state(tiny_model, {"cls_token": tiny_model.cls_token}, source="a.pth")
