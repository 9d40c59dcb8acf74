"""Ablations that an earlier version has begun: which of their runs and teachers stand for today's rows."""

import hashlib
import json

import pytest
import yaml

from hdscale.ablation.jobs import JobBuilder, Settings
from hdscale.ablation.paper_tables import TABLES
from hdscale.ablation.running import adopt_teachers
from hdscale.ablation.scales import SCALES
from hdscale.config.history import LATER_FIELDS
from hdscale.config.loading import dump_recipe, load_recipe
from hdscale.runs.folder import changed_on_the_way, write_run_folder

DEMO, REAL = SCALES["demo"], SCALES["b-in1k"]
AS_BEFORE = [f"{field}={later.before}" for field, later in LATER_FIELDS.items()]


def row_of(table, key, scale, output, *overrides):
    return JobBuilder(Settings(TABLES[table], scale, output, overrides)).build_row(TABLES[table].row(key), 0)


def earlier_name(table, row, recipe, output):
    """Name a run's folder as earlier versions did: by a digest without defaults."""
    values = recipe.model_dump(mode="json", exclude_defaults=True, exclude={"run": True, "mask": {"store"}})
    for field in LATER_FIELDS:
        values.get(field.split(".")[0], {}).pop(field.split(".")[1], None)
    text = json.dumps(values, sort_keys=True).replace(str(output), "{output}")
    return f"{table}-{row}-{hashlib.sha256(text.encode()).hexdigest()[:8]}-seed{recipe.run.seed}"


def write_recipe(folder, recipe, *, missing=LATER_FIELDS):
    """Write what an earlier version wrote into a run's folder when it had finished."""
    values = yaml.safe_load(dump_recipe(recipe))
    for field in missing:
        section, name = field.split(".")
        del values[section][name]
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(values))
    (folder / "DONE").write_text("")
    return folder


def earlier_run(table, row, scale, output, *overrides):
    """Write a finished run of a row by an earlier version."""
    recipe = row_of(table, row, scale, output, *overrides).recipe
    return write_recipe(output / "runs" / earlier_name(table, row, recipe, output), recipe)


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("scale", [DEMO, REAL], ids=["demo", "b-in1k"])
def test_a_run_of_an_earlier_version_never_stands_for_a_row_that_means_something_else_today(scale, tmp_path):
    earlier = earlier_run("8", "none", scale, tmp_path)
    before = contents(tmp_path)
    today = row_of("8", "none", scale, tmp_path)
    assert today.folder != earlier
    assert not today.is_done
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    ("table", "row"), [("8", "none"), ("8", "random"), ("5", "features"), ("9", "dbot-deit-stage-1")]
)
@pytest.mark.parametrize("scale", [DEMO, REAL], ids=["demo", "b-in1k"])
def test_a_run_of_an_earlier_version_is_found_by_the_row_that_still_means_the_same(table, row, scale, tmp_path):
    earlier = earlier_run(table, row, scale, tmp_path)
    today = row_of(table, row, scale, tmp_path, *AS_BEFORE)
    assert today.folder == earlier
    assert today.is_done
    assert today.recipe.run.name == earlier.name
    # One more difference, and it is another run.
    assert row_of(table, row, scale, tmp_path, *AS_BEFORE, "optim.lr=1e-3").folder != earlier


def test_a_field_that_makes_no_difference_to_a_row_need_not_be_set_back(tmp_path):
    earlier = earlier_run("8", "none", DEMO, tmp_path)
    needed = ["loss.cls=exclude", "student.init=timm", "student.drop_path_per=rank"]
    assert row_of("8", "none", DEMO, tmp_path, *needed).folder == earlier
    for field in needed:
        assert row_of("8", "none", DEMO, tmp_path, *(other for other in needed if other != field)).folder != earlier
    assert row_of("8", "random", DEMO, tmp_path, *needed).folder != earlier


def test_of_two_runs_that_mean_the_same_the_finished_one_is_taken(tmp_path):
    recipe = row_of("8", "none", DEMO, tmp_path).recipe
    first, second = (write_recipe(tmp_path / "runs" / name, recipe) for name in ("a-1-seed0", "b-2-seed0"))
    assert row_of("8", "none", DEMO, tmp_path, *AS_BEFORE).folder == first
    (first / "DONE").unlink()
    assert row_of("8", "none", DEMO, tmp_path, *AS_BEFORE).folder == second


def test_a_finished_run_that_means_the_same_is_taken_before_one_that_was_only_begun_under_today_s_name(tmp_path):
    begun = row_of("8", "none", DEMO, tmp_path, *AS_BEFORE)
    write_run_folder(begun.folder, begun.recipe, {}, 2)
    assert row_of("8", "none", DEMO, tmp_path, *AS_BEFORE).folder == begun.folder
    finished = write_recipe(tmp_path / "runs" / "a-1-seed0", begun.recipe)
    assert row_of("8", "none", DEMO, tmp_path, *AS_BEFORE).folder == finished


def test_a_run_whose_recipe_was_changed_on_the_way_stands_for_no_row(tmp_path):
    recipe = row_of("8", "none", DEMO, tmp_path).recipe
    for name in ("a-1-seed0", recipe.run.name):  # found by what its recipe means, and by its name
        folder = tmp_path / "runs" / name
        before = recipe.model_copy(update={"loss": recipe.loss.model_copy(update={"cls": "exclude"})})
        write_run_folder(folder, before, {}, 2)
        write_run_folder(folder, recipe, {}, 2)
        write_run_folder(folder, recipe, {}, 2)  # once changed, always
        (folder / "DONE").write_text("")
        assert changed_on_the_way(folder) == ["loss.cls"]
    today = row_of("8", "none", DEMO, tmp_path)
    assert not today.folder.exists()
    assert not today.is_done
    write_run_folder(today.folder, today.recipe, {}, 2)  # begun anew, and found again
    assert row_of("8", "none", DEMO, tmp_path).folder == today.folder


def test_a_run_that_was_started_twice_alike_stands_for_its_row(tmp_path):
    recipe = row_of("8", "none", DEMO, tmp_path).recipe
    for free in (3, 5):  # keeping more checkpoints changes no result
        changed = recipe.model_copy(update={"checkpoint": recipe.checkpoint.model_copy(update={"keep": free})})
        write_run_folder(tmp_path / "runs" / "a-1-seed0", changed, {}, 2)
    assert changed_on_the_way(tmp_path / "runs" / "a-1-seed0") == []


def test_teachers_count_by_their_place_in_the_ablation_and_not_by_what_it_was_called(tmp_path):
    earlier = earlier_run("3", "tc+tm", DEMO, tmp_path / "before")
    (tmp_path / "before").rename(tmp_path / "now")
    found = [row_of("3", row, DEMO, tmp_path / "now", *AS_BEFORE).folder for row in ("tc+tm", "tc+tc")]
    assert found[0] == tmp_path / "now/runs" / earlier.name
    assert found[1] != found[0]


def test_a_recipe_that_cannot_be_read_is_passed_over(tmp_path):
    (tmp_path / "runs/x").mkdir(parents=True)
    (tmp_path / "runs/x/recipe.yaml").write_text("optim: {lrr: 1}")
    assert not row_of("8", "none", DEMO, tmp_path).folder.exists()


def test_an_earlier_version_s_teacher_stays_and_today_s_rows_get_one_of_their_own(tmp_path):
    arguments = row_of("3", "tm", DEMO, tmp_path).jobs[1].arguments
    recipe = load_recipe(DEMO.trained["mae"].recipe, arguments[4:])
    earlier = write_recipe(tmp_path / "teachers/mae", recipe)
    before = contents(tmp_path)
    today = row_of("3", "tm", DEMO, tmp_path)
    (training,) = [job for job in today.jobs if job.script == "launch/pretrain_teacher.py"]
    folder = training.marker.parent
    assert folder.parent == earlier.parent
    assert folder.name.startswith("mae-")
    assert f"run.name={folder.name}" in training.arguments
    assert today.recipe.feature_teacher.weights == str(folder / "encoder.safetensors")
    assert not training.is_done
    assert contents(tmp_path) == before
    # Once it is there, it is found again.
    write_recipe(folder, recipe, missing=())
    assert [job.is_done for job in row_of("3", "tm", DEMO, tmp_path).jobs] == [False, True, False]


def test_a_teacher_of_today_keeps_its_plain_name(tmp_path):
    arguments = row_of("3", "tm", DEMO, tmp_path).jobs[1].arguments
    recipe = load_recipe(DEMO.trained["mae"].recipe, arguments[4:])
    teacher = write_recipe(tmp_path / "teachers/mae", recipe, missing=())
    assert row_of("3", "tm", DEMO, tmp_path).jobs[1].marker == teacher / "DONE"


def test_the_demo_s_teacher_is_taken_beside_an_earlier_version_s(tmp_path):
    recipe = load_recipe(DEMO.trained["mae"].recipe)
    output, found = tmp_path / "out", write_recipe(tmp_path / "demo", recipe, missing=())
    for file in ("environment.json", "encoder.safetensors"):
        (found / file).write_text("today's")
    earlier = write_recipe(output / "teachers/mae", recipe)
    adopt_teachers(DEMO._replace(trained={"mae": DEMO.trained["mae"]._replace(found_at=found)}), output, None)
    (adopted,) = [path for path in earlier.parent.iterdir() if path != earlier]
    assert adopted == row_of("3", "tm", DEMO, output).jobs[1].marker.parent
    assert (adopted / "encoder.safetensors").read_text() == "today's"
