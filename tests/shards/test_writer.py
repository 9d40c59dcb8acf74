import json
import os

import numpy as np
import pytest
import webdataset
from PIL import Image

from hdscale.data.index import open_shards
from hdscale.data.pictures import BadPicture
from hdscale.errors import UserError
from hdscale.hashing import file_digest
from hdscale.shards import resumable, writer
from hdscale.shards.sources.base import Listing
from hdscale.shards.sources.digits import Digits
from hdscale.shards.sources.image_folder import ImageFolder
from hdscale.shards.split import MachineShare, SplitSettings
from hdscale.shards.writer import SplitJob, finish_split, part_samples, write_part
from tests.helpers.files import content


class FirstDigits(Digits):
    """The first 60 digits; those in `broken` cannot be decoded, those in `unreadable` cannot be read."""

    def __init__(self, broken=(), unreadable=()):
        super().__init__()
        self.broken, self.unreadable = broken, unreadable

    def listing(self):
        whole = super().listing()
        return whole._replace(names=whole.names[:60], labels=whole.labels[:60])

    def read(self, name, place=None):
        if name in self.broken:
            raise BadPicture("cannot be decoded (for the test)")
        if name in self.unreadable:
            raise OSError(5, "Input/output error", name)
        return super().read(name)


TENS = SplitSettings(samples_per_shard=10)


def test_plain_webdataset_reads_the_shards(digit_folder, digits):
    urls = [str(digit_folder / entry.name) for entry in digits.manifest.shards]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False).decode("l8"))
    assert [sample["cls"] for sample in samples] == digits.index["label"].tolist()
    assert len({sample["__key__"] for sample in samples}) == 1797
    assert all(sample["png"].shape == (8, 8) for sample in samples)


def test_the_manifest_tells_sizes_and_digests(digit_folder, digits):
    manifest = json.loads((digit_folder / "train.manifest.json").read_text())
    assert [shard["name"] for shard in manifest["shards"]] == [f"train-{number:06d}.tar" for number in range(18)]
    for shard in manifest["shards"]:
        assert shard["sha256"] == file_digest(digit_folder / shard["name"])
        assert shard["bytes"] == (digit_folder / shard["name"]).stat().st_size
    assert [shard["samples"] for shard in manifest["shards"]] == [100] * 17 + [97]
    assert manifest["num_samples"] == 1797
    assert manifest["index_digest"] == digits.digest == file_digest(digit_folder / "train.index.npy")
    assert manifest["skipped"] == []


def test_only_shards_index_and_manifest_are_left(tmp_path, write):
    write(FirstDigits(), tmp_path, TENS)
    expected = {f"train-{number:06d}.tar" for number in range(6)} | {"train.index.npy", "train.manifest.json"}
    assert set(content(tmp_path)) == expected


def test_the_number_of_workers_changes_nothing(tmp_path, write):
    settings = TENS._replace(val_fraction=0.3)
    write(FirstDigits(), tmp_path / "one", settings)
    write(FirstDigits(), tmp_path / "two", settings, workers=2)
    assert content(tmp_path / "one") == content(tmp_path / "two")


def test_a_run_that_failed_continues_to_the_same_bytes(tmp_path, write, monkeypatch):
    write(FirstDigits(), tmp_path / "whole", TENS)
    original, written = writer._write_shard, []

    def fail_at_the_fourth(task):
        if len(written) == 3:
            raise OSError(28, "No space left on device")
        written.append(task.number)
        return original(task)

    monkeypatch.setattr(writer, "_write_shard", fail_at_the_fourth)
    with pytest.raises(UserError, match=r"--output .* cannot be written to \(No space left on device\)"):
        write(FirstDigits(), tmp_path / "parts", TENS)
    with pytest.raises(UserError, match=r"holds no shards"):
        open_shards(tmp_path / "parts", "train")
    (tmp_path / "parts" / ".train-000003.tar.1.tmp").write_bytes(b"half")

    def count(task):
        written.append(task.number)
        return original(task)

    monkeypatch.setattr(writer, "_write_shard", count)
    write(FirstDigits(), tmp_path / "parts", TENS)
    assert written == [0, 1, 2, 3, 4, 5]
    assert content(tmp_path / "parts") == content(tmp_path / "whole")


def test_a_shard_that_was_cut_short_is_written_again(tmp_path, write, monkeypatch):
    write(FirstDigits(), tmp_path / "whole", TENS)

    def stop(*_):
        raise RuntimeError("stopped before the manifest")

    monkeypatch.setattr(resumable, "write_manifest", stop)
    with pytest.raises(RuntimeError, match="stopped before the manifest"):
        write(FirstDigits(), tmp_path / "parts", TENS)
    monkeypatch.undo()
    (tmp_path / "parts" / "train-000002.tar").write_bytes(b"cut")
    write(FirstDigits(), tmp_path / "parts", TENS)
    assert content(tmp_path / "parts") == content(tmp_path / "whole")


def test_running_again_after_the_end_writes_nothing(tmp_path, write, monkeypatch):
    first = write(FirstDigits(), tmp_path, TENS)
    monkeypatch.setattr(writer, "_write_shard", lambda task: pytest.fail("wrote a shard"))
    assert write(FirstDigits(), tmp_path, TENS) == first


def test_running_again_misses_a_shard_that_was_deleted(tmp_path, write):
    write(FirstDigits(), tmp_path, TENS)
    (tmp_path / "train-000001.tar").unlink()
    with pytest.raises(UserError, match=r"train-000001.tar is missing"):
        write(FirstDigits(), tmp_path, TENS)


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (TENS._replace(samples_per_shard=20), "made with --samples-per-shard 10, not 20"),
        (TENS._replace(seed=1), "made with --seed 0, not 1"),
        (TENS._replace(val_fraction=0.5), "made with --val-fraction None, not 0.5"),
    ],
)
def test_other_settings_in_the_same_folder_are_refused(tmp_path, write, monkeypatch, settings, message, finished):
    if finished:
        write(FirstDigits(), tmp_path, TENS)
    else:
        with pytest.raises(UserError, match="cannot be read"):
            write(FirstDigits(unreadable=["digit-0030"]), tmp_path, TENS)
    before = content_of_files(tmp_path)
    with pytest.raises(UserError, match=message):
        write(FirstDigits(), tmp_path, settings)
    assert content_of_files(tmp_path) == before


def content_of_files(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_other_pictures_in_the_same_folder_are_refused(tmp_path, write):
    write(FirstDigits(), tmp_path, TENS)
    with pytest.raises(UserError, match=r"made with other pictures or classes \(--input"):
        write(Digits(), tmp_path, TENS)


def test_tar_files_of_somebody_else_are_not_overwritten(tmp_path, write):
    (tmp_path / "train-000000.tar").write_bytes(b"precious")
    with pytest.raises(UserError, match=r"train-000000.tar is there already and was not made by this run"):
        write(FirstDigits(), tmp_path, TENS)
    assert (tmp_path / "train-000000.tar").read_bytes() == b"precious"


def test_two_splits_of_a_folder_have_the_same_classes(tmp_path, write):
    write(FirstDigits(), tmp_path, TENS)
    classes, *rest = FirstDigits().listing()
    other = Listing(("zero", *classes[1:]), *rest)
    with pytest.raises(UserError, match=r"train.manifest.json lists other classes than the new split val has"):
        write(FirstDigits(), tmp_path, TENS._replace(split="val"), listing=other)
    write(FirstDigits(), tmp_path, TENS._replace(split="val"))
    assert open_shards(tmp_path, "val").num_samples == 60


def test_pictures_that_cannot_be_decoded_are_left_out_and_named(tmp_path, write):
    broken = ["digit-0007", "digit-0042"]
    (manifest,) = write(FirstDigits(broken), tmp_path, TENS)
    assert manifest.num_samples == open_shards(tmp_path, "train").num_samples == 58
    assert sorted(manifest.skipped) == [(name, "cannot be decoded (for the test)") for name in broken]


def test_a_shard_whose_pictures_are_all_broken_is_left_out(tmp_path, write):
    (whole,) = write(FirstDigits(), tmp_path / "whole", TENS)
    shards = open_shards(tmp_path / "whole", "train")
    broken = [shards.member_name(row).rsplit("-", 1)[0] for row in range(20, 30)]
    (manifest,) = write(FirstDigits(broken), tmp_path / "broken", TENS)
    assert manifest.shards == whole.shards[:2] + whole.shards[3:]
    shards = open_shards(tmp_path / "broken", "train")
    assert shards.index["shard"].tolist() == np.repeat(range(5), 10).tolist()
    for row in (0, 19, 20, 49):
        shards.read(row)


def test_a_source_without_a_single_good_picture_is_refused(tmp_path, write):
    names = FirstDigits().listing().names
    with pytest.raises(UserError, match=r"none of the 60 pictures can be decoded \(the first, digit-\d+, cannot be"):
        write(FirstDigits(names), tmp_path, TENS)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_picture_that_cannot_be_read_ends_the_run(tmp_path, write, workers):
    with pytest.raises(UserError, match=r"digit-0030 cannot be read \(Input/output error\): .*shards are kept"):
        write(FirstDigits(unreadable=["digit-0030"]), tmp_path, TENS, workers=workers)


def test_an_empty_file_in_place_of_an_unreadable_one_keeps_the_finished_shards(tmp_path, write):
    for name in ("1", "2", "3"):
        (tmp_path / "pictures/a").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (3, 3)).save(tmp_path / f"pictures/a/{name}.png")
    (tmp_path / "pictures/a/4.png").symlink_to("nowhere")
    source, ones = ImageFolder(tmp_path / "pictures"), SplitSettings(samples_per_shard=1)
    with pytest.raises(UserError, match=r"a/4.png cannot be read .*: mend it.*an empty file in its place is left out"):
        write(source, tmp_path / "shards", ones)
    (tmp_path / "pictures/a/4.png").unlink()
    (tmp_path / "pictures/a/4.png").write_bytes(b"")
    (manifest,) = write(source, tmp_path / "shards", ones)
    assert (manifest.num_samples, [item.name for item in manifest.skipped]) == (3, ["a/4.png"])


def test_a_skipped_picture_whose_name_is_no_text_is_named_with_escapes(tmp_path, write):
    (tmp_path / "pictures/a").mkdir(parents=True)
    Image.new("RGB", (3, 3)).save(tmp_path / "pictures/a/1.png")
    (tmp_path / os.fsdecode(b"pictures/a/\xc3\xa4\xff.png")).write_bytes(b"no picture")
    (manifest,) = write(ImageFolder(tmp_path / "pictures"), tmp_path / "shards", SplitSettings())
    assert [item.name for item in manifest.skipped] == [r"a/ä\xff.png"]


def test_a_split_whose_name_begins_like_another_is_not_mistaken_for_it(tmp_path, write):
    for split in ("train-2", "train"):
        (manifest,) = write(FirstDigits(), tmp_path, TENS._replace(split=split))
        assert manifest.num_samples == 60


def test_an_output_that_is_a_file_is_refused(tmp_path, write):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--output .*file cannot be written to"):
        write(FirstDigits(), tmp_path / "file", TENS)


def test_sizes_in_the_index_are_those_of_the_stored_pictures(tmp_path, write):
    for number, size in enumerate([(30, 20), (7, 90), (1, 1)]):
        path = tmp_path / "pictures" / "a" / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size).save(path)
    write(ImageFolder(tmp_path / "pictures"), tmp_path / "shards", SplitSettings())
    index = open_shards(tmp_path / "shards", "train").index
    assert {(int(row["width"]), int(row["height"])) for row in index} == {(30, 20), (7, 90), (1, 1)}


def digits_job(folder, **changes):
    """60 digits in six shards."""
    listing = FirstDigits().listing()
    values = {
        "source": FirstDigits(),
        "output": folder,
        "split": "train",
        "classes": listing.classes,
        "names": listing.names,
        "labels": listing.labels,
        "samples_per_shard": 10,
        "made_by": {"seed": 0},
    }
    return SplitJob(**values | changes)


def no_progress(_):
    pass


def test_parts_write_their_shards_and_the_end_joins_them(tmp_path):
    whole, shared = digits_job(tmp_path / "whole"), digits_job(tmp_path / "shared")
    writer.write_split(whole, 0, no_progress)
    counts = []
    write_part(shared, MachineShare(2, 4), 0, counts.append)
    assert {path.name for path in shared.output.glob("*.tar")} == {"train-000001.tar", "train-000005.tar"}
    assert sum(counts) == part_samples(shared, MachineShare(2, 4)) == 20
    for number in (4, 1, 3):
        write_part(shared, MachineShare(number, 4), 0, no_progress)
    assert not (shared.output / "train.manifest.json").exists()
    assert finish_split(shared) == finish_split(shared)
    assert content(whole.output) == content(shared.output)


def test_missing_shards_are_counted_by_part(tmp_path):
    job = digits_job(tmp_path)
    with pytest.raises(UserError, match=r"--finish: .* has no part of split train: run --part 1/n"):
        finish_split(job)
    write_part(job, MachineShare(2, 4), 0, no_progress)
    (tmp_path / "train-000005.tar").write_bytes(b"cut")
    message = r"5 of 6 shards of split train are missing \(2 of part 1/4, 1 of part 2/4, 1 of part 3/4, 1 of part 4/4\)"
    with pytest.raises(UserError, match=message):
        finish_split(job)


def test_only_some_of_many_missing_parts_are_named(tmp_path):
    job = digits_job(tmp_path, samples_per_shard=1)
    write_part(job, MachineShare(1, 50), 0, no_progress)
    with pytest.raises(UserError, match=r"58 of 60 .*\(2 of part 2/50, .* 2 of part 6/50, ...\)"):
        finish_split(job)


def test_shards_that_an_interrupted_run_lacks_are_counted(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        writer.write_split(digits_job(tmp_path, source=FirstDigits(unreadable=["digit-0030"])), 0, no_progress)
    with pytest.raises(UserError, match=r"3 of 6 shards of split train are missing: run without --finish"):
        finish_split(digits_job(tmp_path))


def test_one_machine_may_write_what_parts_have_not(tmp_path):
    writer.write_split(digits_job(tmp_path / "whole"), 0, no_progress)
    write_part(digits_job(tmp_path / "parts"), MachineShare(2, 3), 0, no_progress)
    writer.write_split(digits_job(tmp_path / "parts"), 0, no_progress)
    assert content(tmp_path / "whole") == content(tmp_path / "parts")
    write_part(digits_job(tmp_path / "parts"), MachineShare(1, 3), 0, no_progress)  # has nothing left to do
    assert content(tmp_path / "whole") == content(tmp_path / "parts")


def test_all_parts_have_one_number_of_parts_and_the_same_settings(tmp_path):
    write_part(digits_job(tmp_path), MachineShare(1, 4), 0, no_progress)
    with pytest.raises(UserError, match=r"--part: .* was begun in 4 parts, not 3: give parts of 4, or no --part"):
        write_part(digits_job(tmp_path), MachineShare(1, 3), 0, no_progress)
    other = digits_job(tmp_path, made_by={"seed": 1})
    for attempt in (lambda: write_part(other, MachineShare(2, 4), 0, no_progress), lambda: finish_split(other)):
        with pytest.raises(UserError, match=r"made with --seed 0, not 1"):
            attempt()


def test_a_setting_that_only_the_earlier_run_had_is_refused(tmp_path):
    writer.write_split(digits_job(tmp_path, made_by={"seed": 0, "resize_short": 8}), 0, no_progress)
    with pytest.raises(UserError, match=r"made with --resize-short 8, not None"):
        writer.write_split(digits_job(tmp_path), 0, no_progress)


def test_a_part_leaves_the_temporary_files_of_others_alone(tmp_path):
    job = digits_job(tmp_path)
    write_part(job, MachineShare(1, 2), 0, no_progress)
    making = tmp_path / "train.making"
    own = [tmp_path / ".train-000003.tar.dead-7.tmp", making / ".000003.npy.dead-7.tmp"]
    others = [tmp_path / ".train-000004.tar.live-8.tmp", making / ".000004.json.live-8.tmp"]
    for path in own + others:
        path.touch()
    write_part(job, MachineShare(2, 2), 0, no_progress)
    assert [path.exists() for path in own + others] == [False, False, True, True]
