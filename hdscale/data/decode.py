"""From stored bytes to the pixels of a view: one path for everybody, the same bits every time."""

from __future__ import annotations

import numpy as np
import PIL
import torch
import torchvision
from torch import Tensor
from torch.nn import functional as F
from torchvision.io import ImageReadMode, decode_image

from hdscale.data.jpeg import decode_jpeg_region, jpeg_decoder_version
from hdscale.data.pictures import check_size, is_plain, open_picture, to_rgb
from hdscale.data.views import ViewParameters

INTERPOLATION = "bicubic antialias uint8"
"""How crops are resized: part of the fingerprint of views."""


def decoder_version() -> str:
    """Name the decoders and their versions: other versions may give other pixels."""
    versions = f"torchvision {torchvision.__version__}, torch {torch.__version__}, pillow {PIL.__version__}"
    return f"{jpeg_decoder_version()}, {versions}"


def decode_rgb(data: bytes) -> Tensor:
    """Decode a picture of any mode.

    JPEG of 8 bits, grey or RGB, takes torchvision's fast decoder; everything else takes Pillow (transparency goes over
    white), and so does what the fast decoder refuses. PNG does, too: torchvision 0.29 dies of a segmentation fault, and
    the run with it, where a PNG file has fewer rows than its header says. The bytes alone decide.

    Returns:
        (3, H, W) uint8, RGB.

    Raises:
        BadPicture: nobody can decode it.
    """
    image = open_picture(data)
    if is_plain(image, data) and image.format != "PNG":
        try:
            return decode_image(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode=ImageReadMode.RGB)
        except RuntimeError:
            pass  # stricter than Pillow
    return torch.from_numpy(np.array(to_rgb(image))).permute(2, 0, 1)  # (3, H, W)


def decode_view(data: bytes, size: tuple[int, int], parameters: ViewParameters, img_size: int) -> Tensor:
    """Decode a view of a picture of any mode: cut the box out, resize it, flip it.

    Args:
        data: the stored bytes.
        size: width and height that the index gives for the picture.
        parameters: the box, inside that size, and the flip.
        img_size: side of the result, in pixels.

    Returns:
        (3, img_size, img_size) uint8, RGB.

    Raises:
        BadPicture: nobody can decode it, or it has another size.
    """
    return resize_and_flip(decode_crop(data, size, parameters), parameters.flip, img_size)


def decode_crop(data: bytes, size: tuple[int, int], box: ViewParameters) -> Tensor:
    """Decode a box: the pixels of `decode_rgb`, bit by bit, at a lower price where that is possible.

    Returns:
        (3, box.height, box.width) uint8, RGB, not flipped.

    Raises:
        BadPicture: nobody can decode it, or it has another size.
    """
    region = decode_jpeg_region(data, size, box)
    if region is not None:
        return torch.from_numpy(region).permute(2, 0, 1)
    image = decode_rgb(data)
    check_size(image.shape[2], image.shape[1], size)
    return image[:, box.top : box.top + box.height, box.left : box.left + box.width]


def resize_and_flip(crop: Tensor, flip: bool, img_size: int) -> Tensor:
    """Turn a decoded box (3, h, w) uint8 into a view (3, img_size, img_size) uint8, its channels innermost in memory.

    With channels innermost from the decoder to the batch, torch resizes pixels without taking them apart and putting
    them together again.
    """
    pixels = crop.permute(1, 2, 0).contiguous()[None].permute(0, 3, 1, 2)  # (1, 3, h, w), in memory (1, h, w, 3)
    if crop.shape[1:] != (img_size, img_size):
        size = (img_size, img_size)
        pixels = F.interpolate(pixels, size, mode="bicubic", align_corners=False, antialias=True)
    return (pixels.flip(-1) if flip else pixels)[0]
