"""What is indexed of tars that others have written: keys, pictures, labels, manifest."""

import zlib

import pytest
import webdataset

from hdscale.data.index import open_shards
from hdscale.hashing import file_digest
from hdscale.shards import indexer
from tests.helpers.files import content
from tests.helpers.foreign_tars import JPG, found, good, index, picture, three_tars, write_tar


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


def test_the_number_of_workers_changes_nothing(tmp_path):
    for name, workers in (("one", 0), ("two", 2)):
        three_tars(tmp_path / name)
        index(tmp_path / name, workers)
    assert content(tmp_path / "one") == content(tmp_path / "two")
