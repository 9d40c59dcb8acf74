"""Every recipe in launch/recipes/ takes steps in its small form, and its teachers exist."""

import json
import math
import sys

import open_clip
import pytest
import timm

from hdscale.config.loading import load_recipe
from tests.helpers.launcher import ROOT, run

RECIPES = sorted((ROOT / "launch/recipes").glob("*.yaml"))


@pytest.fixture(scope="module")
def outcome(world):
    """What one process found out about all recipes."""
    done = run([sys.executable, ROOT / "tests/launch/recipes_scenario.py", world.folder])
    assert done.returncode == 0, done.stderr[-4000:]
    return {name: json.loads((world.folder / f"{name}.json").read_text()) for name in ("stepped", "stages")}


@pytest.fixture(scope="module")
def stepped(outcome):
    """What became of each recipe."""
    return outcome["stepped"]


def test_every_recipe_takes_a_step_that_moves_every_parameter(stepped):
    assert {name.split()[0] for name in stepped} == {path.stem for path in RECIPES}
    for name, found in stepped.items():
        assert all(math.isfinite(loss) and loss > 0 for loss in found["losses"]), name
        assert found["still"] == [], name


def test_the_flops_that_the_log_divides_by_are_those_of_every_recipes_step(stepped):
    counted = {name: found["counted"] for name, found in stepped.items() if "counted" in found}
    assert len(counted) == len(RECIPES) - 1  # demo_teacher has no teachers
    assert counted == {name: stepped[name]["computed"] for name in counted}


def test_sharded_and_recomputed_students_of_every_kind_train_alike(stepped):
    sharded = {name: found for name, found in stepped.items() if "zero3" in found}
    assert len(sharded) == 4
    for name, found in sharded.items():
        assert found["zero3"] == pytest.approx(found["losses"], rel=1e-5), name


@pytest.mark.parametrize("name", ["dbot_deit_b", "fd_clip_b"])
def test_an_exported_student_is_the_feature_teacher_of_the_next_stage(name, outcome):
    stage = outcome["stages"][name]
    assert stage["shape"] == [4, 1 + 48, 48]  # images, class token and hidden patches of 64, width
    assert stage["error"] < 1e-5
    assert all(math.isfinite(loss) for loss in stage["losses"])


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_named_teachers_have_released_weights(path):
    recipe = load_recipe(path)
    for teacher in (recipe.feature_teacher, recipe.relation_teacher):
        if teacher is None or teacher.source == "file":
            continue
        if teacher.source == "timm":
            assert teacher.name in timm.list_pretrained(teacher.name.split(".")[0] + "*")
        else:
            assert (teacher.name, teacher.weights) in open_clip.list_pretrained()
