"""The formula of a hybrid step against torch's counter on a real one."""

import pytest
import torch

from hdscale.config.recipe import TeacherConfig
from hdscale.config.sections import LossConfig, MaskConfig, RelationConfig, StudentConfig
from hdscale.distiller import build_distiller
from hdscale.flops import DecoderSizes, HeadSizes, RelationUse, ViTSizes, count_flops, hybrid_step_flops
from hdscale.masking.progressive import patches_by_block
from hdscale.teachers.build import build_teacher
from hdscale.teachers.targets import TeacherPair
from hdscale.types import Batch, ComparedTokens, TeacherShapes

TINY = ViTSizes(depth=12, embed_dim=192, num_patches=16, patch_size=16)
BATCH, GRID = 2, 4


def real_step(mask, loss=LossConfig(), relation=None, relation_name="vit_tiny_patch16_224", **student):  # noqa: B008 - frozen
    """Build two teachers and a student, and return one training step of them."""
    config = TeacherConfig(name="vit_tiny_patch16_224", weights="random", sharding="replicate")
    relation = relation or RelationConfig()
    feature_teacher = build_teacher(config, role="feature", grid_size=GRID)
    relation_teacher = build_teacher(
        config.model_copy(update={"name": relation_name}),
        role="relation",
        grid_size=GRID,
        relation_layers=relation.layers,
        layer_output=relation.target,
        mask=mask if mask.strategy == "progressive" else None,
        field="relation_teacher",
    )
    distiller = build_distiller(
        StudentConfig(model="vit_tiny_patch16_224", drop_path=0.0, **student),
        relation,
        loss,
        img_size=GRID * 16,
        seed=0,
        teachers=TeacherShapes(
            feature_dim=192,
            relation_heads=relation_teacher.num_heads,
            relation_dim=relation_teacher.embed_dim,
            relation_has_cls=True,
        ),
    )
    pair = TeacherPair(
        feature_teacher,
        relation_teacher,
        relation_config=relation,
        mask_config=mask,
        seed=0,
        num_patches=GRID**2,
        compared=ComparedTokens(cls_in_relation=distiller.cls_in_relation, features_on=loss.features_on),
    )
    ids = torch.arange(BATCH)
    images = torch.randint(0, 256, (BATCH, 3, GRID * 16, GRID * 16), dtype=torch.uint8)
    batch = Batch(images, ids, ids, ids * 0, ids * 0, None)
    return lambda: distiller(batch.images, pair(batch)).total.backward()


def test_the_formula_equals_a_real_step_with_stored_or_random_masks():
    step = real_step(MaskConfig(strategy="random", keep_ratio=0.35))
    assert count_flops(step) == BATCH * hybrid_step_flops(TINY, TINY, TINY, num_keep=5)


def test_online_progressive_masks_cost_nothing_more():
    step = real_step(MaskConfig(source="online", images_per_forward=BATCH))
    assert count_flops(step) == BATCH * hybrid_step_flops(
        TINY, TINY, TINY, num_keep=4, relation=RelationUse(mask_blocks=9)
    )


@pytest.mark.parametrize("at", ["output", "input"])
def test_a_teacher_that_drops_patches_costs_less(at):
    mask = MaskConfig(source="online", in_teacher="drop", images_per_forward=BATCH, at=at)
    mask_blocks = 9 if at == "output" else 8
    patches = patches_by_block(mask, 16, 12)
    dropping = RelationUse(mask_blocks=mask_blocks, block_patches=patches)
    expected = hybrid_step_flops(TINY, TINY, TINY, 4, relation=dropping)
    assert count_flops(real_step(mask)) == BATCH * expected
    assert expected < hybrid_step_flops(TINY, TINY, TINY, 4, relation=RelationUse(mask_blocks=mask_blocks))


@pytest.mark.parametrize("target", ["attention", "features"])
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_small_patch16_224"])
@pytest.mark.parametrize("token_head", ["norm_linear", "width"])
def test_targets_of_tokens_cost_whole_blocks_and_the_linears_that_there_are(target, name, token_head):
    relation = RelationConfig(target=target, layers=(-4, -2), token_head=token_head)
    step = real_step(MaskConfig(strategy="random", keep_ratio=0.35), relation=relation, relation_name=name)
    teacher = TINY if "tiny" in name else TINY._replace(embed_dim=384)
    use = RelationUse(relation.layers, target, token_head=token_head)
    expected = hybrid_step_flops(TINY, TINY, teacher, 5, relation=use)
    assert count_flops(step) == BATCH * expected


EVERYWHERE = [(where, on) for where in ("encoder", "decoder") for on in ("kept", "hidden", "all")]


@pytest.mark.parametrize(
    ("mask_tokens", "features_on", "decoder_dim"),
    [
        *((*way, dim) for way in [("none", "kept"), *EVERYWHERE] for dim in (192, 96)),
        *((*way, None) for way in EVERYWHERE if way[0] == "encoder"),
    ],
)
def test_decoders_and_mask_tokens_are_counted(mask_tokens, features_on, decoder_dim):
    decoder = None if decoder_dim is None else DecoderSizes(2, decoder_dim)
    student = {"mask_tokens": mask_tokens}
    if decoder is not None:
        student |= {"decoder": "transformer", "decoder_depth": 2, "decoder_dim": decoder_dim}
    step = real_step(MaskConfig(strategy="random", keep_ratio=0.35), LossConfig(features_on=features_on), **student)
    head = HeadSizes(features_on, mask_tokens, decoder=decoder)
    assert count_flops(step) == BATCH * hybrid_step_flops(TINY, TINY, TINY, num_keep=5, head=head)


def test_a_decoder_without_masks_is_counted():
    step = real_step(MaskConfig(strategy="none"), decoder="transformer", decoder_depth=3)
    head = HeadSizes(decoder=DecoderSizes(3, 192))
    assert count_flops(step) == BATCH * hybrid_step_flops(TINY, TINY, TINY, num_keep=None, head=head)


def test_a_head_without_a_linear_costs_nothing():
    step = real_step(MaskConfig(strategy="random", keep_ratio=0.35), decoder="identity")
    assert count_flops(step) == BATCH * hybrid_step_flops(TINY, TINY, TINY, num_keep=5, head=HeadSizes(linear=False))


def test_a_shared_bias_and_layer_scale_cost_no_products():
    step = real_step(MaskConfig(strategy="random", keep_ratio=0.35), rel_pos_bias=True, layer_scale=0.1)
    assert count_flops(step) == BATCH * hybrid_step_flops(TINY, TINY, TINY, num_keep=5)
