"""What recipes and docs say that a step costs."""

from pathlib import Path

import pytest
import torch

import hdscale.teachers.build
from hdscale.config.loading import load_recipe
from hdscale.distiller import build_distiller
from hdscale.flops import step_flops_per_image
from hdscale.teachers.build import build_teachers

ROOT = Path(__file__).resolve().parents[2]
GRID = 14


def gflop_per_image(path, *more):
    recipe = load_recipe(path, ["feature_teacher.weights=random", "relation_teacher.weights=random", *more])
    with torch.device("meta"):
        teachers = build_teachers(recipe, GRID)
        distiller = build_distiller(
            recipe.student, recipe.relation, recipe.loss, img_size=224, seed=0, teachers=teachers.shapes()
        )
    return step_flops_per_image(recipe, distiller, teachers) / 1e9


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("vit_b_in1k", "98.7"),
        ("hybrid_deit_b", "98.7"),
        ("hybrid_dino_b", "98.7"),
        ("vit_l_in1k", "357.7"),
        ("vit_l_in21k", "357.7"),
        ("vit_l_in21k_literal", "357.7"),
    ],
)
def test_stored_masks_save_nothing_beside_the_relation_teacher_as_recipes_and_docs_say(name, said, monkeypatch):
    monkeypatch.setattr(hdscale.teachers.build, "weights_digest", lambda _: "")
    path = ROOT / f"launch/recipes/{name}.yaml"
    in_the_step = gflop_per_image(path, "mask.source=online")
    assert gflop_per_image(path, "mask.source=store", "data.views=4") == in_the_step
    assert f"{in_the_step:.1f}" == said
    assert (
        f"costs {said} GFLOP per image" in path.read_text() or f"the same, {said} GFLOP per image" in path.read_text()
    )
    assert f" {said} " in (ROOT / "docs/masks.md").read_text()
