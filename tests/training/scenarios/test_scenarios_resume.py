"""Whole runs that stop go on as if they had not."""

import json
import math

import pytest
from safetensors.torch import load_file

from hdscale.data.index import open_shards
from tests.helpers.whole_runs import (
    BATCH,
    STEPS,
    STOP,
    assert_equal_tensors,
    assert_same_checkpoints,
    global_batch,
    relative_difference,
)


@pytest.mark.parametrize("stage", ["2", "3all"])
def test_a_stopped_run_goes_on_bit_for_bit(stage, world, two_ranks, curve):
    found = two_ranks["resume"][stage]
    # In one go; stopped; finished; started once more, with nothing left to do.
    assert found["codes"] == [0, 75, 0, 0]
    assert not found["done_early"]
    assert (world.folder / "runs" / f"cut-z{stage}" / "DONE").exists()
    for column in ("loss", "loss_feature", "loss_relation", "grad_norm"):
        assert curve(f"cut-z{stage}", column) == curve(f"whole-z{stage}", column)
    assert len(curve(f"cut-z{stage}")) == STEPS
    assert_same_checkpoints(world, f"cut-z{stage}", f"whole-z{stage}")


def test_a_signal_to_any_rank_stops_all_with_a_checkpoint_that_goes_on_bit_for_bit(world, two_ranks, curve):
    assert two_ranks["interrupt"] == {"code": 75, "latest": f"step-{STOP:09d}", "again": 0}
    assert curve("interrupted") == curve("whole-z2")
    assert_same_checkpoints(world, "interrupted", "whole-z2")


def test_a_run_that_measures_gradient_norms_is_the_same_run_bit_for_bit(world, two_ranks, curve):
    folders = [world.folder / "runs" / name for name in ("interrupted", "whole-z2")]
    measured, plain = (list(map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())) for folder in folders)
    extra = [line.keys() - other.keys() for line, other in zip(measured, plain, strict=True)]
    norms = {f"gradient_norm_{what}" for what in ("feature", "relation", "seconds")}
    assert extra == [norms if step in (3, 6) else set() for step in range(1, STEPS + 1)]
    assert all(0 < measured[step - 1][name] < 600 for step in (3, 6) for name in norms)
    for column in ("loss", "loss_feature", "loss_relation", "grad_norm"):
        assert curve("interrupted", column) == curve("whole-z2", column)
    assert_same_checkpoints(world, "interrupted", "whole-z2")


ELASTIC = [(ranks, source, stage) for ranks in (2, 1) for source, stage in (("2", "2"), ("2", "3all"), ("3all", "2"))]


@pytest.mark.parametrize(("ranks", "source", "stage"), ELASTIC)
def test_a_checkpoint_of_two_ranks_loads_at_any_stage_and_number_of_ranks(
    ranks, source, stage, world, recipe, two_ranks, one_rank, curve
):
    name = f"elastic-{source}-to-{stage}-of-{ranks}"
    found = (two_ranks if ranks == 2 else one_rank)["elastic"][name]
    loaded = {}
    for rank in range(ranks):
        shard = load_file(world.folder / f"{name}-{rank}.safetensors")
        assert not loaded.keys() & shard.keys()
        loaded |= shard
    saved = {}
    for file in (world.folder / "runs" / f"elastic-from-{source}/checkpoints/step-{STOP:09d}").glob("*.safetensors"):
        saved |= load_file(file)
    assert any(tensor.abs().max() > 0 for name, tensor in saved.items() if name.startswith("exp_avg_sq/"))
    assert_equal_tensors(loaded, saved)

    shards = open_shards(world.folder / "shards", "train")
    for step in range(STOP, STEPS):
        given = [sample for rank in range(ranks) for sample in micro_steps(found["ids"][rank], step - STOP, ranks)]
        assert given == global_batch(recipe, shards, step)[0]
    assert found["code"] == 0
    assert relative_difference(curve(name), curve("whole-z2")) <= 1e-5


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("ranks", [2, 1])
def test_a_checkpoint_of_two_ranks_goes_on_bit_for_bit_on_any_number_of_them(ranks, world, recipe, curve):
    """One rank leaves what two would have left, so that the run may go back to two.

    The last steps are not clipped: each number of ranks adds up the gradient's norm in an order of its own.
    """
    assert max(curve("whole-z2", "grad_norm")[STOP:]) < recipe.optim.clip
    name = f"elastic-2-to-2-of-{ranks}"
    assert curve(name) == curve("whole-z2")
    assert_same_checkpoints(world, name, "whole-z2")


def micro_steps(batches, step, ranks):
    """Sample ids of one rank's micro-batches of 8 in one step of 16."""
    count = BATCH // 8 // ranks
    return [sample for batch in batches[step * count : (step + 1) * count] for sample in batch]


@pytest.mark.parametrize("stage", ["2", "3"])
def test_bf16_runs_keep_relations_in_float32_and_go_on_bit_for_bit(stage, two_ranks, curve):
    found = two_ranks["bf16"][stage]
    assert found["codes"] == [0, 75, 0]
    assert found["dtypes"] == {
        "images": "uint8",
        "weights": "bfloat16",
        "features": "bfloat16",
        "relations": "float32",
        "keep_indices": "int64",
    }
    losses = curve(f"bf16-whole-z{stage}")
    assert len(losses) == 4
    assert all(map(math.isfinite, losses))
    assert curve(f"bf16-cut-z{stage}") == losses


def test_an_optimizer_on_the_cpu_trains_the_same_and_resumes_bit_by_bit(curve, two_ranks):
    wanted = {"whole": [75], "cut": [75, 75], "optimizers": ["DeepSpeedCPUAdam"]}
    assert two_ranks["offloaded"] == wanted
    plain, whole = curve("two-z2-store-0")[:STOP], curve("offload-whole")
    assert len(whole) == STOP
    # DeepSpeed compiles its CPU Adam for the machine: with fused multiply-adds or without, it rounds as torch does, or
    # not.
    assert whole == pytest.approx(plain, rel=1e-6)
    # The same kernels on the same shapes, and a checkpoint keeps float32 as it is: on one machine, equal on any.
    assert curve("offload-cut") == whole
