"""What the scenarios and the tests that judge them share."""

import math

import numpy as np
import torch

from hdscale.data.loader import SequentialLoader
from hdscale.data.order import build_order
from hdscale.runs.checkpoint import newest_checkpoint

STEPS, BATCH, STOP = 8, 16, 4  # steps 4 and 8 straddle epochs of 60 samples; steps 1 to 3 are clipped
BAD = [3, 30]


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


def relative_difference(curve, other):
    return max(abs(a - b) / abs(b) for a, b in zip(curve, other, strict=True))


def assert_same_checkpoints(world, name, other):
    found, wanted = (newest_checkpoint(world.folder / "runs" / run) for run in (name, other))
    assert found.step == wanted.step == STEPS
    assert found.state["scaler"] == wanted.state["scaler"]
    for kind in ("weight", "exp_avg", "exp_avg_sq", "buffer"):
        assert_equal_tensors(found.tensors(kind), wanted.tensors(kind))


def assert_equal_tensors(found, wanted):
    assert found.keys() == wanted.keys()
    unequal = [name for name in wanted if not torch.equal(found[name], wanted[name])]
    assert not unequal
