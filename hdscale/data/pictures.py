"""Pillow's side of pictures: headers, and any mode to 8-bit RGB.

EXIF orientation and colour profiles are not applied, as in the published ImageNet pipelines.
"""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

MAX_PIXELS = 178_956_970
"""A picture whose header claims more is refused before it is decoded (Pillow's limit against decompression bombs)."""

_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
_PNG_BIT_DEPTH = 24  # offset of the bit depth in a PNG file, inside the IHDR chunk, which always comes first


class BadPicture(ValueError):
    """A picture that cannot be decoded; the message says why, without naming the file."""


def open_picture(data: bytes) -> Image.Image:
    """Read a picture's header; its pixels are decoded on first use.

    Raises:
        BadPicture: the format is unknown, the header is broken, or it claims more than `MAX_PIXELS`.
    """
    try:
        image = Image.open(io.BytesIO(data), formats=_FORMATS)
    except Image.UnidentifiedImageError:
        raise BadPicture(f"is none of {', '.join(_FORMATS)}") from None
    except Exception as error:  # Pillow's parsers raise anything from struct.error to IndexError on broken bytes
        raise BadPicture(f"cannot be opened ({error})") from error
    check_pixels(*image.size)
    return image


def check_size(width: int, height: int, expected: tuple[int, int]) -> None:
    """Raise BadPicture when a picture has not the size that the index gives for it."""
    if (width, height) != expected:
        raise BadPicture(f"is {width} x {height} pixels, not {expected[0]} x {expected[1]} as the index says")


def check_pixels(width: int, height: int) -> None:
    """Raise a BadPicture for more than `MAX_PIXELS`."""
    if width * height > MAX_PIXELS:
        raise BadPicture(f"claims {width} x {height} pixels, more than {MAX_PIXELS}")


def is_plain(image: Image.Image, data: bytes) -> bool:
    """Say whether these bytes are an 8-bit grey or RGB JPEG or PNG without transparency, which need no conversion."""
    if image.mode not in ("RGB", "L"):
        return False
    if image.format == "PNG":
        return data[_PNG_BIT_DEPTH] == 8 and "transparency" not in image.info
    return image.format in ("JPEG", "MPO")


def to_rgb(image: Image.Image) -> Image.Image:
    """Decode any mode to 8-bit RGB: transparency goes over white, 16 bits keep their upper 8.

    Raises:
        BadPicture: the pixels cannot be decoded, for example because the file is cut short.
    """
    try:
        image.load()
        if image.mode.startswith("I"):
            high_byte = np.clip(np.asarray(image).astype(np.int64), 0, 65535) >> 8
            return Image.fromarray(high_byte.astype(np.uint8)).convert("RGB")
        if image.has_transparency_data:
            rgba = image.convert("RGBA")
            return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
        return image.convert("RGB")
    except Exception as error:  # Pillow's decoders raise anything, too
        raise BadPicture(f"cannot be decoded ({error})") from error
