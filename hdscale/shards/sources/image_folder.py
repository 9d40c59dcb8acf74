"""Where pictures come from before they are in shards."""

from __future__ import annotations

import hashlib
import os
import re
import stat
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from PIL import Image

from hdscale.errors import UserError
from hdscale.shards.sources.classes import choose_classes
from hdscale.shards.sources.packed_names import PackedNames
from hdscale.shards.sources.stored_picture import Picture, Resize, png_bytes, stored_picture

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp")
"""Files of an image folder that are taken, in any case; their content decides how they are decoded."""


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


class ImageFolder:
    """Folders of pictures, one for each class; folders inside them belong to the class."""

    name = "imagefolder"

    def __init__(self, folder: Path, only: tuple[str, ...] | None = None, resize: Resize | None = None) -> None:
        """Name the source.

        Args:
            folder: holds the class folders.
            only: the classes to take, in the order of their labels; None: all with pictures, sorted.
            resize: how larger pictures are made smaller.
        """
        self.folder = folder
        self.only = only
        self.resize = resize

    def listing(self) -> Listing:
        """List the pictures by class and path; labels number the sorted class folders that hold pictures.

        Raises:
            UserError: there is no such folder, no class folder with a picture in it, or none of a class asked for.
            OSError: a folder cannot be read.
        """
        if not self.folder.is_dir():
            raise UserError(f"--input {self.folder} is not a folder: name the folder that holds the class folders")
        classes, names, labels, empty, others, loops = [], [], [], [], 0, []
        folders = (path.name for path in self.folder.iterdir() if path.is_dir() and not path.name.startswith("."))
        chosen, left_out = choose_classes(sorted(folders), self.only, f"--input {self.folder}")
        for class_name in chosen:
            found, ignored, leading_back = _pictures_below(self.folder / class_name)
            others += ignored
            loops += [f"{class_name}/{name}" for name in leading_back]
            if not found:
                empty.append(class_name)
                if self.only is None:
                    continue  # a class of the list keeps its number
            labels += [len(classes)] * len(found)
            classes.append(class_name)
            names += [f"{class_name}/{name}" for name in found]
        if not names:
            raise UserError(
                f"--input {self.folder} has no class folder with {', '.join(EXTENSIONS)} files in it: "
                "put the pictures into one folder a class"
            )
        left_out += [f"{others} files with other extensions than {', '.join(EXTENSIONS)}"] if others else []
        left_out += [f"link {name}, which leads back to a folder that it is in" for name in loops]
        left_out += [f"class folder {class_name}, without pictures" for class_name in empty]
        return Listing(tuple(classes), names, np.array(labels, dtype=np.int32), left_out)

    def read(self, name: str, place: None = None) -> Picture:
        """Read a file; see `stored_picture`."""
        del place
        return stored_picture(read_file(self.folder / name), self.resize)


class Digits:
    """The 1,797 scanned digits of 8 x 8 pixels that scikit-learn carries; needs no network."""

    name = "digits"

    def __init__(self) -> None:
        self._images: np.ndarray | None = None  # (n, 8, 8) uint8

    def listing(self) -> Listing:
        """Name the digits by their row."""
        labels = _load_digits()[1].astype(np.int32)
        names = [f"digit-{row:04d}" for row in range(len(labels))]
        return Listing(tuple(str(digit) for digit in range(10)), names, labels, [])

    def read(self, name: str, place: None = None) -> Picture:
        """Return a digit as an 8-bit grey PNG; its 17 levels are spread over 0 .. 255."""
        del place
        if self._images is None:
            self._images = np.round(_load_digits()[0] * (255 / 16)).astype(np.uint8)
        image = Image.fromarray(self._images[int(name.removeprefix("digit-"))])
        return Picture(png_bytes(image), "png", *image.size)


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


def _pictures_below(folder: Path) -> tuple[list[str], int, list[str]]:
    """Return the sorted paths of a folder's pictures below it, the number of other files, and links that lead back.

    Raises:
        OSError: a folder cannot be read; its pictures would be missing without a word.
    """
    found, others, loops = [], 0, []
    for parent, folders, files in os.walk(folder, followlinks=True, onerror=_refuse):
        visible_folders = [name for name in folders if not name.startswith(".")]
        back = [name for name in visible_folders if _leads_back(folder, Path(parent, name))]
        loops += [Path(parent, name).relative_to(folder).as_posix() for name in back]
        folders[:] = [name for name in visible_folders if name not in back]
        visible = [file for file in files if not file.startswith(".")]
        taken = [file for file in visible if file.lower().endswith(EXTENSIONS)]
        others += len(visible) - len(taken)
        below = Path(parent).relative_to(folder)
        found += [(below / file).as_posix() for file in taken] if below.parts else taken
    return sorted(found), others, sorted(loops)


def _refuse(error: OSError) -> None:
    raise error


def _leads_back(folder: Path, path: Path) -> bool:
    """Say whether a path below a folder is a link to what it is in: followed, it would give the same pictures again."""
    if not path.is_symlink():
        return False
    target, trail = path.resolve(), [path.parent, *path.parent.parents]
    return any(parent.resolve().is_relative_to(target) for parent in trail if parent.is_relative_to(folder))


def _load_digits() -> tuple[np.ndarray, np.ndarray]:
    """Return images (n, 8, 8) float64 with levels 0 .. 16, and labels (n,)."""
    from sklearn.datasets import load_digits  # takes a second to import, and only the demo needs it

    digits = load_digits()
    return digits.images, digits.target  # pyright: ignore[reportAttributeAccessIssue]
