import numpy as np
import pytest
import torch

from hdscale.analysis.curves import attention_curves
from hdscale.types import ViTOutput
from tests.helpers.attention import GRID, PREFIX, make_batches, reference_figures

HEADS, WIDTH = 2, 4


def encode(images):
    """Q and K that depend on the image."""
    generator = torch.Generator().manual_seed(3)
    mixing = torch.randn(24, 2 * 2 * HEADS * (PREFIX + GRID**2) * WIDTH, generator=generator)
    tokens = ((images[:, 0, 0].float() / 255 - 0.5) @ mixing).view(-1, 2, 2, HEADS, PREFIX + GRID**2, WIDTH)
    return ViTOutput(None, tuple(tokens[:, 0].unbind(1)), tuple(tokens[:, 1].unbind(1)), ())


@pytest.mark.parametrize("num_images", [5, 100])
def test_curves_are_means_over_the_first_images_of_uneven_batches(num_images):
    batches = make_batches([4, 3])
    curves = attention_curves(
        encode, batches, num_images=num_images, num_prefix_tokens=PREFIX, grid_size=GRID, patch_size=8
    )
    output = encode(torch.cat([batch.images for batch in batches])[:num_images])
    for layer in range(2):
        wanted = [reference_figures(q, k, 8) for q, k in zip(output.queries[layer], output.keys[layer], strict=True)]
        assert curves.head_distance[layer] == pytest.approx(np.mean([d for d, _ in wanted]), rel=1e-5)
        assert curves.nmi[layer] == pytest.approx(np.mean([i for _, i in wanted]), rel=1e-4)
