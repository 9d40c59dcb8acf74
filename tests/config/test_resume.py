"""Which fields a run may change between its starts: a literal list, and every other field of the recipe is refused."""

import re
import types
import typing

import pytest
from pydantic import BaseModel

from hdscale.config.loading import RECIPE_FILE, changed_fields, check_allowed, dump_recipe, is_allowed, load_recipe
from hdscale.config.recipe import Recipe
from hdscale.errors import UserError
from hdscale.runs.folder import check_recipe_unchanged

FREE = {
    "run.name",
    "run.root",
    "run.rendezvous_seconds",
    "data.shards",
    "data.workers",
    "data.max_bad_fraction",
    "student.checkpoint_every",
    "feature_teacher.sharding",
    "feature_teacher.weights",
    "relation_teacher.sharding",
    "relation_teacher.weights",
    "mask.source",
    "mask.store",
    "optim.micro_batch_size",
    "schedule.stop_after",
    "checkpoint.every_steps",
    "checkpoint.keep",
    "log.every_steps",
    "log.gradient_norms_every",
    "evaluation.split",
    "evaluation.neighbors",
    "evaluation.attention_images",
}
ONE_VALUE_ONLY = {"targets.source"}
# Fields that make no difference to the default recipe, and a recipe to which they do.
WITH_BEARING = {
    "mask.random_per": ["mask.strategy=random"],
    "relation.token_head": ["relation.target=features"],
}


def section_of(annotation):
    options = typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)
    return next((option for option in options if isinstance(option, type) and issubclass(option, BaseModel)), None)


def all_fields():
    return [
        f"{section}.{field}"
        for section, info in Recipe.model_fields.items()
        for field in section_of(info.annotation).model_fields
    ]


def another(value, annotation):
    """A value of the same type that is not this one."""
    choices = [choice for choice in typing.get_args(annotation) if choice != value]
    if typing.get_origin(annotation) is typing.Literal:
        return choices[0]
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    if isinstance(value, str):
        return value + "x"
    if isinstance(value, tuple):
        return value[::-1]
    assert value is None
    return (1, 2) if "tuple" in str(annotation) else 1


def with_another_value(recipe, field):
    section, name = field.split(".")
    old = getattr(recipe, section)
    value = another(getattr(old, name), type(old).model_fields[name].annotation)
    return recipe.model_copy(update={section: old.model_copy(update={name: value})})


CHANGEABLE = [field for field in all_fields() if field not in ONE_VALUE_ONLY]


def test_the_list_of_free_fields_names_fields_of_the_recipe():
    assert set(CHANGEABLE) >= FREE


@pytest.mark.parametrize("field", CHANGEABLE)
def test_every_field_outside_a_literal_list_is_refused_on_a_resume_unless_allowed(field, tmp_path):
    before = load_recipe(None, WITH_BEARING.get(field, []))
    (tmp_path / RECIPE_FILE).write_text(dump_recipe(before))
    after = with_another_value(before, field)
    assert after != before
    if field in FREE:
        assert changed_fields(before, after) == []
        check_recipe_unchanged(tmp_path, after, [])
        return
    assert [name for name, *_ in changed_fields(before, after)] == [field]
    others = [other for other in CHANGEABLE if other != field]
    with pytest.raises(UserError, match=re.escape(f"pass --allow-change {field}") + "$"):
        check_recipe_unchanged(tmp_path, after, others)
    for allowed in (field, field.split(".")[0]):
        check_allowed([allowed])
        check_recipe_unchanged(tmp_path, after, [allowed])


def test_a_change_is_reported_with_both_values(tmp_path):
    before, after = load_recipe(None), load_recipe(None, ["optim.lr=1e-3", "loss.alpha=0.5"])
    assert changed_fields(before, after) == [("loss.alpha", 1.0, 0.5), ("optim.lr", 6e-4, 1e-3)]
    (tmp_path / RECIPE_FILE).write_text(dump_recipe(before))
    with pytest.raises(UserError) as caught:
        check_recipe_unchanged(tmp_path, after, [])
    assert str(caught.value) == (
        f"{tmp_path / RECIPE_FILE}: the run was started with loss.alpha=1.0 (now 0.5), optim.lr=0.0006 (now 0.001): "
        "set it back, choose another run.name, or pass --allow-change loss.alpha --allow-change optim.lr"
    )
    with pytest.raises(UserError, match=r"started with optim\.lr=0\.0006 \(now 0\.001\): set"):
        check_recipe_unchanged(tmp_path, after, ["loss"])


@pytest.mark.parametrize("section", list(Recipe.model_fields))
def test_allowing_a_section_allows_its_own_fields_and_no_other_section_s(section):
    allowed = {field for field in all_fields() if is_allowed(field, [section])}
    assert allowed == {field for field in all_fields() if field.split(".")[0] == section}


def test_a_teacher_that_goes_or_comes_is_a_change():
    both = load_recipe(None, ["mask.strategy=random"])
    one = load_recipe(None, ["mask.strategy=random", "relation_teacher=null"])
    for before, after in ((both, one), (one, both)):
        names = [name for name, *_ in changed_fields(before, after)]
        assert names == ["relation_teacher.name", "relation_teacher.source", "relation_teacher.target"]


@pytest.mark.parametrize(
    ("name", "allowed"),
    [
        ("relation.layers", "relation_teacher"),
        ("relation_teacher.name", "relation"),
        ("relation_teacher", "relation"),
        ("optim.lr", "optim.l"),
        ("optim.lr", "optim.lr.x"),
        ("view img_size", "view"),
        ("data", "data.views"),
    ],
)
def test_only_a_whole_name_or_section_allows(name, allowed):
    assert not is_allowed(name, [allowed])
    assert is_allowed(name, [allowed, name])
