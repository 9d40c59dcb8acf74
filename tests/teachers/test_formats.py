"""Files of other people: each test writes one of that exact layout, loads it, and computes the features by hand."""

import argparse
import pickle
import zipfile

import numpy
import open_clip
import pytest
import torch
from safetensors.torch import save_file

from hdscale.config.recipe import TeacherConfig
from hdscale.errors import UserError
from hdscale.teachers.files import save_teacher_file
from hdscale.teachers.load import load_source
from hdscale.teachers.weights import fit_state, read_state
from hdscale.vit.build import create_teacher_vit
from hdscale.vit.encoder import ViTEncoder
from tests.helpers.teacher_layouts import DIM, SIZES, patch_tokens, random_state
from tests.helpers.tensors import close

OTHERS = {"optimizer": {"state": {}, "param_groups": [{"lr": 1e-3}]}, "epoch": 3, "args": argparse.Namespace(lr=0.1)}
HEAD = {"head.weight": torch.ones(10, DIM), "head.bias": torch.ones(10)}
MARKS = {"input_resolution": 224, "context_length": 77, "vocab_size": 49408}
DECODER = {
    "mask_token": torch.ones(1, 1, 32),
    "decoder_embed.weight": torch.ones(32, DIM),
    "decoder_pos_embed": torch.ones(1, 17, 32),
    "decoder_blocks.0.attn.qkv.weight": torch.ones(96, 32),
    "decoder_norm.weight": torch.ones(32),
}
TEXT = {
    "positional_embedding": torch.ones(77, 32),
    "text_projection": torch.ones(32, 24),
    "logit_scale": torch.ones(()),
    "token_embedding.weight": torch.ones(50, 32),
    "transformer.resblocks.0.attn.in_proj_weight": torch.ones(96, 32),
    "transformer.resblocks.0.mlp.c_proj.bias": torch.ones(32),
    "ln_final.weight": torch.ones(32),
}
VIT, DINOV2, REG, CLIP = (
    "vit_tiny_patch16_224",
    "vit_small_patch14_dinov2",
    "vit_small_patch14_reg4_dinov2",
    "vit_base_patch16_clip_224",
)
GIANT = ("vit_giant_patch14_dinov2", {"mlp_ratio": 4.0})  # two halves of 96


def below(prefix, state):
    return {prefix + name: tensor for name, tensor in state.items()}


def in_chunks(state):
    """DINOv2's training counts chunks of blocks before blocks."""
    return {name.replace("blocks.", "blocks.0.", 1): tensor for name, tensor in state.items()}


def dino_training(state):
    zeros = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    return {
        "student": below("module.backbone.", zeros) | below("module.head.", {"mlp.0.weight": torch.ones(3)}),
        "teacher": below("backbone.", state) | below("head.", {"mlp.0.weight": torch.ones(3)}),
        "optimizer": {"param_groups": [{"lr": numpy.float64(5e-4)}]},
        "dino_loss": {"center": torch.zeros(1, 5)},
        "fp16_scaler": None,
        "args": argparse.Namespace(arch="vit_base"),
    }


# What the file is called, how its tensors are named, what is put around them, and the timm model they are for.
FORMATS = {
    "MAE's release": ("mae_pretrain_vit_base.pth", "timm", lambda s: {"model": s}, VIT),
    "MAE's pretraining": ("checkpoint-799.pth", "timm", lambda s: {"model": s | DECODER, **OTHERS}, VIT),
    "dBOT's release": (
        "84.5_dbot_base_pre.pth",
        "timm",
        lambda s: {"model": s | DECODER | {"decoder_predp.weight": torch.ones(DIM, 32)}, **OTHERS},
        VIT,
    ),
    "DeiT's": ("deit_base_patch16_224-b5f2ef4d.pth", "timm", lambda s: {"model": s | HEAD}, "deit_tiny_patch16_224"),
    "DeiT's distilled": (
        "deit_base_distilled_patch16_224-df68dfff.pth",
        "distilled",
        lambda s: {"model": s | HEAD | {"head_dist.weight": torch.ones(10, DIM), "head_dist.bias": torch.ones(10)}},
        "deit_tiny_distilled_patch16_224",
    ),
    "DeiT III's": ("deit_3_base_224_21k.pth", "deit3", lambda s: {"model": s | HEAD}, "deit3_small_patch16_224"),
    "DINO's release": ("dino_vitbase16_pretrain.pth", "timm", dict, VIT),
    "DINO's training": ("dino_vitbase16_pretrain_full_checkpoint.pth", "timm", dino_training, VIT),
    "a student's alone": (
        "checkpoint.pth",
        "timm",
        lambda s: {"student": below("module.backbone.", s) | below("module.head.", {"last_layer": torch.ones(3)})},
        VIT,
    ),
    "iBOT's": (
        "checkpoint_teacher.pth",
        "timm",
        lambda s: {"state_dict": s | {"masked_embed": torch.ones(1, DIM)}},
        VIT,
    ),
    "DINOv2's": ("dinov2_vits14_pretrain.pth", "dinov2", dict, DINOV2),
    "DINOv2's with registers": ("dinov2_vits14_reg4_pretrain.pth", "dinov2_reg", dict, REG),
    "DINOv2's giant": ("dinov2_vitg14_pretrain.pth", "dinov2_giant", dict, GIANT),
    "DINOv2's training": (
        "teacher_checkpoint.pth",
        "dinov2",
        lambda s: {"teacher": below("backbone.", in_chunks(s)) | {"dino_head.mlp.0.weight": torch.ones(3)}},
        DINOV2,
    ),
    "timm's on the hub": ("model.safetensors", "timm", lambda s: s | HEAD, VIT),
    "ViTMAE of transformers": (
        "model.safetensors",
        "hf_vit",
        lambda s: below("vit.", s) | below("decoder.", {"mask_token": torch.ones(1, 1, 32)}),
        VIT,
    ),
    "ViTModel of transformers": (
        "pytorch_model.bin",
        "hf_vit",
        lambda s: s | {"pooler.dense.weight": torch.ones(DIM, DIM)},
        VIT,
    ),
    "Dinov2 of transformers": ("model.safetensors", "hf_dinov2", dict, DINOV2),
    "Dinov2WithRegisters of transformers": ("model.safetensors", "hf_dinov2_reg", dict, REG),
    "Dinov2 giant of transformers": ("model.safetensors", "hf_dinov2_giant", dict, GIANT),
    "a classifier on Dinov2 of transformers": (
        "model.safetensors",
        "hf_dinov2",
        lambda s: below("dinov2.", s) | {"classifier.weight": torch.ones(10, 2 * DIM)},
        DINOV2,
    ),
    "CLIPModel of transformers": (
        "model.safetensors",
        "hf_clip",
        lambda s: (
            below("vision_model.", s | {"embeddings.position_ids": torch.arange(17)[None]})
            | {"visual_projection.weight": torch.ones(24, DIM), "logit_scale": torch.ones(())}
            | below("text_model.", {"embeddings.token_embedding.weight": torch.ones(50, 32)})
        ),
        CLIP,
    ),
    "CLIPVisionModel of transformers": ("pytorch_model.bin", "hf_clip", lambda s: below("vision_model.", s), CLIP),
    "OpenCLIP's release": (
        "open_clip_pytorch_model.bin",
        "clip",
        lambda s: below("visual.", s | {"proj": torch.ones(DIM, 24)}) | TEXT,
        CLIP,
    ),
    "OpenCLIP's training": (
        "epoch_32.pt",
        "clip",
        lambda s: {
            "epoch": 32,
            "name": "run",
            "state_dict": below("module.", below("visual.", s | {"proj": torch.ones(DIM, 24)}) | TEXT),
            "optimizer": {},
        },
        CLIP,
    ),
}


def write(path, content):
    if path.suffix == ".safetensors":
        save_file({name: tensor.contiguous() for name, tensor in content.items()}, path)
    else:
        torch.save(content, path)


def images() -> torch.Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def tokens_of(model) -> torch.Tensor:
    with torch.no_grad():
        return ViTEncoder(model.eval())(images()).patch_tokens


@pytest.mark.parametrize("name", FORMATS)
def test_a_released_file_gives_the_features_of_its_model(name, tmp_path):
    file, layout, around, model_name = FORMATS[name]
    model_name, more = (model_name, {}) if isinstance(model_name, str) else model_name
    state = random_state(layout)
    write(tmp_path / file, around(dict(state)))
    model = create_teacher_vit("name", {"model_name": model_name, **SIZES, **more})
    fit_state(model, read_state(tmp_path / file, "weights"), source="weights")
    assert close(tokens_of(model), patch_tokens(state, layout, images()))


@pytest.fixture
def tiny_clip(monkeypatch):
    vision = {"image_size": 32, "layers": 2, "width": DIM, "head_width": 16, "patch_size": 8, "mlp_ratio": 2}
    monkeypatch.setattr(open_clip, "list_models", lambda: ["tiny"])
    monkeypatch.setattr(open_clip, "get_model_config", lambda _name: {"embed_dim": 24, "vision_cfg": vision})


class Folder(torch.nn.Module):
    """Holds tensors under dotted names, and runs nothing of use."""

    def __init__(self, state: dict[str, torch.Tensor]) -> None:
        super().__init__()
        inner: dict[str, dict[str, torch.Tensor]] = {}
        for name, tensor in state.items():
            first, dot, rest = name.partition(".")
            if dot:
                inner.setdefault(first, {})[rest] = tensor
            else:
                self.register_parameter(first, torch.nn.Parameter(tensor, requires_grad=False))
        for name, part in inner.items():
            self.add_module(name, Folder(part))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 1


def openai_state():
    """float16, with the text tower, as OpenAI released it; two tensors share a storage."""
    state = random_state("clip", torch.float16)
    norm = torch.stack([state["ln_pre.weight"], state["ln_pre.bias"]])
    state |= {"ln_pre.weight": norm[0], "ln_pre.bias": norm[1]}
    return state, below("visual.", state | {"proj": torch.ones(DIM, 24, dtype=torch.float16)}) | TEXT


@pytest.mark.parametrize("archive", [False, True])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.*torch.jit.*")
def test_openai_s_clip_is_read_as_state_dict_or_archive_and_with_quick_gelu(archive, tmp_path, tiny_clip):
    vision, whole = openai_state()
    if archive:
        module = Folder(whole)
        for name, value in MARKS.items():
            module.register_buffer(name, torch.tensor(value))
        torch.jit.trace(module, torch.ones(2)).save(tmp_path / "ViT-B-32.pt")
    else:
        torch.save(whole | {name: torch.tensor(value) for name, value in MARKS.items()}, tmp_path / "ViT-B-32.pt")
    config = TeacherConfig(name=f"open_clip:tiny/{tmp_path}/ViT-B-32.pt")
    model = load_source(config, "feature_teacher").model
    assert close(tokens_of(model), patch_tokens(vision, "clip", images(), quick_gelu=True))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.*torch.jit.*")
def test_an_archive_that_asks_for_anything_but_tensors_is_refused_and_runs_nothing(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "written"), "w"))

    path = tmp_path / "evil.pt"
    torch.jit.trace(Folder({"a": torch.ones(2)}), torch.ones(2)).save(path)
    with zipfile.ZipFile(path) as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in content.items():
            archive.writestr(name, pickle.dumps(Evil(), protocol=2) if name.endswith("/data.pkl") else data)
    with pytest.raises(
        UserError, match=r"weights: .*evil\.pt is a TorchScript archive .* asks for .*open.* convert"
    ) as e:
        read_state(path, "weights")
    assert "\n" not in str(e.value)
    assert not (tmp_path / "written").exists()


def test_a_pickle_that_runs_code_is_refused_and_runs_nothing(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "written"), "w"))

    torch.save({"model": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(UserError, match=r"evil\.pth is neither a safetensors file nor a torch checkpoint"):
        read_state(tmp_path / "evil.pth", "weights")
    assert not (tmp_path / "written").exists()


def test_a_file_of_hdscale_s_is_read_by_a_timm_name_too(tmp_path):
    state = random_state("timm")
    save_teacher_file(
        tmp_path / "mae.safetensors", state, {"model_name": VIT, **SIZES}, (0, 0, 0), (1, 1, 1), kind="mae"
    )
    model = create_teacher_vit("name", {"model_name": VIT, **SIZES})
    fit_state(model, read_state(tmp_path / "mae.safetensors", "weights"), source="weights")
    assert close(tokens_of(model), patch_tokens(state, "timm", images()))


EVA_FILES = {
    "EVA-02's pretraining": lambda s: {
        "module": s | {"mask_token": torch.ones(1, 1, DIM), "lm_head.bias": torch.ones(9)}
    },
    "EVA-02 CLIP's": lambda s: (
        below("visual.", s) | {"text.ln_final.weight": torch.ones(3), "logit_scale": torch.ones(())}
    ),
    "timm's on the hub": lambda s: s | HEAD,
}


@pytest.mark.parametrize("name", EVA_FILES)
def test_eva_02_is_read_with_the_names_of_its_authors(name, tmp_path):
    sizes = {"model_name": "eva02_base_patch14_224", **SIZES}
    torch.manual_seed(0)
    source = create_teacher_vit("name", sizes, seed=1)
    state = source.state_dict()
    authors = {}
    for key, tensor in state.items():
        key = key.replace("mlp.fc1_g", "mlp.w1").replace("mlp.fc1_x", "mlp.w2").replace("mlp.fc2", "mlp.w3")
        key = key.replace("mlp.norm", "mlp.ffn_ln").replace("q_proj.bias", "q_bias").replace("v_proj.bias", "v_bias")
        authors[key.replace("fc_norm", "norm") if "pretraining" in name else key] = tensor
    authors["rope.freqs_cos"] = torch.ones(16, 16)
    file = tmp_path / "eva.pt"
    torch.save(EVA_FILES[name](state if "timm" in name else authors), file)
    model = create_teacher_vit("name", sizes, seed=2)
    assert not close(tokens_of(model), tokens_of(source))
    fit_state(model, read_state(file, "weights"), source="weights")
    assert torch.equal(tokens_of(model), tokens_of(source))


def test_dinov3_is_read_with_the_names_of_its_authors(tmp_path):
    sizes = {"model_name": "vit_small_patch16_dinov3_qkvb", **SIZES}
    source = create_teacher_vit("name", sizes, seed=1)
    authors = {"mask_token": torch.ones(1, DIM), "rope_embed.periods": torch.ones(4)}
    for key, tensor in source.state_dict().items():
        key = key.replace("gamma_", "ls").replace("reg_token", "storage_tokens")
        authors[key + ".gamma" if ".ls" in key else key] = tensor
    for block in range(2):
        query, value = (authors.pop(f"blocks.{block}.attn.{part}_bias") + 1 for part in "qv")
        authors[f"blocks.{block}.attn.qkv.bias"] = torch.cat([query, torch.zeros(DIM), value])
        authors[f"blocks.{block}.attn.qkv.bias_mask"] = torch.ones(3 * DIM)
        source.blocks[block].attn.q_bias.data, source.blocks[block].attn.v_bias.data = query, value
    torch.save(authors, tmp_path / "dinov3_vits16_pretrain_lvd1689m.pth")
    model = create_teacher_vit("name", sizes, seed=2)
    fit_state(model, read_state(tmp_path / "dinov3_vits16_pretrain_lvd1689m.pth", "weights"), source="weights")
    assert torch.equal(tokens_of(model), tokens_of(source))


def test_a_layout_that_is_not_known_is_refused_with_its_names(tmp_path):
    state = below("vision_model.", random_state("hf_clip"))
    del state["vision_model.embeddings.class_embedding"]  # transformers' SigLIP has none
    save_file(state, tmp_path / "model.safetensors")
    model = create_teacher_vit("name", {"model_name": "vit_base_patch16_siglip_224", **SIZES})
    with pytest.raises(
        UserError, match=r"missing: attn_pool.*; left over: vision_model\.embeddings\..* more; name the"
    ):
        fit_state(model, read_state(tmp_path / "model.safetensors", "weights"), source="weights")


def test_a_block_without_its_key_layer_is_found(tmp_path):
    state = random_state("hf_vit")
    del state["encoder.layer.1.attention.attention.key.weight"]
    torch.save(state, tmp_path / "a.bin")
    model = create_teacher_vit("name", {"model_name": VIT, **SIZES})
    with pytest.raises(UserError, match=r"missing: blocks\.1\.attn\.qkv\.weight; left over: blocks\.1\.attn\.query\.w"):
        fit_state(model, read_state(tmp_path / "a.bin", "weights"), source="weights")
