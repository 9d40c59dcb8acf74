"""What is left out of an index and named: hostile members, tars that are cut, files that are no tars."""

import tarfile

import pytest

from hdscale.shards.labels import LabelRule
from tests.helpers.foreign_tars import JPG, found, good, index, link, open_end, write_tar

HOSTILE = {
    "dots": ([("../evil.jpg", JPG)], "../evil.jpg", "has a name with .. in it"),
    "absolute": ([("/tmp/evil.jpg", JPG)], "/tmp/evil.jpg", "has an absolute name"),
    "symbolic link": ([link("evil.jpg")], "evil.jpg", "is a symbolic link"),
    "hard link": ([link("evil.jpg", tarfile.LNKTYPE)], "evil.jpg", "is a hard link"),
    "device": ([link("evil.jpg", tarfile.CHRTYPE)], "evil.jpg", "is a character device"),
    "fifo": ([link("evil.jpg", tarfile.FIFOTYPE)], "evil.jpg", "is a fifo"),
    "linked label": ([("evil.jpg", JPG), link("evil.cls")], "evil.jpg", "has the member evil.cls, which is a symbolic"),
    "hidden": ([("._evil.jpg", JPG)], "._evil.jpg", "has no key and extension"),
    "no extension": ([("README", b"")], "README", "has no key and extension"),
    "control characters": ([("e\nv\x1b[2Jil", b"")], "e\\nv\\x1b[2Jil", "has no key and extension"),
    "long name": ([("e" * 5000 + ".jpg", JPG)], "e" * 200, "has a name of more than 4096 characters"),
    "empty": ([("evil.jpg", b"")], "evil.jpg", "is empty"),
    "no picture": ([("evil.jpg", b"<html>")], "evil.jpg", "is none of JPEG"),
    "only a label": ([("evil.cls", b"1")], "evil", "has no picture under its key"),
    "two labels": ([("evil.jpg", JPG), ("evil.cls", b"1"), ("evil.x.cls", b"2")], "evil.jpg", "has several .cls"),
    "negative label": ([("evil.jpg", JPG), ("evil.cls", b"-1")], "evil.jpg", "no integer from 0 on ('-1')"),
    "text label": ([("evil.jpg", JPG), ("evil.cls", b"cat\n")], "evil.jpg", "no integer from 0 on"),
    "no label": ([("evil.jpg", JPG), ("evil.cls", b"")], "evil.jpg", "no integer from 0 on ('')"),
    "float label": ([("evil.jpg", JPG), ("evil.json", b'{"label": 1.5}')], "evil.jpg", "no integer from 0 on ('1.5')"),
    "true": ([("evil.jpg", JPG), ("evil.json", b'{"label": true}')], "evil.jpg", "no integer from 0 on ('True')"),
    "negative field": ([("evil.jpg", JPG), ("evil.json", b'{"label": -3}')], "evil.jpg", "is not in 0 .."),
    "other digits": ([("evil.jpg", JPG), ("evil.cls", "\u0663".encode())], "evil.jpg", "no integer from 0 on"),
    "huge label": ([("evil.jpg", JPG), ("evil.cls", b"2147483648")], "evil.jpg", "is not in 0 .. 2147483647"),
    "many classes": ([("evil.jpg", JPG), ("evil.cls", b"2147483647")], "evil.jpg", "too large without --classes"),
    "long label": ([("evil.jpg", JPG), ("evil.cls", b"1" * 70)], "evil.jpg", "no integer from 0 on"),
    "no json": ([("evil.jpg", JPG), ("evil.json", b"{")], "evil.jpg", "has a .json member that is no JSON"),
    "deep json": ([("evil.jpg", JPG), ("evil.json", b"[" * 99999)], "evil.jpg", "has a .json member that is no JSON"),
    "long number": ([("evil.jpg", JPG), ("evil.json", b"9" * 99999)], "evil.jpg", "has a .json member that is no JSON"),
    "two jsons": ([("evil.jpg", JPG), ("evil.json", b"{}"), ("evil.b.json", b"{}")], "evil.jpg", "has several .json"),
    "large json": (
        [("evil.jpg", JPG), ("evil.cls", b"1"), ("evil.json", b" " * ((1 << 20) + 1))],
        "evil.jpg",
        "has a .json member of 1048577 bytes, more than 1048576",
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_members_are_left_out_and_named(tmp_path, case):
    members, name, reason = HOSTILE[case]
    write_tar(tmp_path / "in" / "a.tar", good(1) + members + good(2))
    index(tmp_path / "in")
    samples, left_out = found(tmp_path / "in")
    assert samples == [("good1.jpg", 1), ("good2.jpg", 1)]
    assert reason in left_out[f"a.tar:{name}"]
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_a_json_member_of_64_megabytes_is_not_read(tmp_path, monkeypatch):
    path = write_tar(tmp_path / "a.tar", [*good(0), ("evil.jpg", JPG)])
    info = tarfile.TarInfo("evil.json")
    info.size = 1 << 26
    with path.open("r+b") as file:  # sparse
        file.seek(open_end(path))
        file.write(info.tobuf())
        file.truncate(file.tell() + info.size + 1024)
    monkeypatch.setattr(LabelRule, "from_json", lambda rule, data: pytest.fail("read it"))
    index(tmp_path)
    assert found(tmp_path)[1] == {"a.tar:evil.jpg": "has a .json member of 67108864 bytes, more than 1048576"}


def test_a_tar_that_is_cut_keeps_its_whole_samples_and_is_named(tmp_path):
    path = write_tar(tmp_path / "a.tar", [*good(0), ("last.jpg", JPG), ("last.cls", b"1")])
    whole = path.read_bytes()
    path.write_bytes(whole[: open_end(path) - 1024])  # the label of the last sample is gone, without a trace
    index(tmp_path)
    samples, left_out = found(tmp_path)
    assert samples == [("good0.jpg", 1)]
    assert left_out["a.tar"].startswith("has no end of archive: it may be cut at byte")
    assert left_out["a.tar:last.jpg"] == "may be incomplete: it stands last in a tar that is cut"

    (tmp_path / "train.manifest.json").unlink()
    path.write_bytes(whole[: whole.rindex(b"last.jpg") + 512 + len(JPG) - 1])
    index(tmp_path)
    samples, left_out = found(tmp_path)
    assert samples == [("good0.jpg", 1)]
    assert left_out["a.tar"].startswith("is cut at byte")
    assert left_out["a.tar:last.jpg"] == "is a file that is cut"


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"\x1f\x8b" + bytes(999), "is a compressed tar (gzip)"), (b"", "is empty"), (b"x" * 999, "is no tar file")],
)
def test_files_that_are_no_tars_are_named_and_not_listed(tmp_path, content, reason):
    write_tar(tmp_path / "b.tar", good(0))
    (tmp_path / "a.tar").write_bytes(content)
    manifest = index(tmp_path)
    samples, left_out = found(tmp_path)
    assert samples == [("good0.jpg", 1)]
    assert left_out["a.tar"].startswith(reason)
    assert [entry.name for entry in manifest.shards] == ["b.tar"]
