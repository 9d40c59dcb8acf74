"""What a source of pictures is: a listing, and the bytes of each picture."""

from __future__ import annotations

import hashlib
import os
import re
import stat
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from hdscale.shards.sources.packed_names import PackedNames
from hdscale.shards.sources.stored_picture import Picture

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp")
"""What the names of pictures end with, in any case; their content decides how they are decoded."""


class Listing(NamedTuple):
    """All pictures of a source, in an order that depends on their names only."""

    classes: tuple[str, ...]
    names: list[str] | PackedNames  # unique in the source; for files the path below its folder
    labels: np.ndarray  # (n,) int32
    left_out: list[str]  # what was seen and not taken, in words
    places: np.ndarray | None = None  # (n,) where the pictures are, if their names do not tell
    damaged: tuple[str, ...] = ()  # what is broken and ought to be mended, in words

    def digest(self) -> str:
        """Return the sha256 of classes, names and labels."""
        digest = hashlib.sha256("\n".join(self.classes).encode(errors="surrogateescape"))
        for name, label in zip(self.names, self.labels.tolist(), strict=True):
            digest.update(f"\0{label} {name}".encode(errors="surrogateescape"))
        return digest.hexdigest()


class Source(Protocol):
    """Lists pictures cheaply and reads one at a time; must be picklable."""

    name: str

    def listing(self) -> Listing:
        """Name all pictures."""
        ...

    def read(self, name: str, place: Any) -> Picture:
        """Read one picture, checked and ready to be stored; its place is the listing's, or None.

        Raises:
            BadPicture: it cannot be decoded.
            OSError: it cannot be read.
        """
        ...


def sample_key(name: str) -> str:
    """Turn a picture's name into a WebDataset key: letters, digits, - and _, at most 80 characters, unique.

    A dot would end the key, and two files of one folder may differ by their extension only: hence the hash.
    """
    readable = re.sub(r"[^A-Za-z0-9_-]+", "_", os.path.splitext(name)[0])[:69]  # noqa: PTH122 (not a path)
    return f"{readable}-{hashlib.sha256(name.encode(errors='surrogateescape')).hexdigest()[:10]}"


def read_file(path: Path) -> bytes:
    """Return the bytes of a regular file.

    Raises:
        OSError: it cannot be read, or is something else: a pipe or a device may have no end.
    """
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb", buffering=0) as file:  # not to wait for a pipe
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError("it is no regular file")
        return file.readall()
