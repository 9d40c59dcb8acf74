import os
import re

import numpy as np
import pytest
import torch

from hdscale.data.decode import decode_view
from hdscale.data.samples import load_batch, substitute, too_many_bad
from hdscale.data.views import view_parameters
from hdscale.errors import UserError
from hdscale.types import BadSample

SEED = 11
GOLDEN = [969, 1569, 345]


def load(shards, config, ids):
    ids = np.array(ids)
    return load_batch(shards, config, SEED, ids, np.full_like(ids, 2), np.full_like(ids, 6))


def test_a_batch_is_prefetched_before_its_first_picture_is_read(digits, view_config, monkeypatch):
    calls = []
    monkeypatch.setattr(type(digits), "prefetch", lambda _, ids: calls.append(ids.tolist()))
    read = type(digits).read
    monkeypatch.setattr(type(digits), "read", lambda shards, row: calls.append(row) or read(shards, row))
    batch = load(digits, view_config, [5, 3])
    assert calls == [[5, 3], 5, 3]
    # Channels innermost, so that torch need not take the pixels of a view apart.
    assert batch.images.is_contiguous(memory_format=torch.channels_last)


def test_another_sample_takes_the_place_of_a_bad_one(damaged, view_config):
    shards = damaged([4])
    batch = load(shards, view_config, [3, 4])
    shown = substitute(4, 1, shards.num_samples)
    assert batch.sample_ids.tolist() == [3, shown]
    assert batch.labels.tolist() == shards.index["label"][[3, shown]].tolist()
    assert (batch.views.tolist(), batch.epochs.tolist()) == ([2, 2], [6, 6])
    box = view_parameters(SEED, 2, shown, 8, 8)
    assert torch.equal(batch.images[1], decode_view(shards.read(shown), (8, 8), box, 8))
    (bad,) = batch.bad
    assert bad == (4, shown, "train-000000.tar", shards.member_name(4), "is damaged (wrong CRC32)")


def test_a_bad_substitute_is_replaced_and_named_too(damaged, view_config):
    first, second = (substitute(4, attempt, 1797) for attempt in (1, 2))
    batch = load(damaged([4, first]), view_config, [4])
    assert batch.sample_ids.tolist() == [second]
    assert [(bad.sample_id, bad.shown_id) for bad in batch.bad] == [(4, second), (first, second)]


def test_substitutes_never_change():
    assert [substitute(4, attempt, 1797) for attempt in (1, 2, 3)] == GOLDEN
    assert len({substitute(sample_id, 1, 10**6) for sample_id in range(1000)}) > 990


def shorten(shards):
    os.truncate(shards.folder / "train-000000.tar", int(shards.index[4]["offset"]) + 10)


def empty(shards):
    os.truncate(shards.folder / "train-000000.tar", 0)


def remove(shards):
    shards.close()
    (shards.folder / "train-000000.tar").unlink()


def exchange(shards):
    shards.close()
    (shards.folder / "train-000001.tar").replace(shards.folder / "train-000000.tar")


@pytest.mark.parametrize(
    ("accident", "reason"),
    [
        (shorten, "is damaged (wrong CRC32)"),
        (empty, "is damaged (wrong CRC32)"),
        (remove, "cannot be read (No such file or directory)"),
        (exchange, "is damaged (wrong CRC32)"),
    ],
)
def test_a_shard_that_changes_while_training_runs_gives_bad_samples(damaged, view_config, accident, reason):
    shards = damaged([])
    name = shards.member_name(4)
    accident(shards)
    batch = load(shards, view_config, [4])
    assert batch.sample_ids.tolist() != [4]
    assert (batch.bad[0].sample_id, batch.bad[0].shard, batch.bad[0].reason) == (4, "train-000000.tar", reason)
    if accident is shorten:
        assert batch.bad[0].name == name
    else:
        assert re.fullmatch(r"byte \d+|digit-.*png", batch.bad[0].name)


def test_a_sample_that_cannot_be_decoded_is_bad(digits, view_config, monkeypatch):
    original = type(digits).read
    monkeypatch.setattr(type(digits), "read", lambda self, i: b"no picture" if i == 17 else original(self, i))
    (bad,) = load(digits, view_config, [17]).bad
    assert (bad.sample_id, bad.reason) == (17, "is none of JPEG, PNG, WEBP, GIF, BMP")


def test_without_any_good_sample_the_run_ends_with_one_line(digits, view_config, monkeypatch):
    tried = []
    monkeypatch.setattr(type(digits), "read", lambda self, sample_id: tried.append(sample_id) or b"no picture")
    error = load(digits, view_config, [17])
    assert tried == [17] + [substitute(17, attempt, digits.num_samples) for attempt in range(1, 11)]
    assert isinstance(error, UserError)
    assert re.search(
        r"train-000000.tar: digit-\S+ \(sample 17\) is none of JPEG.*none of 10 others can be shown in its "
        r"place: check the disk, and run data_tools/verify_shards.py --shards \S+ --split train$",
        str(error),
    )


@pytest.mark.parametrize(
    ("fraction", "count", "ends"), [(0.001, 1, False), (0.001, 2, True), (0, 1, True), (1, 9, False)]
)
def test_more_bad_samples_than_the_fraction_end_the_work(digits, view_config, fraction, count, ends):
    config = view_config.model_copy(update={"max_bad_fraction": fraction})
    new = [BadSample(5, 6, "train-000000.tar", "digit.png", "is damaged")]
    error = too_many_bad(range(count), new, digits, config)
    assert (error is not None) == ends
    assert too_many_bad(range(count), [], digits, config) is None
