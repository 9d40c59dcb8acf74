import pytest
import timm
import torch
from torch import nn

from hdscale.config.sections import StudentConfig
from hdscale.errors import UserError
from hdscale.student.build import STATE_PREFIX, build_student, student_arch
from hdscale.vit.position import sincos_position_embedding

TINY = StudentConfig(
    model="vit_small_patch16_224", patch_size=8, embed_dim=48, depth=4, num_heads=3, mlp_ratio=2, drop_path=0.3
)


def images() -> torch.Tensor:
    return torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def changed(**changes) -> StudentConfig:
    return TINY.model_copy(update=changes)


@pytest.mark.parametrize("name", ["vit_small_patch16_224", "vit_small_patch14_reg4_dinov2", "deit3_small_patch16_224"])
def test_timm_takes_a_students_weights_strictly_and_gives_the_same_features(name):
    config = changed(model=name)
    student = build_student(config, 32, seed=1).eval()
    state = {key.removeprefix(STATE_PREFIX): value for key, value in student.state_dict().items()}
    model = timm.create_model(**student_arch(config, 32)).eval()
    model.load_state_dict(state, strict=True)
    with torch.no_grad():
        reference = model.forward_features(student.preprocess(images(), torch.float32))
        assert torch.equal(student(images()).patch_tokens, reference[:, student.num_prefix_tokens :])


def test_the_position_embedding_is_mae_s_and_not_trained():
    student = build_student(TINY, 32, seed=1)
    assert STATE_PREFIX + "pos_embed" not in dict(student.named_parameters())
    buffer = dict(student.named_buffers())[STATE_PREFIX + "pos_embed"]
    assert torch.equal(buffer, sincos_position_embedding(48, 4, 1))


def test_there_is_no_layer_scale_even_where_the_named_model_has_one():
    for name in ("deit3_small_patch16_224", "vit_small_patch14_dinov2"):
        student = build_student(changed(model=name), 32, seed=1)
        assert all(type(block.ls1) is nn.Identity for block in student.encoder.model.blocks)
        assert student_arch(changed(model=name), 32)["init_values"] == 0
    assert "init_values" not in student_arch(TINY, 32)


def test_drop_path_rises_linearly_to_the_last_block():
    blocks = build_student(TINY, 32, seed=1).encoder.model.blocks
    rates = [getattr(block.drop_path2, "drop_prob", 0.0) for block in blocks]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3])


def test_weights_follow_the_seed():
    first, same, other = (build_student(TINY, 32, seed=seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not torch.equal(first[STATE_PREFIX + "cls_token"], other[STATE_PREFIX + "cls_token"])


def test_sizes_replace_those_of_the_named_model():
    student = build_student(TINY, 32, seed=1, relation_layers=(-3, -2), checkpoint_every=2)
    assert (student.embed_dim, student.depth, student.num_heads) == (48, 4, 3)
    assert (student.patch_size, student.grid_size, student.num_prefix_tokens, student.has_cls) == (8, 4, 1, True)
    assert student.encoder.model.blocks[0].mlp.fc1.out_features == 96
    assert student.encoder.recompute.every == 2
    keep = torch.tensor([[0, 5, 9], [1, 2, 3]])
    output = student(images(), keep)
    assert output.patch_tokens.shape == (2, 3, 48)
    assert [query.shape for query in output.queries] == [(2, 3, 4, 16)] * 2


def test_a_student_in_half_precision_feeds_itself_half_precision():
    student = build_student(TINY, 32, seed=1).bfloat16().eval()
    assert student(images()).patch_tokens.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("config", "img_size", "message"),
    [
        (TINY, 30, r"data\.img_size must be a multiple of the student's patch size 8, got 30"),
        (changed(embed_dim=42), 32, r"student\.embed_dim must be a multiple of 4 .* got 42"),
        (changed(embed_dim=44), 32, r"student\.model: timm cannot create .*embed_dim=44, .*divisible"),
        (changed(model="vit_base_patch16_siglip_224"), 32, r"student\.model must have .* no attention pooling"),
        (changed(model="resnet50", embed_dim=None), 32, r"student\.model"),
        (changed(model="nothing"), 32, r"student\.model must be a timm model, got nothing"),
    ],
)
def test_students_that_do_not_fit_together_are_refused(config, img_size, message):
    with pytest.raises(UserError, match=message):
        build_student(config, img_size, seed=0)
