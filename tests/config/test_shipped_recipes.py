"""launch/recipes/: what each recipe says of views, masks, initial weights and warm-up, typed out from its sources."""

from pathlib import Path

import pytest
import yaml

from hdscale.config.loading import load_recipe

RECIPES = {path.stem: path for path in Path("launch/recipes").glob("*.yaml")}
# Views, who chooses patches and when, images per forward of the teacher that does, initial weights, epochs and warm-up.
# dBOT, FD and MAE draw a new crop in each epoch, dBOT and MAE a new random mask, too.
SAID = {
    "vit_b_in1k": ("fresh", "progressive online", 128, "mae", 300, 40),
    "hybrid_deit_b": ("fresh", "progressive online", 128, "mae", 300, 40),
    "hybrid_dino_b": ("fresh", "progressive online", 128, "mae", 300, 40),
    "vit_l_in1k": ("fresh", "progressive online", 32, "mae", 300, 40),
    "vit_l_in21k": (4, "progressive store", 16, "mae", 40, 2),
    "vit_l_in21k_literal": ("fresh", "progressive online", 32, "mae", 40, 2),
    "distill_deit_b": ("fresh", "none", None, "mae", 300, 40),
    "distill_mae_b": ("fresh", "none", None, "mae", 300, 40),
    "distill_clip_b": ("fresh", "none", None, "mae", 300, 40),
    "fd_deit_b": ("fresh", "none", None, "fd", 300, 10),
    "fd_mae_b": ("fresh", "none", None, "fd", 300, 10),
    "fd_clip_b": ("fresh", "none", None, "fd", 300, 10),
    "dbot_deit_b": ("fresh", "random epoch", None, "mae", 150, 40),
    "dbot_deit_b_stage2": ("fresh", "random epoch", None, "mae", 150, 40),
    "reconstruct_deit_b": ("fresh", "random epoch", None, "mae", 100, 40),
    "demo_hybrid": (4, "progressive store", 16, "mae", 18, 2),
    "demo_feature_only": (4, "none", None, "mae", 18, 2),
    "demo_teacher": ("fresh", "none", None, "mae", 20, 2),
}


def said(recipe, stated):
    mask = recipe.mask
    how = {"none": "none", "random": f"random {mask.random_per}"}.get(mask.strategy, f"{mask.strategy} {mask.source}")
    group = stated["mask"]["images_per_forward"] if mask.chosen_by_teacher else None  # not the code's default
    schedule = recipe.schedule
    return recipe.data.views, how, group, recipe.student.init, schedule.epochs, schedule.warmup_epochs


def test_every_recipe_stands_in_the_list():
    assert set(RECIPES) == set(SAID)


@pytest.mark.parametrize("name", SAID)
def test_a_recipe_says_what_its_sources_do(name):
    recipe = load_recipe(RECIPES[name])
    assert said(recipe, yaml.safe_load(RECIPES[name].read_text())) == SAID[name]
    assert recipe.loss.cls == "include"


@pytest.mark.parametrize("name", SAID)
def test_a_recipe_states_its_views_with_their_source(name):
    (line,) = [line for line in RECIPES[name].read_text().splitlines() if line.startswith("  views: ")]
    assert " # " in line


@pytest.mark.parametrize("name", [name for name, (_, how, *_) in SAID.items() if how.endswith("online")])
def test_the_group_that_makes_masks_is_the_recipe_s_own_micro_batch_and_stays_when_this_changes(name):
    recipe = load_recipe(RECIPES[name])
    assert recipe.mask.images_per_forward == recipe.optim.micro_batch_size
    smaller = load_recipe(RECIPES[name], ["optim.micro_batch_size=8"])
    assert smaller.mask.images_per_forward == recipe.mask.images_per_forward
