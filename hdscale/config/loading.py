"""Recipes from YAML files and `key=value` arguments, with errors that name the field and the way out."""

from __future__ import annotations

import difflib
import types
import typing
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from hdscale.config.recipe import Recipe
from hdscale.errors import UserError

RECIPE_FILE = "recipe.yaml"

# Fields that may differ between the starts of one run: they change where things lie, how fast they go or what is
# written down, not which numbers come out. (The data, masks and teachers behind the paths have digests of their own.)
_FREE_FIELDS = (
    "run.name",
    "run.root",
    "data.shards",
    "data.workers",
    "student.checkpoint_every",
    "feature_teacher.sharding",
    "feature_teacher.weights",
    "relation_teacher.sharding",
    "relation_teacher.weights",
    "mask.source",
    "mask.store",
    "optim.micro_batch_size",
    "schedule.stop_after",
    "checkpoint",
    "log",
    "evaluation",
)


def load_recipe(path: Path | None, overrides: typing.Sequence[str] = ()) -> Recipe:
    """Read a recipe and apply `key=value` overrides.

    Args:
        path: YAML file; None for the defaults alone.
        overrides: `section.field=value`, the value in YAML; `feature_teacher=null` removes a section.

    Raises:
        UserError: no such file, not YAML, an unknown key, or a value that breaks a rule.
    """
    values = {} if path is None else _read_yaml(path)
    sources: dict[str, str] = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise UserError(f"argument {override!r} must be key=value, such as optim.lr=3e-4")
        _set(values, key.split("."), _parse_value(override, text))
        sources[key] = override
    recipe = _validate(values, "the arguments" if path is None else str(path), sources)
    if not recipe.run.name:
        name = path.stem if path is not None else "default"
        recipe = recipe.model_copy(update={"run": recipe.run.model_copy(update={"name": name})})
    return recipe


def load_run_recipe(run_folder: Path) -> Recipe:
    """Read the resolved recipe that a run wrote into its folder."""
    path = run_folder / RECIPE_FILE
    if not path.is_file():
        raise UserError(
            f"{run_folder} is not a run folder: it has no {RECIPE_FILE}; give one that launch/train.py wrote"
        )
    return load_recipe(path)


def dump_recipe(recipe: Recipe) -> str:
    """Return the resolved recipe as YAML that `load_recipe` reads back unchanged."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False)


def changed_fields(old: Recipe, new: Recipe) -> list[tuple[str, Any, Any]]:
    """List (field, old value, new value) of all fields that change a run's result."""
    before, after = _flatten(old.model_dump(mode="json")), _flatten(new.model_dump(mode="json"))
    return [
        (field, before.get(field), after.get(field))
        for field in sorted(before.keys() | after.keys())
        if before.get(field) != after.get(field) and not _is_free(field)
    ]


def _is_free(field: str) -> bool:
    return any(field == free or field.startswith(free + ".") for free in _FREE_FIELDS)


def _flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat.update(_flatten(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text())
    except OSError as error:
        raise UserError(f"recipe {path} cannot be read ({error.strerror}); see launch/recipes/ for examples") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"recipe {path} is not YAML: {error}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f"recipe {path} must be sections of key: value, got a {type(values).__name__}")
    return values


def _parse_value(override: str, text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"argument {override!r} has a value that is not YAML: {error}") from error


def _set(values: dict[str, Any], keys: list[str], value: Any) -> None:
    for depth, key in enumerate(keys[:-1]):
        inner = values.setdefault(key, {})
        if inner is None:
            inner = values[key] = {}
        if not isinstance(inner, dict):
            raise UserError(f"{'.'.join(keys)} cannot be set: {'.'.join(keys[: depth + 1])} is a value, not a section")
        values = inner
    values[keys[-1]] = value


def _validate(values: dict[str, Any], where: str, sources: dict[str, str]) -> Recipe:
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
    location = [str(part) for part in first["loc"]]
    field = ".".join(location)
    where = f"argument {sources[field]!r}" if field in sources else where
    if first["type"] == "extra_forbidden":
        raise UserError(f"{where}: unknown key {field}{_suggestion(location)}") from None
    message = first["msg"].removeprefix("Value error, ")
    for found, wanted in (("Input should be", "must be"), ("Field required", "is required")):
        message = message.replace(found, wanted)
    given = first["input"]
    got = "" if isinstance(given, dict) or ", got " in message else f", got {given!r}"
    colon = ":" if first["type"] == "value_error" and field else ""
    raise UserError(f"{where}: {field}{colon} {message}{got}".replace(":  ", ": "))


def _suggestion(location: list[str]) -> str:
    model: type[BaseModel] | None = Recipe
    for part in location[:-1]:
        model = _section(model.model_fields[part].annotation) if model and part in model.model_fields else None
    if model is None:
        return ""
    close = difflib.get_close_matches(location[-1], model.model_fields, n=1)
    if close:
        return f"; did you mean {'.'.join([*location[:-1], close[0]])}?"
    everywhere = [
        f"{section}.{field}"
        for section, info in Recipe.model_fields.items()
        for field in getattr(_section(info.annotation), "model_fields", {})
    ]
    close = difflib.get_close_matches(".".join(location), everywhere, n=1)
    return f"; did you mean {close[0]}?" if close else f"; known here: {', '.join(model.model_fields)}"


def _section(annotation: Any) -> type[BaseModel] | None:
    options = typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)
    return next((option for option in options if isinstance(option, type) and issubclass(option, BaseModel)), None)
