"""Indexing tar shards that others made, such as img2dataset's, without rewriting a byte of them.

Every tar is a task of its own, read once from front to back, then recorded in SPLIT.indexing/. Report, index and
manifest come last. The same tars and settings give the same bytes, whatever happened in between.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from hdscale.data.index import INDEX_DTYPE, open_shards
from hdscale.data.manifest import Manifest, ShardEntry, Skipped, manifest_path
from hdscale.data.pictures import BadPicture
from hdscale.errors import UserError
from hdscale.hashing import file_digest, json_digest
from hdscale.shards.labels import MAX_CLS, MAX_JSON, BadLabel, LabelRule
from hdscale.shards.picture_size import picture_size
from hdscale.shards.resumable import Settings, ShardRecord, SplitRecords, join_shards, run_missing
from hdscale.shards.sources.base import EXTENSIONS
from hdscale.shards.sources.packed_names import is_text
from hdscale.shards.tar_reader import BadTar, Member, TarReader, TrailingData, printable
from hdscale.staging import staged

MAX_PICTURE = 64 << 20
"""Bytes; a larger picture is left out."""

_SKIPPED_IN_MANIFEST = 1000  # the report names them all


class IndexJob(NamedTuple):
    """One split to be indexed."""

    folder: Path
    split: str
    pattern: str  # of the names of its tar files
    rule: LabelRule
    classes: tuple[str, ...] | None  # names by label; None: the labels themselves, as text
    pictures: tuple[str, ...]  # what follows the first dot of a picture's name; empty: anything that ends as a picture
    made_by: Settings  # recorded in the manifest; a run that continues must have the same

    @property
    def records(self) -> SplitRecords:
        """Where finished tars are recorded until all of them are."""
        return SplitRecords(self.folder, self.split, "indexing", self.made_by)

    @property
    def report(self) -> Path:
        """Where all that was left out is named, one JSON object per line."""
        return self.folder / f"{self.split}.index-report.jsonl"


class _Task(NamedTuple):
    job: IndexJob
    record: ShardRecord
    name: str
    bytes: int
    mtime_ns: int

    @property
    def state(self) -> dict[str, Any]:
        """What the tar file was like when it was indexed."""
        return {"name": self.name, "bytes": self.bytes, "mtime_ns": self.mtime_ns}


class _Sample:
    """What the members of one key are."""

    __slots__ = ("cls", "json_label", "pictures", "problem")

    def __init__(self) -> None:
        self.pictures: list[tuple[str, tuple[int, ...] | str]] = []  # name, and a row without label or what is wrong
        self.cls: bytes | None = None
        self.json_label: int | BadLabel | None = None
        self.problem: str | None = None


def index_split(job: IndexJob, workers: int, progress: Callable[[int, str], object]) -> Manifest:
    """Index the tars of a split, or those that are missing.

    Args:
        job: what to index.
        workers: processes; 0 or 1 works in this one.
        progress: called with the number of tars that have just been read, and how many samples there are so far.

    Returns:
        The manifest, as it is on the disk.

    Raises:
        UserError: there are no tars or no samples in them, a tar changed or cannot be read, or the folder cannot be
            written to.
    """
    tasks = _tasks(job)
    try:
        manifest = _finished(job, tasks)
        if manifest is not None:
            progress(len(tasks), f"{manifest.num_samples} samples")
            return manifest
        way_out = f"to begin again, delete {job.records.path}, or give another --split"
        _refuse_other_settings(job, job.records.begin(), way_out)
        samples = 0
        for count in run_missing(tasks, _num_indexed, _index_tar, workers):
            samples += count
            progress(1, f"{samples} samples")
        return _finish(job, tasks)
    except OSError as error:
        raise UserError(
            f"--input {job.folder} cannot be written to ({error.strerror or error}): the index has its place beside "
            "the tars; mend that and run again, finished tars are kept"
        ) from error


def tar_names(job: IndexJob) -> list[str]:
    """Name the tars of a split, sorted.

    Raises:
        UserError: there are none.
    """
    try:
        if not job.folder.is_dir():
            raise UserError(f"--input {job.folder} is not a folder: name the folder that holds the tar files")
        names = sorted(
            path.name
            for path in job.folder.iterdir()
            if fnmatchcase(path.name, job.pattern) and not path.name.startswith(".") and path.is_file()
        )
    except OSError as error:
        raise UserError(
            f"--input {job.folder} cannot be listed ({error.strerror or error}): mend that, or name another folder"
        ) from error
    for name in names:
        if not is_text(name):
            raise UserError(f"--input {job.folder} has the tar {name!r}, whose name is no UTF-8: rename it")
    if not names:
        raise UserError(f"--input {job.folder} has no files {job.pattern}: name another folder, or give --pattern")
    return names


def _tasks(job: IndexJob) -> list[_Task]:
    light = job._replace(classes=None)  # each task is pickled, and its worker needs no names
    names = tar_names(job)
    states = [(job.folder / name).stat() for name in names]
    return [
        _Task(light, job.records.of_shard(number), name, state.st_size, state.st_mtime_ns)
        for number, (name, state) in enumerate(zip(names, states, strict=True))
    ]


def _listing(tasks: list[_Task]) -> str:
    return json_digest([[task.name, task.bytes] for task in tasks])


def _finished(job: IndexJob, tasks: list[_Task]) -> Manifest | None:
    """Return the manifest when an earlier run finished this very split; refuse if it is another one."""
    manifest = job.records.finished()
    if manifest is None:
        return None
    path, made_by = manifest_path(job.folder, job.split), manifest.made_by
    again = f"to index again, delete {path} first, or give another --split"
    if made_by.get("tool") != job.made_by["tool"]:
        raise UserError(f"{path} was written by {made_by.get('tool')}, not by {job.made_by['tool']}: {again}")
    _refuse_other_settings(job, made_by, again)
    open_shards(job.folder, job.split).close()  # raises when a listed tar changed its size
    if made_by.get("listing") != _listing(tasks):
        raise UserError(f"{job.folder} has other tars {job.pattern} than {path} was made for: {again}")
    indexed_ns, entries = path.stat().st_mtime_ns, {entry.name: entry for entry in manifest.shards}
    for task in tasks:
        if task.mtime_ns > indexed_ns and task.name in entries:
            tar = job.folder / task.name
            if file_digest(tar) != entries[task.name].sha256:
                raise UserError(f"{tar} changed since {path} was made: {again}")
    job.records.remove()
    return manifest


def _refuse_other_settings(job: IndexJob, before: Settings, way_out: str) -> None:
    for name, value in job.made_by.items():
        if before.get(name) != value:
            what = "with other --classes" if name == "classes" else f"with --{name} {before.get(name)}, not {value}"
            raise UserError(f"split {job.split} in {job.folder} was indexed {what}: {way_out}")


def _read_record(task: _Task) -> dict[str, Any] | None:
    """Return the record of a tar, or None when there is none of the tar as it is now."""
    record = task.record.read()
    return record if record is not None and record["state"] == task.state else None


def _num_indexed(task: _Task) -> int | None:
    record = _read_record(task)
    return None if record is None else record["samples"]


def _index_tar(task: _Task) -> int:
    """Index one tar and write its record; return the number of its samples."""
    path = task.job.folder / task.name
    try:
        with TarReader(path, hashed=True) as tar:
            rows, skipped = _walk(tar, task.job)
            digest, changed = tar.sha256(), tar.changed() or (tar.size, tar.mtime_ns) != (task.bytes, task.mtime_ns)
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror or error}): mend it and run again; finished tars are kept"
        ) from error
    except BadTar:
        changed, digest, rows, skipped = True, "", [], []
    if changed:
        raise UserError(f"{path} is being written to: wait for the end of that and run again; finished tars are kept")
    record = {"state": task.state, "samples": len(rows), "sha256": digest, "skipped": skipped}
    task.record.write(record, _as_index(rows))
    return len(rows)


def _as_index(rows: list[tuple[int, ...]]) -> np.ndarray:
    index = np.zeros(len(rows), dtype=INDEX_DTYPE)
    columns = np.array(rows, dtype=np.int64).reshape(-1, 6)
    for column, name in enumerate(("offset", "size", "width", "height", "crc32", "label")):
        index[name] = columns[:, column]
    return index


def _walk(tar: TarReader, job: IndexJob) -> tuple[list[tuple[int, ...]], list[tuple[str, str]]]:
    """Return the rows of a tar's samples, by offset, and the names and reasons of what is left out."""
    samples: dict[str, _Sample] = {}
    skipped: list[tuple[str, str]] = []
    key = None
    try:
        for member in tar.members():
            key, extension = _split_name(member.name)
            reason = member.refusal() or (None if extension else "has no key and extension, such as KEY.jpg")
            if reason is not None:
                skipped.append((printable(member.name), reason))
                if extension and member.kind != "directory":  # a label that is a link must not make it unlabelled
                    samples.setdefault(
                        key, _Sample()
                    ).problem = f"has the member {printable(member.name)}, which {reason}"
                continue
            sample = samples.get(key)
            if sample is None:
                sample = samples[key] = _Sample()
            _take(sample, member, extension, tar, job)
    except TrailingData as error:
        skipped.append(("", str(error)))
    except BadTar as error:
        skipped.append(("", str(error)))
        if key in samples:
            samples[key].problem = samples[key].problem or "may be incomplete: it stands last in a tar that is cut"
    rows = []
    for key, sample in samples.items():
        if isinstance(outcome := _outcome(key, sample, job.rule), tuple):
            rows.append(outcome)
        else:
            skipped += outcome
    return sorted(rows), skipped


def _split_name(name: str) -> tuple[str, str]:
    """Split a member's name at the first dot of its last part, as WebDataset does; no dot, no extension."""
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return folder + slash + stem, extension if stem else ""


def _take(sample: _Sample, member: Member, extension: str, tar: TarReader, job: IndexJob) -> None:
    """Note what a member says of its sample."""
    kind = extension.rpartition(".")[2].lower()
    if extension.lower() in job.pictures if job.pictures else f".{kind}" in EXTENSIONS:
        sample.pictures.append((member.name, _picture_row(member, tar)))
    elif kind == "cls" and job.rule.cls:
        if sample.cls is not None:
            sample.problem = "has several .cls members under its key"
        sample.cls = tar.read(member.offset, min(member.size, MAX_CLS + 1))
    elif kind == "json" and job.rule.fields:
        if member.size > MAX_JSON:
            sample.problem = f"has a .json member of {member.size} bytes, more than {MAX_JSON}"
        elif sample.json_label is not None:
            sample.problem = "has several .json members under its key"
        else:
            sample.json_label = job.rule.from_json(tar.read(member.offset, member.size))


def _picture_row(member: Member, tar: TarReader) -> tuple[int, ...] | str:
    if member.size > MAX_PICTURE:
        return f"has {member.size} bytes, more than {MAX_PICTURE}"
    if not member.size:
        return "is empty"
    data = tar.read(member.offset, member.size)
    try:
        width, height = picture_size(data)
    except BadPicture as error:
        return printable(str(error))
    return member.offset, member.size, width, height, zlib.crc32(data)


def _outcome(key: str, sample: _Sample, rule: LabelRule) -> tuple[int, ...] | list[tuple[str, str]]:
    """Return the row of a sample, or names and reasons of what is left out of it."""
    if not sample.pictures:
        return [] if sample.problem else [(printable(key), "has no picture under its key")]
    reason = sample.problem
    if len(sample.pictures) > 1:
        others = len(sample.pictures) - 1
        reason = f"shares the key {printable(key)[:80]} with {others} other pictures (--pictures may help)"
    if reason is None:
        row = sample.pictures[0][1]
        if isinstance(row, str):
            reason = row
        else:
            try:
                return *row, rule.of(sample.cls, sample.json_label)
            except BadLabel as error:
                reason = printable(str(error))
    return [(printable(name), reason) for name, _ in sample.pictures]


def _finish(job: IndexJob, tasks: list[_Task]) -> Manifest:
    """Join the records of all tars to report, index and manifest."""
    shards, named, num_skipped = [], [], 0
    with staged(job.report) as path, path.open("w", encoding="utf-8") as report:
        for task in tasks:
            record = _read_record(task)
            assert record is not None
            for skipped in _skipped(task, record):
                report.write(json.dumps(skipped._asdict()) + "\n")
                num_skipped += 1
                if len(named) < _SKIPPED_IN_MANIFEST:
                    named.append(skipped)
            entry = ShardEntry(name=task.name, samples=record["samples"], bytes=task.bytes, sha256=record["sha256"])
            shards.append((entry, task.record))
    entries, index = join_shards(shards)
    if not entries:
        first = f" (the first of {num_skipped}, {named[0].name}, {named[0].reason})" if named else ""
        raise UserError(
            f"split {job.split}: there is no sample in the {len(tasks)} tars of {job.folder}{first}: check --input, "
            f"--pattern, --pictures and --labels, and delete {job.records.path} before the next run"
        )
    if num_skipped > len(named):
        named.append(Skipped(f"{num_skipped - len(named)} more", f"are named in {job.report.name}"))
    classes = job.classes
    if classes is None:
        classes = tuple(str(label) for label in range(int(index["label"].max()) + 1))
    made_by = {**job.made_by, "listing": _listing(tasks)}
    return job.records.finish(entries, index, classes=classes, skipped=named, made_by=made_by)


def _skipped(task: _Task, record: dict[str, Any]) -> Iterator[Skipped]:
    for name, reason in record["skipped"]:
        yield Skipped(f"{task.name}:{name}" if name else task.name, reason)
