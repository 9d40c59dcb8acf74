"""Splits that are made shard by shard: an interrupted run leaves nothing half-written, and the next one continues.

Finished shards are recorded in a folder beside them, whose first file says with which settings the split was begun.
Index and manifest come last, and with them the folder goes.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from hdscale.data.index import INDEX_DTYPE, write_index
from hdscale.data.manifest import Manifest, ShardEntry, Skipped, manifest_path, read_manifest, write_manifest
from hdscale.shards.workers import in_processes
from hdscale.staging import create_folder, remove_leftovers, staged

_MADE_BY = "made_by.json"

Settings = dict[str, str | int | float | None]
"""Settings of the tool that makes a split, as the manifest records them."""

_Task = TypeVar("_Task")


class ShardRecord(NamedTuple):
    """What is known of one finished shard: a JSON object, and beside it the shard's rows of the index."""

    path: Path

    @property
    def rows(self) -> Path:
        """Where the rows are: (samples,) INDEX_DTYPE, whose field `shard` is not set yet."""
        return self.path.with_suffix(".npy")

    def read(self) -> dict[str, Any] | None:
        """Return the JSON object, or None when the shard is not finished."""
        return json.loads(self.path.read_text(encoding="utf-8")) if self.path.is_file() else None

    def write(self, values: dict[str, Any], rows: np.ndarray) -> None:
        """Record a shard; its rows come first, since the JSON object says that they are there."""
        remove_leftovers(self.path.parent, f"{self.path.stem}.")
        with staged(self.rows) as temporary, temporary.open("wb") as file:
            np.save(file, rows, allow_pickle=False)
        _write_json(self.path, values)


class SplitRecords(NamedTuple):
    """The records of a split that is being made."""

    folder: Path  # holds the shards, and in the end their index and manifest
    split: str
    suffix: str  # of the folder of records: SPLIT.making or SPLIT.indexing
    made_by: Settings  # what the split is made with now

    @property
    def path(self) -> Path:
        """Where finished shards are recorded until all of them are."""
        return self.folder / f"{self.split}.{self.suffix}"

    def of_shard(self, number: int) -> ShardRecord:
        """Return the record of a shard, written or not."""
        return ShardRecord(self.path / f"{number:06d}.json")

    def begin(self) -> Settings:
        """Create the folder of records, unless an interrupted run or another machine has; return what it says."""
        if not (self.path / _MADE_BY).is_file():
            self.folder.mkdir(parents=True, exist_ok=True)
            remove_leftovers(self.path, _MADE_BY)
            create_folder(self.path, lambda folder: _write_json(folder / _MADE_BY, self.made_by))
        return self.begun_with()

    def begun_with(self) -> Settings:
        """Return the settings with which the split was begun."""
        return json.loads((self.path / _MADE_BY).read_text(encoding="utf-8"))

    def finished(self) -> Manifest | None:
        """Return the manifest of a finished split, whatever it was made with; None when it is not finished."""
        there = manifest_path(self.folder, self.split).is_file()
        return read_manifest(self.folder, self.split) if there else None

    def finish(
        self,
        shards: Sequence[ShardEntry],
        index: np.ndarray,
        *,
        classes: tuple[str, ...],
        skipped: Sequence[Skipped],
        made_by: Settings,
    ) -> Manifest:
        """Write the index (n,) and the manifest, whose fields the other arguments are, and remove the records."""
        for name in ("index", "manifest", self.suffix):
            remove_leftovers(self.folder, f"{self.split}.{name}")
        manifest = Manifest(
            split=self.split,
            num_samples=len(index),
            classes=classes,
            shards=tuple(shards),
            index_digest=write_index(self.folder, self.split, index),
            skipped=tuple(skipped),
            made_by=made_by,
        )
        write_manifest(self.folder, manifest)
        shutil.rmtree(self.path)
        return manifest

    def remove(self) -> None:
        """Remove the records that a run left which was killed after the manifest."""
        shutil.rmtree(self.path, ignore_errors=True)


def run_missing(
    tasks: Iterable[_Task], finished: Callable[[_Task], int | None], make: Callable[[_Task], int], workers: int
) -> Iterator[int]:
    """Make the shards that are missing, in worker processes.

    Args:
        tasks: one per shard; pickled.
        finished: returns the number of pictures of a finished shard, None for a missing one.
        make: makes one shard, records it, and returns that number.
        workers: processes; 0 or 1 works in this one.

    Yields:
        The number of every shard: at once of those that are finished, of others as soon as they are.
    """
    missing = []
    for task in tasks:
        count = finished(task)
        if count is None:
            missing.append(task)
        else:
            yield count
    yield from in_processes(make, missing, workers)


def join_shards(shards: Iterable[tuple[ShardEntry, ShardRecord]]) -> tuple[list[ShardEntry], np.ndarray]:
    """Return the entries of the shards that have samples, and the index of all, (n,) INDEX_DTYPE."""
    entries, parts = [], [np.zeros(0, dtype=INDEX_DTYPE)]
    for entry, record in shards:
        if entry.samples:
            rows = np.load(record.rows, allow_pickle=False)
            rows["shard"] = len(entries)
            entries.append(entry)
            parts.append(rows)
    return entries, np.concatenate(parts)


def _write_json(path: Path, value: Any) -> None:
    with staged(path) as temporary:
        temporary.write_text(json.dumps(value), encoding="utf-8")
