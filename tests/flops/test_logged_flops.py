"""FLOPs an image, as the log's `mfu` takes them, against torch's counter on a real step."""

import pytest
import torch

from hdscale.config.recipe import Recipe
from hdscale.distiller import build_distiller
from hdscale.flops import count_flops, step_flops_per_image
from hdscale.teachers.build import build_teachers
from hdscale.teachers.targets import TeacherPair
from hdscale.types import Batch

GRID = 4


def logged_and_counted(student, feature, relation):
    recipe = Recipe.model_validate(
        {
            "student": {
                "model": student,
                "patch_size": 16,
                "embed_dim": 48,
                "depth": 4,
                "num_heads": 3,
                "drop_path": 0.0,
            },
            "data": {"img_size": GRID * 16},
            "feature_teacher": f"timm:{feature}/random",
            "relation_teacher": f"timm:{relation}/random",
            "relation": {"heads": "merged"},
            "mask": {"source": "online", "images_per_forward": 1},
        }
    )
    teachers = build_teachers(recipe, GRID)
    assert teachers.feature is not None
    assert teachers.relation is not None
    distiller = build_distiller(
        recipe.student,
        recipe.relation,
        recipe.loss,
        img_size=GRID * 16,
        seed=0,
        teachers=teachers.shapes(),
    )
    pair = TeacherPair(
        teachers.feature,
        teachers.relation,
        relation_config=recipe.relation,
        mask_config=recipe.mask,
        seed=0,
        num_patches=GRID**2,
        cls_in_relation=distiller.cls_in_relation,
    )
    ids = torch.zeros(1, dtype=torch.int64)
    batch = Batch(torch.zeros(1, 3, GRID * 16, GRID * 16, dtype=torch.uint8), ids, ids, ids, ids, None)
    counted = count_flops(lambda: distiller(batch.images, pair(batch)).total.backward())
    return step_flops_per_image(recipe, distiller, teachers), counted


@pytest.mark.parametrize(
    ("student", "feature", "relation"),
    [
        ("vit_tiny_patch16_224", "vit_tiny_patch16_224", "vit_tiny_patch16_224"),
        ("vit_tiny_patch16_224", "eva02_tiny_patch14_224", "eva02_tiny_patch14_224"),  # fused SwiGLU, rotary
        ("vit_tiny_patch16_224", "eva02_base_patch14_224", "vit_tiny_patch16_224"),  # SwiGLU of three Linears
        ("vit_giant_patch14_dinov2", "vit_tiny_patch16_224", "vit_tiny_patch16_224"),
    ],
)
def test_flops_of_the_log_are_those_of_a_real_step_whatever_the_blocks(student, feature, relation):
    logged, counted = logged_and_counted(student, feature, relation)
    assert logged == counted
