"""From the bytes that a source has to the bytes that a shard stores."""

from __future__ import annotations

import io
from typing import NamedTuple

from PIL import Image

from hdscale.data.pictures import is_plain, open_picture, to_rgb

_JPEG_FORMATS = ("JPEG", "MPO")
DEFAULT_QUALITY = 90


class Picture(NamedTuple):
    """What a shard stores of one picture; width and height are in pixels."""

    data: bytes
    extension: str  # jpg or png
    width: int
    height: int


class Resize(NamedTuple):
    """How larger pictures are made smaller."""

    short_side: int  # pixels
    quality: int = DEFAULT_QUALITY  # of JPEG, 1 .. 100


def stored_picture(data: bytes, resize: Resize | None = None) -> Picture:
    """Check a picture and make it ready to be stored.

    Plain JPEG and PNG bytes stay as they are, everything else becomes a lossless RGB PNG. With `resize`, a picture
    whose shorter side is larger becomes RGB with that shorter side, JPEG if it was JPEG and PNG otherwise, without EXIF
    and colour profile: what was not applied before is not applied later either.

    Raises:
        BadPicture: it cannot be decoded.
    """
    image = open_picture(data)
    rgb = to_rgb(image)  # decodes all of it: a file that is cut short is found here
    if resize is not None and min(rgb.size) > resize.short_side:
        smaller = _resized(rgb, resize.short_side)
        if image.format in _JPEG_FORMATS:
            return Picture(_encoded(smaller, "JPEG", quality=resize.quality), "jpg", *smaller.size)
        return Picture(png_bytes(smaller), "png", *smaller.size)
    if is_plain(image, data):
        return Picture(data, "png" if image.format == "PNG" else "jpg", *rgb.size)
    return Picture(png_bytes(rgb), "png", *rgb.size)


def png_bytes(image: Image.Image) -> bytes:
    """Encode an image as PNG."""
    return _encoded(image, "PNG")


def _resized(image: Image.Image, short_side: int) -> Image.Image:
    scale = short_side / min(image.size)
    width, height = (max(short_side, round(side * scale)) for side in image.size)
    smaller = image.resize((width, height), Image.Resampling.LANCZOS)
    smaller.info.clear()  # Pillow would write the profile into a PNG
    return smaller


def _encoded(image: Image.Image, kind: str, **options: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()
