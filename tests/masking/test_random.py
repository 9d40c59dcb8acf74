"""Random masks are a pure function of seed, view and sample."""

import numpy as np
import torch

from hdscale.masking.random import random_keep_indices

GOLDEN = [[0, 7, 12, 14, 15], [0, 2, 6, 7, 10], [0, 2, 3, 8, 13]]


def test_random_masks_never_change_between_releases():
    assert random_keep_indices(np.array([0, 1, 14_197_121]), np.array([0, 1, 3]), 16, 5, seed=7).tolist() == GOLDEN


def test_a_mask_depends_on_its_own_sample_and_view_only():
    ids, views = torch.tensor([5, 9, 5, 2]), torch.tensor([0, 1, 1, 0])
    together = random_keep_indices(ids, views, 196, 68, seed=3)
    assert together.dtype == torch.int64
    assert together.shape == (4, 68)
    for row in range(4):
        alone = random_keep_indices(ids[row : row + 1], int(views[row]), 196, 68, seed=3)
        assert torch.equal(together[row : row + 1], alone)
    assert not torch.equal(together[0], together[2])
    assert not torch.equal(together, random_keep_indices(ids, views, 196, 68, seed=4))


def test_indices_ascend_and_every_patch_is_equally_likely():
    kept = random_keep_indices(np.arange(4000), 0, 20, 7, seed=2**63 - 1)
    assert (kept.diff(dim=1) > 0).all()
    share = torch.bincount(kept.flatten(), minlength=20) / 4000
    assert (share - 7 / 20).abs().max() < 5 * (0.35 * 0.65 / 4000) ** 0.5
