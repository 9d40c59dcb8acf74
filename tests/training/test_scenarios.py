"""Whole runs on one and two ranks under the real launcher; scenarios.py makes them, here they are judged."""

import json
import math
import re

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from hdscale.config.loading import load_recipe
from hdscale.config.recipe import TeacherConfig
from hdscale.data.index import open_shards
from hdscale.data.loader import SequentialLoader
from hdscale.data.order import build_order
from hdscale.data.samples import substitute
from hdscale.distiller import build_distiller
from hdscale.losses import token_relation
from hdscale.masking.store import MaskStore
from hdscale.runs.checkpoint import newest_checkpoint
from hdscale.teachers.build import build_teacher
from hdscale.teachers.targets import online_keep_indices
from hdscale.teachers.weights import weights_digest
from hdscale.types import Targets, TeacherShapes

STEPS, BATCH, STOP = 20, 16, 4
BAD = [3, 30]
# The last number: student.checkpoint_every.
TWO = [f"two-z{stage}-{how}" for stage in (2, 3) for how in ("store-0", "online-1", "accumulated")]
ONE = ["one-z2-accumulated", "one-z2-online-1", "one-z3-store-0"]


@pytest.fixture(scope="module")
def recipe(world):
    return load_recipe(world.recipe)


@pytest.fixture(scope="module")
def teachers(recipe):
    """Feature and relation teacher, unpruned, with everything a test may ask for."""
    feature = build_teacher(recipe.feature_teacher, grid_size=8)
    relation = build_teacher(
        recipe.relation_teacher, grid_size=8, relation_layers=recipe.relation.layers, mask=recipe.mask
    )
    return feature, relation


def global_batch(recipe, shards, step):
    """Positions step * 16 ... of the endless stream: ids in order, and uint8 pictures."""
    order = build_order(shards.index, recipe.data, recipe.run.seed)
    ids, images = [], []
    for position in range(step * BATCH, (step + 1) * BATCH):
        epoch, place = divmod(position, shards.num_samples)
        ids += order.sample_ids(epoch, np.array([place])).tolist()
        view = epoch % recipe.data.views
        (batch,) = SequentialLoader(shards, recipe.data, recipe.run.seed, sample_ids=ids[-1:], view=view, batch_size=1)
        images.append(batch.images)
    return ids, torch.cat(images)


def plain_lr(step, peak=1e-3, low=1e-5, warmup=3):
    if step < warmup:
        return peak * (step + 1) / warmup
    return low + (peak - low) * (1 + math.cos(math.pi * (step - warmup) / (STEPS - warmup))) / 2


def at_rows(tokens, kept):
    """Prefix and kept rows of (B, A, 1 + N, E)."""
    rows = torch.cat([torch.zeros(len(kept), 1, dtype=torch.int64), kept + 1], dim=1)
    return torch.stack([sample[:, row] for sample, row in zip(tokens, rows, strict=True)])


def plain_targets(recipe, teachers, images):
    feature, relation = teachers
    kept = online_keep_indices(relation, images, recipe.mask)
    output = relation(images)
    relations = tuple(
        token_relation(at_rows(query, kept), at_rows(key, kept), "scaled", "per_head")
        for query, key in zip(output.queries, output.keys, strict=True)
    )
    tokens = feature(images).patch_tokens
    return Targets(kept, torch.stack([sample[row] for sample, row in zip(tokens, kept, strict=True)]), relations)


@pytest.fixture(scope="module")
def plain_curve(world, recipe, teachers):
    """The same training in a loop of plain PyTorch, without ranks, engines or loader."""
    shards = open_shards(world.folder / "shards", "train")
    distiller = build_distiller(
        recipe.student,
        recipe.relation,
        recipe.loss,
        img_size=32,
        seed=recipe.run.seed,
        teachers=TeacherShapes(feature_dim=48, relation_heads=3, teacher_has_cls=True),
    )
    named = dict(distiller.named_parameters())
    undecayed = {name for name in named if name.endswith(("bias", "cls_token")) or "norm" in name}
    optimizer = torch.optim.AdamW(
        [
            {"params": [named[name] for name in named if name not in undecayed], "weight_decay": 0.05},
            {"params": [named[name] for name in sorted(undecayed)], "weight_decay": 0.0},
        ],
        betas=(0.9, 0.95),
    )
    losses, norms = [], []
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = plain_lr(step)
        _, images = global_batch(recipe, shards, step)
        loss = distiller(images, plain_targets(recipe, teachers, images)).total
        optimizer.zero_grad()
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(distiller.parameters(), recipe.optim.clip).item())
        optimizer.step()
        losses.append(loss.item())
    # Both sides of the clipping threshold are in the test.
    assert min(norms) < recipe.optim.clip < max(norms)
    return losses


def relative_difference(curve, other):
    return max(abs(a - b) / abs(b) for a, b in zip(curve, other, strict=True))


@pytest.mark.parametrize("name", TWO)
def test_two_ranks_train_as_plain_pytorch_does(name, two_ranks, curve, plain_curve):
    assert two_ranks["curves_of_two"][name]["code"] == 0
    assert relative_difference(curve(name), plain_curve) <= 1e-5


@pytest.mark.parametrize("name", ONE)
def test_one_rank_trains_as_plain_pytorch_does(name, one_rank, curve, plain_curve):
    assert one_rank["curves_of_one"][name] == 0
    assert relative_difference(curve(name), plain_curve) <= 1e-5


@pytest.mark.parametrize("name", ["attention", "features", "dropping", "dbot", "mask_tokens", "fd", "eva"])
def test_the_paper_s_other_ways_train_the_same_on_two_ranks_of_zero_3_and_on_one(name, two_ranks, one_rank, curve):
    assert two_ranks["others"][name] == one_rank["others"][name] == 75  # stopped after 4 of 20 steps
    assert relative_difference(curve(f"{name}-of-2"), curve(f"{name}-of-1")) <= 1e-5
    assert relative_difference(curve(f"{name}-of-1"), curve("one-z3-store-0")[:4]) > 1e-3


def test_tars_that_plain_webdataset_wrote_train_as_ours_do(one_rank, curve):
    assert one_rank["foreign"] == 75  # stopped after 5 of 20 steps
    assert curve("foreign") == curve("one-z2-online-1")[:5]


@pytest.mark.parametrize("name", TWO)
def test_adamw_steps_at_the_schedule_s_rates_and_the_log_shows_them(name, two_ranks, curve):
    wanted = [plain_lr(step) for step in range(STEPS)]
    steps = two_ranks["curves_of_two"][name]["steps"]
    calls = len(steps) // STEPS  # ZeRO calls AdamW once for each group of parameters, or part of one
    assert calls >= 2
    assert len(steps) == calls * STEPS
    for number, (optimizer, rates) in enumerate(steps):
        assert optimizer == "AdamW"
        assert rates == pytest.approx([wanted[number // calls]] * len(rates), rel=1e-12)
    assert curve(name, "lr") == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize("stage", ["2", "3all"])
def test_a_stopped_run_goes_on_bit_for_bit(stage, world, two_ranks, curve):
    found = two_ranks["resume"][stage]
    # In one go; stopped; finished; started once more, with nothing left to do.
    assert found["codes"] == [0, 75, 0, 0]
    assert not found["done_early"]
    assert (world.folder / "runs" / f"cut-z{stage}" / "DONE").exists()
    for column in ("loss", "loss_feature", "loss_relation", "grad_norm"):
        assert curve(f"cut-z{stage}", column) == curve(f"whole-z{stage}", column)
    assert len(curve(f"cut-z{stage}")) == 10
    assert_same_checkpoints(world, f"cut-z{stage}", f"whole-z{stage}")


def test_a_signal_to_any_rank_stops_all_with_a_checkpoint_that_goes_on_bit_for_bit(world, two_ranks, curve):
    assert two_ranks["interrupt"] == {"code": 75, "latest": f"step-{STOP:09d}", "again": 0}
    assert curve("interrupted") == curve("whole-z2")
    assert_same_checkpoints(world, "interrupted", "whole-z2")


def assert_same_checkpoints(world, name, other):
    found, wanted = (newest_checkpoint(world.folder / "runs" / run) for run in (name, other))
    assert found.step == wanted.step == 10
    assert found.state["scaler"] == wanted.state["scaler"]
    for kind in ("weight", "exp_avg", "exp_avg_sq", "buffer"):
        assert_equal_tensors(found.tensors(kind), wanted.tensors(kind))


def assert_equal_tensors(found, wanted):
    assert found.keys() == wanted.keys()
    unequal = [name for name in wanted if not torch.equal(found[name], wanted[name])]
    assert not unequal


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
    for step in range(STOP, STOP + 3):
        given = [sample for rank in range(ranks) for sample in micro_steps(found["ids"][rank], step - STOP, ranks)]
        assert given == global_batch(recipe, shards, step)[0]
    assert found["code"] == 75
    assert relative_difference(curve(name), curve("two-z2-store-0")[: STOP + 3]) <= 1e-5


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
    assert counts == [sum(line["step"] <= step for line in lines) for step in range(1, 11)]
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
    assert len(curve("damaged-many")) == 10


def micro_steps(batches, step, ranks):
    """Sample ids of one rank's micro-batches of 8 in one step of 16."""
    count = BATCH // 8 // ranks
    return [sample for batch in batches[step * count : (step + 1) * count] for sample in batch]


def test_sharded_teachers_leave_half_of_their_weights_on_each_of_two_ranks(two_ranks):
    found = two_ranks["teachers"]
    for held in found["held"]:
        assert held.keys() == {"feature_teacher", "relation_teacher"}
        for name, counts in held.items():
            assert len(counts) == 3  # before, and after each of two steps
            assert 0.49 * found["totals"][name] < min(counts) <= max(counts) <= 0.55 * found["totals"][name]


def test_sharded_teachers_say_the_same_as_whole_ones_bit_for_bit(two_ranks):
    assert two_ranks["teachers"]["equal"] == [True, True]


def test_teacher_weights_have_the_same_hash_at_the_end_as_freshly_built_ones(recipe, two_ranks):
    feature = build_teacher(recipe.feature_teacher, role="feature", grid_size=8)
    relation = build_teacher(
        recipe.relation_teacher, role="relation", grid_size=8, relation_layers=recipe.relation.layers
    )
    wanted = {
        name: weights_digest(dict(teacher.named_parameters()) | dict(teacher.named_buffers()))
        for name, teacher in (("feature_teacher", feature), ("relation_teacher", relation))
    }
    assert two_ranks["teachers"]["digests"] == [[wanted, wanted], [wanted, wanted]]


def test_a_teacher_that_changes_fails_the_run(one_rank):
    assert "a teacher's weights have changed" in one_rank["spoiled_teacher"]["error"]


@pytest.mark.parametrize("name", ["two-z2-store-0", "two-z3-online-1"])
def test_checkpoints_hold_student_and_head_and_nothing_else(name, world, recipe, two_ranks):
    distiller = build_distiller(
        recipe.student,
        recipe.relation,
        recipe.loss,
        img_size=32,
        seed=0,
        teachers=TeacherShapes(feature_dim=48, relation_heads=3, teacher_has_cls=True),
    )
    shapes = {name: parameter.shape for name, parameter in distiller.named_parameters()}
    wanted = {f"{kind}/{name}": shape for kind in ("weight", "exp_avg", "exp_avg_sq") for name, shape in shapes.items()}
    wanted |= {f"buffer/{name}": distiller.state_dict()[name].shape for name in distiller.state_dict() - shapes.keys()}
    folder = world.folder / "runs" / name / "checkpoints" / f"step-{STEPS:09d}"
    files = sorted(path.name for path in folder.iterdir())
    assert files == [
        "manifest.json",
        "state.json",
        "student-00000-of-00002.safetensors",
        "student-00001-of-00002.safetensors",
    ]
    found, sizes = {}, []
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as reader:
            assert not found.keys() & set(reader.keys())
            found |= {key: reader.get_tensor(key).shape for key in reader.keys()}  # noqa: SIM118
        sizes.append(file.stat().st_size)
    assert found == wanted
    assert max(sizes) < 0.6 * sum(sizes)
    state = json.loads((folder / "state.json").read_text())
    assert (state["step"], state["cursor"], state["optimizer_step"]) == (STEPS, STEPS * BATCH, STEPS)


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
    assert [line.split(":")[0] for line in lines[1:]] == ["step 1", "step 2", "FLOPs an image", "peak memory a rank"]
    assert float(lines[3].split(": ")[1].split()[0]) > 0
    assert len(lines[4].split(": ")[1].split(", ")) == 3  # two ranks, and a remark
    assert not (world.folder / "runs/smoke").exists()


@pytest.mark.parametrize("stage", ["2", "3all"])
@pytest.mark.parametrize("kind", ["torch", "partitioned"])
def test_recomputed_activations_give_the_same_losses_whoever_keeps_them(kind, stage, curve, two_ranks):
    name, plain = f"checkpointing-{kind}-z{stage}", f"checkpointing-none-z{stage}"
    assert two_ranks["checkpointing"][name] == two_ranks["checkpointing"][plain] == 75
    losses, norms = curve(name), curve(name, "grad_norm")
    assert len(losses) == 4
    if kind == "torch":
        # It recomputes from the very tensors of the first forward: the same kernels on the same shapes, strides and
        # addresses, whatever the processor.
        assert losses == curve(plain)
        assert norms == curve(plain, "grad_norm")
        return
    # DeepSpeed recomputes from contiguous copies at other addresses. By strides and alignment, a processor's matrix
    # products and sums may take another path and add in another order: equal on some, a rounding apart on others.
    assert losses[0] == curve(plain)[0]  # before anything is recomputed
    assert losses == pytest.approx(curve(plain), rel=1e-5)
    assert norms == pytest.approx(curve(plain, "grad_norm"), rel=1e-4)


def test_an_optimizer_on_the_cpu_trains_the_same_and_resumes_bit_by_bit(curve, two_ranks):
    wanted = {"none": [75], "whole": [75], "cut": [75, 75], "optimizers": ["DeepSpeedCPUAdam"]}
    assert two_ranks["offloaded"] == wanted
    plain, whole = curve("offload-none"), curve("offload-whole")
    assert len(whole) == 6
    # DeepSpeed compiles its CPU Adam for the machine: with fused multiply-adds or without, it rounds as torch does, or
    # not.
    assert whole == pytest.approx(plain, rel=1e-6)
    # The same kernels on the same shapes, and a checkpoint keeps float32 as it is: on one machine, equal on any.
    assert curve("offload-cut") == whole
