import argparse
from functools import partial

import open_clip
import pytest
import timm
import torch
from open_clip.model import CLIPVisionCfg, _build_vision_tower

from hdscale.config.recipe import TeacherConfig
from hdscale.errors import UserError
from hdscale.teachers.build import build_teacher
from hdscale.teachers.files import save_teacher_file
from hdscale.teachers.load import load_source
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


TRUNKS = {
    "EVA-02, its head as projection": ("eva02_tiny_patch14_224", "token", None),
    "EVA-02, norm behind the pooling": ("eva02_tiny_patch14_224", "avg", None),
    "EVA-02, a projection of open_clip's": ("eva02_tiny_patch14_224", "", "linear"),
    "timm's CLIP": ("vit_tiny_patch16_224", "token", None),
    "norm behind the pooling": ("vit_tiny_patch16_224", "avg", None),
    "a projection of open_clip's": ("vit_tiny_patch16_224", "", "linear"),
}


@pytest.mark.parametrize("trunk", TRUNKS)
@pytest.mark.parametrize("target", ["norm", "projected"])
def test_a_tower_that_is_timm_s_own_gives_open_clip_s_tokens(trunk, target, monkeypatch, tmp_path, images):
    name, pool, projection = TRUNKS[trunk]
    vision = {"image_size": 224, "timm_model_name": name, "timm_pool": pool, "timm_proj": projection}
    monkeypatch.setattr(open_clip, "list_models", lambda: ["tiny"])
    monkeypatch.setattr(open_clip, "get_model_config", lambda _name: {"embed_dim": 24, "vision_cfg": vision})
    torch.manual_seed(0)
    tower = _build_vision_tower(24, CLIPVisionCfg(**vision)).eval()
    with torch.no_grad():
        for parameter in tower.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    state = {f"visual.{k}": v for k, v in tower.state_dict().items()}
    torch.save({**state, "logit_scale": torch.ones(()), "text.ln_final.bias": torch.ones(3)}, tmp_path / "clip.bin")
    teacher = build_teacher(TeacherConfig(name=f"open_clip:tiny/{tmp_path}/clip.bin", target=target))
    with torch.no_grad():
        tokens = tower.trunk.forward_features(teacher.preprocess(images[:2], torch.float32))
        tokens = tower.trunk.fc_norm(tokens)[:, tower.trunk.num_prefix_tokens :]
        reference = tower.head(tower.trunk.head(tokens)) if target == "projected" else tokens
    ours = teacher(images[:2]).patch_tokens
    assert (ours - reference).norm() <= 1e-5 * reference.norm()
    assert teacher.target_dim == ours.shape[-1]


def test_open_clip_names_of_eva_02_and_siglip_become_timm_s_models_with_their_normalisation():
    for name, model, mean in (
        ("EVA02-B-16", "Eva", open_clip.OPENAI_DATASET_MEAN),
        ("PE-Core-T-16-384", "Eva", (0.5, 0.5, 0.5)),
        ("ViT-B-16-SigLIP", "VisionTransformer", (0.5, 0.5, 0.5)),
    ):
        with torch.device("meta"):
            source = load_source(TeacherConfig(name=f"open_clip:{name}/random"), "feature_teacher")
        assert (type(source.model).__name__, source.mean) == (model, mean)


def test_openai_s_weights_need_a_model_with_quick_gelu(monkeypatch, tmp_path, clip_config):
    tower = _build_vision_tower(24, CLIPVisionCfg(**clip_config["vision_cfg"]), quick_gelu=True)
    marks = dict.fromkeys(("input_resolution", "context_length", "vocab_size"), torch.ones(()))
    state = {**{f"visual.{k}": v for k, v in tower.state_dict().items()}, **marks}
    torch.save(state, tmp_path / "clip.pt")
    by_name = load_source(TeacherConfig(name=f"open_clip:tiny/{tmp_path}/clip.pt"), "feature_teacher").model
    assert type(by_name.blocks[0].mlp.act).__name__ == "QuickGELU"
    monkeypatch.setattr("hdscale.teachers.load.fit_state", lambda *_args, **_kwargs: None)
    monkeypatch.setattr(timm, "create_model", partial(_untrained, timm.create_model))
    with torch.device("meta"):
        for config in (
            TeacherConfig(name="vit_base_patch16_clip_224", weights=str(tmp_path / "clip.pt")),
            TeacherConfig(name="vit_base_patch16_clip_224.openai"),
        ):
            with pytest.raises(
                UserError, match=r"feature_teacher\.name: OpenAI .* choose vit_\*_clip_quickgelu_\*, or"
            ):
                load_source(config, "feature_teacher")
            quick = config.model_copy(update={"name": config.name.replace("clip_", "clip_quickgelu_")})
            load_source(quick, "feature_teacher")


def _untrained(create, *args, pretrained, **kwargs):
    del pretrained
    return create(*args, **kwargs)


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
    monkeypatch.setattr("hdscale.teachers.load._open_clip_path", lambda *_args: "no file")
    monkeypatch.setattr("hdscale.teachers.load.read_state", lambda *_args: {})
    monkeypatch.setattr("hdscale.teachers.load.fit_state", lambda *_args, **_kwargs: None)
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


def test_a_file_without_a_tag_is_refused_where_its_normalisation_would_be_guessed(tmp_path):
    state = timm.create_model("vit_base_patch16_224", num_classes=0).state_dict()
    torch.save({"model": state}, tmp_path / "mae_pretrain_vit_base.pth")
    where = f"{tmp_path}/mae_pretrain_vit_base.pth"
    with pytest.raises(UserError, match=r"feature_teacher\.name must have a tag, .*_224\.mae .* got vit"):
        load_source(TeacherConfig(name=f"timm:vit_base_patch16_224/{where}"), "feature_teacher")
    source = load_source(TeacherConfig(name=f"timm:vit_base_patch16_224.mae/{where}"), "feature_teacher")
    assert (source.mean, source.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def test_a_file_of_ours_by_timm_s_name_keeps_its_own_normalisation(tmp_path):
    arch = {"model_name": "vit_tiny_patch16_224", "num_classes": 0}
    path = tmp_path / "student.safetensors"
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)
    save_teacher_file(path, timm.create_model(**arch).state_dict(), arch, mean, std, kind="student")
    source = load_source(TeacherConfig(name=f"timm:vit_tiny_patch16_224/{path}"), "feature_teacher")
    assert (source.mean, source.std) == (mean, std)


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
            {"source": "open_clip", "name": "convnext_base"},
            r"relation_teacher\.name must be a timm VisionTransformer or Eva, got a ConvNeXt",
        ),
        (
            {"source": "open_clip", "name": "ViT-B-16-SigLIP", "target": "projected"},
            r"relation_teacher\.target projected needs .* of each token, ViT-B-16-SigLIP projects otherwise; set it to",
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
    with torch.device("meta"), pytest.raises(UserError, match=message) as caught:
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
