"""Decoding one region of a JPEG: the only file that knows nvImageCodec, whose CPU decoder needs no GPU.

Rows below the region are never decoded and blocks beside it only as far as the entropy coder must, which saves a part
of the time. The pixels are those of a full decode by libjpeg-turbo (tests compare them with torchvision's bit by bit),
so machines without this library make the same views, only more slowly.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np

from hdscale.data.pictures import check_size
from hdscale.data.views import ViewParameters

_START, _END = b"\xff\xd8\xff", b"\xff\xd9"
_MIN_WIDTH = 16
"""Of a region. One column at the picture's edge gets other colours than in a full decode (libjpeg-turbo does not smooth
the upsampled chroma of so narrow an output); nothing is gained by cutting such regions out."""


def jpeg_decoder_version() -> str:
    """Name the region decoder and its version."""
    nvimgcodec = _library()
    return "no nvimgcodec" if nvimgcodec is None else f"nvimgcodec {nvimgcodec.__version__}"


def decode_jpeg_region(data: bytes, size: tuple[int, int], box: ViewParameters) -> np.ndarray | None:
    """Decode a region of an 8-bit grey or colour JPEG.

    Args:
        data: bytes of any picture.
        size: width and height that the picture must have.
        box: inside that size; its flip is not applied.

    Returns:
        (h, w, 3) uint8, RGB; None when this decoder is not for these bytes, or refuses them.

    Raises:
        BadPicture: the picture has another size.
    """
    # A file without its end may be cut short below the region, where nobody would see it: the strict decoder does.
    if not data.startswith(_START) or not data.endswith(_END) or box.width < _MIN_WIDTH:
        return None
    nvimgcodec = _library()
    if nvimgcodec is None:
        return None
    try:
        stream = nvimgcodec.CodeStream(data)
        width, height = stream.width, stream.height
        if stream.num_channels not in (1, 3) or stream.precision != 8:
            return None
    except RuntimeError:
        return None
    check_size(width, height, size)
    left, top, box_width, box_height, _ = box
    region = nvimgcodec.Region(top, left, top + box_height, left + box_width)
    as_stored = nvimgcodec.DecodeParams(apply_exif_orientation=False)
    image = _decoder().decode(stream.get_sub_code_stream(region=region), params=as_stored)
    return None if image is None else np.asarray(image)


@cache
def _library() -> Any:
    """Load nvImageCodec, or return None where there is no wheel of it."""
    try:
        with _silence():
            from nvidia import nvimgcodec  # not at the top: loading it is noisy
    except ImportError:
        return None
    return nvimgcodec


@cache
def _decoder() -> Any:
    """Make the decoder at first use; with one thread it works in the caller's, so that a fork may inherit it."""
    nvimgcodec = _library()
    with _silence():
        return nvimgcodec.Decoder(
            device_id=nvimgcodec.NVIMGCODEC_DEVICE_CPU_ONLY,
            max_num_cpu_threads=1,
            backends=[nvimgcodec.Backend(nvimgcodec.BackendKind.CPU_ONLY)],
        )


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Keep the library's complaints about missing CUDA libraries, which no CPU decoder needs, from the terminal."""
    stderr, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 2)
    try:
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(nothing)
