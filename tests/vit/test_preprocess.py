import numpy as np
import torch
from PIL import Image

from hdscale.vit.preprocess import Preprocess

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def pictures(side: int) -> torch.Tensor:
    return torch.randint(0, 256, (2, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_pixels_are_normalised_as_in_float64_numpy():
    images = pictures(24)
    reference = (images.double().numpy() / 255 - np.reshape(MEAN, (3, 1, 1))) / np.reshape(STD, (3, 1, 1))
    ours = Preprocess(24, MEAN, STD)(images, torch.float32)
    np.testing.assert_allclose(ours.numpy(), reference, rtol=1e-5, atol=1e-6)


def test_half_precision_rounds_the_result_once_and_not_mean_or_deviation():
    images, preprocess = pictures(24), Preprocess(24, MEAN, STD)
    exact = preprocess(images, torch.float32)
    assert torch.equal(preprocess(images, torch.float16), exact.half())
    rounded = (images.half() / 255 - torch.tensor(MEAN).half().view(3, 1, 1)) / torch.tensor(STD).half().view(3, 1, 1)
    assert not torch.equal(exact.half(), rounded)


def test_another_size_is_reached_by_the_antialiased_bicubic_resize_of_pillow():
    images = pictures(56)
    ours = Preprocess(49, (0, 0, 0), (1 / 255,) * 3)(images, torch.float32)  # pixels come out as 0..255
    for image, resized in zip(images, ours, strict=True):
        for channel in range(3):
            band = Image.fromarray(image[channel].numpy()).convert("F")
            reference = np.asarray(band.resize((49, 49), Image.Resampling.BICUBIC)).clip(0, 255)
            np.testing.assert_allclose(resized[channel].numpy(), reference, atol=0.02)


def test_interpolation_never_leaves_the_range_of_pixels():
    images = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    images[..., 16:] = 255
    ours = Preprocess(48, (0, 0, 0), (1, 1, 1))(images, torch.float32)
    assert ours.min() == 0
    assert ours.max() == 1


def test_models_get_channels_outermost_however_the_loader_stores_them():
    images = pictures(24)
    stored = images.contiguous(memory_format=torch.channels_last)
    ours = Preprocess(24, MEAN, STD)(stored, torch.float32)
    assert ours.is_contiguous()
    assert torch.equal(ours, Preprocess(24, MEAN, STD)(images, torch.float32))
