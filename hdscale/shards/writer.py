"""Writing shards so that an interrupted run leaves nothing half-written and the next one continues.

Every shard is a task of its own: written under a temporary name, flushed, renamed, then recorded in SPLIT.making/. The
index and the manifest come last. The same source and settings give the same bytes, whatever happened in between.
"""

from __future__ import annotations

import json
import re
import shutil
import tarfile
import zlib
from collections import Counter
from contextlib import contextmanager
from itertools import repeat
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from webdataset.writer import TarWriter

from hdscale.data.index import INDEX_DTYPE, open_shards, write_index
from hdscale.data.manifest import Manifest, ShardEntry, Skipped, manifest_path, read_manifest, write_manifest
from hdscale.data.pictures import BadPicture
from hdscale.errors import UserError
from hdscale.hashing import file_digest
from hdscale.shards.sources.base import Source, sample_key
from hdscale.shards.workers import in_processes
from hdscale.staging import create_folder, remove_leftovers, staged

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from hdscale.shards.sources.stored_picture import Picture
    from hdscale.shards.split import MachineShare

_MTIME = 0  # of every member, so that the bytes of a shard depend on its samples only
_OWNER = "hdscale"
_MADE_BY = "made_by.json"
_PARTS = "parts-"  # SPLIT.making/parts-4: an empty file, whose name says that four machines share the work
_NAMED_PARTS = 5


class SplitJob(NamedTuple):
    """One split to be written."""

    source: Source
    output: Path
    split: str
    classes: tuple[str, ...]
    names: Sequence[str]  # in the order in which they are written
    labels: np.ndarray  # (n,) of the same
    samples_per_shard: int
    made_by: dict[str, str | int | float | None]  # recorded in the manifest; a run that continues must have the same
    places: np.ndarray | None = None  # (n,) of the same, see `Listing`


class _ShardTask(NamedTuple):
    source: Source
    output: Path
    split: str
    number: int
    names: Sequence[str]
    labels: np.ndarray
    places: np.ndarray | None

    @property
    def record(self) -> Path:
        return _making_folder(self.output, self.split) / f"{self.number:06d}.json"

    @property
    def rows(self) -> Path:
        return self.record.with_suffix(".npy")

    @property
    def tar(self) -> Path:
        return self.output / f"{self.split}-{self.number:06d}.tar"


def write_split(job: SplitJob, workers: int, progress: Callable[[int], None]) -> Manifest:
    """Write a split, or what is missing of it.

    Args:
        job: what to write.
        workers: processes; 0 or 1 writes in this one.
        progress: called with the number of samples that have just been finished.

    Returns:
        The manifest, as it is on the disk.

    Raises:
        UserError: the folder holds something else, cannot be written to, or a picture cannot be read.
    """
    with _explained(job.output):
        if _is_complete(job):
            progress(len(job.names))
            return read_manifest(job.output, job.split)
        _begin(job)
        _write_shards(_tasks(job), workers, progress)
        return _finish(job)


def write_part(job: SplitJob, part: MachineShare, workers: int, progress: Callable[[int], None]) -> None:
    """Write the shards of one part, or what is missing of them; other machines may write other parts meanwhile.

    Raises:
        UserError: as `write_split`, or the split was begun in another number of parts.
    """
    with _explained(job.output):
        if _is_complete(job):
            progress(part_samples(job, part))
            return
        _begin(job)
        _note_parts(job, part.total)
        _write_shards(_tasks(job, part), workers, progress)


def finish_split(job: SplitJob) -> Manifest:
    """Write index and manifest of a split whose parts are written.

    Raises:
        UserError: shards are missing, or were made from something else.
    """
    with _explained(job.output):
        if _is_complete(job):
            return read_manifest(job.output, job.split)
        if not _making_folder(job.output, job.split).is_dir():
            raise UserError(f"--finish: {job.output} has no part of split {job.split}: run --part 1/n ... n/n first")
        _refuse_other_settings(job, _begun_with(job))
        _refuse_missing_shards(job)
        return _finish(job)


def part_samples(job: SplitJob, part: MachineShare) -> int:
    """Return how many samples a part deals with."""
    return sum(len(task.names) for task in _tasks(job, part))


@contextmanager
def _explained(output: Path) -> Iterator[None]:
    """Turn what the file system refuses into a UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"--output {output} cannot be written to ({error.strerror or error}): "
            "mend that, or choose another folder, and run again; finished shards are kept"
        ) from error


def _is_complete(job: SplitJob) -> bool:
    """Say whether an earlier run finished this very split; refuse if it is another one."""
    for path in sorted(job.output.glob("*.manifest.json")):
        classes = read_manifest(job.output, path.name.removesuffix(".manifest.json")).classes
        if path != manifest_path(job.output, job.split) and classes != job.classes:
            raise UserError(
                f"{path} lists other classes than the new split {job.split} has, so that labels would not agree: "
                "choose another --output, or give both splits the same class folders"
            )
    if not manifest_path(job.output, job.split).is_file():
        return False
    _refuse_other_settings(job, read_manifest(job.output, job.split).made_by)
    open_shards(job.output, job.split).close()  # raises when a file of it went missing since
    shutil.rmtree(_making_folder(job.output, job.split), ignore_errors=True)
    return True


def _begin(job: SplitJob) -> None:
    """Create the folders, or check that an interrupted run or another machine was writing the same split."""
    making = _making_folder(job.output, job.split)
    tars = job.output.glob(f"{job.split}-[0-9]*.tar")
    foreign = next((path for path in tars if re.fullmatch(r"[0-9]+", path.stem.removeprefix(f"{job.split}-"))), None)
    if not making.is_dir():  # asked after the glob: another machine makes this folder before its first shard
        if foreign is not None:
            raise UserError(
                f"{foreign} is there already and was not made by this run: choose another --output or --split"
            )
        job.output.mkdir(parents=True, exist_ok=True)
        create_folder(making, lambda folder: _write_json(folder / _MADE_BY, job.made_by))
    _refuse_other_settings(job, _begun_with(job))


def _begun_with(job: SplitJob) -> dict[str, Any]:
    return json.loads((_making_folder(job.output, job.split) / _MADE_BY).read_text(encoding="utf-8"))


def _note_parts(job: SplitJob, total: int) -> None:
    """Record the number of parts, so that `finish_split` can name those that are missing."""
    others = [number for number in _numbers_of_parts(job) if number != total]
    if others:
        raise UserError(
            f"--part: {job.output} was begun in {others[0]} parts, not {total}: give parts of {others[0]}, "
            "or no --part in order to write all that is missing on one machine"
        )
    (_making_folder(job.output, job.split) / f"{_PARTS}{total}").touch()


def _numbers_of_parts(job: SplitJob) -> list[int]:
    making = _making_folder(job.output, job.split)
    return sorted(int(path.name.removeprefix(_PARTS)) for path in making.glob(f"{_PARTS}*"))


def _refuse_missing_shards(job: SplitJob) -> None:
    tasks = _tasks(job)
    missing = [task.number for task in tasks if not _is_written(task)]
    if not missing:
        return
    whole = f"--finish: {len(missing)} of {len(tasks)} shards of split {job.split} are missing"
    parts = _numbers_of_parts(job)
    if not parts:
        raise UserError(f"{whole}: run without --finish until they are written")
    lacking = Counter(number % parts[0] + 1 for number in missing)
    named = ", ".join(f"{count} of part {part}/{parts[0]}" for part, count in sorted(lacking.items())[:_NAMED_PARTS])
    more = ", ..." if len(lacking) > _NAMED_PARTS else ""
    raise UserError(f"{whole} ({named}{more}): run these parts again, then --finish")


def _refuse_other_settings(job: SplitJob, before: dict[str, Any]) -> None:
    if before.get("tool") != job.made_by.get("tool"):
        raise UserError(
            f"{job.output} holds the split {job.split} of {before.get('tool')} already: choose another --output or "
            "--split"
        )
    for name in before | job.made_by:
        old, new = before.get(name), job.made_by.get(name)
        if old != new:
            flag = f"--{name.replace('_', '-')} {old}, not {new}"
            what = "other pictures or classes (--input, --only-classes)" if name == "listing" else flag
            raise UserError(
                f"{job.output} holds shards of split {job.split} made with {what}: "
                "choose another --output, or delete that folder"
            )


def _tasks(job: SplitJob, part: MachineShare | None = None) -> list[_ShardTask]:
    tasks = []
    for number, start in enumerate(range(0, len(job.names), job.samples_per_shard)):
        if part is None or part.owns(number):
            rows = slice(start, start + job.samples_per_shard)
            places = None if job.places is None else job.places[rows]
            task = _ShardTask(job.source, job.output, job.split, number, job.names[rows], job.labels[rows], places)
            tasks.append(task)
    return tasks


def _write_shards(tasks: list[_ShardTask], workers: int, progress: Callable[[int], None]) -> None:
    missing = []
    for task in tasks:
        if _is_written(task):
            progress(len(task.names))
        else:
            missing.append(task)
    for count in in_processes(_write_shard, missing, workers):
        progress(count)


def _is_written(task: _ShardTask) -> bool:
    if not task.record.is_file():
        return False
    entry = _read_record(task)[0]
    return not entry.samples or (task.tar.is_file() and task.tar.stat().st_size == entry.bytes)


def _write_shard(task: _ShardTask) -> int:
    """Write one shard and its record; return the number of pictures that were dealt with."""
    records, labels, skipped = [], [], []
    remove_leftovers(task.tar.parent, task.tar.name)
    remove_leftovers(task.record.parent, f"{task.record.stem}.")
    places = repeat(None, len(task.names)) if task.places is None else task.places
    with staged(task.tar) as temporary:
        with (
            temporary.open("wb") as file,
            TarWriter(file, user=_OWNER, group=_OWNER, mtime=_MTIME, encoder=False) as tar,
        ):
            for name, label, place in zip(task.names, task.labels.tolist(), places, strict=True):
                try:
                    picture = _read(task.source, name, place)
                except BadPicture as error:
                    skipped.append(Skipped(_as_text(name), str(error)))
                    continue
                tar.write({"__key__": sample_key(name), picture.extension: picture.data, "cls": str(label).encode()})
                records.append((len(picture.data), picture.width, picture.height, zlib.crc32(picture.data)))
                labels.append(label)
        offsets = list(_picture_offsets(temporary))
        size, digest = temporary.stat().st_size, file_digest(temporary)
    if not records:
        task.tar.unlink()  # every picture was skipped: some readers stumble over an empty tar file
    rows = np.zeros(len(records), dtype=INDEX_DTYPE)
    rows["offset"], rows["label"] = offsets, labels
    for column, name in enumerate(("size", "width", "height", "crc32")):
        rows[name] = [record[column] for record in records]
    with staged(task.rows) as path, path.open("wb") as file:
        np.save(file, rows, allow_pickle=False)
    entry = ShardEntry(name=task.tar.name, samples=len(records), bytes=size, sha256=digest)
    _write_json(task.record, {"entry": entry.model_dump(), "skipped": skipped})
    return len(task.names)


def _read(source: Source, name: str, place: np.void | None) -> Picture:
    try:
        return source.read(name, place)
    except OSError as error:
        raise UserError(
            f"{name} cannot be read ({error.strerror or error}): mend it and run again, finished shards are kept; "
            "an empty file in its place is left out and listed, but without it the shards would be others"
        ) from error


def _as_text(name: str) -> str:
    """Return a name as the manifest may hold it: bytes that are no UTF-8 as escapes."""
    return name.encode(errors="surrogateescape").decode(errors="backslashreplace")


def _picture_offsets(path: Path) -> Iterator[int]:
    """Yield where each picture's bytes start, as the tar file itself says."""
    with tarfile.open(path, "r:") as tar:
        for member in tar:
            if not member.name.endswith(".cls"):
                yield member.offset_data


def _read_record(task: _ShardTask) -> tuple[ShardEntry, list[Skipped]]:
    record = json.loads(task.record.read_text(encoding="utf-8"))
    return ShardEntry(**record["entry"]), [Skipped(*item) for item in record["skipped"]]


def _finish(job: SplitJob) -> Manifest:
    """Join the records of all shards to index and manifest."""
    remove_leftovers(job.output, f"{job.split}.")
    entries, parts, skipped = [], [], []
    for task in _tasks(job):
        entry, skipped_here = _read_record(task)
        skipped += skipped_here
        if entry.samples:
            rows = np.load(task.rows, allow_pickle=False)
            rows["shard"] = len(entries)
            entries.append(entry)
            parts.append(rows)
    if not parts:
        raise UserError(
            f"split {job.split}: none of the {len(skipped)} pictures can be decoded (the first, {skipped[0].name}, "
            f"{skipped[0].reason}): check --input, and delete {job.output} before the next run"
        )
    index = np.concatenate(parts)
    manifest = Manifest(
        split=job.split,
        num_samples=len(index),
        classes=job.classes,
        shards=tuple(entries),
        index_digest=write_index(job.output, job.split, index),
        skipped=tuple(skipped),
        made_by=job.made_by,
    )
    write_manifest(job.output, manifest)
    shutil.rmtree(_making_folder(job.output, job.split))
    return manifest


def _write_json(path: Path, value: Any) -> None:
    with staged(path) as temporary:
        temporary.write_text(json.dumps(value), encoding="utf-8")


def _making_folder(output: Path, split: str) -> Path:
    return output / f"{split}.making"
