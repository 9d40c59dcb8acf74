"""What a split's records hold, and what is on the disk when the work on it stops half-way."""

import numpy as np
import pytest

from hdscale.data.index import INDEX_DTYPE
from hdscale.data.manifest import ShardEntry, Skipped
from hdscale.hashing import file_digest
from hdscale.shards import resumable
from hdscale.shards.resumable import SplitRecords, join_shards, run_missing


@pytest.fixture
def records(tmp_path):
    return SplitRecords(tmp_path / "shards", "train", "making", {"seed": 0})


def rows_at(*offsets):
    rows = np.zeros(len(offsets), dtype=INDEX_DTYPE)
    rows["offset"] = offsets
    return rows


def entry(number, samples):
    return ShardEntry(name=f"{number}.tar", samples=samples, bytes=1024, sha256="0" * 64)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def finish(records):
    skipped = [Skipped("c.jpg", "is empty")]
    return records.finish([entry(0, 2)], rows_at(512, 1536), classes=("a", "b"), skipped=skipped, made_by={"seed": 1})


def test_a_record_of_a_shard_is_read_as_it_was_written(records):
    records.begin()
    record = records.of_shard(3)
    assert record.read() is None
    record.write({"samples": 2}, rows_at(512, 1536))
    assert records.of_shard(3).read() == {"samples": 2}
    assert np.array_equal(np.load(record.rows), rows_at(512, 1536))
    assert names(records.path) == ["000003.json", "000003.npy", "made_by.json"]


def test_a_shard_whose_record_was_not_completed_is_missing_and_may_be_recorded_again(records):
    records.begin()
    record = records.of_shard(3)
    with pytest.raises(TypeError, match="not JSON serializable"):
        record.write({"samples": object()}, rows_at(512))
    assert record.read() is None
    assert names(records.path) == ["000003.npy", "made_by.json"]  # the rows came first
    record.write({"samples": 2}, rows_at(512, 1536))
    assert len(np.load(record.rows)) == record.read()["samples"]


def test_a_split_that_was_begun_says_with_what_and_keeps_its_records(records):
    assert records.begin() == {"seed": 0}
    records.of_shard(0).write({"samples": 2}, rows_at(512, 1536))
    assert records._replace(made_by={"seed": 1}).begin() == {"seed": 0}
    assert records.begun_with() == {"seed": 0}
    assert records.of_shard(0).read() == {"samples": 2}


def test_a_beginning_that_fails_leaves_no_folder_of_records(records):
    with pytest.raises(TypeError, match="not JSON serializable"):
        records._replace(made_by={"seed": object()}).begin()
    assert names(records.folder) == []
    assert records.begin() == {"seed": 0}


def test_a_run_that_was_killed_before_its_first_record_begins_again(records):
    records.path.mkdir(parents=True)
    (records.path / ".made_by.json.host-1.tmp").write_bytes(b"half")
    assert records.begin() == {"seed": 0}
    assert names(records.path) == ["made_by.json"]


def test_a_second_machine_finds_the_folder_that_another_made_meanwhile(records, monkeypatch):
    """It looked for the folder before the other machine made it and recorded its first shard."""
    original = resumable.create_folder

    def another_is_faster(path, fill):
        monkeypatch.setattr(resumable, "create_folder", original)
        records.begin()
        records.of_shard(0).write({"samples": 1}, rows_at(512))
        original(path, fill)

    monkeypatch.setattr(resumable, "create_folder", another_is_faster)
    assert records._replace(made_by={"seed": 1}).begin() == {"seed": 0}
    assert names(records.folder) == ["train.making"]
    assert records.of_shard(0).read() == {"samples": 1}


def test_a_finished_split_is_an_index_and_a_manifest_and_nothing_else_of_its_own(records):
    records.begin()
    assert records.finished() is None
    for name in ("train.index.npy", "train.manifest.json", "train.making", "val.index.npy"):
        (records.folder / f".{name}.host-1.tmp").touch()
    manifest = finish(records)
    assert names(records.folder) == [".val.index.npy.host-1.tmp", "train.index.npy", "train.manifest.json"]
    assert np.array_equal(np.load(records.folder / "train.index.npy"), rows_at(512, 1536))
    assert records.finished() == manifest
    assert (manifest.split, manifest.num_samples, manifest.classes) == ("train", 2, ("a", "b"))
    assert (manifest.shards, manifest.skipped) == ((entry(0, 2),), (("c.jpg", "is empty"),))
    assert manifest.index_digest == file_digest(records.folder / "train.index.npy")
    assert manifest.made_by == {"seed": 1}


def test_a_split_that_stops_before_its_manifest_is_not_finished_and_keeps_its_records(records, monkeypatch):
    def stop(*_):
        raise OSError("full")

    records.begin()
    monkeypatch.setattr(resumable, "write_manifest", stop)
    with pytest.raises(OSError, match="full"):
        finish(records)
    monkeypatch.undo()
    assert records.finished() is None
    assert names(records.folder) == ["train.index.npy", "train.making"]
    assert records.begin() == {"seed": 0}
    assert finish(records) == records.finished()


def test_a_split_that_stops_after_its_manifest_is_finished_and_its_records_can_be_removed(records, monkeypatch):
    def stop(*_):
        raise OSError("full")

    records.begin()
    monkeypatch.setattr(resumable.shutil, "rmtree", stop)
    with pytest.raises(OSError, match="full"):
        finish(records)
    monkeypatch.undo()
    assert records.finished().num_samples == 2
    assert names(records.folder) == ["train.index.npy", "train.making", "train.manifest.json"]
    for _ in range(2):  # another machine may have removed them
        records.remove()
        assert names(records.folder) == ["train.index.npy", "train.manifest.json"]


def test_only_missing_shards_are_made_and_finished_ones_are_counted_at_once():
    made = []

    def make(task):
        made.append(task)
        return 10 * task

    counts = run_missing(range(5), {1: 7, 3: 0}.get, make, workers=0)  # all pictures of shard 3 were skipped
    assert [next(counts), next(counts)] == [7, 0]
    assert made == []
    assert list(counts) == [0, 20, 40]
    assert made == [0, 2, 4]


def test_a_shard_that_cannot_be_made_ends_the_work_after_those_before_it():
    made, counts = [], []

    def make(task):
        if task == 2:
            raise OSError("full")
        made.append(task)
        return task

    with pytest.raises(OSError, match="full"):
        counts.extend(run_missing(range(5), {4: 40}.get, make, workers=1))
    assert made == [0, 1]


def test_the_index_counts_the_shards_that_have_samples(records):
    records.begin()
    shards = []
    for number, rows in enumerate([rows_at(512), rows_at(), rows_at(1024, 2048)]):
        if len(rows):  # of a shard without samples nothing is read
            records.of_shard(number).write({}, rows)
        shards.append((entry(number, len(rows)), records.of_shard(number)))
    entries, index = join_shards(shards)
    assert entries == [entry(0, 1), entry(2, 2)]
    assert index["shard"].tolist() == [0, 1, 1]
    assert index["offset"].tolist() == [512, 1024, 2048]


def test_a_split_without_shards_has_an_empty_index():
    entries, index = join_shards([])
    assert (entries, index.shape, index.dtype) == ([], (0,), INDEX_DTYPE)
