"""SPLIT.manifest.json: what a folder of shards holds and how it was made."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, ValidationError

from hdscale.errors import UserError
from hdscale.staging import staged


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ShardEntry(_Frozen):
    """One tar file."""

    name: str
    samples: int
    bytes: int
    sha256: str


class Skipped(NamedTuple):
    """A picture of the source that is in no shard."""

    name: str
    reason: str


class Manifest(_Frozen):
    """A split of a data set in tar shards; sample ids are rows of its index, shard after shard."""

    format_version: Literal[1] = 1
    split: str
    num_samples: int
    classes: tuple[str, ...]
    """Names by label."""
    shards: tuple[ShardEntry, ...]
    index_digest: str
    """sha256 of SPLIT.index.npy: stands for the data in fingerprints."""
    skipped: tuple[Skipped, ...] = ()
    made_by: dict[str, str | int | float | None]
    """Settings of the tool that made the shards; running it again with others is refused."""


def manifest_path(folder: Path, split: str) -> Path:
    """Return where a split's manifest is."""
    return folder / f"{split}.manifest.json"


def index_path(folder: Path, split: str) -> Path:
    """Return where a split's index is."""
    return folder / f"{split}.index.npy"


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write a manifest: the last file of a split, whose presence says that the split is complete."""
    with staged(manifest_path(folder, manifest.split)) as path:
        path.write_text(manifest.model_dump_json(indent=1) + "\n", encoding="utf-8")


def read_manifest(folder: Path, split: str) -> Manifest:
    """Read a split's manifest.

    Raises:
        UserError: it is not there, or is not one of ours.
    """
    path = manifest_path(folder, split)
    try:
        content = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        splits = sorted(found.name.removesuffix(".manifest.json") for found in folder.glob("*.manifest.json"))
        there = f"has the splits {', '.join(splits)} only" if splits else "holds no shards"
        raise UserError(
            f"{folder} {there}, {path.name} is missing: set data.shards and data.split, or make them with `python "
            f"data_tools/make_shards.py --source imagefolder --input DIR --output {folder} --split {split}`"
        ) from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): mend that, or name another folder") from error
    try:
        return Manifest.model_validate_json(content)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"])) or "file"
        raise UserError(
            f"{path} is no manifest that this version reads ({field}: {first['msg']}): "
            "make the shards again in an empty folder with data_tools/make_shards.py"
        ) from None
