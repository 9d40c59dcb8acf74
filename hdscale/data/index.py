"""The index of a split, and reading samples by it."""

from __future__ import annotations

import os
import tarfile
import zlib
from collections import OrderedDict
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from hdscale.data.manifest import Manifest, index_path, read_manifest
from hdscale.data.pictures import BadPicture
from hdscale.errors import UserError
from hdscale.hashing import file_digest
from hdscale.staging import staged

INDEX_DTYPE = np.dtype(
    [
        ("shard", "<u4"),  # place in the manifest's list of shards; rising
        ("offset", "<u8"),  # of the picture's bytes in the tar file
        ("size", "<u4"),  # of the picture's bytes
        ("label", "<i4"),
        ("width", "<u4"),  # of the stored picture, in pixels
        ("height", "<u4"),
        ("crc32", "<u4"),  # of the picture's bytes
    ]
)
"""One record per sample, 32 bytes; its row is the sample's id."""

_OPEN_FILES = 128
_MAKE_AGAIN = (
    "make the shards again in an empty folder with data_tools/make_shards.py (index tars of others again with "
    "data_tools/index_shards.py), or copy them again"
)


def write_index(folder: Path, split: str, index: np.ndarray) -> str:
    """Write SPLIT.index.npy, (n,) INDEX_DTYPE, and return its sha256."""
    path = index_path(folder, split)
    with staged(path) as temporary, temporary.open("wb") as file:
        np.save(file, index, allow_pickle=False)
    return file_digest(path)


def open_shards(folder: Path, split: str) -> ShardSet:
    """Open a split, after checking that its files are those the index was made for.

    Raises:
        UserError: there are no shards, or a file changed since.
    """
    manifest = read_manifest(folder, split)
    path = index_path(folder, split)
    if not path.is_file() or file_digest(path) != manifest.index_digest:
        state = "changed since the manifest was made" if path.is_file() else "is missing"
        raise UserError(f"{path} {state}: {_MAKE_AGAIN}")
    shards = ShardSet(folder, manifest)
    _check_files(shards)
    return shards


def _check_files(shards: ShardSet) -> None:
    """Compare every shard's size, and the tar headers of its first and last picture, with manifest and index."""
    last_row = -1
    for number, entry in enumerate(shards.manifest.shards):
        path = shards.folder / entry.name
        if not path.is_file():
            raise UserError(f"{path} is missing, but {shards.split}.manifest.json lists it: {_MAKE_AGAIN}")
        if path.stat().st_size != entry.bytes:
            raise UserError(
                f"{path} changed since the index was made ({path.stat().st_size} bytes, not {entry.bytes}): "
                f"{_MAKE_AGAIN}"
            )
        first_row, last_row = last_row + 1, last_row + entry.samples
        for row in {first_row, last_row}:
            assert shards.index[row]["shard"] == number, f"manifest and index disagree about {entry.name}"
            try:
                changed = shards.member_name(row) is None
            except OSError as error:
                raise UserError(f"{path} cannot be read ({error.strerror}): mend that, or copy it again") from error
            if changed:
                raise UserError(
                    f"{path} changed since the index was made (sample {row} does not start where the index says): "
                    f"{_MAKE_AGAIN}"
                )


class ShardSet:
    """The samples of one split.

    May be forked and pickled: reads name their offset, so processes do not disturb each other. Not for several threads.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        """Map the index into memory; `open_shards` also checks the files."""
        self.folder = folder
        self.manifest = manifest
        self.index: np.ndarray = np.load(index_path(folder, manifest.split), mmap_mode="r", allow_pickle=False)
        assert self.index.dtype == INDEX_DTYPE
        self._descriptors: OrderedDict[int, int] = OrderedDict()

    @property
    def split(self) -> str:
        """Name of the split."""
        return self.manifest.split

    @property
    def num_samples(self) -> int:
        """Number of samples; ids are 0 .. num_samples - 1."""
        return len(self.index)

    @property
    def digest(self) -> str:
        """Digest of the index, which stands for the data in fingerprints."""
        return self.manifest.index_digest

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names by label."""
        return self.manifest.classes

    def prefetch(self, sample_ids: np.ndarray) -> None:
        """Let the kernel fetch the bytes of pictures that will be read soon, all at once, while others are decoded.

        A shard that cannot be opened is passed over: `read` tells.
        """
        if not hasattr(os, "posix_fadvise"):
            return  # macOS
        for shard, offset, size in self.index[sample_ids][["shard", "offset", "size"]].tolist():
            with suppress(OSError):
                os.posix_fadvise(self._descriptor(shard), offset, size, os.POSIX_FADV_WILLNEED)

    def read(self, sample_id: int) -> bytes:
        """Return the stored bytes of a picture.

        Raises:
            BadPicture: they cannot be read, or are not the bytes that the index was made for.
        """
        record = self.index[sample_id]
        try:
            data = os.pread(self._descriptor(int(record["shard"])), int(record["size"]), int(record["offset"]))
        except OSError as error:
            raise BadPicture(f"cannot be read ({error.strerror})") from error
        if zlib.crc32(data) != int(record["crc32"]):
            raise BadPicture("is damaged (wrong CRC32)")
        return data

    def locate(self, sample_id: int) -> tuple[str, str]:
        """Name a sample for a message: its shard and, where the shard still tells, its name there."""
        record = self.index[sample_id]
        try:
            name = self.member_name(sample_id)
        except OSError:
            name = None
        return self.manifest.shards[int(record["shard"])].name, name or f"byte {int(record['offset'])}"

    def member_name(self, sample_id: int) -> str | None:
        """Return the picture's name in its tar file, or None when no header of that size stands before its bytes.

        Raises:
            OSError: the shard cannot be read.
        """
        record = self.index[sample_id]
        header_start = int(record["offset"]) - tarfile.BLOCKSIZE
        header = os.pread(self._descriptor(int(record["shard"])), tarfile.BLOCKSIZE, header_start)
        try:
            member = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
        except tarfile.HeaderError:
            return None
        return member.name if member.size == int(record["size"]) else None

    def close(self) -> None:
        """Close the tar files; the next read opens them again."""
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])

    def _descriptor(self, shard: int) -> int:
        """Return an open descriptor of a shard, closing the one that was not used for longest."""
        if shard not in self._descriptors:
            if len(self._descriptors) >= _OPEN_FILES:
                os.close(self._descriptors.popitem(last=False)[1])
            self._descriptors[shard] = os.open(self.folder / self.manifest.shards[shard].name, os.O_RDONLY)
        self._descriptors.move_to_end(shard)
        return self._descriptors[shard]

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder, "manifest": self.manifest}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["folder"], state["manifest"])

    def __del__(self) -> None:
        self.close()


UNLABELLED = -1


def require_labels(shards: ShardSet, purpose: str) -> None:
    """Raise a UserError unless all samples of a split have a label; `purpose` says what needs them."""
    count = int((shards.index["label"] == UNLABELLED).sum())
    if count:
        raise UserError(
            f"{purpose} needs labels, but {count} of {shards.num_samples} samples of split {shards.split} in "
            f"{shards.folder} have none: index them again with data_tools/index_shards.py --labels cls or json:FIELD, "
            "which leaves such samples out"
        )
