"""Pictures that a CSV file lists."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from hdscale.errors import UserError
from hdscale.shards.sources.base import Listing, read_file
from hdscale.shards.sources.classes import choose_classes
from hdscale.shards.sources.stored_picture import Picture, Resize, stored_picture

_COLUMNS = ("path", "label")
_MAX_DIGITS = 20  # of a label that is a number


class CsvList:
    """A CSV file with the columns path and label; others are ignored.

    Labels are class names, numbered in sorted order, or all of them are integers 0 .. n - 1, which stay as they are.
    """

    name = "csv"

    def __init__(
        self, path: Path, root: Path | None = None, only: tuple[str, ...] | None = None, resize: Resize | None = None
    ) -> None:
        """Name the source.

        Args:
            path: the CSV file.
            root: folder of relative paths; None: the file's own.
            only: the labels to take, in the order of their numbers; None: all.
            resize: how larger pictures are made smaller.
        """
        self.path = path
        self.root = path.parent if root is None else root
        self.only = only
        self.resize = resize

    def listing(self) -> Listing:
        """List the pictures, sorted by path; whether the files are there is seen when they are read.

        Raises:
            UserError: the file cannot be read or a line breaks a rule.
        """
        labels: dict[str, str] = {}
        lines: dict[str, int] = {}
        for line, path, label in self._rows():
            if path in lines:
                raise self._error(line, f"path {path} is on line {lines[path]} already: remove one of them")
            labels[path], lines[path] = label, line
        if not labels:
            raise UserError(f"--input {self.path} lists no pictures: write one path,label a line below the header")
        present = set(labels.values())
        available = sorted(present) if self.only is not None else self._numbered(present)
        classes, left_out = choose_classes(available, self.only, f"--input {self.path}")
        number = {name: place for place, name in enumerate(classes)}
        names = sorted(path for path, label in labels.items() if label in number)
        numbers = np.array([number[labels[name]] for name in names], dtype=np.int32)
        return Listing(tuple(classes), names, numbers, left_out)

    def read(self, name: str, place: None = None) -> Picture:
        """Read the file of this name, checked and ready to be stored.

        Raises:
            BadPicture: it cannot be decoded.
            OSError: it cannot be read, or is no regular file.
        """
        del place
        return stored_picture(read_file(self.root / name), self.resize)

    def _rows(self) -> Iterator[tuple[int, str, str]]:
        """Yield line number, path and label."""
        line = 1
        try:
            with self.path.open(encoding="utf-8-sig", newline="") as file:
                reader = csv.reader(file, skipinitialspace=True, strict=True)
                header = [name.strip() for name in next(reader, [])]
                if any(header.count(name) != 1 for name in _COLUMNS):
                    raise self._error(1, f"must name the columns path and label, got {','.join(header)!r}")
                columns = [header.index(name) for name in _COLUMNS]
                for row in reader:
                    line = reader.line_num
                    if not row:
                        continue
                    path, label = (row[column].strip() if column < len(row) else "" for column in columns)
                    if "\0" in path:
                        raise self._error(line, "has a zero byte in its path: no file is called so")
                    if not path or not label:
                        raise self._error(line, f"has no {'label' if path else 'path'}: write path,label")
                    yield line, path, label
        except OSError as error:
            raise UserError(f"--input {self.path} cannot be read ({error.strerror}): name a CSV file") from None
        except UnicodeDecodeError:
            raise self._error(line, "or one soon after is not UTF-8 text: save the file as UTF-8") from None
        except csv.Error as error:
            raise self._error(line + 1, f"is no CSV ({error}): mend it") from None

    def _numbered(self, labels: set[str]) -> list[str]:
        """Sort labels: by number if all are integers, else as names."""
        if not all(_is_integer(label) for label in labels):
            return sorted(labels)
        numbers = sorted(map(int, labels))
        if numbers != list(range(len(numbers))):
            raise UserError(
                f"--input {self.path}: integer labels must be 0 .. n - 1 without gaps, got {len(numbers)} from "
                f"{numbers[0]} to {numbers[-1]}: renumber them, or list them in an --only-classes file in their order"
            )
        return [str(number) for number in numbers]

    def _error(self, line: int, problem: str) -> UserError:
        return UserError(f"--input {self.path}, line {line}: {problem}")


def _is_integer(label: str) -> bool:
    """Say whether a label is an integer as Python writes it: 007 is a name."""
    short = len(label) <= _MAX_DIGITS  # Python refuses to read an integer of thousands of digits
    return short and label.isascii() and label.removeprefix("-").isdecimal() and str(int(label)) == label
