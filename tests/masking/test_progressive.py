"""Progressive masks against loops in float64."""

import numpy as np
import pytest
import torch

from hdscale.config.sections import MaskConfig
from hdscale.errors import UserError
from hdscale.masking.counts import num_kept
from hdscale.masking.progressive import (
    expected_num_keep,
    keep_least_redundant,
    progressive_keep_indices,
    stage_layers,
)


def reference_masks(stage_tokens, keep_ratio):
    """One image at a time, tokens in plain lists, float64."""
    masks = []
    for image in range(len(stage_tokens[0])):
        kept = list(range(stage_tokens[0].shape[1]))
        for stage in stage_tokens:
            tokens = stage[image].double().numpy()
            center = sum(tokens[i] for i in kept) / len(kept)
            cosine = {i: float(tokens[i] @ center / (np.linalg.norm(tokens[i]) * np.linalg.norm(center))) for i in kept}
            count = max(1, int(round(len(kept) * keep_ratio, 6)))
            kept = sorted(sorted(kept, key=lambda i: (cosine[i], i))[:count])
        masks.append(kept)
    return masks


def stages(batch, num_patches, widths, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    shared = 2.0  # real tokens have much in common: similarities crowd together
    return [(torch.randn(batch, num_patches, width, generator=generator) + shared).to(dtype) for width in widths]


@pytest.mark.parametrize("keep_ratio", [0.5, 0.7, 0.9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_progressive_masks_equal_loops_in_float64(keep_ratio, dtype):
    tokens = stages(24, 196, [64, 64, 96], dtype)
    assert progressive_keep_indices(tokens, keep_ratio).tolist() == reference_masks(tokens, keep_ratio)


def test_masks_do_not_depend_on_the_batch():
    tokens = stages(9, 196, [64, 64, 64])
    whole = progressive_keep_indices(tokens, 0.7)
    alone = torch.cat([progressive_keep_indices([stage[i : i + 1] for stage in tokens], 0.7) for i in range(9)])
    assert torch.equal(whole, alone)


def test_the_least_similar_tokens_are_kept_in_ascending_order():
    tokens = torch.tensor([[[1.0, 0.0], [1.0, 0.1], [-1.0, 0.5], [1.0, -0.1], [0.2, -1.0]]])
    kept = keep_least_redundant(tokens, 2)
    assert kept.dtype == torch.int64
    assert kept.tolist() == [[2, 4]]


def test_of_equal_tokens_the_lowest_indices_are_kept():
    assert keep_least_redundant(torch.ones(2, 50, 8), 20).tolist() == [list(range(20))] * 2
    tokens = torch.ones(1, 6, 3)
    tokens[0, 4] = torch.tensor([-1.0, 0.0, 0.0])
    assert keep_least_redundant(tokens, 3).tolist() == [[0, 1, 4]]


def test_similarity_is_to_the_mean_of_the_tokens_still_kept():
    first = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [1.0, 1.0], [1.0, 1.0]]])
    # Among all tokens of the second stage, token 1 would be the outlier; among the three kept it is token 0.
    second = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [0.0, 1.0], [1.0, 0.0], [1.0, 0.0]]])
    assert progressive_keep_indices([first], 0.6).tolist() == [[0, 1, 2]]
    assert progressive_keep_indices([first, second], 0.6).tolist() == reference_masks([first, second], 0.6) == [[0]]


def test_a_zero_token_is_similar_to_nothing():
    assert keep_least_redundant(torch.zeros(1, 4, 3), 2).tolist() == [[0, 1]]
    tokens = torch.ones(1, 4, 3)
    tokens[0, 2] = 0
    assert keep_least_redundant(tokens, 1).tolist() == [[2]]


def test_num_kept_rounds_down_and_never_drops_everything():
    assert [num_kept(196, 0.7), num_kept(137, 0.7), num_kept(95, 0.7)] == [137, 95, 66]
    assert [num_kept(196, 0.9), num_kept(176, 0.9), num_kept(158, 0.9)] == [176, 158, 142]
    assert [num_kept(196, 0.5), num_kept(98, 0.5), num_kept(49, 0.5)] == [98, 49, 24]
    assert num_kept(3, 0.1) == 1
    assert num_kept(196, 1.0) == 196


def test_num_kept_is_not_fooled_by_float_rounding():
    assert int(100 * 0.29) == 28  # what a plain product gives
    assert num_kept(100, 0.29) == 29
    assert num_kept(10, 0.7) == 7
    for total in range(1, 300):
        for keep in range(1, total + 1):
            assert num_kept(total, keep / total) == keep


def test_stages_are_at_the_start_and_the_thirds():
    assert stage_layers(24) == (0, 8, 16)
    assert stage_layers(12) == (0, 4, 8)
    assert stage_layers(12, (1, 5)) == (1, 5)


def test_two_thirds_are_of_the_depth_and_not_twice_its_rounded_third():
    assert [stage_layers(depth) for depth in (2, 4, 5, 6, 8, 32)] == [
        (0, 0, 1),
        (0, 1, 2),
        (0, 1, 3),
        (0, 2, 4),
        (0, 2, 5),
        (0, 10, 21),
    ]


@pytest.mark.parametrize("layers", [(0, 12), (-1, 3), (4, 4), (5, 2), ()])
def test_impossible_stages_are_refused(layers):
    with pytest.raises(UserError, match=r"mask\.layers must be rising block numbers from 0 to 11 .* got \["):
        stage_layers(12, layers)


def test_the_recipe_says_how_many_patches_the_student_sees():
    assert expected_num_keep(MaskConfig(), 196, 24) == 66
    assert expected_num_keep(MaskConfig(layers=(3,)), 196, 24) == 137
    assert expected_num_keep(MaskConfig(strategy="random"), 196, 24) == 68
    assert expected_num_keep(MaskConfig(strategy="direct", keep_ratio=0.5), 196, 24) == 98
    assert expected_num_keep(MaskConfig(strategy="none"), 196, 24) is None
