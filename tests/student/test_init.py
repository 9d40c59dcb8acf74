"""Initial weights against the published rules of MAE and FD, and against what timm draws itself."""

import math
import re

import pytest
import timm
import torch

from hdscale.config.sections import LossConfig, PretrainConfig, RelationConfig, StudentConfig
from hdscale.distiller import build_distiller
from hdscale.pretraining import MaskedAutoencoder
from hdscale.student.build import build_student, student_arch
from hdscale.student.decoder import TransformerDecoder
from hdscale.types import TeacherShapes

BASE = StudentConfig(
    model="vit_base_patch16_224", decoder="transformer", decoder_dim=512, decoder_heads=16, mask_tokens="decoder"
)
TINY = {"model": "vit_tiny_patch16_224", "patch_size": 8, "embed_dim": 96, "depth": 3, "num_heads": 3, "mlp_ratio": 2}
UNIFORM, NORMAL, CUT_OFF = "uniform", "normal", "cut off"
# Fourth moment over the squared second one, which decides how far the deviation of n draws is off.
KURTOSIS = {UNIFORM: 1.8, NORMAL: 3.0, CUT_OFF: 1.94}
# A normal distribution without all beyond one deviation: 1 - 2 phi(1) / (Phi(1) - Phi(-1)) of the variance is left.
CUT_OFF_STD = 0.02 * math.sqrt(1 - 2 * math.exp(-0.5) / math.sqrt(2 * math.pi) / math.erf(math.sqrt(0.5)))


def xavier(fan_in, fan_out):
    return UNIFORM, math.sqrt(2 / (fan_in + fan_out))


def torch_default(fan_in):
    return UNIFORM, 1 / math.sqrt(3 * fan_in)


def of_blocks(width, rule):
    """Name the four Linears of a block by their (fan-in, fan-out), and hand each to a rule of fans, part and number."""
    parts = {
        "attn.qkv": (width, 3 * width),
        "attn.proj": (width, width),
        "mlp.fc1": (width, 4 * width),
        "mlp.fc2": (4 * width, width),
    }
    return {part: lambda number, part=part, fans=fans: rule(*fans, part, number) for part, fans in parts.items()}


def expected(name, rules):
    """Look up what a parameter is drawn from, or the number that it is."""
    block = re.fullmatch(r"(.*)blocks\.(\d+)\.((?:attn|mlp)\.\w+)\.weight", name)
    if block is not None:
        return rules[block[1] + "blocks"][block[3]](int(block[2]) + 1)
    if re.search(r"norm\d?\.weight$", name):
        return 1.0
    if name not in rules and name.endswith(".bias"):
        return 0.0
    return rules[name]


def check(module, rules):
    for name, parameter in module.named_parameters():
        wanted, values = expected(name, rules), parameter.detach().double().flatten()
        if isinstance(wanted, float):
            assert values.unique().tolist() == [wanted], name
            continue
        kind, std = wanted
        count = len(values)
        tolerance = 0.02 if count > 100_000 else 4 * math.sqrt((KURTOSIS[kind] - 1) / (4 * count))
        assert values.square().mean().sqrt().item() == pytest.approx(std, rel=tolerance), name
        assert abs(values.mean().item()) < 4 * std / math.sqrt(count), name
        kurtosis = values.square().square().mean().item() / std**4
        assert count < 10_000 or kurtosis == pytest.approx(KURTOSIS[kind], rel=0.05), name


def prefixed(prefix, rules):
    return {prefix + name: rule for name, rule in rules.items()}


# MAE's `initialize_weights` for a ViT-B and its decoder of 8 blocks, 512 wide: Xavier in every Linear (queries, keys
# and values as one matrix) and in the patch embedding as a matrix, whose bias stays PyTorch's own; tokens of 0.02.
MAE_ENCODER = {
    "cls_token": (NORMAL, 0.02),
    "patch_embed.proj.weight": xavier(3 * 16 * 16, 768),
    "patch_embed.proj.bias": torch_default(3 * 16 * 16),
    "blocks": of_blocks(768, lambda fan_in, fan_out, part, number: xavier(fan_in, fan_out)),
}
MAE_DECODER = {
    "mask_token": (NORMAL, 0.02),
    "embed.weight": xavier(768, 512),
    "blocks": of_blocks(512, lambda fan_in, fan_out, part, number: xavier(fan_in, fan_out)),
}
# BEiT's, which FD trains: a normal distribution cut off at one deviation, and branches that shrink with the depth.
FD_BLOCK = {"attn.proj", "mlp.fc2"}


def fd_block(fan_in, fan_out, part, number):
    return CUT_OFF, CUT_OFF_STD / (math.sqrt(2 * number) if part in FD_BLOCK else 1)


FD_STUDENT = {
    "cls_token": (CUT_OFF, CUT_OFF_STD),
    "patch_embed.proj.weight": torch_default(3 * 16 * 16),
    "patch_embed.proj.bias": torch_default(3 * 16 * 16),
    "blocks": of_blocks(768, fd_block),
}


def distiller_of(student, *, feature_dim, img_size=224, seed=0, relation_dim=None, **relation):
    return build_distiller(
        student,
        RelationConfig(heads="merged", **relation),
        LossConfig(),
        img_size=img_size,
        seed=seed,
        teachers=TeacherShapes(
            feature_dim=feature_dim, relation_heads=3, relation_dim=relation_dim, relation_has_cls=True
        ),
    )


def test_a_student_of_mae_s_weights_deviates_as_mae_s_published_code():
    rules = {
        **prefixed("student.encoder.model.", MAE_ENCODER),
        **prefixed("decoder.", MAE_DECODER),
        "head.proj.weight": xavier(512, 1024),
    }
    check(distiller_of(BASE, feature_dim=1024), rules)


def test_a_masked_autoencoder_deviates_as_mae_s_published_code():
    autoencoder = MaskedAutoencoder(build_student(BASE, 224, seed=3), PretrainConfig(), seed=3)
    rules = {
        **prefixed("encoder.encoder.model.", MAE_ENCODER),
        **prefixed("decoder.", MAE_DECODER),
        "pixels.weight": xavier(512, 3 * 16 * 16),
    }
    check(autoencoder, rules)


def test_a_student_of_fd_s_weights_deviates_as_fd_s_published_code():
    student = StudentConfig(model="vit_base_patch16_224", depth=4, init="fd", mask_tokens="encoder")
    rules = {
        **prefixed("student.encoder.model.", FD_STUDENT),
        "student.encoder.mask_token": (CUT_OFF, CUT_OFF_STD),
        "head.proj.weight": torch_default(768),
        "head.proj.bias": torch_default(768),
    }
    distiller = distiller_of(student, feature_dim=1024)
    check(distiller, rules)
    assert max(p.abs().max().item() for n, p in distiller.named_parameters() if ".qkv.weight" in n) <= 0.02


def test_a_decoder_and_heads_of_layers_follow_the_student_s_rule():
    decoder = {"decoder": "transformer", "decoder_depth": 2, "decoder_dim": 512, "decoder_heads": 8}
    student = StudentConfig(**TINY, **decoder, init="fd", mask_tokens="decoder")
    distiller = distiller_of(student, feature_dim=40, img_size=32, relation_dim=80, target="features")
    rules = {
        "mask_token": (CUT_OFF, CUT_OFF_STD),
        "embed.weight": (CUT_OFF, CUT_OFF_STD),
        "blocks": of_blocks(512, fd_block),
    }
    check(distiller.decoder, rules)
    default = prefixed("proj.", {"weight": torch_default(96), "bias": torch_default(96)})
    for head in distiller.layer_heads:
        check(head, default)
    of_mae = distiller_of(
        student.model_copy(update={"init": "mae"}), feature_dim=40, img_size=32, relation_dim=80, target="features"
    )
    for head in of_mae.layer_heads:
        check(head, {"proj.weight": xavier(96, 80)})


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_small_patch14_reg4_dinov2"])
def test_timm_s_weights_are_those_that_timm_draws_from_the_seed(name):
    config = StudentConfig(**{**TINY, "model": name}, init="timm", drop_path=0.1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        wanted = timm.create_model(**student_arch(config, 32), drop_path_rate=0.1).state_dict()
    found = build_student(config, 32, seed=7).encoder.model.state_dict()
    assert wanted.keys() == found.keys()
    assert [key for key in wanted if key != "pos_embed" and not torch.equal(wanted[key], found[key])] == []


def test_decoder_and_heads_beside_timm_s_weights_start_where_they_did():
    config = StudentConfig(**TINY, init="timm", decoder="transformer", mask_tokens="decoder", decoder_depth=2)
    distiller = distiller_of(config, feature_dim=40, img_size=32, seed=7, relation_dim=80, target="features")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        decoder = TransformerDecoder(
            96, 96, 2, 3, grid_size=4, num_prefix_tokens=1, drop_path=config.drop_path, mask_tokens=True
        )
    found = distiller.decoder.state_dict()
    assert [name for name, tensor in decoder.state_dict().items() if not torch.equal(tensor, found[name])] == []
    for seed, head in enumerate([distiller.head, *distiller.layer_heads], start=7):
        drawn = torch.empty_like(head.proj.weight).normal_(std=0.02, generator=torch.Generator().manual_seed(seed))
        assert torch.equal(head.proj.weight, drawn)
        assert not head.proj.bias.any()


@pytest.mark.parametrize("init", ["mae", "fd"])
def test_every_token_is_drawn_and_what_is_no_matrix_stays_as_it_was_built(init):
    config = StudentConfig(**{**TINY, "model": "vit_small_patch14_reg4_dinov2"}, init=init, mask_tokens="encoder")
    encoder = build_student(config, 32, seed=0).encoder
    wanted = 0.02 if init == "mae" else CUT_OFF_STD
    for token in (encoder.model.cls_token, encoder.model.reg_token, encoder.mask_token):
        assert token.std().item() == pytest.approx(wanted, rel=0.3)
    scaled = build_student(StudentConfig(**TINY, init=init, layer_scale=0.1, rel_pos_bias=True), 32, seed=0).encoder
    assert not scaled.model.rel_pos_bias.relative_position_bias_table.any()
    for block in scaled.model.blocks:
        assert block.ls1.gamma.unique().item() == block.ls2.gamma.unique().item() == torch.tensor(0.1).item()


@pytest.mark.parametrize("init", ["mae", "timm", "fd"])
def test_weights_follow_the_seed_and_leave_the_callers_random_state_alone(init):
    config = StudentConfig(**TINY, init=init, decoder="transformer", mask_tokens="decoder")
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first, same, other = (distiller_of(config, feature_dim=96, img_size=32, seed=s).state_dict() for s in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(first[name], same[name]) for name in first)
    drawn = [name for name in first if name.endswith(("proj.weight", "qkv.weight", "_token"))]
    assert len(drawn) > 20
    assert [name for name in drawn if torch.equal(first[name], other[name])] == []


@pytest.mark.parametrize("init", ["mae", "fd"])
def test_no_two_matrices_of_a_run_start_from_the_same_draws(init):
    config = StudentConfig(**TINY, init=init, decoder="transformer", decoder_dim=64, decoder_heads=4)
    distiller = distiller_of(config, feature_dim=96, img_size=32, relation_dim=80, target="attention")
    starts = [p.detach().flatten()[:2000] for p in distiller.parameters() if p.numel() >= 2000]
    assert len(starts) > 30
    likeness = torch.corrcoef(torch.stack(starts)) - torch.eye(len(starts))
    assert likeness.abs().max() < 0.15
