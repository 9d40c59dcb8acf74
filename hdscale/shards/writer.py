"""Writing shards so that an interrupted run leaves nothing half-written and the next one continues.

Every shard is a task of its own: written under a temporary name, flushed, renamed, then recorded in SPLIT.making/. The
index and the manifest come last. The same source and settings give the same bytes, whatever happened in between.
"""

from __future__ import annotations

import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import repeat
from pathlib import Path
from typing import NamedTuple

import numpy as np
from webdataset.writer import TarWriter

from hdscale.data.index import INDEX_DTYPE, open_shards
from hdscale.data.manifest import Manifest, ShardEntry, Skipped, manifest_path, read_manifest
from hdscale.data.pictures import BadPicture
from hdscale.errors import UserError
from hdscale.hashing import file_digest
from hdscale.shards.resumable import Settings, ShardRecord, SplitRecords, join_shards, run_missing
from hdscale.shards.sources.base import Source, sample_key
from hdscale.shards.sources.stored_picture import Picture
from hdscale.shards.split import MachineShare
from hdscale.shards.tar_reader import TarReader
from hdscale.staging import remove_leftovers, staged

_MTIME = 0  # of every member, so that the bytes of a shard depend on its samples only
_OWNER = "hdscale"
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
    made_by: Settings  # recorded in the manifest; a run that continues must have the same
    places: np.ndarray | None = None  # (n,) where the pictures are, if their names do not tell

    @property
    def records(self) -> SplitRecords:
        """Where finished shards are recorded until all of them are."""
        return SplitRecords(self.output, self.split, "making", self.made_by)


class _ShardTask(NamedTuple):
    source: Source
    number: int
    tar: Path
    record: ShardRecord
    names: Sequence[str]
    labels: np.ndarray
    places: np.ndarray | None


def write_split(job: SplitJob, workers: int, progress: Callable[[int], None]) -> Manifest:
    """Write a split, or what is missing of it.

    Args:
        job: what to write.
        workers: processes; 0 or 1 writes in this one.
        progress: called with the number of pictures that have just been written or skipped.

    Returns:
        The manifest, as it is on the disk.

    Raises:
        UserError: the folder holds something else, cannot be written to, or a picture cannot be read.
    """
    with _explained(job.output):
        manifest = _finished(job)
        if manifest is not None:
            progress(len(job.names))
            return manifest
        _begin(job)
        _write_shards(_tasks(job), workers, progress)
        return _finish(job)


def write_part(job: SplitJob, part: MachineShare, workers: int, progress: Callable[[int], None]) -> None:
    """Write the shards of one machine, or what is missing of them; others may write other parts meanwhile.

    Raises:
        UserError: for what `write_split` raises one, or the split was begun in another number of parts.
    """
    with _explained(job.output):
        if _finished(job) is not None:
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
        manifest = _finished(job)
        if manifest is not None:
            return manifest
        if not job.records.path.is_dir():
            raise UserError(f"--finish: {job.output} has no part of split {job.split}: run --part 1/n ... n/n first")
        _refuse_other_settings(job, job.records.begun_with())
        _refuse_missing_shards(job)
        return _finish(job)


def part_samples(job: SplitJob, part: MachineShare) -> int:
    """Return the number of pictures that one machine has to write."""
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


def _finished(job: SplitJob) -> Manifest | None:
    """Return the manifest when an earlier run finished this very split; refuse if it is another one."""
    for path in sorted(job.output.glob("*.manifest.json")):
        classes = read_manifest(job.output, path.name.removesuffix(".manifest.json")).classes
        if path != manifest_path(job.output, job.split) and classes != job.classes:
            raise UserError(
                f"{path} lists other classes than the new split {job.split} has, so that labels would not agree: "
                "choose another --output, or give both splits the same class folders"
            )
    manifest = job.records.finished()
    if manifest is not None:
        _refuse_other_settings(job, manifest.made_by)
        open_shards(job.output, job.split).close()  # raises when a file of it went missing since
        job.records.remove()
    return manifest


def _begin(job: SplitJob) -> None:
    """Create the folders, or check that an interrupted run or another machine was writing the same split."""
    tars = job.output.glob(f"{job.split}-[0-9]*.tar")
    foreign = next((path for path in tars if re.fullmatch(r"[0-9]+", path.stem.removeprefix(f"{job.split}-"))), None)
    # Asked after the glob: another machine makes the folder of records before its first shard.
    if foreign is not None and not job.records.path.is_dir():
        raise UserError(f"{foreign} is there already and was not made by this run: choose another --output or --split")
    _refuse_other_settings(job, job.records.begin())


def _note_parts(job: SplitJob, total: int) -> None:
    """Record the number of parts, so that `finish_split` can name those that are missing."""
    others = [number for number in _numbers_of_parts(job) if number != total]
    if others:
        raise UserError(
            f"--part: {job.output} was begun in {others[0]} parts, not {total}: give parts of {others[0]}, "
            "or no --part in order to write all that is missing on one machine"
        )
    (job.records.path / f"{_PARTS}{total}").touch()


def _numbers_of_parts(job: SplitJob) -> list[int]:
    return sorted(int(path.name.removeprefix(_PARTS)) for path in job.records.path.glob(f"{_PARTS}*"))


def _refuse_missing_shards(job: SplitJob) -> None:
    tasks = _tasks(job)
    missing = [task.number for task in tasks if _num_written(task) is None]
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


def _refuse_other_settings(job: SplitJob, before: Settings) -> None:
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
            tar, record = job.output / f"{job.split}-{number:06d}.tar", job.records.of_shard(number)
            tasks.append(_ShardTask(job.source, number, tar, record, job.names[rows], job.labels[rows], places))
    return tasks


def _write_shards(tasks: list[_ShardTask], workers: int, progress: Callable[[int], None]) -> None:
    for count in run_missing(tasks, _num_written, _write_shard, workers):
        progress(count)


def _num_written(task: _ShardTask) -> int | None:
    """Return how many pictures a finished shard has, skipped ones among them; None when it is missing or cut short."""
    record = task.record.read()
    if record is None:
        return None
    entry = ShardEntry(**record["entry"])
    whole = not entry.samples or (task.tar.is_file() and task.tar.stat().st_size == entry.bytes)
    return len(task.names) if whole else None


def _write_shard(task: _ShardTask) -> int:
    """Write one shard and its record; return the number of pictures that were written or skipped."""
    records, labels, skipped = [], [], []
    remove_leftovers(task.tar.parent, task.tar.name)
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
        with TarReader(temporary) as reader:  # where each picture's bytes start, as the tar file itself says
            offsets = [member.offset for member in reader.members() if not member.name.endswith(".cls")]
        size, digest = temporary.stat().st_size, file_digest(temporary)
    if not records:
        task.tar.unlink()  # every picture was skipped: some readers stumble over an empty tar file
    rows = np.zeros(len(records), dtype=INDEX_DTYPE)
    rows["offset"], rows["label"] = offsets, labels
    for column, name in enumerate(("size", "width", "height", "crc32")):
        rows[name] = [record[column] for record in records]
    entry = ShardEntry(name=task.tar.name, samples=len(records), bytes=size, sha256=digest)
    task.record.write({"entry": entry.model_dump(), "skipped": skipped}, rows)
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


def _finish(job: SplitJob) -> Manifest:
    """Join the records of all shards to index and manifest."""
    shards, skipped = [], []
    for task in _tasks(job):
        record = task.record.read()
        assert record is not None
        shards.append((ShardEntry(**record["entry"]), task.record))
        skipped += [Skipped(*item) for item in record["skipped"]]
    entries, index = join_shards(shards)
    if not entries:
        raise UserError(
            f"split {job.split}: none of the {len(skipped)} pictures can be decoded (the first, {skipped[0].name}, "
            f"{skipped[0].reason}): check --input, and delete {job.output} before the next run"
        )
    return job.records.finish(entries, index, classes=job.classes, skipped=skipped, made_by=job.made_by)
