import io
import json
import os
import tarfile
import zlib

import numpy as np
import pytest
import webdataset
from PIL import Image

from hdscale.data.index import open_shards
from hdscale.errors import UserError
from hdscale.hashing import file_digest
from hdscale.shards import indexer
from hdscale.shards.indexer import IndexJob, index_split
from hdscale.shards.labels import LabelRule, label_rule


def picture(form="JPEG", size=(12, 9), seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, form)
    return buffer.getvalue()


JPG = picture()


def write_tar(path, members, form=tarfile.PAX_FORMAT):
    """Write a tar of (name, data) pairs, or of (TarInfo, data) pairs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form) as tar:
        for name, data in members:
            info = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            if info.isreg():
                info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def link(name, kind=tarfile.SYMTYPE, target="/etc/passwd"):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info, b""


def job_for(folder, labels="auto", classes=None, split="train", pattern="*.tar", pictures=()):
    rule = label_rule(labels, None if classes is None else len(classes))
    made_by = {"tool": "index_shards", "labels": labels, "pattern": pattern}
    return IndexJob(folder, split, pattern, rule, classes, pictures, made_by)


def index(folder, workers=0, **settings):
    return index_split(job_for(folder, **settings), workers, lambda count, note: None)


def found(folder, split="train"):
    """Names and labels of the samples, and names and reasons of what was left out."""
    shards = open_shards(folder, split)
    samples = [(shards.member_name(row), int(shards.index[row]["label"])) for row in range(shards.num_samples)]
    lines = (folder / f"{split}.index-report.jsonl").read_text().splitlines()
    return samples, {line["name"]: line["reason"] for line in map(json.loads, lines)}


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def good(number, label=1):
    return [(f"good{number}.jpg", JPG), (f"good{number}.cls", b"%d" % label)]


def test_the_tars_of_plain_webdataset_are_indexed_and_read_back(tmp_path):
    kinds, expected = [("jpg", "JPEG"), ("jpeg", "JPEG"), ("png", "PNG"), ("webp", "WEBP")], []
    with webdataset.ShardWriter(str(tmp_path / "part-%06d.tar"), maxcount=7, verbose=0) as writer:
        for number in range(40):
            extension, form = kinds[number % 4]
            size = (5 + number, 40 - number // 2)
            data = picture(form, size, number)
            writer.write({"__key__": f"s{number:05d}", extension: data, "cls": number % 3, "json": {"caption": "x"}})
            expected.append((data, number % 3, size))
    before = content(tmp_path)
    manifest = index(tmp_path, workers=2)
    shards = open_shards(tmp_path, "train")
    assert [shards.read(row) for row in range(40)] == [data for data, _, _ in expected]
    assert shards.index["label"].tolist() == [label for _, label, _ in expected]
    sizes = zip(shards.index["width"].tolist(), shards.index["height"].tolist(), strict=True)
    assert list(sizes) == [size for _, _, size in expected]
    assert shards.index["crc32"].tolist() == [zlib.crc32(data) for data, _, _ in expected]
    assert shards.classes == ("0", "1", "2")
    assert [entry.name for entry in manifest.shards] == [f"part-{number:06d}.tar" for number in range(6)]
    assert all(entry.sha256 == file_digest(tmp_path / entry.name) for entry in manifest.shards)
    assert manifest.skipped == ()
    after = content(tmp_path)
    assert {name: after[name] for name in before} == before
    assert set(after) - set(before) == {"train.index.npy", "train.manifest.json", "train.index-report.jsonl"}


def test_keys_end_at_the_first_dot_of_the_last_part(tmp_path):
    names = ["n01.v2/a.jpg", "n01.v2/a.cls", "n02/a.jpg", "n02/a.cls", "n03_1.JPEG.jpg", "n03_1.JPEG.cls", "b.JPG"]
    write_tar(tmp_path / "a.tar", [(name, b"4" if name.endswith("cls") else JPG) for name in names])
    index(tmp_path)
    samples, left_out = found(tmp_path)
    assert samples == [("n01.v2/a.jpg", 4), ("n02/a.jpg", 4), ("n03_1.JPEG.jpg", 4), ("b.JPG", -1)]
    assert left_out == {}


def test_members_of_a_sample_need_not_be_neighbours(tmp_path):
    members = [("b.cls", b"1"), ("a.jpg", JPG), ("b.jpg", JPG), ("c.jpg", JPG), ("a.cls", b"0"), ("c.cls", b"2")]
    write_tar(tmp_path / "a.tar", members)
    index(tmp_path)
    assert found(tmp_path) == ([("a.jpg", 0), ("b.jpg", 1), ("c.jpg", 2)], {})


def test_pictures_that_share_a_key_are_left_out_and_named(tmp_path):
    members = [("a.jpg", JPG), ("a.png", JPG), ("b.jpg", JPG), ("b.jpg", JPG), ("c.1.jpg", JPG), ("c.2.jpg", JPG)]
    write_tar(tmp_path / "a.tar", members + good(0))
    index(tmp_path)
    samples, left_out = found(tmp_path)
    assert samples == [("good0.jpg", 1)]
    assert set(left_out) == {"a.tar:a.jpg", "a.tar:a.png", "a.tar:b.jpg", "a.tar:c.1.jpg", "a.tar:c.2.jpg"}
    assert left_out["a.tar:a.jpg"] == "shares the key a with 1 other pictures (--pictures may help)"


def test_one_of_several_pictures_of_a_key_can_be_chosen(tmp_path):
    write_tar(tmp_path / "a.tar", [("a.jpg", JPG), ("a.seg.png", b"mask"), ("a.cls", b"3")])
    index(tmp_path, pictures=("jpg",))
    assert found(tmp_path) == ([("a.jpg", 3)], {})


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ("auto", [0, 11, 22, -1]),
        ("cls", [0]),
        ("json:label", [10, 11]),
        ("json:cls", [20, 22]),
        ("none", [-1, -1, -1, -1]),
    ],
)
def test_where_labels_come_from(tmp_path, labels, expected):
    members = [("a.cls", b" 0\n"), ("a.json", b'{"label": 10, "cls": 20}'), ("a.jpg", JPG)]
    members += [("b.jpg", JPG), ("b.json", b'{"label": "11"}'), ("c.jpg", JPG), ("c.json", b'{"cls": 22}')]
    write_tar(tmp_path / "a.tar", [*members, ("d.jpg", JPG), ("d.json", b"{}")])
    index(tmp_path, labels=labels)
    samples, left_out = found(tmp_path)
    assert [label for _, label in samples] == expected
    assert len(left_out) == 4 - len(expected)


def test_samples_without_labels_have_no_classes(tmp_path):
    write_tar(tmp_path / "a.tar", [("a.jpg", JPG)])
    assert index(tmp_path).classes == ()


def test_named_classes_bound_the_labels(tmp_path):
    write_tar(tmp_path / "a.tar", good(0, 0) + good(1, 1) + good(2, 2))
    assert index(tmp_path, classes=("cat", "dog")).classes == ("cat", "dog")
    samples, left_out = found(tmp_path)
    assert samples == [("good0.jpg", 0), ("good1.jpg", 1)]
    assert left_out == {"a.tar:good2.jpg": "has the label 2, but --classes names 2 classes only"}


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


def test_a_json_member_of_a_gigabyte_is_not_read(tmp_path, monkeypatch):
    path = write_tar(tmp_path / "a.tar", [*good(0), ("evil.jpg", JPG)])
    info = tarfile.TarInfo("evil.json")
    info.size = 1 << 30
    with path.open("r+b") as file:  # sparse
        file.seek(open_end(path))
        file.write(info.tobuf())
        file.truncate(file.tell() + info.size + 1024)
    monkeypatch.setattr(LabelRule, "from_json", lambda rule, data: pytest.fail("read it"))
    index(tmp_path)
    assert found(tmp_path)[1] == {"a.tar:evil.jpg": "has a .json member of 1073741824 bytes, more than 1048576"}


def open_end(path):
    """Where the end of a tar's archive begins."""
    with tarfile.open(path) as tar:
        tar.getmembers()
        return tar.offset


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


def test_a_tar_without_a_good_sample_is_not_listed(tmp_path):
    for number, name in enumerate(("a", "b", "c")):
        write_tar(tmp_path / f"{name}.tar", [("bad.jpg", b"")] if name == "b" else good(number))
    manifest = index(tmp_path)
    assert [(entry.name, entry.samples) for entry in manifest.shards] == [("a.tar", 1), ("c.tar", 1)]
    assert open_shards(tmp_path, "train").index["shard"].tolist() == [0, 1]


def test_the_manifest_stays_small_and_the_report_names_all(tmp_path, monkeypatch):
    monkeypatch.setattr(indexer, "_SKIPPED_IN_MANIFEST", 3)
    write_tar(tmp_path / "a.tar", [*good(0), *((f"{number}.jpg", b"") for number in range(9))])
    manifest = index(tmp_path)
    assert [skipped.name for skipped in manifest.skipped] == ["a.tar:0.jpg", "a.tar:1.jpg", "a.tar:2.jpg", "6 more"]
    assert manifest.skipped[-1].reason == "are named in train.index-report.jsonl"
    assert len(found(tmp_path)[1]) == 9


def test_two_patterns_make_two_splits_of_a_folder(tmp_path):
    for name, number in (("t-0", 0), ("t-1", 1), ("v-0", 2)):
        write_tar(tmp_path / f"{name}.tar", good(number))
    index(tmp_path, pattern="t-*.tar")
    index(tmp_path, pattern="v-*.tar", split="val")
    assert found(tmp_path)[0] == [("good0.jpg", 1), ("good1.jpg", 1)]
    assert found(tmp_path, "val")[0] == [("good2.jpg", 1)]


def three_tars(folder):
    for number in range(3):
        write_tar(folder / f"{number}.tar", [*good(number), ("bad.jpg", b"")])


def test_the_number_of_workers_changes_nothing(tmp_path):
    for name, workers in (("one", 0), ("two", 2)):
        three_tars(tmp_path / name)
        index(tmp_path / name, workers)
    assert content(tmp_path / "one") == content(tmp_path / "two")


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


def test_a_run_that_was_killed_before_its_first_record_begins_again(tmp_path):
    for name in ("whole", "killed"):
        three_tars(tmp_path / name)
    index(tmp_path / "whole")
    (tmp_path / "killed" / "train.indexing").mkdir()
    (tmp_path / "killed" / "train.indexing" / ".made_by.json.host-1.tmp").write_bytes(b"half")
    index(tmp_path / "killed")
    assert content(tmp_path / "killed") == content(tmp_path / "whole")


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
