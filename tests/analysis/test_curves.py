"""Per-head attention statistics through whole batches: loops in float64, and patterns whose figures are known."""

import math

import pytest
import torch

from hdscale.analysis.curves import attention_curves, over_heads
from hdscale.types import Batch, ViTOutput
from tests.helpers.attention import GRID, PREFIX, make_batches, reference_means

HEADS, WIDTH = 2, 4


def encode(images):
    """Q and K that depend on the image."""
    generator = torch.Generator().manual_seed(3)
    mixing = torch.randn(24, 2 * 2 * HEADS * (PREFIX + GRID**2) * WIDTH, generator=generator)
    tokens = ((images[:, 0, 0].float() / 255 - 0.5) @ mixing).view(-1, 2, 2, HEADS, PREFIX + GRID**2, WIDTH)
    return ViTOutput(None, tuple(tokens[:, 0].unbind(1)), tuple(tokens[:, 1].unbind(1)), ())


@pytest.mark.parametrize("num_images", [8, 100])
def test_curves_are_means_over_the_first_images_of_uneven_batches(num_images):
    batches = make_batches([4, 3, 2])
    curves = attention_curves(
        encode, batches, num_images=num_images, num_prefix_tokens=PREFIX, grid_size=GRID, patch_size=8
    )
    output = encode(torch.cat([batch.images for batch in batches])[:num_images])
    assert len(curves.head_distance) == len(curves.nmi) == 2
    for layer in range(2):
        distances, mutual_info = reference_means(output.queries[layer], output.keys[layer], 8)
        assert len(distances) == HEADS
        assert curves.head_distance[layer] == pytest.approx(distances, rel=1e-6)
        assert curves.nmi[layer] == pytest.approx(mutual_info, rel=1e-6)


# Attention of which every figure is known: patches of 4 x 4, 10 px apart.
SIDE, PIXELS = 4, 10
NUM_PATCHES = SIDE**2


def swapped(down, across):
    """Every query looks at one other patch, `down` rows and `across` columns away; no two at the same one."""
    return [(place // SIDE ^ down) * SIDE + (place % SIDE ^ across) for place in range(NUM_PATCHES)]


def mean_distance(places):
    return PIXELS * sum(math.dist((q // SIDE, q % SIDE), (k // SIDE, k % SIDE)) for q, k in places) / len(places)


ITSELF, NEXT, BELOW = swapped(0, 0), swapped(0, 1), swapped(2, 0)
DIAGONAL = swapped(2, 1)
CORNER = [0] * NUM_PATCHES
UNIFORM = None
# Pattern: its distance in pixels, its NMI.
KNOWN = {
    "itself": (ITSELF, 0.0, 1.0),
    "next": (NEXT, 10.0, 1.0),
    "below": (BELOW, 20.0, 1.0),
    "diagonal": (DIAGONAL, math.sqrt(500), 1.0),
    "corner": (CORNER, mean_distance(list(enumerate(CORNER))), 0.0),
    "uniform": (UNIFORM, mean_distance([(q, k) for q in range(NUM_PATCHES) for k in range(NUM_PATCHES)]), 0.0),
}
# By layer and kind of image: one pattern per head.
HEADS_OF = [
    [["itself", "next", "below", "diagonal", "uniform"], ["below", "next", "corner", "uniform", "uniform"]],
    [["corner", "uniform", "next", "itself", "below"], ["corner", "next", "below", "uniform", "itself"]],
]


def encode_patterns(images):
    """Q and K whose attention is exactly a pattern per head; the first pixel says which kind of image it is.

    The class token draws most of it, and is taken out.
    """
    queries, keys = [], []
    for patterns in HEADS_OF:
        query = torch.zeros(len(images), len(patterns[0]), 1 + NUM_PATCHES, 1 + NUM_PATCHES)
        query[..., 0] = 2000.0
        for image, kind in enumerate(images[:, 0, 0, 0].tolist()):
            for head, name in enumerate(patterns[kind]):
                if (pattern := KNOWN[name][0]) is not UNIFORM:
                    rows = torch.arange(1, 1 + NUM_PATCHES)
                    query[image, head, rows, torch.tensor(pattern) + 1] = 1000.0
        queries.append(query)
        keys.append(torch.eye(1 + NUM_PATCHES).expand_as(query))
    return ViTOutput(None, tuple(queries), tuple(keys), ())


def batch_of(kinds):
    images = torch.zeros(len(kinds), 3, 40, 40, dtype=torch.uint8)
    images[:, 0, 0, 0] = torch.tensor(kinds, dtype=torch.uint8)
    ids = torch.arange(len(kinds))
    return Batch(images, ids, ids, ids, ids, None)


@pytest.mark.parametrize(("num_images", "shares"), [(7, (4 / 7, 3 / 7)), (8, (4 / 8, 4 / 8)), (5, (4 / 5, 1 / 5))])
def test_every_head_has_its_own_exact_figures_on_one_hot_and_uniform_attention(num_images, shares):
    batches = [batch_of([0, 0, 1]), batch_of([0, 0, 1]), batch_of([1, 1])]
    curves = attention_curves(
        encode_patterns, batches, num_images=num_images, num_prefix_tokens=1, grid_size=SIDE, patch_size=PIXELS
    )
    for layer, by_kind in enumerate(HEADS_OF):
        for figure, values in enumerate(curves, start=1):
            wanted = [
                sum(share * KNOWN[name][figure] for share, name in zip(shares, names, strict=True))
                for names in zip(*by_kind, strict=True)
            ]
            assert len(values) == 2
            assert values[layer] == pytest.approx(wanted, rel=1e-12, abs=1e-12)


def test_the_spread_of_heads_is_that_of_all_heads_there_are():
    eight, alone, agreeing = over_heads([(2.0, 4.0, 4.0, 4.0, 5.0, 5.0, 7.0, 9.0), (3.5,), (0.25, 0.25)])
    assert eight == pytest.approx((5.0, 2.0, 2.0, 9.0), rel=1e-15)  # by n - 1 it would be 2.14
    assert alone == (3.5, 0.0, 3.5, 3.5)
    assert agreeing == (0.25, 0.0, 0.25, 0.25)


def test_heads_of_a_student_that_diverged_have_no_spread_and_stop_nothing():
    ((mean, deviation, _, _),) = over_heads([(1.0, math.nan)])
    assert math.isnan(mean)
    assert math.isnan(deviation)
