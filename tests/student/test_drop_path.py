"""Drop-path by sample: how often it drops, what its draws depend on, and what they do not."""

from functools import partial

import numpy as np
import pytest
import torch
from timm.layers.drop import DropPath
from torch import nn
from torch.utils.checkpoint import checkpoint

from hdscale.config.sections import LossConfig, RelationConfig, StudentConfig
from hdscale.data.order import positions_of
from hdscale.distiller import build_distiller
from hdscale.student.drop_path import SampleDropPath, draw_drop_path, use_sample_drop_path
from hdscale.types import Targets, TeacherShapes
from hdscale.vit.encoder import Recompute

CPU = torch.device("cpu")
GOLDEN_POSITIONS = [0, 1, 2, 3, 10**6, 10**9, 10**9 + 1, 10**12]
GOLDEN = [[0, 0, 0, 0, 2, 0, 0, 2], [2, 2, 2, 2, 0, 2, 2, 0]]
STUDENT = StudentConfig(
    model="vit_tiny_patch16_224",
    patch_size=8,
    embed_dim=32,
    depth=3,
    num_heads=4,
    drop_path=0.5,
    decoder="transformer",
    decoder_depth=2,
    decoder_dim=16,
    decoder_heads=2,
)


def branches(*rates):
    """A module of nothing but drop-paths, and a weight for its dtype."""
    module = nn.Sequential(*map(SampleDropPath, rates))
    module.register_parameter("weight", nn.Parameter(torch.zeros(())))
    return module


def drawn(module, positions, seed=7):
    """Draw and return the factors, (drop-paths, B)."""
    draw_drop_path(module, seed, np.asarray(positions), CPU)
    parts = [part for part in module.modules() if isinstance(part, SampleDropPath)]
    return torch.stack([torch.as_tensor(part.factors) for part in parts])


def built(seed=3):
    """A student and its decoder, with drop-paths in all blocks but the first of each."""
    teachers = TeacherShapes(feature_dim=24)
    return build_distiller(STUDENT, RelationConfig(), LossConfig(), img_size=32, seed=seed, teachers=teachers)


def gradients(distiller, positions):
    """Return loss and gradients of the micro-batch at these positions, whose samples are told apart by them."""
    random = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (16, 3, 32, 32), generator=random, dtype=torch.uint8)[positions]
    features = torch.randn(16, 16, 24, generator=random)[positions]
    draw_drop_path(distiller, 7, np.asarray(positions), CPU)
    distiller.zero_grad()
    loss = distiller(images, Targets(None, features, ())).total
    loss.backward()
    return loss.detach(), [parameter.grad.clone() for parameter in distiller.parameters()]


def test_draws_never_change_between_releases():
    assert drawn(branches(0.5, 0.5), GOLDEN_POSITIONS).tolist() == GOLDEN


def test_branches_are_dropped_at_their_rates_and_keep_their_expected_value():
    rates = torch.tensor([0.05, 0.2, 0.7])
    factors = drawn(branches(*rates.tolist()), range(20_000))
    for rate, row in zip(rates, factors, strict=True):
        assert set(row.tolist()) == {0.0, (1 / (1 - rate)).item()}
        error = (rate * (1 - rate) / 20_000).sqrt()
        assert ((row == 0).float().mean() - rate).abs() < 4 * error
        assert (row.mean() - 1).abs() < 4 * error / (1 - rate)


def test_drop_paths_samples_epochs_and_seeds_draw_independently():
    """As often alike as two fair coins, to five standard errors."""
    count = 10_000
    first, second = drawn(branches(0.5, 0.5), range(count))
    next_epoch, _ = drawn(branches(0.5, 0.5), range(count, 2 * count))
    other_seed, _ = drawn(branches(0.5, 0.5), range(count), seed=8)
    for other in (second, next_epoch, other_seed, first.roll(1)):
        assert ((first == other).float().mean() - 0.5).abs() < 5 * 0.5 / count**0.5


@pytest.mark.parametrize(("ranks", "micro_batch"), [(1, 16), (1, 2), (2, 8), (2, 4), (4, 4), (4, 1)])
def test_any_ranks_and_micro_batches_draw_alike(ranks, micro_batch):
    wanted = drawn(branches(0.3, 0.6), range(3 * 16, 4 * 16))
    found = torch.zeros_like(wanted)
    for rank in range(ranks):
        for positions in positions_of(3, rank, ranks, micro_batch, 16 // ranks // micro_batch):
            found[:, positions - 3 * 16] = drawn(branches(0.3, 0.6), positions)
    assert torch.equal(found, wanted)


def test_a_branch_is_scaled_sample_by_sample_in_training_and_left_alone_elsewhere():
    module = branches(0.5)
    (factors,) = drawn(module, range(6))
    x = torch.randn(6, 5, 8)
    assert torch.equal(module(x), torch.stack([sample * factor for sample, factor in zip(x, factors, strict=True)]))
    assert module.eval()(x) is x
    assert SampleDropPath(0.5).eval()(x) is x


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_tokens_keep_their_dtype(dtype):
    module = branches(0.2).to(dtype)
    drawn(module, range(6))
    assert module(torch.ones(6, 5, 8, dtype=dtype)).dtype == dtype


def test_a_forward_without_draws_or_with_those_of_another_micro_batch_is_a_bug():
    with pytest.raises(AssertionError, match="comes before each forward"):
        branches(0.5)(torch.ones(6, 5, 8))
    module = branches(0.5)
    drawn(module, [0])
    with pytest.raises(AssertionError, match="another micro-batch"):
        module(torch.ones(6, 5, 8))


def test_every_drop_path_of_timm_s_is_replaced_and_weights_stay_as_they_are():
    before, distiller = built().state_dict(), built()
    rates = [part.drop_prob for part in distiller.modules() if isinstance(part, DropPath)]
    use_sample_drop_path(distiller)
    assert not any(isinstance(part, DropPath) for part in distiller.modules())
    found = [part.drop_prob for part in distiller.modules() if isinstance(part, SampleDropPath)]
    assert found == rates == [0.25, 0.25, 0.5, 0.5, 0.5, 0.5]  # of two blocks of the student, one of the decoder
    after = distiller.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_together_compute_what_one_does(ranks):
    distiller = built()
    use_sample_drop_path(distiller)
    loss, whole = gradients(distiller, range(16))
    parts = [gradients(distiller, positions_of(0, rank, ranks, 16 // ranks, 1)[0]) for rank in range(ranks)]
    assert sum(loss for loss, _ in parts) / ranks == pytest.approx(loss.item(), rel=1e-5)
    for wanted, *shares in zip(whole, *(shares for _, shares in parts), strict=True):
        torch.testing.assert_close(sum(shares) / ranks, wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_recomputed_blocks_drop_what_they_have_dropped(use_reentrant):
    distiller = built()
    use_sample_drop_path(distiller)
    loss, plain = gradients(distiller, range(16))
    distiller.student.encoder.recompute = Recompute(1, partial(checkpoint, use_reentrant=use_reentrant))
    again, recomputed = gradients(distiller, range(16))
    assert torch.equal(again, loss)
    assert all(map(torch.equal, recomputed, plain))
