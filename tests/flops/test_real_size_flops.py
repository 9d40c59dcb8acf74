"""The cost of the paper's ViT-L step, counted by torch on a real step of tensors without memory."""

from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import hdscale.teachers.build
from hdscale.config.loading import load_recipe
from hdscale.distiller import Distiller, build_distiller
from hdscale.flops import HeadSizes, ViTSizes, count_flops, hybrid_step_flops, student_step_flops, vit_forward_flops
from hdscale.teachers.build import build_teachers
from hdscale.teachers.targets import TeacherPair
from hdscale.types import Batch, ComparedTokens, Targets
from hdscale.vit.encoder import Recompute

RECIPE = Path(__file__).resolve().parents[2] / "launch/recipes/vit_l_in21k.yaml"
KEPT, PATCHES = 66, 196
VIT_L = ViTSizes(depth=24, embed_dim=1024, num_patches=PATCHES, patch_size=16)
CLIP_L = ViTSizes(depth=24, embed_dim=1024, num_patches=PATCHES, patch_size=14)
HEAD = HeadSizes(cls=True)


class Step(NamedTuple):
    distiller: Distiller
    pair: TeacherPair
    batch: Batch


@pytest.fixture(scope="module")
def step():
    """Student and teachers of the default recipe, and one image."""
    recipe = load_recipe(RECIPE, ["feature_teacher.weights=random", "relation_teacher.weights=random"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hdscale.teachers.build, "weights_digest", lambda _: "")
        # timm reads numbers out of tensors while it builds; that works on meta, and fake tensors refuse it.
        with torch.device("meta"):
            teachers = build_teachers(recipe, 14)
            distiller = build_distiller(
                recipe.student,
                recipe.relation,
                recipe.loss,
                img_size=224,
                seed=0,
                teachers=teachers.shapes(),
            )
            distiller.student.encoder.recompute = Recompute(every=0)
    pair = TeacherPair(
        teachers.feature,
        teachers.relation,
        relation_config=recipe.relation,
        mask_config=recipe.mask,
        seed=0,
        num_patches=PATCHES,
        compared=ComparedTokens(cls_in_relation=distiller.cls_in_relation, cls_in_features=distiller.cls_in_features),
    )
    with FakeTensorMode():
        for module in (distiller, teachers.feature, teachers.relation):
            module._apply(lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype))
        images = torch.empty(1, 3, 224, 224, dtype=torch.uint8)
        ids = torch.zeros(1, dtype=torch.int64)
        batch = Batch(images, ids, ids, ids, ids, torch.empty(1, KEPT, dtype=torch.int64))
        yield Step(distiller, pair, batch)


def test_a_hybrid_step_of_vit_l_costs_at_most_358_gflop_an_image(step):
    assert step.pair.feature.preprocess.img_size == 196
    counted = count_flops(lambda: step.distiller(step.batch.images, step.pair(step.batch)).total.backward())
    assert counted == hybrid_step_flops(VIT_L, CLIP_L, VIT_L, KEPT, head=HEAD)
    assert counted <= 358e9
    # Nothing pruned:
    full = student_step_flops(VIT_L, KEPT, 1024, 2, head=HEAD) + vit_forward_flops(VIT_L) + vit_forward_flops(CLIP_L)
    assert full == pytest.approx(370e9, rel=0.01)


def test_the_student_s_part_is_at_most_0_35_of_its_full_one(step):
    masked, full = (student_flops(step, kept) for kept in (KEPT, None))
    assert masked == student_step_flops(VIT_L, KEPT, 1024, 2, head=HEAD)
    assert full == student_step_flops(VIT_L, None, 1024, 2, head=HEAD)
    assert masked <= 0.35 * full


def student_flops(step, kept):
    """Count a step in which the teachers' word about `kept` tokens, or all of them, costs nothing."""
    count = kept or PATCHES
    relation = torch.empty(1, 16, 1 + count, 1 + count)
    indices = None if kept is None else step.batch.keep_indices
    targets = Targets(indices, torch.empty(1, 1 + count, 1024), (relation, relation))
    return count_flops(lambda: step.distiller(step.batch.images, targets).total.backward())
