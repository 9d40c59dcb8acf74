import pytest
import torch
import torch.nn.functional as F

from hdscale.config.recipe import TeacherConfig
from hdscale.config.sections import MaskConfig
from hdscale.errors import UserError
from hdscale.teachers.build import Teachers, build_teacher, mask_stages
from hdscale.teachers.weights import weights_digest
from hdscale.types import TeacherShapes

KEEP = torch.tensor([[0, 3, 5], [1, 2, 9], [4, 5, 6], [7, 8, 15], [0, 1, 2], [3, 4, 5]])


def test_by_its_section_alone_a_teacher_gives_every_feature(tiny_config, tiny_model, images):
    teacher = build_teacher(tiny_config)
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in ((0.5, 0.4, 0.3), (0.2, 0.3, 0.25)))
    with torch.no_grad():
        reference = tiny_model.forward_features((images / 255 - mean) / std)[:, 1:]
    torch.testing.assert_close(teacher(images).patch_tokens, reference, rtol=1e-5, atol=1e-6)
    assert (teacher.embed_dim, teacher.target_dim, teacher.num_heads, teacher.depth) == (48, 48, 3, 4)
    assert (teacher.num_prefix_tokens, teacher.has_cls, teacher.grid_size, teacher.patch_size) == (1, True, 4, 8)


def test_a_role_prunes_and_changes_no_value(tiny_config, images):
    whole = build_teacher(tiny_config, relation_layers=(-3, -2), mask=MaskConfig(layers=(0,)))
    relation = build_teacher(
        tiny_config,
        role="relation",
        grid_size=4,
        relation_layers=(-3, -2),
        mask=MaskConfig(layers=(0,)),
        field="relation_teacher",
    )
    feature = build_teacher(tiny_config, role="feature", grid_size=4)
    expected, relations, features = whole(images, KEEP), relation(images, KEEP), feature(images, KEEP)
    torch.testing.assert_close(features.patch_tokens, expected.patch_tokens, rtol=1e-5, atol=1e-6)
    assert relations.patch_tokens is None
    for ours, theirs in zip(
        relations.queries + relations.keys + relations.stage_tokens,
        expected.queries + expected.keys + expected.stage_tokens,
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    count = {teacher: sum(p.numel() for p in teacher.parameters()) for teacher in (whole, relation, feature)}
    assert count[feature] == count[whole]
    block, norm = 12 * 48**2 + 13 * 48, 2 * 48
    assert count[whole] - count[relation] == 2 * block + norm - (norm + 2 * 48**2 + 2 * 48)
    assert relation.depth == 4


def test_a_teacher_that_only_masks_by_the_input_of_its_first_block_has_no_block_left(tiny_config, images):
    mask = MaskConfig(layers=(0,), at="input")
    teacher = build_teacher(tiny_config, role="relation", grid_size=4, mask=mask, field="relation_teacher")
    whole = build_teacher(tiny_config, mask=mask)
    assert len(teacher.encoder.model.blocks) == 0
    assert (teacher.depth, teacher.num_heads) == (4, 3)
    assert torch.equal(teacher(images).stage_tokens[0], whole(images).stage_tokens[0])


def test_a_teacher_is_frozen_whatever_is_asked_of_it(tiny_config, images):
    teacher = build_teacher(tiny_config, role="feature", grid_size=4)
    before = weights_digest(teacher.state_dict())
    parent = torch.nn.Sequential(teacher).train()
    assert not any(module.training for module in teacher.modules())
    assert not any(parameter.requires_grad for parameter in parent.parameters())
    tokens = teacher(images).patch_tokens
    assert not tokens.requires_grad
    F.smooth_l1_loss(torch.zeros_like(tokens, requires_grad=True), tokens).backward()  # refused in inference mode
    assert weights_digest(teacher.state_dict()) == before


def test_digests_are_of_the_whole_model_and_see_one_changed_bit(tiny_config, tiny_model):
    whole = build_teacher(tiny_config)
    assert whole.digest == build_teacher(tiny_config, role="relation", grid_size=4, relation_layers=(-2,)).digest
    state = {name: tensor.clone() for name, tensor in tiny_model.state_dict().items()}
    assert weights_digest(state) == whole.digest
    assert weights_digest(dict(reversed(state.items()))) == whole.digest
    state["norm.weight"].view(torch.int32)[0] ^= 1
    assert weights_digest(state) != whole.digest


def test_the_teachers_grid_becomes_the_students_by_resizing_its_input(tiny_config, images):
    teacher = build_teacher(tiny_config, grid_size=6)
    assert teacher.preprocess.img_size == 48
    assert teacher(images).patch_tokens.shape == (6, 36, 48)


def test_clip_l_14_is_fed_196_pixels_for_a_grid_of_14():
    config = TeacherConfig(name="vit_tiny_patch16_224", weights="random")
    assert build_teacher(config, grid_size=14).preprocess.img_size == 224
    config = TeacherConfig(name="vit_small_patch14_dinov2", weights="random")
    assert build_teacher(config, grid_size=14).preprocess.img_size == 196


def test_random_teachers_are_the_same_in_every_process(images):
    config = TeacherConfig(name="vit_tiny_patch16_224", weights="random")
    torch.manual_seed(1)
    first = build_teacher(config, grid_size=2)
    torch.manual_seed(2)
    assert first.digest == build_teacher(config, grid_size=2).digest


@pytest.mark.parametrize(
    ("img_size", "grid_size", "message"),
    [
        (40, 4, r"feature_teacher\.img_size must be 32, so that patches of 8 px .* grid of 4 x 4, got 40; or leave"),
        (30, None, r"feature_teacher\.img_size must be a multiple of the patch size 8, got 30"),
    ],
)
def test_grids_that_cannot_match_are_refused(tiny_config, img_size, grid_size, message):
    with pytest.raises(UserError, match=message):
        build_teacher(tiny_config.model_copy(update={"img_size": img_size}), grid_size=grid_size)
    assert build_teacher(tiny_config.model_copy(update={"img_size": 40}), grid_size=5).grid_size == 5


def test_mask_stages_are_thirds_of_the_depth_or_the_last_block():
    assert mask_stages(MaskConfig(at="input"), 24) == ((0, 8, 16), "input")
    assert mask_stages(MaskConfig(strategy="direct", at="input"), 24) == ((23,), "output")
    assert mask_stages(MaskConfig(strategy="random"), 24) == ((), "output")
    with pytest.raises(UserError, match=r"mask\.layers"):
        mask_stages(MaskConfig(layers=(0, 30)), 24)


def test_a_student_has_to_fit_the_teachers_there_are_and_no_others(tiny_config):
    teacher = build_teacher(tiny_config)
    assert Teachers(teacher, None).shapes() == TeacherShapes(feature_dim=48, feature_has_cls=True)
    relation = TeacherShapes(relation_heads=3, relation_dim=48, relation_has_cls=True)
    assert Teachers(None, teacher).shapes() == relation
    without_cls = build_teacher(TeacherConfig(name="vit_medium_patch16_gap_240", weights="random"))
    heads, dim = without_cls.num_heads, without_cls.embed_dim
    assert Teachers(teacher, without_cls).shapes() == (48, True, heads, dim, False)
    assert Teachers(without_cls, teacher).shapes() == (dim, False, 3, 48, True)
