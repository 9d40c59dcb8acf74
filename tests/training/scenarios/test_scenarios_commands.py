"""Masks, pretrained teachers and smoke runs, made on ranks."""

import json
import math

import pytest
import torch

from hdscale.config.recipe import TeacherConfig
from hdscale.data.index import open_shards
from hdscale.data.loader import SequentialLoader
from hdscale.masking.store import MaskStore
from hdscale.runs.checkpoint import newest_checkpoint
from hdscale.teachers.build import build_teacher
from hdscale.teachers.targets import online_keep_indices


@pytest.mark.parametrize("micro_batch_size", [1, 5, 16])
def test_masks_made_on_two_ranks_are_the_online_masks_of_one_rank(micro_batch_size, world, recipe, teachers, two_ranks):
    assert two_ranks["masks"]["codes"] == [0, 0]
    store, shards = MaskStore.open(world.folder / "masks"), open_shards(world.folder / "shards", "train")
    for view in range(2):
        loader = SequentialLoader(
            shards, recipe.data, recipe.run.seed, sample_ids=range(60), view=view, batch_size=micro_batch_size
        )
        for batch in loader:
            wanted = online_keep_indices(teachers[1], batch.images, recipe.mask)
            assert wanted.shape[1] == 21  # 64 -> 44 -> 30 -> 21
            assert torch.equal(store.keep_indices(batch.sample_ids, view), wanted)


def test_an_interrupted_precomputation_goes_on_where_it_stopped(two_ranks):
    found = two_ranks["masks"]
    assert sorted(found["before"]) == ["view-0000/part-00000.npy", "view-0001/part-00000.npy"]
    assert found["after"] == found["before"]
    assert found["other_part_untouched"]


@pytest.mark.parametrize("method", ["mae", "supervised"])
def test_a_pretrained_encoder_is_a_teacher_file(method, world, one_rank):
    assert one_rank["pretraining"][method] == 0
    run = world.folder / "runs" / f"pretrained-{method}"
    teacher = build_teacher(TeacherConfig(source="file", weights=str(run / "encoder.safetensors")), grid_size=8)
    weights = newest_checkpoint(run).tensors("weight")
    trained = {
        name.removeprefix("encoder.encoder.model."): tensor
        for name, tensor in weights.items()
        if name.startswith("encoder.")
    }
    state = teacher.encoder.model.state_dict()
    assert trained.keys() <= state.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in trained.items())
    losses = [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 2
    assert all(map(math.isfinite, losses))


@pytest.mark.parametrize("stage", ["2", "3"])
def test_a_smoke_run_prints_its_figures_once_and_leaves_nothing_behind(stage, world, two_ranks):
    (code, text), (other_code, other_text) = two_ranks["smoke_run"][stage]
    assert (code, other_code, other_text) == (0, 0, "")
    lines = text.splitlines()
    assert lines[0].startswith(f"smoke run of smoke: 2 ranks, ZeRO-{stage}, fp32, micro-batch 1, no accumulation")
    against = "FLOPs against the feature teacher alone, no masks"
    heads = ["step 1", "step 2", "FLOPs an image", against, "peak memory a rank"]
    assert [line.split(":")[0] for line in lines[1:]] == heads
    assert float(lines[3].split(": ")[1].split()[0]) > 0
    assert 0.5 < float(lines[4].split(": ")[1].split()[0]) < 1  # 21 of 64 patches
    assert len(lines[5].split(": ")[1].split(", ")) == 3  # two ranks, and a remark
    assert not (world.folder / "runs/smoke").exists()
