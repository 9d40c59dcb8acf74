"""float16 on a CPU, where DeepSpeed has no fp16 engine: the weights in float16, as that engine holds them, or autocast.

What a GPU alone can show stays untested here: its kernels, and DeepSpeed's scaler on real overflows.
"""

import contextlib

import pytest
import timm
import torch
from timm.layers import RmsNorm
from torch import nn
from torch.nn import functional as F

from hdscale.config.loading import load_recipe
from hdscale.distiller import build_distiller
from hdscale.losses import feature_loss, relation_loss, token_relation
from hdscale.masking.progressive import keep_least_redundant
from hdscale.teachers.build import build_teacher
from hdscale.teachers.targets import TeacherPair
from hdscale.types import Batch, ComparedTokens, TeacherShapes
from hdscale.vit.encoder import Outputs, ViTEncoder

LOSS_SCALE = 2.0**16  # where engines start
LITERAL = ("relation.scale=raw", "relation.heads=merged")
RECIPES = {
    "scaled": (),
    "literal": LITERAL,
    "softmax": ("relation.scale=softmax", "relation.loss=kl"),
    "attention": ("relation.target=attention",),
    "decoder": ("student.decoder=transformer", "student.decoder_depth=1", "student.rel_pos_bias=true"),
}


@pytest.fixture
def large_query_and_key():
    """Q and K of a ViT-L in which a few channels dominate, as in trained ViTs: far inside float16, a product is not."""
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 2, 16, 67, 64, generator=generator)
    channels = torch.tensor([40.0] * 4 + [0.0] * 60)
    return (query * 4 + channels).half(), (key * 4 + channels).half()


def merged(x):
    return x.transpose(1, 2).flatten(2)  # (B, S, A * E)


def test_raw_relations_overflow_in_float16_and_ours_do_not(large_query_and_key):
    query, key = large_query_and_key
    assert max(query.abs().max(), key.abs().max()) < 100
    naive = merged(query) @ merged(key).transpose(-2, -1)
    assert naive.dtype == torch.float16
    assert naive.isinf().all()
    assert F.smooth_l1_loss(naive, naive + 1).isnan()  # and that would be the loss
    with torch.autocast("cpu", dtype=torch.float16):
        assert (merged(query.float()) @ merged(key.float()).transpose(-2, -1)).isinf().all()
        ours = token_relation(query, key, "raw", "merged")
    exact = merged(query.double()) @ merged(key.double()).transpose(-2, -1)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours[:, 0].double(), exact, rtol=1e-6, atol=0.02)
    loss = relation_loss(ours, ours + 1, beta=2.0)
    assert (loss.dtype, loss.isfinite().item()) == (torch.float32, True)


@pytest.mark.parametrize("scale", ["raw", "scaled", "softmax"])
@pytest.mark.parametrize("heads", ["per_head", "merged"])
def test_gradients_of_large_relations_survive_the_loss_scale(scale, heads, large_query_and_key):
    query, key = (x.requires_grad_() for x in large_query_and_key)
    relation = token_relation(query, key, scale, heads)
    # A student far away from its teacher: everywhere on the loss's straight part.
    (relation_loss(relation, relation.detach() * 0.5, beta=2.0) * LOSS_SCALE).backward()
    for gradient in (query.grad, key.grad):
        assert gradient.dtype == torch.float16
        assert gradient.isfinite().all()


def test_feature_targets_are_standardised_in_float32():
    generator = torch.Generator().manual_seed(0)
    teacher = torch.randn(2, 6, 1024, generator=generator) * 4 + 200  # sums of a token exceed float16
    teacher[..., 7] = 3000  # a channel as in large ViTs: its square does, too
    teacher, student = teacher.half(), torch.randn(2, 6, 1024, generator=generator).half()
    for context in (contextlib.nullcontext(), torch.autocast("cpu", dtype=torch.float16)):
        with context:
            loss = feature_loss(student, teacher, beta=2.0)
        wanted = teacher.double()
        wanted = (wanted - wanted.mean(-1, keepdim=True)) / (wanted.var(-1, keepdim=True, correction=0) + 1e-6).sqrt()
        assert loss.dtype == torch.float32
        assert loss.item() == pytest.approx(F.smooth_l1_loss(student.double(), wanted, beta=2.0).item(), rel=1e-5)


def test_masks_of_float16_tokens_are_those_of_the_same_values_in_float64():
    tokens = (torch.randn(4, 50, 1024, generator=torch.Generator().manual_seed(0)) * 20 + 30).half()
    assert tokens.square().sum(-1).isinf().all()
    assert torch.equal(keep_least_redundant(tokens, 17), keep_least_redundant(tokens.double(), 17))


@pytest.mark.parametrize("norm", [nn.LayerNorm, timm.layers.LayerNorm, RmsNorm])
def test_norms_accumulate_in_float32(norm):
    x = (torch.randn(4, 1024, generator=torch.Generator().manual_seed(0)) * 30 + 1000).half()
    assert x.sum(-1).isinf().all()
    exact = norm(1024).double()(x.double())
    rounding = 2.0**-10 * exact.abs().max()
    assert (norm(1024).half()(x).double() - exact).abs().max() < rounding


@pytest.mark.parametrize(
    "name", ["vit_large_patch16_224", "vit_base_patch14_dinov2", "eva02_base_patch14_224", "vit_base_patch16_dinov3"]
)
def test_the_norms_of_teachers_are_those_tested(name):
    """Norms of their own could accumulate in float16 without anybody noticing."""
    with torch.device("meta"):
        model = timm.create_model(name, pretrained=False)
    norms = {type(module) for key, module in model.named_modules() if "norm" in key.rpartition(".")[2]}
    assert norms - {nn.Identity} <= {nn.LayerNorm, timm.layers.LayerNorm, RmsNorm}


def cast(module, how):
    """Return the module as one of the ways to float16 has it, and what to run it in."""
    if how == "half":
        module.half()
    elif how == "parameters":  # DeepSpeed leaves buffers in float32
        for parameter in module.parameters():
            parameter.data = parameter.data.half()
    inside = torch.autocast("cpu", dtype=torch.float16) if how == "autocast" else contextlib.nullcontext()
    return module, inside


def step(world, how, *overrides):
    """Run both teachers and the student forward and backward; return the terms, the targets and the gradients."""
    random = "mask.strategy=random"  # masks that do not depend on the precision
    recipe = load_recipe(world.recipe, [random, "mask.keep_ratio=0.4", *overrides])
    feature = build_teacher(recipe.feature_teacher, role="feature", grid_size=8)
    relation = build_teacher(
        recipe.relation_teacher,
        role="relation",
        grid_size=8,
        relation_layers=recipe.relation.layers,
        layer_output=recipe.relation.target,
    )
    distiller = build_distiller(
        recipe.student,
        recipe.relation,
        recipe.loss,
        img_size=32,
        seed=0,
        teachers=TeacherShapes(
            feature_dim=48, feature_has_cls=True, relation_heads=3, relation_dim=48, relation_has_cls=True
        ),
    )
    pair = TeacherPair(
        cast(feature, how)[0],
        cast(relation, how)[0],
        relation_config=recipe.relation,
        mask_config=recipe.mask,
        seed=0,
        num_patches=64,
        compared=ComparedTokens(cls_in_relation=distiller.cls_in_relation, cls_in_features=distiller.cls_in_features),
    )
    distiller, inside = cast(distiller, how)
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    ids = torch.arange(4)
    batch = Batch(**{**dict.fromkeys(Batch._fields), "images": images, "sample_ids": ids, "epochs": ids * 0})
    with inside:
        targets = pair(batch)
        terms = distiller(images, targets)
    (terms.total * LOSS_SCALE).backward()
    gradients = {name: parameter.grad for name, parameter in distiller.named_parameters()}
    return terms, targets, gradients


@pytest.fixture(scope="module")
def exact(world):
    return {name: step(world, "float32", *overrides) for name, overrides in RECIPES.items()}


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("how", ["half", "parameters", "autocast"])
def test_a_step_in_float16_has_losses_in_float32_and_finite_gradients(how, name, world, exact):
    terms, targets, gradients = step(world, how, *RECIPES[name])
    reference, _, reference_gradients = exact[name]
    for term, wanted in zip(terms, reference, strict=True):
        assert term.dtype == torch.float32
        assert term.item() == pytest.approx(wanted.item(), rel=0.02)
    if name != "attention":  # that one compares tokens, which come as the teacher computes
        assert {relation.dtype for relation in targets.relations} == {torch.float32}
    for parameter, gradient in gradients.items():
        wanted = reference_gradients[parameter]
        assert gradient is not None, parameter
        assert gradient.isfinite().all(), parameter
        assert gradient.dtype == (torch.float32 if how == "autocast" else torch.float16)
        error = (gradient.float() - wanted).norm() / wanted.norm().clamp_min(1e-6 * LOSS_SCALE)
        assert error < 0.1, (parameter, error)


def test_queries_and_keys_with_norm_and_rotation_stay_close_in_float16():
    model = timm.create_model("eva02_tiny_patch14_224", pretrained=False, img_size=56, depth=2).eval()
    encoder = ViTEncoder(model, Outputs(relation_layers=(0, 1)))
    images = torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    keep = torch.tensor([[0, 3, 7, 12], [1, 2, 9, 15]])
    with torch.no_grad():
        wanted = encoder(images, keep)
        found = encoder.half()(images.half(), keep)
    for name in ("queries", "keys"):
        for one, other in zip(getattr(found, name), getattr(wanted, name), strict=True):
            assert one.isfinite().all()
            assert (one.float() - other).abs().max() < 0.02 * other.abs().max()
