"""Pictures in folders, one folder per class."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from hdscale.errors import UserError
from hdscale.shards.sources.base import EXTENSIONS, Listing, read_file
from hdscale.shards.sources.classes import choose_classes
from hdscale.shards.sources.stored_picture import Picture, Resize, stored_picture


class ImageFolder:
    """Folders of pictures, one per class; folders inside them belong to the class."""

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
        """Read the file of this name, checked and ready to be stored.

        Raises:
            BadPicture: it cannot be decoded.
            OSError: it cannot be read, or is no regular file.
        """
        del place
        return stored_picture(read_file(self.folder / name), self.resize)


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
