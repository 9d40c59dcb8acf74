"""Recipes from YAML files and `key=value` arguments, with errors that name the field and the way out."""

from __future__ import annotations

import difflib
import re
import types
import typing
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from hdscale.config.history import bears_on_result, with_earlier_meaning
from hdscale.config.recipe import Recipe
from hdscale.errors import UserError

RECIPE_FILE = "recipe.yaml"
ENVIRONMENT_FILE = "environment.json"
"""Beside the recipe in a run folder: versions and devices."""

# Fields that may differ between the starts of one run: they change where things lie, how fast they go or what is
# written down, not which numbers come out. (The data, masks and teachers behind the paths have digests of their own.)
_FREE_FIELDS = (
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
    "checkpoint",
    "log",
    "evaluation",
)


def load_recipe(path: Path | None, overrides: typing.Sequence[str] = ()) -> Recipe:
    """Read a recipe and apply `key=value` overrides.

    Args:
        path: YAML file; None for the defaults alone. Of a recipe that lies in a run folder, fields that it lacks mean
            what they meant to the version that wrote it; of any other, they have today's defaults.
        overrides: `section.field=value`, the value in YAML; `feature_teacher=null` removes a section.

    Raises:
        UserError: no such file, not YAML, an unknown key, or a value that breaks a rule.
    """
    return _load(path, overrides, of_a_run=path is not None and _is_of_a_run(path))


def load_run_recipe(run_folder: Path) -> Recipe:
    """Read the resolved recipe that a run wrote into its folder; fields it lacks mean what they meant then."""
    path = run_folder / RECIPE_FILE
    if not path.is_file():
        raise UserError(
            f"{run_folder} is not a run folder: it has no {RECIPE_FILE}; give one that launch/train.py wrote"
        )
    return _load(path, (), of_a_run=True)


def dump_recipe(recipe: Recipe) -> str:
    """Return the resolved recipe as YAML that `load_recipe` reads back unchanged."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False)


def changed_fields(old: Recipe, new: Recipe) -> list[tuple[str, Any, Any]]:
    """List (field, old value, new value) of all fields that change a run's result."""
    before, after = flat_fields(old.model_dump(mode="json")), flat_fields(new.model_dump(mode="json"))
    return [
        (field, before.get(field), after.get(field))
        for field in sorted(before.keys() | after.keys())
        if before.get(field) != after.get(field)
        and not is_allowed(field, _FREE_FIELDS)
        and (bears_on_result(field, old) or bears_on_result(field, new))
    ]


def is_allowed(name: str, allow_change: typing.Sequence[str]) -> bool:
    """Tell whether a field or fingerprint is listed, itself or by its section."""
    return any(name == allowed or name.startswith(allowed + ".") for allowed in allow_change)


def is_known_field(name: str) -> bool:
    """Tell whether a recipe has this section, such as `relation_teacher`, or field, such as `optim.lr`."""
    parts = name.split(".")
    return _known_parts(parts) == parts


def check_allowed(names: typing.Sequence[str]) -> None:
    """Refuse names for --allow-change that could never match: a misspelt one would be passed over in silence."""
    for name in names:
        if not (is_known_field(name) or name in ("precision", "method") or name.startswith("view ")):
            raise UserError(
                f"--allow-change {name} is no field or section of the recipe; take the name from the message that "
                "refused the run"
            )


def flat_fields(values: typing.Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Name each value of nested sections by its path: `optim.lr`."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat.update(flat_fields(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat


def _load(path: Path | None, overrides: typing.Sequence[str], *, of_a_run: bool) -> Recipe:
    values = {} if path is None else _read_yaml(path)
    if of_a_run:
        values = with_earlier_meaning(values)
    sources: dict[str, str] = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise UserError(f"argument {override!r} must be key=value, such as optim.lr=3e-4")
        _set(values, key.split("."), _parse_value(override, text))
        sources = {k: argument for k, argument in sources.items() if not k.startswith(key + ".")}
        sources[key] = override
    recipe = _validate(values, "the arguments" if path is None else str(path), sources)
    if not recipe.run.name:
        name = path.stem if path is not None else "default"
        recipe = recipe.model_copy(update={"run": recipe.run.model_copy(update={"name": name})})
    return recipe


def _is_of_a_run(path: Path) -> bool:
    """Tell whether a recipe was written by a run, which writes all fields there are, beside what it ran on."""
    return path.name == RECIPE_FILE and (path.parent / ENVIRONMENT_FILE).is_file()


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.load(path.read_text(), _Loader)
    except OSError as error:
        raise UserError(f"recipe {path} cannot be read ({error.strerror}); see launch/recipes/ for examples") from error
    except yaml.YAMLError as error:
        raise UserError(f"recipe {path} is not YAML: {_problem(error)}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"recipe {path} is not YAML: {error}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f"recipe {path} must be sections of key: value, got a {type(values).__name__}")
    return values


def _parse_value(override: str, text: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise UserError(f"argument {override!r} has a value that is not YAML: {_problem(error)}") from error


class _Loader(yaml.SafeLoader):
    """Safe YAML that refuses a key that is there twice: YAML takes the last one in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(None, None, f"{key.value} is there twice", key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def _problem(error: yaml.YAMLError) -> str:
    if not isinstance(error, yaml.MarkedYAMLError) or error.problem_mark is None:
        return str(error)
    return f"line {error.problem_mark.line + 1}, column {error.problem_mark.column + 1}: {error.problem}"


def _set(values: dict[str, Any], keys: list[str], value: Any) -> None:
    for depth, key in enumerate(keys[:-1]):
        inner = values.setdefault(key, {})
        if inner is None:
            inner = values[key] = {}
        if isinstance(inner, str) and ":" in inner and depth == 0 and key.endswith("_teacher"):
            inner = values[key] = {"name": inner}  # a teacher's section may be a name alone
        if not isinstance(inner, dict):
            raise UserError(f"{'.'.join(keys)} cannot be set: {'.'.join(keys[: depth + 1])} is a value, not a section")
        values = inner
    values[keys[-1]] = value


def _validate(values: dict[str, Any], where: str, sources: dict[str, str]) -> Recipe:
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        errors = error.errors(include_url=False)
    first = errors[0]
    location = [str(part) for part in first["loc"]]
    prefixes = (".".join(location[:length]) for length in range(len(location), 0, -1))
    where = next((f"argument {sources[prefix]!r}" for prefix in prefixes if prefix in sources), where)
    if first["type"] == "extra_forbidden":
        path = ".".join(location)
        within = [argument for key, argument in sources.items() if key.startswith(path + ".")]
        where = f"argument {within[-1]!r}" if within else where  # a section that an argument made
        raise UserError(f"{where}: unknown key {path}{_suggestion(location)}") from None
    known = _known_parts(location)
    message = _rule(errors, known)
    given = first["input"]
    got = "" if isinstance(given, dict) or ", got " in message else f", got {given!r}"
    colon = ":" if first["type"] == "value_error" and len(known) == 1 else ""
    raise UserError(f"{where}: {'.'.join(known)}{colon} {message}{got}".replace(":  ", ": "))


def _rule(errors: typing.Sequence[ErrorDetails], known: list[str]) -> str:
    """Say which rule the first error's value breaks; a union refuses a value once for each of its types."""
    first, place = errors[0], errors[0]["loc"]
    if first["type"] in ("missing", "too_long"):  # elements of a tuple: every field has a default
        return f"must have {'more' if first['type'] == 'missing' else 'fewer'} elements"
    if first["type"] == "model_type":
        return "must be a section of key: value"
    in_union = len(place) > len(known) and isinstance(place[-1], str)
    alternatives = [error for error in errors if error["loc"][:-1] == place[:-1]] if in_union else [first]
    messages = [re.sub(", (unable to parse|got a number with) .*", "", error["msg"]) for error in alternatives]
    rules = [text.removeprefix("Value error, ").removeprefix("Input should be ") for text in messages]
    must_be = "must be " if messages[0].startswith("Input should be ") else ""
    return must_be + " or ".join(rules)


def _known_parts(parts: list[str]) -> list[str]:
    """Return the leading parts that name a section and its field: no types of a union, no places in a list."""
    model: type[BaseModel] | None = Recipe
    known: list[str] = []
    for part in parts:
        if model is None or part not in model.model_fields:
            break
        known.append(part)
        model = _section(model.model_fields[part].annotation)
    return known


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
