"""What recipes of earlier versions meant, and which of a recipe's fields bear on its result."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from hdscale.config.recipe import Recipe


class LaterField(NamedTuple):
    """A field that recipes of earlier versions could not state."""

    before: Any  # what the code did then
    bears_on: Callable[[Recipe], bool]  # whether the field makes a difference to a run


LATER_FIELDS: Mapping[str, LaterField] = {
    "loss.cls": LaterField("exclude", lambda recipe: recipe.feature_teacher is not None),
    "student.init": LaterField("timm", lambda _: True),
    "student.drop_path_per": LaterField("rank", lambda recipe: recipe.student.drop_path > 0),
    "mask.random_per": LaterField(  # a fresh view has its epoch's number
        "view", lambda recipe: recipe.mask.strategy == "random" and recipe.data.views != "fresh"
    ),
    "relation.token_head": LaterField(
        "width", lambda recipe: recipe.relation_teacher is not None and recipe.relation.target != "relation"
    ),
}
"""By name. Defaults follow what is known today; a run that is there already goes on as it was started."""


def with_earlier_meaning(values: Mapping[str, Any]) -> dict[str, Any]:
    """Give the fields that a whole recipe lacks the values of the version that wrote it.

    Args:
        values: sections of a recipe that its run has written down: a field that is missing did not exist then.
    """
    completed = dict(values)
    for field, later in LATER_FIELDS.items():
        section, name = field.split(".")
        completed[section] = {name: later.before, **completed.get(section, {})}
    return completed


def bears_on_result(field: str, recipe: Recipe) -> bool:
    """Tell whether a field of `LATER_FIELDS` makes a difference to a run; of all others, that is taken as given."""
    return field not in LATER_FIELDS or LATER_FIELDS[field].bears_on(recipe)
