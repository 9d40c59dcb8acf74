"""Which classes are taken, in which order, and what they are called."""

from __future__ import annotations

import re
from pathlib import Path

from hdscale.errors import UserError
from hdscale.shards.sources.packed_names import is_text

_NAMED = 5  # missing classes that a message names


def read_class_list(path: Path) -> tuple[str, ...]:
    """Read the file of --only-classes, one class name per line; blank lines and # comments are ignored.

    Raises:
        UserError: the file cannot be read, names a class twice, or names none.
    """
    seen: dict[str, int] = {}
    for number, line in enumerate(_read_lines("--only-classes", path, "name a file, one class a line"), 1):
        name = re.split(r"(?:^|\s)#", line, maxsplit=1)[0].strip()
        if name in seen:
            raise UserError(f"--only-classes {path}, line {number}: {name} is on line {seen[name]} already: remove one")
        if name:
            seen[name] = number
    if not seen:
        raise UserError(f"--only-classes {path} names no class: write one name a line")
    return tuple(seen)


def choose_classes(available: list[str], only: tuple[str, ...] | None, where: str) -> tuple[list[str], list[str]]:
    """Choose classes of a source.

    Args:
        available: the classes it has, sorted.
        only: those to take, in the order of their labels; None: all.
        where: the source, for messages.

    Returns:
        The classes by label, and what was left out, in words.

    Raises:
        UserError: the source lacks one, or has one whose name is no text.
    """
    if only is None:
        for name in available:
            if not is_text(name):
                raise UserError(f"{where} has the class {name!r}, whose name is no UTF-8: rename it")
        return available, []
    missing = sorted(set(only).difference(available))
    if missing:
        named = ", ".join(missing[:_NAMED]) + (", ..." if len(missing) > _NAMED else "")
        raise UserError(
            f"--only-classes names {len(missing)} of {len(only)} classes that {where} lacks ({named}): "
            "remove them from the list, or add their pictures"
        )
    others = len(available) - len(only)
    return list(only), [f"{others} classes that --only-classes does not name"] if others else []


def read_classes(path: Path) -> tuple[str, ...]:
    """Read the file of --classes, one class name per line, in the order of the labels.

    Raises:
        UserError: it cannot be read, or a line is empty or there twice.
    """
    names = tuple(_read_lines("--classes", path, "give a text file, one class name a line"))
    if not names:
        raise UserError(f"--classes {path} is empty: give one class name a line")
    first_line: dict[str, int] = {}
    for line, name in enumerate(names, 1):
        if not name.strip() or first_line.setdefault(name, line) != line:
            what = f"repeats the name {name!r} of line {first_line[name]}" if name.strip() else "is empty"
            raise UserError(f"--classes {path}: line {line} {what}; give one class name a line, in order of the labels")
    return names


def _read_lines(option: str, path: Path, way_out: str) -> list[str]:
    try:
        return path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise UserError(f"{option} {path} cannot be read ({reason}): {way_out}") from None
