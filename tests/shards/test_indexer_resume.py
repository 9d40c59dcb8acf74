"""Indexing again: after a stop, after the end, after tars or settings changed."""

import os

import pytest

from hdscale.errors import UserError
from hdscale.shards import indexer
from tests.helpers.files import content
from tests.helpers.foreign_tars import JPG, found, good, index, three_tars, write_tar


def counted(monkeypatch, stop_after=None):
    """The names of the tars that are indexed from now on."""
    original, names = indexer._index_tar, []

    def count(task):
        if len(names) == stop_after:
            raise RuntimeError("stopped")
        names.append(task.name)
        return original(task)

    monkeypatch.setattr(indexer, "_index_tar", count)
    return names


def test_a_run_that_was_stopped_continues_to_the_same_bytes(tmp_path, monkeypatch):
    for name in ("whole", "parts"):
        three_tars(tmp_path / name)
    index(tmp_path / "whole")
    counted(monkeypatch, stop_after=2)
    with pytest.raises(RuntimeError, match="stopped"):
        index(tmp_path / "parts")
    monkeypatch.undo()
    (tmp_path / "parts" / ".train.index.npy.1.tmp").write_bytes(b"half")
    names = counted(monkeypatch)
    index(tmp_path / "parts")
    assert names == ["2.tar"]
    assert content(tmp_path / "parts") == content(tmp_path / "whole")


def test_a_tar_that_changed_before_the_run_continued_is_indexed_again(tmp_path, monkeypatch):
    three_tars(tmp_path)
    counted(monkeypatch, stop_after=2)
    with pytest.raises(RuntimeError, match="stopped"):
        index(tmp_path)
    monkeypatch.undo()
    write_tar(tmp_path / "0.tar", good(7))
    names = counted(monkeypatch)
    index(tmp_path)
    assert names == ["0.tar", "2.tar"]
    assert found(tmp_path)[0][0] == ("good7.jpg", 1)


def test_running_again_after_the_end_does_nothing(tmp_path, monkeypatch):
    three_tars(tmp_path)
    first = index(tmp_path)
    before = content(tmp_path)
    names = counted(monkeypatch)
    os.utime(tmp_path / "1.tar", ns=(1 << 62, 1 << 62))  # touched, but the same
    assert index(tmp_path) == first
    assert (names, content(tmp_path)) == ([], before)


def test_a_tar_that_changed_after_the_end_is_named(tmp_path):
    three_tars(tmp_path)
    index(tmp_path)
    same_size = (tmp_path / "1.tar").read_bytes().replace(JPG, JPG[:-3] + b"new")
    (tmp_path / "1.tar").write_bytes(same_size)
    os.utime(tmp_path / "1.tar", ns=(1 << 62, 1 << 62))
    with pytest.raises(UserError, match=r"1.tar changed since .*train.manifest.json was made: to index again, delete"):
        index(tmp_path)
    with (tmp_path / "1.tar").open("ab") as file:
        file.write(bytes(512))
    with pytest.raises(UserError, match=r"1.tar changed since the index was made"):
        index(tmp_path)


def test_a_tar_that_came_later_is_noticed(tmp_path):
    three_tars(tmp_path)
    index(tmp_path)
    write_tar(tmp_path / "3.tar", good(3))
    with pytest.raises(UserError, match=r"has other tars \*.tar than .*train.manifest.json was made for: to index"):
        index(tmp_path)


@pytest.mark.parametrize("finished", [True, False])
def test_other_settings_are_refused(tmp_path, monkeypatch, finished):
    three_tars(tmp_path)
    counted(monkeypatch, stop_after=None if finished else 2)
    try:
        index(tmp_path)
    except RuntimeError:
        assert not finished
    with pytest.raises(UserError, match=r"split train in .* was indexed with --labels auto, not none: to .*, delete"):
        index(tmp_path, labels="none")


def test_shards_of_make_shards_are_not_indexed_over(digit_folder):
    with pytest.raises(UserError, match=r"train.manifest.json was written by None, not by index_shards: to index"):
        index(digit_folder)
