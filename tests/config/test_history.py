"""Runs of earlier versions: what their recipes could not state, and how they go on."""

import pytest
import yaml

from hdscale.config.history import LATER_FIELDS
from hdscale.config.loading import (
    ENVIRONMENT_FILE,
    RECIPE_FILE,
    changed_fields,
    dump_recipe,
    flat_fields,
    load_recipe,
    load_run_recipe,
)
from hdscale.errors import UserError
from hdscale.runs.folder import check_recipe_unchanged

# To which every one of these fields makes a difference.
CONTEXT = ["mask.strategy=random", "relation.target=attention"]
BEFORE = {
    "loss.cls": "exclude",
    "student.init": "timm",
    "student.drop_path_per": "rank",
    "mask.random_per": "view",
    "relation.token_head": "width",
}
WITHOUT_BEARING = {
    "loss.cls": ["feature_teacher=null"],
    "student.drop_path_per": ["student.drop_path=0"],
    "mask.random_per": ["mask.strategy=none"],
    "relation.token_head": ["relation.target=relation"],
}


@pytest.fixture
def old_run(tmp_path):
    """Return a function that writes the folder of a run whose recipe could not state some fields."""

    def write(overrides, missing):
        values = yaml.safe_load(dump_recipe(load_recipe(None, overrides)))
        for field in missing:
            section, name = field.split(".")
            del values[section][name]
        (tmp_path / RECIPE_FILE).write_text(yaml.safe_dump(values))
        (tmp_path / ENVIRONMENT_FILE).write_text("{}")
        return tmp_path

    return write


def test_the_fields_and_what_was_done_before_them_stand_in_a_literal_list():
    assert {field: later.before for field, later in LATER_FIELDS.items()} == BEFORE


def test_a_missing_field_means_what_the_code_did_and_a_stated_one_what_it_says(old_run):
    stated = [f"{field}={value}" for field, value in BEFORE.items()]
    assert load_run_recipe(old_run(CONTEXT, BEFORE)) == load_recipe(None, [*CONTEXT, *stated])
    today = old_run(CONTEXT, [])
    assert load_run_recipe(today) == load_recipe(None, CONTEXT)


def test_a_whole_section_may_be_missing(old_run):
    folder = old_run(CONTEXT, [])
    values = yaml.safe_load((folder / RECIPE_FILE).read_text())
    del values["student"]
    (folder / RECIPE_FILE).write_text(yaml.safe_dump(values))
    assert load_run_recipe(folder).student.init == "timm"


def test_a_run_s_recipe_means_the_same_when_it_is_given_as_a_recipe(old_run):
    folder = old_run(CONTEXT, BEFORE)
    assert load_recipe(folder / RECIPE_FILE) == load_run_recipe(folder)
    assert load_recipe(folder / RECIPE_FILE, ["loss.cls=include"]).loss.cls == "include"


def test_anybody_else_s_recipe_has_today_s_defaults(old_run):
    folder = old_run(CONTEXT, BEFORE)
    mine = (folder / RECIPE_FILE).rename(folder / "mine.yaml")
    assert load_recipe(mine).loss.cls == "include"
    (folder / "elsewhere").mkdir()
    copy = folder / "elsewhere" / RECIPE_FILE
    copy.write_text(mine.read_text())
    assert load_recipe(copy).loss.cls == "include"


@pytest.mark.parametrize("field", BEFORE)
def test_an_old_run_is_refused_under_a_new_default_and_goes_on_when_it_is_set_back_or_allowed(field, old_run):
    folder, today = old_run(CONTEXT, [field]), load_recipe(None, CONTEXT)
    with pytest.raises(UserError, match=rf"the run was started with {field}={BEFORE[field]} \(now \w+\): set it back"):
        check_recipe_unchanged(folder, today, [])
    check_recipe_unchanged(folder, today, [field])
    check_recipe_unchanged(folder, load_recipe(None, [*CONTEXT, f"{field}={BEFORE[field]}"]), [])


def test_random_masks_of_fresh_views_are_the_same_by_epoch_and_by_view(old_run):
    """A fresh view has its epoch's number."""
    overrides = [*CONTEXT, "data.views=fresh", "mask.source=online"]
    check_recipe_unchanged(old_run(overrides, ["mask.random_per"]), load_recipe(None, overrides), [])


@pytest.mark.parametrize("field", WITHOUT_BEARING)
def test_a_field_that_makes_no_difference_to_a_run_is_not_compared(field, old_run):
    overrides = [*CONTEXT, *WITHOUT_BEARING[field]]
    folder = old_run(overrides, [field])
    check_recipe_unchanged(folder, load_recipe(None, overrides), [])
    # With the change that lets it matter, both are named.
    changed = [name for name, *_ in changed_fields(load_run_recipe(folder), load_recipe(None, CONTEXT))]
    assert field in changed


def test_every_later_field_is_one_of_the_recipe_s():
    assert set(BEFORE) <= set(flat_fields(load_recipe(None).model_dump()))
