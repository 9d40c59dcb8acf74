"""From stored bytes to the pixels of a view: one path for everybody, the same bits every time."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import PIL
import torch
import torchvision
from torch.nn import functional as F
from torchvision.io import ImageReadMode, decode_image

from hdscale.data.pictures import is_plain, open_picture, to_rgb

if TYPE_CHECKING:
    from torch import Tensor

    from hdscale.data.views import ViewParameters

INTERPOLATION = "bicubic antialias uint8"
"""How crops are resized: part of the fingerprint of views."""


def decoder_version() -> str:
    """Name the decoders and their versions: other versions may give other pixels."""
    return f"torchvision {torchvision.__version__}, torch {torch.__version__}, pillow {PIL.__version__}"


def decode_rgb(data: bytes) -> Tensor:
    """Decode a picture of any mode.

    JPEG and PNG of 8 bits, grey or RGB, take torchvision's fast decoder; CMYK, 16 bits, palettes, transparency (over
    white) and WebP take Pillow, and so does what the fast decoder refuses. The bytes alone decide.

    Returns:
        (3, H, W) uint8, RGB.

    Raises:
        BadPicture: nobody can decode it.
    """
    image = open_picture(data)
    if is_plain(image, data):
        try:
            return decode_image(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode=ImageReadMode.RGB)
        except RuntimeError:
            pass  # stricter than Pillow
    return torch.from_numpy(np.array(to_rgb(image))).permute(2, 0, 1)  # (3, H, W)


def train_view(image: Tensor, parameters: ViewParameters, img_size: int) -> Tensor:
    """Cut the crop out of a picture, resize it and flip it.

    Args:
        image: (3, H, W) uint8.
        parameters: from `view_parameters`.
        img_size: side of the result, in pixels.

    Returns:
        (3, img_size, img_size) uint8, contiguous.
    """
    left, top, width, height, flip = parameters
    resized = _resize(image[:, top : top + height, left : left + width], img_size)
    return (resized.flip(-1) if flip else resized).contiguous()


def eval_view(image: Tensor, img_size: int) -> Tensor:
    """Return the central square of a picture, resized: the view of held-out samples.

    Cropping before resizing bounds the memory of a long, thin picture.

    Args:
        image: (3, H, W) uint8.
        img_size: side of the result, in pixels.

    Returns:
        (3, img_size, img_size) uint8, contiguous.
    """
    height, width = image.shape[1:]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return _resize(image[:, top : top + side, left : left + side], img_size).contiguous()


def _resize(image: Tensor, img_size: int) -> Tensor:
    if image.shape[1:] == (img_size, img_size):
        return image
    batch = image[None].contiguous(memory_format=torch.channels_last)  # twice as fast as the strided crop
    return F.interpolate(batch, (img_size, img_size), mode="bicubic", align_corners=False, antialias=True)[0]
