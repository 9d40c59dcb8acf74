import io
import json
import multiprocessing
import os
import pickle
import shutil
import tarfile
import zlib

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from hdscale.data import index as index_module
from hdscale.data.index import INDEX_DTYPE, open_shards
from hdscale.data.pictures import BadPicture
from hdscale.errors import UserError


@pytest.fixture
def copied(digit_folder, tmp_path):
    return shutil.copytree(digit_folder, tmp_path / "shards")


def test_a_record_is_32_bytes():
    assert INDEX_DTYPE.itemsize == 32


def test_every_sample_is_read_as_the_tar_file_holds_it(digits, digit_folder):
    sample_id = 0
    for entry in digits.manifest.shards:
        with tarfile.open(digit_folder / entry.name) as tar:
            members = {member.name: tar.extractfile(member).read() for member in tar.getmembers()}
        pictures = [name for name in members if name.endswith(".png")]
        assert entry.samples == len(pictures)
        for name in pictures:
            assert digits.read(sample_id) == members[name]
            assert digits.member_name(sample_id) == name
            assert digits.index[sample_id]["label"] == int(members[name.replace(".png", ".cls")])
            sample_id += 1
    assert sample_id == digits.num_samples == 1797


def test_pictures_and_labels_are_scikit_learns(digits):
    source = load_digits()
    for sample_id in (0, 500, 1796):
        row = int(digits.member_name(sample_id).split("-")[1])
        levels = np.asarray(Image.open(io.BytesIO(digits.read(sample_id)))).astype(float) * 16 / 255
        assert np.array_equal(np.round(levels), source.images[row])
        assert digits.index[sample_id]["label"] == source.target[row]
    assert digits.classes == tuple("0123456789")
    assert set(digits.index["width"]) == set(digits.index["height"]) == {8}


def test_few_files_stay_open(digits, monkeypatch):
    monkeypatch.setattr(index_module, "_OPEN_FILES", 2)
    digits.close()
    rows = np.random.default_rng(0).integers(0, digits.num_samples, 200).tolist()
    for row in rows:
        assert zlib.crc32(digits.read(row)) == digits.index[row]["crc32"]
        assert len(digits._descriptors) <= 2


def test_prefetched_pictures_are_named_to_the_kernel_and_missing_shards_passed_over(copied, monkeypatch):
    shards, prefetched = open_shards(copied, "train"), []
    monkeypatch.setattr(os, "posix_fadvise", lambda _, *place: prefetched.append(place))
    shards.close()
    (copied / shards.manifest.shards[1].name).unlink()
    rows = np.array([7, 150, 201])  # of shards 0, 1 and 2
    shards.prefetch(rows)
    wanted = [(*shards.index[row][["offset", "size"]].tolist(), os.POSIX_FADV_WILLNEED) for row in rows]
    assert prefetched == [wanted[0], wanted[2]]


def test_a_set_of_shards_survives_pickling_without_carrying_its_index(digits):
    digits.read(0)
    pickled = pickle.dumps(digits)
    assert len(pickled) < digits.index.nbytes / 4
    assert pickle.loads(pickled).read(5) == digits.read(5)


def test_forked_processes_read_at_once(digits):
    digits.read(0)
    expected = [digits.read(row) for row in range(200)]
    context = multiprocessing.get_context("fork")
    queue = context.Queue()

    def read_all():
        queue.put([digits.read(row) for row in range(200)])

    processes = [context.Process(target=read_all) for _ in range(2)]
    for process in processes:
        process.start()
    assert [queue.get(), queue.get()] == [expected, expected]
    for process in processes:
        process.join()


def test_an_empty_folder_has_no_shards(tmp_path):
    with pytest.raises(UserError, match=r"holds no shards, train.manifest.json is missing: .*make_shards.py"):
        open_shards(tmp_path, "train")


def test_a_missing_split_is_named_with_those_that_are_there(digit_folder):
    with pytest.raises(UserError, match=r"has the splits train only, val.manifest.json is missing"):
        open_shards(digit_folder, "val")


def test_a_missing_shard_is_named(copied):
    (copied / "train-000004.tar").unlink()
    with pytest.raises(UserError, match=r"train-000004.tar is missing, but train.manifest.json lists it"):
        open_shards(copied, "train")


def test_a_shard_of_another_size_is_named(copied):
    with (copied / "train-000004.tar").open("ab") as file:
        file.write(b"\0" * 512)
    with pytest.raises(UserError, match=r"train-000004.tar changed since the index was made \(\d+ bytes, not \d+\)"):
        open_shards(copied, "train")


@pytest.mark.parametrize("row", [400, 499])
def test_a_shard_with_other_samples_is_named(copied, digits, row):
    with (copied / "train-000004.tar").open("r+b") as file:
        file.seek(int(digits.index[row]["offset"]) - 512)
        file.write(b"\1" * 512)
    with pytest.raises(UserError, match=rf"train-000004.tar changed since the index was made \(sample {row} does not"):
        open_shards(copied, "train")


def test_an_index_that_changed_is_named(copied):
    with (copied / "train.index.npy").open("ab") as file:
        file.write(b"\0")
    with pytest.raises(UserError, match=r"train.index.npy changed since the manifest was made"):
        open_shards(copied, "train")


def test_a_missing_index_is_named(copied):
    (copied / "train.index.npy").unlink()
    with pytest.raises(UserError, match=r"train.index.npy is missing"):
        open_shards(copied, "train")


def test_a_manifest_of_another_version_is_named(copied):
    path = copied / "train.manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format_version": 2}))
    with pytest.raises(UserError, match=r"train.manifest.json is no manifest that this version reads \(format_version"):
        open_shards(copied, "train")


def test_a_file_that_is_no_manifest_is_named(copied):
    (copied / "train.manifest.json").write_text("{")
    with pytest.raises(UserError, match=r"train.manifest.json is no manifest that this version reads \(file"):
        open_shards(copied, "train")


def test_a_flipped_byte_is_found_and_its_sample_named(copied, digits):
    with (copied / "train-000004.tar").open("r+b") as file:
        file.seek(int(digits.index[450]["offset"]) + 40)
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 1]))
    shards = open_shards(copied, "train")
    assert shards.read(449) == digits.read(449)
    with pytest.raises(BadPicture, match=r"^is damaged \(wrong CRC32\)$"):
        shards.read(450)
    assert shards.locate(450) == ("train-000004.tar", digits.member_name(450))


def test_a_shard_that_goes_away_later_is_named(copied):
    shards = open_shards(copied, "train")
    shards.close()
    (copied / "train-000004.tar").unlink()
    with pytest.raises(BadPicture, match=r"^cannot be read \(No such file or directory\)$"):
        shards.read(450)
    assert shards.locate(450) == ("train-000004.tar", f"byte {int(shards.index[450]['offset'])}")


def test_a_shard_that_may_not_be_read_is_refused(copied, monkeypatch):
    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("hdscale.data.index.os.pread", refuse)  # chmod stops nobody who runs this as root
    with pytest.raises(UserError, match=r"train-000000.tar cannot be read \(Permission denied\)"):
        open_shards(copied, "train")
