"""What ends an indexing run with a message: folders, names and tars that nobody could index."""

import os

import pytest

from hdscale.errors import UserError
from hdscale.shards import indexer
from tests.helpers.foreign_tars import good, index, three_tars, write_tar


@pytest.mark.parametrize("more", [0, 20], ids=["of_equal_size", "larger"])
def test_a_tar_that_was_replaced_between_the_listing_and_its_turn_is_refused(tmp_path, monkeypatch, more):
    three_tars(tmp_path)
    original = indexer._index_tar

    def replace_first(task):
        other = write_tar(tmp_path / "new", [*good(7), ("bad.jpg", b""), *(more * good(8))])
        os.utime(other, ns=(task.mtime_ns, task.mtime_ns + (0 if more else 2 * 10**9)))
        assert (other.stat().st_size == task.bytes) == (not more)
        other.replace(tmp_path / task.name)
        return original(task)

    monkeypatch.setattr(indexer, "_index_tar", replace_first)
    with pytest.raises(UserError, match=r"0.tar is being written to: wait for the end of that and run again"):
        index(tmp_path)
    assert not list(tmp_path.glob("train.indexing/0*"))


def test_a_tar_that_is_being_written_to_is_refused(tmp_path, monkeypatch):
    three_tars(tmp_path)
    original = indexer._take

    def grow(*arguments):
        with (tmp_path / "1.tar").open("ab") as file:
            file.write(bytes(512))
        original(*arguments)

    monkeypatch.setattr(indexer, "_take", grow)
    with pytest.raises(UserError, match=r"tar is being written to: wait for the end of that and run again"):
        index(tmp_path)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_tar_that_cannot_be_read_is_named(tmp_path, monkeypatch, workers):
    three_tars(tmp_path)

    def fail(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(indexer.TarReader, "read", fail)
    with pytest.raises(UserError, match=r"\d.tar cannot be read \(Input/output error\): mend it and run again"):
        index(tmp_path, workers)


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path):
    three_tars(tmp_path)
    (tmp_path / "train.indexing").write_text("in the way")
    with pytest.raises(UserError, match=r"--input .* cannot be written to \(Not a directory\)"):
        index(tmp_path)


def test_input_without_tars_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"--input .*nowhere is not a folder"):
        index(tmp_path / "nowhere")
    (tmp_path / "folder.tar").mkdir()
    (tmp_path / ".hidden.tar").write_bytes(b"")
    with pytest.raises(UserError, match=r"--input .* has no files \*.tar: name another folder, or give --pattern"):
        index(tmp_path)


def test_a_tar_whose_name_is_no_text_is_refused_before_the_work(tmp_path):
    write_tar(tmp_path / os.fsdecode(b"\xff.tar"), good(0))
    with pytest.raises(UserError, match=r"has the tar '\\udcff.tar', whose name is no UTF-8: rename it"):
        index(tmp_path)
    assert [path.suffix for path in tmp_path.iterdir()] == [".tar"]


def test_tars_without_a_sample_are_refused(tmp_path):
    write_tar(tmp_path / "a.tar", good(0))
    message = r"there is no sample in the 1 tars of .* \(the first of 1, a.tar:good0.jpg, has no field 'x' in a .json"
    with pytest.raises(UserError, match=message.replace("'x'", "x")):
        index(tmp_path, labels="json:x")
    assert not (tmp_path / "train.manifest.json").exists()
