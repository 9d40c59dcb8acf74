"""ImageNet-21K as it is distributed: one tar of JPEGs per class, alone or in one outer tar; nothing is extracted."""

from __future__ import annotations

import os
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np

from hdscale.errors import UserError
from hdscale.shards.sources.base import EXTENSIONS, Listing
from hdscale.shards.sources.classes import choose_classes
from hdscale.shards.sources.packed_names import PackedNames
from hdscale.shards.sources.stored_picture import Picture, Resize, stored_picture
from hdscale.shards.tar_reader import CUT_FILE, FILE, TWO_SIZES, BadTar, TarReader, TrailingData

PLACE_DTYPE = np.dtype([("offset", "<u8"), ("size", "<u4")])
"""Where a picture's bytes are in its file: the class's tar, or the outer one."""

_MAX_BYTES = 1 << 30  # larger members are no pictures
_FILES = (FILE, TWO_SIZES)  # the header of a file of more than 8 GiB has no room for its size


class _Tar(NamedTuple):
    """One class."""

    path: Path
    start: int  # offset in the file
    end: int


class SynsetTars:
    """A folder of tars, or a tar of tars, one per class: n01440764.tar holds the pictures of n01440764."""

    name = "synset-tars"

    def __init__(self, path: Path, only: tuple[str, ...] | None = None, resize: Resize | None = None) -> None:
        """Name the source.

        Args:
            path: the folder, or the outer tar.
            only: the classes to take, in the order of their labels; None: all, sorted.
            resize: how larger pictures are made smaller.
        """
        self.path = path
        self.only = only
        self.resize = resize

    def listing(self) -> Listing:
        """List the pictures by class and name; labels number the sorted tars, with and without pictures.

        Of a tar that is cut short the pictures before the cut are taken, and `damaged` names it: its class keeps its
        label, and the other tars are not lost for it.

        Raises:
            UserError: there are no tars, the outer tar is cut short, or there is no picture.
        """
        tars, left_out = self._tars()
        classes, others = choose_classes(sorted(tars), self.only, f"--input {self.path}")
        names, places, counts, ignored, damaged = PackedNames(), [], [], 0, []
        for class_name in classes:
            found, ignored_here, damage = _pictures_in(tars[class_name])
            ignored += ignored_here
            if damage:
                damaged.append(
                    f"{class_name}.tar is cut short ({damage}): the {len(found)} pictures before the cut are taken; "
                    "copy it again for the rest"
                )
            elif not found:
                left_out.append(f"class {class_name}, whose tar holds no pictures")
            ordered = sorted(found)
            names.extend(f"{class_name}/{name}" for name in ordered)
            places.append(np.array([found[name] for name in ordered], dtype=PLACE_DTYPE))
            counts.append(len(found))
        if not names:
            raise UserError(
                f"--input {self.path}: none of {len(classes)} tars holds {', '.join(EXTENSIONS)} files: "
                f"give uncompressed tars of pictures{'; ' + damaged[0] if damaged else ''}"
            )
        if ignored:
            left_out.append(f"{ignored} tar members that are no regular {', '.join(EXTENSIONS)} files with safe names")
        labels = np.repeat(np.arange(len(classes), dtype=np.int32), counts)
        return Listing(tuple(classes), names, labels, left_out + others, np.concatenate(places), tuple(damaged))

    def read(self, name: str, place: np.void) -> Picture:
        """Read the picture at this place of its tar, checked and ready to be stored.

        Raises:
            BadPicture: it cannot be decoded.
            OSError: it cannot be read, or ends before the picture does.
        """
        path = self.path / f"{name.partition('/')[0]}.tar" if self.path.is_dir() else self.path
        size = int(place["size"])
        with path.open("rb", buffering=0) as file:  # shuffled reads: keeping it open would save next to nothing
            data = os.pread(file.fileno(), size, int(place["offset"]))
        if len(data) != size:
            raise OSError(f"{path} is shorter than when the run began")
        return stored_picture(data, self.resize)

    def _tars(self) -> tuple[dict[str, _Tar], list[str]]:
        """Return the tars by class, and what was left out, in words."""
        if self.path.is_dir():
            files = [path for path in self.path.iterdir() if path.is_file() and not path.name.startswith(".")]
            tars = {path.stem: _Tar(path, 0, path.stat().st_size) for path in files if path.suffix == ".tar"}
            others = len(files) - len(tars)
        elif self.path.is_file():
            tars, others = self._tars_in_tar()
        else:
            raise UserError(f"--input {self.path} is neither a folder of tars nor a tar of tars: name one of them")
        if not tars:
            raise UserError(f"--input {self.path} holds no CLASS.tar: give a folder of tars, or a tar of tars")
        return tars, [f"{others} members of --input that are no .tar files"] if others else []

    def _tars_in_tar(self) -> tuple[dict[str, _Tar], int]:
        tars, others = {}, 0
        try:
            with TarReader(self.path) as outer:
                for member in outer.members():
                    name = PurePosixPath(member.name)
                    if member.kind not in _FILES or name.suffix != ".tar" or name.name.startswith("."):
                        others += member.kind in _FILES
                        continue
                    if name.stem in tars:
                        raise UserError(
                            f"--input {self.path} holds two {name.name}: each class needs one tar of its own"
                        )
                    tars[name.stem] = _Tar(self.path, member.offset, member.offset + member.size)
        except TrailingData:
            pass  # behind the last member
        except BadTar as error:
            raise UserError(
                f"--input {self.path} is no whole, uncompressed tar (it {error}), and which classes it lacks cannot be "
                "told: copy it again, or unpack it"
            ) from None
        return tars, others


def _pictures_in(tar: _Tar) -> tuple[dict[str, tuple[int, int]], int, str]:
    """Return offset and size of a tar's pictures by name, the number of other members, and how it is damaged."""
    found, ignored = {}, 0
    try:
        with TarReader(tar.path, start=tar.start, end=tar.end) as reader:
            for member in reader.members():
                name = (member.name.rstrip("/") if member.kind == "directory" else member.name).removeprefix("./")
                if member.kind == CUT_FILE or name.rpartition("/")[2].startswith("."):
                    continue  # hidden, as in folders
                wanted = member.kind in _FILES and member.size <= _MAX_BYTES and _is_picture_name(name)
                if wanted and name not in found:
                    found[name] = (tar.start + member.offset, member.size)
                else:
                    ignored += 1
    except TrailingData:
        pass  # behind the last member
    except BadTar as error:
        return found, ignored, f"it {error}"
    except OSError as error:
        raise UserError(f"{tar.path} cannot be read ({error.strerror or error}): mend it and run again") from error
    return found, ignored, ""


def _is_picture_name(name: str) -> bool:
    return name.lower().endswith(EXTENSIONS) and not name.startswith("/") and ".." not in name.split("/")
