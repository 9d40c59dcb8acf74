import os

import pytest

from hdscale.staging import remove_leftovers, staged


def test_a_file_appears_under_its_name_when_it_is_on_the_disk(tmp_path, monkeypatch):
    target = tmp_path / "a.json"
    target.write_text("old")
    flushed = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: flushed.append((os.fstat(descriptor), target.read_text())))
    with staged(target) as temporary:
        temporary.write_text("new")
        inode = temporary.stat().st_ino
        assert target.read_text() == "old"
    # Its bytes before the rename, the folder's entry after it.
    assert [(stat.st_ino, text) for stat, text in flushed] == [(inode, "old"), (tmp_path.stat().st_ino, "new")]
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    target = tmp_path / "a.json"
    target.write_text("old")
    with pytest.raises(OSError, match="full"), staged(target) as temporary:  # noqa: PT012
        temporary.write_text("ne")
        raise OSError("full")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a.json", "old")]


def test_leftovers_of_other_targets_stay(tmp_path):
    for name in (".a-1.json.7.tmp", ".a-2.json.8.tmp", ".b.json.7.tmp", "a-1.json"):
        (tmp_path / name).touch()
    remove_leftovers(tmp_path, "a-*.json")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".b.json.7.tmp", "a-1.json"]
