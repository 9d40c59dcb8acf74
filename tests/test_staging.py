import os
import socket

import pytest

from hdscale.staging import create_folder, remove_leftovers, staged


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


def test_temporary_names_differ_between_processes_and_machines(tmp_path, monkeypatch):
    names = set()
    for host, process in (("one", 1), ("one", 2), ("two.example", 1)):
        monkeypatch.setattr(socket, "gethostname", lambda host=host: host)
        monkeypatch.setattr(os, "getpid", lambda process=process: process)
        with staged(tmp_path / "a.json") as temporary:
            temporary.touch()
            names.add(temporary.name)
    assert names == {".a.json.one-1.tmp", ".a.json.one-2.tmp", ".a.json.two.example-1.tmp"}


def test_a_folder_appears_with_its_files(tmp_path):
    def fill(folder):
        assert not (tmp_path / "a").exists()
        (folder / "file").write_text("first")

    create_folder(tmp_path / "a", fill)
    assert (tmp_path / "a/file").read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_the_faster_one_creates_the_folder(tmp_path):
    def fill(folder):
        (folder / "file").write_text("slower")
        (tmp_path / "a").mkdir()
        (tmp_path / "a/file").write_text("faster")

    create_folder(tmp_path / "a", fill)
    assert (tmp_path / "a/file").read_text() == "faster"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_folder_that_cannot_be_created_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        create_folder(tmp_path / "nowhere" / "a", lambda folder: None)
    with pytest.raises(FileNotFoundError):
        create_folder(tmp_path / "a", lambda folder: (folder / "nowhere" / "file").touch())
    assert not list(tmp_path.iterdir())


def test_folders_that_killed_runs_left_are_removed_too(tmp_path):
    (tmp_path / ".a.making.one-1.tmp").mkdir()
    (tmp_path / ".a.making.one-1.tmp/file").touch()
    remove_leftovers(tmp_path, "a.")
    assert not list(tmp_path.iterdir())
