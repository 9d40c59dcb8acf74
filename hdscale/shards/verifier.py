"""Checking the shards of a split against their index and manifest, as they lie on the disk now."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from hdscale.data.manifest import Manifest, ShardEntry, index_path, read_manifest
from hdscale.data.pictures import BadPicture, open_picture, to_rgb
from hdscale.errors import UserError
from hdscale.hashing import file_digest
from hdscale.shards.tar_reader import BadTar, Member, TarReader, printable
from hdscale.shards.workers import in_processes
from hdscale.staging import staged


class Bad(NamedTuple):
    """One line of the report."""

    shard: str
    sample: int | None  # its id; None: the file as a whole
    name: str | None  # of the picture in the tar file, if one is there
    reason: str


class Summary(NamedTuple):
    """What a check came to."""

    samples: int  # in the manifest
    bad_samples: int
    bad_files: int  # tars and index


class _Task(NamedTuple):
    folder: Path
    index_file: Path | None  # None: it cannot be trusted
    number: int
    entry: ShardEntry
    first_row: int
    quick: bool


def check_split(
    folder: Path, split: str, quick: bool, workers: int, report: Path, progress: Callable[[int], object]
) -> Summary:
    """Check a split and report all that is bad, one JSON object per line, by shard and sample.

    Args:
        folder: holds the shards.
        split: the name of their index and manifest.
        quick: compare sizes, the digest of the index, and the headers of all samples; else also read the tars for
            their sha256, the CRC32 of all pictures and their pixels.
        workers: processes; 0 or 1 works in this one.
        report: the file to be written.
        progress: called with the number of samples that have just been checked.

    Raises:
        UserError: there is no manifest, or the report cannot be written.
    """
    manifest = read_manifest(folder, split)
    path = index_path(folder, split)
    problem = _index_problem(path, manifest)
    tasks, first_row = [], 0
    for number, entry in enumerate(manifest.shards):
        tasks.append(_Task(folder, None if problem else path, number, entry, first_row, quick))
        first_row += entry.samples
    bad_samples, bad_files = 0, 0
    try:
        with staged(report) as temporary, temporary.open("w", encoding="utf-8") as file:
            found = [Bad(path.name, None, None, f"{problem}: no sample can be checked")] if problem else []
            for checked, bad in _in_order(found, tasks, workers):
                for line in bad:
                    bad_samples, bad_files = bad_samples + (line.sample is not None), bad_files + (line.sample is None)
                    file.write(json.dumps(line._asdict()) + "\n")
                progress(checked)
    except OSError as error:
        raise UserError(
            f"--report {report} cannot be written to ({error.strerror or error}): name another file"
        ) from error
    return Summary(manifest.num_samples, bad_samples, bad_files)


def _index_problem(path: Path, manifest: Manifest) -> str | None:
    if not path.is_file():
        return "is missing"
    if file_digest(path) != manifest.index_digest:
        return "changed since the manifest was made"
    listed = sum(entry.samples for entry in manifest.shards)
    if not len(np.load(path, mmap_mode="r", allow_pickle=False)) == listed == manifest.num_samples:
        return "has another number of samples than the manifest"
    return None


def _in_order(found: list[Bad], tasks: list[_Task], workers: int) -> Iterator[tuple[int, list[Bad]]]:
    """Yield the number of samples and what is bad of every shard, by number, whoever finishes first."""
    yield 0, found
    waiting: dict[int, list[Bad]] = {}
    following = 0
    for number, bad in in_processes(_check_shard, tasks, workers):
        waiting[number] = bad
        while following in waiting:
            yield tasks[following].entry.samples, waiting.pop(following)
            following += 1


def _check_shard(task: _Task) -> tuple[int, list[Bad]]:
    """Check one tar; return its number and what is bad: first the file as a whole, then its samples."""
    rows = {}
    if task.index_file is not None:
        index = np.load(task.index_file, mmap_mode="r", allow_pickle=False)
        ids = range(task.first_row, task.first_row + task.entry.samples)
        rows = {int(index[row]["offset"]): (row, index[row]) for row in ids}
    bad, missing = [], "no header of a member stands where the index says"
    try:
        with TarReader(task.folder / task.entry.name, hashed=not task.quick) as tar:
            reasons = _file_reasons(tar, task, rows, bad)
    except FileNotFoundError:
        reasons, missing = ["is missing"], "its shard is missing"
    except (OSError, BadTar) as error:
        words = error.strerror if isinstance(error, OSError) else error
        reasons, missing = [f"cannot be read ({words or error})"], "its shard cannot be read"
    bad += [Bad(task.entry.name, row, None, missing) for row, _ in rows.values()]
    files = [Bad(task.entry.name, None, None, reason) for reason in reasons]
    return task.number, files + sorted(bad, key=lambda line: line.sample)


def _file_reasons(tar: TarReader, task: _Task, rows: dict[int, tuple[int, np.void]], bad: list[Bad]) -> list[str]:
    """Take the samples that are found out of `rows`, add bad ones to `bad`, and say what is wrong with the file."""
    reasons = []
    if tar.size != task.entry.bytes:
        reasons.append(f"has {tar.size} bytes, not {task.entry.bytes}")
    try:
        for member in tar.members():
            if member.offset in rows:
                sample_id, record = rows.pop(member.offset)
                reason = _sample_reason(tar, member, record, task.quick)
                if reason is not None:
                    bad.append(Bad(task.entry.name, sample_id, printable(member.name), reason))
    except BadTar as error:
        if rows:  # else the index was made for a tar that ended in this way
            reasons.append(str(error))
    if not task.quick and tar.sha256() != task.entry.sha256:
        reasons.append("has another sha256 than the manifest says")
    return reasons


def _sample_reason(tar: TarReader, member: Member, record: np.void, quick: bool) -> str | None:
    if member.refusal() is not None:
        return member.refusal()
    if member.size != record["size"]:
        return f"has {member.size} bytes, not {record['size']}"
    if quick:
        return None
    data = tar.read(member.offset, member.size)
    if zlib.crc32(data) != record["crc32"]:
        return "is damaged (wrong CRC32)"
    try:
        width, height = _decoded_size(data)
    except BadPicture as error:
        return printable(str(error))
    if (width, height) != (record["width"], record["height"]):
        return f"has {width} x {height} pixels, not {record['width']} x {record['height']}"
    return None


def _decoded_size(data: bytes) -> tuple[int, int]:
    """Decode a picture as training does; return width and height."""
    from hdscale.data.decode import decode_rgb  # imports torch, which a quick check does not need

    to_rgb(open_picture(data))  # torchvision's PNG decoder ends the process (SIGSEGV) on most damaged files
    height, width = decode_rgb(data).shape[1:]
    return width, height
