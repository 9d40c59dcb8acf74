"""Losses, rates and checkpoints of whole runs on one and two ranks under the real launcher."""

import json

import pytest
import torch
from safetensors import safe_open

from hdscale.data.index import open_shards
from hdscale.distiller import build_distiller
from hdscale.losses import token_relation
from hdscale.teachers.targets import online_keep_indices
from hdscale.types import Targets, TeacherShapes
from tests.helpers.whole_runs import BATCH, STEPS, global_batch, plain_lr, relative_difference

# The last number: student.checkpoint_every.
TWO = [f"two-z{stage}-{how}" for stage in (2, 3) for how in ("store-0", "online-1-accumulated")]
ONE = ["one-z2-online-1", "one-z3-accumulated"]


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
    output = feature(images)
    tokens = torch.cat([output.prefix_tokens, output.patch_tokens], dim=1)  # of class token and all patches
    features = torch.stack([sample[[0, *(row + 1).tolist()]] for sample, row in zip(tokens, kept, strict=True)])
    return Targets(kept, features, relations)


def untrained(recipe):
    return build_distiller(
        recipe.student,
        recipe.relation,
        recipe.loss,
        img_size=32,
        seed=recipe.run.seed,
        teachers=TeacherShapes(feature_dim=48, feature_has_cls=True, relation_heads=3, relation_has_cls=True),
    )


@pytest.fixture(scope="module")
def plain_curve(world, recipe, teachers):
    """The same training in a loop of plain PyTorch, without ranks, engines or loader."""
    shards = open_shards(world.folder / "shards", "train")
    distiller = untrained(recipe)
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


@pytest.mark.parametrize("name", TWO)
def test_two_ranks_train_as_plain_pytorch_does(name, two_ranks, curve, plain_curve):
    assert two_ranks["curves_of_two"][name]["code"] == 0
    assert relative_difference(curve(name), plain_curve) <= 1e-5


@pytest.mark.parametrize("name", ONE)
def test_one_rank_trains_as_plain_pytorch_does(name, one_rank, curve, plain_curve):
    assert one_rank["curves_of_one"][name] == 0
    assert relative_difference(curve(name), plain_curve) <= 1e-5


@pytest.mark.parametrize("name", ["attention", "features", "dropping", "dbot", "mask_tokens", "fd", "eva"])
def test_the_paper_s_other_ways_train_the_same_on_two_ranks_of_zero_3_and_on_one(
    name, two_ranks, one_rank, curve, plain_curve
):
    assert two_ranks["others"][name] == one_rank["others"][name] == 75  # stopped after 3 of 8 steps
    assert relative_difference(curve(f"{name}-of-2"), curve(f"{name}-of-1")) <= 1e-5
    assert relative_difference(curve(f"{name}-of-1"), plain_curve[:3]) > 1e-3


def test_tars_that_plain_webdataset_wrote_train_as_ours_do(one_rank, curve):
    assert one_rank["foreign"] == 75  # stopped after 5 of 8 steps
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
@pytest.mark.parametrize("kind", ["torch", "partitioned"])
def test_recomputed_activations_give_the_same_losses_whoever_keeps_them(kind, stage, curve, two_ranks):
    name, plain = f"checkpointing-{kind}-z{stage}", "whole-z3all" if stage == "3all" else "checkpointing-none-z2"
    assert set(two_ranks["checkpointing"].values()) == {75}  # stopped after 3 of 8 steps
    losses, norms = curve(name), curve(name, "grad_norm")
    plain_losses, plain_norms = curve(plain)[:3], curve(plain, "grad_norm")[:3]
    assert len(losses) == 3
    if kind == "torch":
        # It recomputes from the very tensors of the first forward: the same kernels on the same shapes, strides and
        # addresses, whatever the processor.
        assert losses == plain_losses
        assert norms == plain_norms
        return
    # DeepSpeed recomputes from contiguous copies at other addresses. By strides and alignment, a processor's matrix
    # products and sums may take another path and add in another order: equal on some, a rounding apart on others.
    assert losses[0] == plain_losses[0]  # before anything is recomputed
    assert losses == pytest.approx(plain_losses, rel=1e-5)
    assert norms == pytest.approx(plain_norms, rel=1e-4)


@pytest.mark.parametrize("name", ["two-z2-store-0", "two-z3-online-1-accumulated"])
def test_checkpoints_hold_student_and_head_and_nothing_else(name, world, recipe, two_ranks):
    distiller = untrained(recipe)
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
    assert state["cls_in_loss"] is True
