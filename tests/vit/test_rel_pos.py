"""FD's student: one relative position bias for all blocks, and layer scale."""

from itertools import product

import pytest
import timm
import torch
from safetensors.torch import load_file

from hdscale.analysis.curves import attention_curves
from hdscale.config.recipe import TeacherConfig
from hdscale.config.sections import LossConfig, RelationConfig, StudentConfig
from hdscale.distiller import build_distiller
from hdscale.errors import UserError
from hdscale.export import export_student, loading_code
from hdscale.student.build import build_student
from hdscale.student.load import load_student
from hdscale.teachers.build import build_teacher
from hdscale.types import Batch, Targets, TeacherShapes
from hdscale.vit.rel_pos import SharedRelPosBias

SIZES = {"model": "vit_tiny_patch16_224", "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 4}
KEEP = torch.tensor([[0, 3, 4, 9], [1, 2, 5, 14]])  # of 4 x 4 patches
FD = StudentConfig(**SIZES, drop_path=0.0, rel_pos_bias=True, layer_scale=0.1, pos_embed="none")


@pytest.fixture
def images():
    return torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def stirred(module):
    """Weights that are no longer the initial ones: a bias of zeros would hide mistakes."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return module


def student_of(config=FD, **more):
    return stirred(build_student(config, 32, seed=0, **more)).eval()


def bias_by_hand(table, grid):
    """(A, 1 + N, 1 + N): rows of the table by the offset of query and key; its last three are the class token's."""
    offsets = (2 * grid - 1) ** 2
    bias = torch.zeros(table.shape[1], 1 + grid**2, 1 + grid**2)
    places = list(product(range(grid), range(grid)))
    for (i, (y, x)), (j, (v, u)) in product(enumerate(places), enumerate(places)):
        bias[:, 1 + i, 1 + j] = table[(y - v + grid - 1) * (2 * grid - 1) + x - u + grid - 1]
    bias[:, 0, :], bias[:, :, 0], bias[:, 0, 0] = (
        table[offsets, :, None],
        table[offsets + 1, :, None],
        table[offsets + 2],
    )
    return bias


def tokens_by_hand(student, images, rows):
    """Run one image's rows through the student's linears, with the bias and layer scale written out."""
    model = student.encoder.model
    bias = bias_by_hand(model.rel_pos_bias.relative_position_bias_table, 4)[:, rows][:, :, rows]
    x = model._pos_embed(model.patch_embed(student.preprocess(images, torch.float32)))[0, rows]
    for block in model.blocks:
        query, key, value = block.attn.qkv(block.norm1(x)).unflatten(1, (3, 4, 8)).permute(1, 2, 0, 3)
        attention = (query @ key.transpose(1, 2) / 8**0.5 + bias).softmax(-1)
        x = x + block.ls1.gamma * block.attn.proj((attention @ value).transpose(0, 1).flatten(1))
        x = x + block.ls2.gamma * block.mlp(block.norm2(x))
    return model.norm(x)[1:]


def test_attention_adds_the_bias_of_its_own_tokens_and_branches_are_scaled(images):
    student = student_of()
    with torch.no_grad():
        for keep in (None, KEEP):
            ours = student(images, keep).patch_tokens
            for image in range(2):
                rows = list(range(17)) if keep is None else [0, *(keep[image] + 1).tolist()]
                expected = tokens_by_hand(student, images[image : image + 1], rows)
                torch.testing.assert_close(ours[image], expected, rtol=1e-4, atol=1e-5)


def test_a_new_student_has_no_bias_yet_and_the_given_scale():
    model = build_student(FD, 32, seed=0).encoder.model
    assert not model.rel_pos_bias.relative_position_bias_table.any()
    assert all(bool((layer.gamma == 0.1).all()) for block in model.blocks for layer in (block.ls1, block.ls2))
    assert not model.pos_embed.any()
    torch.manual_seed(3)
    before = torch.get_rng_state()
    SharedRelPosBias(4, 2)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("keep", [None, KEEP])
def test_every_parameter_gets_a_gradient_and_recomputing_changes_none(keep, images):
    gradients = []
    for checkpoint_every in (0, 1):
        config = FD.model_copy(update={"checkpoint_every": checkpoint_every})
        distiller = stirred(
            build_distiller(
                config,
                RelationConfig(),
                LossConfig(),
                img_size=32,
                seed=0,
                teachers=TeacherShapes(feature_dim=20, relation_heads=4, relation_has_cls=True),
            )
        )
        count = 16 if keep is None else 4
        generator = torch.Generator().manual_seed(2)
        relations = tuple(torch.randn(2, 4, 1 + count, 1 + count, generator=generator) for _ in range(2))
        distiller(images, Targets(keep, torch.randn(2, count, 20, generator=generator), relations)).total.backward()
        gradients.append({name: parameter.grad for name, parameter in distiller.named_parameters()})
    assert all(gradient is not None and gradient.any() for gradient in gradients[0].values())
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


def test_relations_are_the_plain_product(images):
    """The bias is no part of Q and K: the second layer's, from its own input, without any bias."""
    student = student_of(relation_layers=(1,))
    block = student.encoder.model.blocks[1]
    inputs = []
    block.norm1.register_forward_hook(lambda _module, _args, output: inputs.append(output))
    with torch.no_grad():
        output = student(images)
        query, key, _ = block.attn.qkv(inputs[0]).unflatten(2, (3, 4, 8)).permute(2, 0, 3, 1, 4)
    torch.testing.assert_close(output.queries[0], query)
    torch.testing.assert_close(output.keys[0], key)


@pytest.mark.parametrize("layer_scale", [None, 0.1])
def test_timm_takes_the_exported_student_as_beit_and_gives_the_same_features(layer_scale, images, tmp_path):
    config = FD.model_copy(update={"layer_scale": layer_scale, "pos_embed": "sincos", "mlp_ratio": 2.5})
    student = student_of(config)
    path = tmp_path / "student.safetensors"
    weights = {f"student.{name}": value for name, value in student.state_dict().items()}
    arch = export_student(weights, config, 32, path)
    names = {}
    exec(loading_code(arch, path, config), names)
    with torch.no_grad():
        ours = student(images).patch_tokens
        theirs = names["model"].eval().forward_features(student.preprocess(images, torch.float32))[:, 1:]
        torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-5)
        assert torch.equal(load_student(config, 32, weights)(images).patch_tokens, ours)
    assert load_file(path).keys() == timm.create_model(**arch).state_dict().keys()


def test_an_exported_student_teaches_the_next_stage_at_chosen_patches(images, tmp_path):
    student = student_of()
    path = tmp_path / "student.safetensors"
    export_student({f"student.{name}": value for name, value in student.state_dict().items()}, FD, 32, path)
    section = TeacherConfig(source="file", weights=str(path))
    with torch.no_grad():
        ours = student(images).patch_tokens
        teacher = build_teacher(section, role="feature", grid_size=4)
        torch.testing.assert_close(teacher(images).patch_tokens, ours, rtol=1e-4, atol=1e-5)
        kept = torch.stack([patches[rows] for patches, rows in zip(ours, KEEP, strict=True)])
        torch.testing.assert_close(teacher(images, KEEP).patch_tokens, kept, rtol=1e-4, atol=1e-5)
    larger = build_teacher(section, role="feature", grid_size=6)
    assert larger(images).patch_tokens.shape == (2, 36, 32)
    relation = build_teacher(section, role="relation", grid_size=4, relation_layers=(0, 1))
    assert [query.shape for query in relation(images).queries] == [(2, 4, 17, 8)] * 2


def test_attention_statistics_see_the_bias(images):
    student = student_of(relation_layers=(0, 1, 2))
    batch = Batch(images, *(torch.arange(2),) * 4, None)
    sizes = {"num_images": 2, "num_prefix_tokens": 1, "grid_size": 4, "patch_size": 8}
    seen = attention_curves(student, [batch], **sizes)
    table = student.encoder.model.rel_pos_bias.relative_position_bias_table
    with torch.no_grad():
        table.zero_()
        plain = attention_curves(student, [batch], **sizes)
        middle = (2 * 4 - 1) * 3 + 3
        table[middle] = 40.0  # every patch looks at itself alone
        alone = attention_curves(student, [batch], **sizes)
    assert seen != plain
    assert len(alone.head_distance) == 3
    for heads in alone.head_distance:
        assert heads == pytest.approx((0, 0, 0, 0), abs=1e-4)
    assert min(plain.head_distance[0]) > 1


@pytest.mark.parametrize("name", ["vit_small_patch14_reg4_dinov2", "vit_medium_patch16_gap_240"])
def test_students_without_exactly_a_class_token_are_refused(name):
    config = FD.model_copy(update={"model": name})
    with pytest.raises(UserError, match=r"student\.model must have a class token and no registers for rel_pos_bias"):
        build_student(config, 32, seed=0)


def test_a_student_that_beit_cannot_hold_is_refused_at_export(tmp_path):
    config = FD.model_copy(update={"model": "vit_base_patch16_clip_224"})  # with a norm before the blocks
    weights = {f"student.{name}": value for name, value in student_of(config).state_dict().items()}
    with pytest.raises(UserError, match=r"student\.rel_pos_bias: timm's Beit.*does not fit.*vit_base_patch16_224"):
        export_student(weights, config, 32, tmp_path / "student.safetensors")
