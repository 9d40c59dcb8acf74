"""Bad samples in whole runs of two ranks."""

import json
import re

import numpy as np
import pytest

from hdscale.data.index import open_shards
from hdscale.data.order import build_order
from hdscale.data.samples import substitute
from hdscale.runs.checkpoint import newest_checkpoint
from tests.helpers.whole_runs import BAD, BATCH, STEPS, assert_same_checkpoints


@pytest.mark.parametrize("name", ["damaged-whole", "damaged-cut"])
def test_bad_samples_of_all_ranks_are_listed_once_and_replaced(name, world, recipe, two_ranks, curve):
    assert two_ranks["damaged"]["codes"][:3] == [0, 75, 0]
    folder = world.folder / "runs" / name
    lines = [json.loads(line) for line in (folder / "quarantine.jsonl").read_text().splitlines()]
    assert sorted(line["sample_id"] for line in lines) == BAD
    order = build_order(open_shards(world.folder / "shards", "train").index, recipe.data, recipe.run.seed)
    places = {int(sample_id): place for place, sample_id in enumerate(order.sample_ids(0, np.arange(60)))}
    assert {places[sample_id] // 8 % 2 for sample_id in BAD} == {0, 1}, "both ranks must meet one"
    for line in lines:
        assert line["step"] == places[line["sample_id"]] // BATCH + 1
        assert line["shown_id"] == substitute(line["sample_id"], 1, 60)
        assert (line["shard"], line["reason"]) == (
            f"train-{line['sample_id'] // 25:06d}.tar",
            "is damaged (wrong CRC32)",
        )
        assert line["name"].startswith("class")
    counts = curve(name, "bad_samples")
    assert counts == [sum(line["step"] <= step for line in lines) for step in range(1, STEPS + 1)]
    assert newest_checkpoint(folder).state["quarantine"] == BAD


def test_a_run_with_bad_samples_goes_on_bit_for_bit(world, two_ranks, curve):
    assert curve("damaged-whole") == curve("damaged-cut")
    assert_same_checkpoints(world, "damaged-whole", "damaged-cut")
    assert curve("damaged-whole") != curve("cut-z2")


def test_too_many_bad_samples_end_the_run_on_all_ranks_with_a_checkpoint(world, two_ranks, curve):
    one, two = two_ranks["damaged"]["errors"]
    assert one == two
    assert re.search(
        r"many: [45] samples of split train are bad, data.max_bad_fraction 0.05 allows 3 \(the last: ", one
    )
    lines = [
        json.loads(line) for line in (world.folder / "runs/damaged-many/quarantine.jsonl").read_text().splitlines()
    ]
    assert two_ranks["damaged"]["latest"] == f"step-{lines[-1]['step']:09d}"
    assert two_ranks["damaged"]["codes"][3] == 0  # goes on when the shards are mended
    assert len(curve("damaged-many")) == STEPS
