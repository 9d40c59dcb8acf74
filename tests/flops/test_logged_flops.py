"""FLOPs an image, as the log's `mfu` takes them, against torch's counter on a real step and against the paper."""

import pytest
import torch

import hdscale.teachers.build
from hdscale.config.recipe import Recipe
from hdscale.distiller import build_distiller
from hdscale.flops import count_flops, flops_over_one_teacher, step_flops_per_image
from hdscale.teachers.build import build_teachers
from hdscale.teachers.targets import TeacherPair
from hdscale.types import Batch, ComparedTokens

GRID = 4


def logged_and_counted(student, feature, relation, embed_dim=48, **settings):
    recipe = Recipe.model_validate(
        {
            "student": {
                "model": student,
                "patch_size": 16,
                "embed_dim": embed_dim,
                "depth": 4,
                "num_heads": 3,
                "drop_path": 0.0,
            },
            "data": {"img_size": GRID * 16},
            "feature_teacher": f"timm:{feature}/random",
            "relation_teacher": f"timm:{relation}/random",
            "relation": {"heads": "merged", **settings},
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
        compared=ComparedTokens(cls_in_relation=distiller.cls_in_relation, cls_in_features=distiller.cls_in_features),
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


@pytest.mark.parametrize("token_head", ["norm_linear", "width"])
def test_the_log_counts_what_stands_behind_token_targets(token_head):
    for width in (48, 192):  # the teacher's is 192
        logged, counted = logged_and_counted(
            *["vit_tiny_patch16_224"] * 3, embed_dim=width, target="features", token_head=token_head
        )
        assert logged == counted


CLIP_B = {"source": "open_clip", "name": "ViT-B-16", "weights": "random"}
MAE_B = {"source": "timm", "name": "vit_base_patch16_224.mae", "weights": "random"}


def vit_b_ratio(monkeypatch, feature=CLIP_B, relation=MAE_B, **mask):
    recipe = Recipe.model_validate(
        {
            "student": {"model": "vit_base_patch16_224"},
            "feature_teacher": feature,
            "relation_teacher": relation,
            "mask": mask,
            "loss": {"cls": "exclude"},
        }
    )
    monkeypatch.setattr(hdscale.teachers.build, "weights_digest", lambda _: "")
    with torch.device("meta"):
        teachers = build_teachers(recipe, 14)
        distiller = build_distiller(
            recipe.student, recipe.relation, recipe.loss, img_size=224, seed=0, teachers=teachers.shapes()
        )
    return flops_over_one_teacher(recipe, distiller, teachers)


@pytest.mark.parametrize(("mask", "times"), [({"strategy": "none"}, 1.215), ({}, 0.7), ({"source": "online"}, 0.7)])
def test_two_teachers_cost_what_the_paper_says_without_masks_and_less_than_one_with_them(mask, times, monkeypatch):
    assert vit_b_ratio(monkeypatch, **mask) == pytest.approx(times, abs=0.0005)


def test_without_masks_the_second_teacher_adds_ten_blocks_to_forty_eight(monkeypatch):
    tokens, patches, dim = 197, 196, 768
    block, linear = 24 * tokens * dim**2 + 4 * tokens**2 * dim, 2 * patches * dim**2
    alone = 36 * block + 2 * linear + 3 * linear + 12 * block + linear  # student, its head, feature teacher
    query_key, product = 4 * tokens * dim**2, 2 * tokens**2 * dim
    second = linear + 10 * block + query_key + 2 * product + 3 * 2 * product
    assert vit_b_ratio(monkeypatch, strategy="none") == pytest.approx(1 + second / alone, rel=1e-12)


@pytest.mark.parametrize("without", ["feature", "relation"])
def test_one_teacher_has_nothing_to_be_compared_with(without, monkeypatch):
    assert vit_b_ratio(monkeypatch, strategy="none", **{without: None}) is None
