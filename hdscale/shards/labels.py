"""Labels of samples that others put into tar files: a `.cls` member, or a field of a `.json` member."""

from __future__ import annotations

import json
from typing import NamedTuple

from hdscale.data.index import UNLABELLED
from hdscale.errors import UserError

MAX_CLS = 64
"""Bytes of a `.cls` member; a longer one is no number."""

MAX_JSON = 1 << 20
"""Bytes of a `.json` member; a longer one is never read."""

_MAX_UNNAMED = 100_000  # labels without a file of class names: the manifest lists a name for each
_MAX_LABEL = (1 << 31) - 1  # of the index
_AUTO_FIELDS = ("label", "cls")


class BadLabel(ValueError):
    """A label that cannot be used; the message says why, without naming the sample."""


class LabelRule(NamedTuple):
    """Where the label of a sample is."""

    cls: bool  # in its .cls member, which comes first
    fields: tuple[str, ...]  # the first of these in its .json member
    required: bool  # a sample without a label is left out
    num_classes: int | None  # labels are below it; None: below 100,000

    def of(self, cls: bytes | None, json_label: int | BadLabel | None) -> int:
        """Return the label of a sample.

        Args:
            cls: content of its `.cls` member, if it has one.
            json_label: what `from_json` found, if it has a `.json` member.

        Returns:
            The label, or -1 for a sample without one.

        Raises:
            BadLabel: it has none, but should, or one that is no label.
        """
        if self.cls and cls is not None:
            return self._checked(".cls", cls.decode("ascii", "replace"))
        if isinstance(json_label, BadLabel):
            raise json_label
        if json_label is not None and json_label != UNLABELLED:
            return json_label
        if self.required:
            raise BadLabel(f"has no {'.cls' if self.cls else f'field {self.fields[0]} in a .json'} member")
        return UNLABELLED

    def from_json(self, data: bytes) -> int | BadLabel:
        """Return the label in a `.json` member, -1 when it has no such field, or why that holds no label."""
        try:
            fields = json.loads(data)
        except (ValueError, RecursionError):
            return BadLabel("has a .json member that is no JSON")
        values = [fields[name] for name in self.fields if name in fields] if isinstance(fields, dict) else []
        if not values or values[0] is None:
            return UNLABELLED
        try:
            return self._checked("label in its .json", values[0])
        except BadLabel as error:
            return error

    def _checked(self, what: str, value: object) -> int:
        if isinstance(value, str) and len(value) <= MAX_CLS and value.strip().isdecimal() and value.isascii():
            value = int(value)
        if not isinstance(value, int) or isinstance(value, bool):
            raise BadLabel(f"has a {what} that is no integer from 0 on ({str(value)[:20]!r})")
        if not 0 <= value <= _MAX_LABEL:
            raise BadLabel(f"has a {what} that is not in 0 .. {_MAX_LABEL} ({str(value)[:20]})")
        if self.num_classes is not None and value >= self.num_classes:
            raise BadLabel(f"has the label {value}, but --classes names {self.num_classes} classes only")
        if self.num_classes is None and value >= _MAX_UNNAMED:
            raise BadLabel(f"has the label {value}, which is too large without --classes FILE")
        return value


def label_rule(option: str, num_classes: int | None) -> LabelRule:
    """Read the option `--labels`: auto, cls, json:FIELD or none.

    auto takes the `.cls` member of a sample, else the field `label` or `cls` of its `.json` member, else no label.

    Raises:
        UserError: it is none of these.
    """
    if option == "auto":
        return LabelRule(True, _AUTO_FIELDS, False, num_classes)
    if option == "cls":
        return LabelRule(True, (), True, num_classes)
    if option == "none":
        return LabelRule(False, (), False, num_classes)
    if option.startswith("json:") and len(option) > len("json:"):
        return LabelRule(False, (option.removeprefix("json:"),), True, num_classes)
    raise UserError(f"--labels must be auto, cls, none, or json:FIELD such as json:label, got {option!r}")
