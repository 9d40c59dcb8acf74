import numpy as np
import pytest

from hdscale.errors import UserError
from hdscale.shards.sources.base import Listing
from hdscale.shards.split import MachineShare, SplitSettings, assign_splits, check_settings, parse_part


def listing(names):
    return Listing(("only",), names, np.zeros(len(names), dtype=np.int32), [])


def names(count):
    return [f"only/{number}.jpg" for number in range(count)]


def test_a_split_holds_every_picture_once_and_is_shuffled():
    rows = assign_splits(listing(names(1000)), SplitSettings())["train"]
    assert np.array_equal(np.sort(rows), np.arange(1000))
    assert abs(np.corrcoef(rows, np.arange(1000))[0, 1]) < 0.1


def test_the_seed_decides_the_shuffle():
    orders = [assign_splits(listing(names(50)), SplitSettings(seed=seed))["train"].tolist() for seed in (0, 0, 1)]
    assert orders[0] == orders[1]
    assert orders[0] != orders[2]


def test_a_fraction_of_the_pictures_is_held_out():
    splits = assign_splits(listing(names(5000)), SplitSettings(val_fraction=0.2))
    assert list(splits) == ["train", "val"]
    assert np.array_equal(np.sort(np.concatenate(list(splits.values()))), np.arange(5000))
    assert len(splits["val"]) == pytest.approx(1000, abs=100)


def test_a_picture_stays_on_its_side_when_others_come_and_the_seed_changes():
    few = assign_splits(listing(names(300)), SplitSettings(val_fraction=0.3))
    many = assign_splits(listing(names(900)), SplitSettings(val_fraction=0.3, seed=5))
    assert set(few["val"]) == {row for row in many["val"] if row < 300}


def test_a_split_that_would_be_empty_is_refused():
    with pytest.raises(UserError, match=r"--val-fraction 0.001 leaves no picture for val among 3"):
        assign_splits(listing(names(3)), SplitSettings(val_fraction=0.001))
    with pytest.raises(UserError, match=r"--val-fraction 0.999 leaves no picture for train among 3"):
        assign_splits(listing(names(3)), SplitSettings(val_fraction=0.999))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (SplitSettings(split="a/b"), r"--split must be letters, digits, - and _, got 'a/b'"),
        (SplitSettings(split=""), r"--split must be"),
        (SplitSettings(samples_per_shard=0), r"--samples-per-shard must be at least 1, got 0"),
        (SplitSettings(val_fraction=1.0), r"--val-fraction must be between 0 and 1, got 1.0"),
        (SplitSettings(split="val", val_fraction=0.1), r"--val-fraction names the held-out split val itself"),
    ],
)
def test_settings_without_sense_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        check_settings(settings)


def test_parts_share_the_shards():
    parts = [parse_part(f"{number}/3") for number in (1, 2, 3)]
    assert parts[1] == MachineShare(2, 3)
    assert [[shard for shard in range(7) if part.owns(shard)] for part in parts] == [[0, 3, 6], [1, 4], [2, 5]]


@pytest.mark.parametrize("text", ["0/4", "5/4", "1/0", "1", "1/2/3", "-1/2", "a/b", "1 /2", ""])
def test_parts_without_sense_are_refused(text):
    with pytest.raises(UserError, match=r"--part must be i/n with i from 1 to n, such as 2/4 .*, got"):
        parse_part(text)
