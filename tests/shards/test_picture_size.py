import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from hdscale.data.pictures import BadPicture, open_picture
from hdscale.shards import picture_size as sizes
from hdscale.shards.picture_size import picture_size


def encoded(form, mode="RGB", size=(67, 31), **options):
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 4), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, form, **options)
    return buffer.getvalue()


def exif_with_thumbnail():
    exif = Image.Exif()
    exif[0x010E] = "x" * 3000
    thumbnail = encoded("JPEG", size=(16, 12))
    return exif.tobytes() + thumbnail


PICTURES = {
    "plain": encoded("JPEG"),
    "grey": encoded("JPEG", "L"),
    "cmyk": encoded("JPEG", "CMYK"),
    "progressive": encoded("JPEG", progressive=True),
    "optimized": encoded("JPEG", optimize=True),
    "restart markers": encoded("JPEG", restart_marker_blocks=1),
    "exif with a thumbnail": encoded("JPEG", exif=exif_with_thumbnail()),
    "colour profile": encoded("JPEG", icc_profile=b"p" * 150_000),
    "comment": encoded("JPEG", comment=b"\xff\xc0\x00\x11\x08" * 9),
    "fill bytes": encoded("JPEG").replace(b"\xff\xc0", b"\xff\xff\xff\xff\xc0", 1),
    "junk between segments": encoded("JPEG").replace(b"\xff\xdb", b"\x00\x12\xff\xdb", 1),
    "wide": encoded("JPEG", size=(65_000, 1)),
    "png": encoded("PNG"),
    "png palette": encoded("PNG", "P"),
    "png 1 bit": encoded("PNG", "1"),
    "webp": encoded("WEBP"),
    "gif": encoded("GIF", "P"),
    "bmp": encoded("BMP"),
}
FAST = {name for name in PICTURES if name not in ("junk between segments", "webp", "gif", "bmp")}


def pillow_size(data):
    try:
        return open_picture(data).size
    except BadPicture:
        return None


def our_size(data):
    try:
        return picture_size(data)
    except BadPicture:
        return None


@pytest.mark.parametrize("name", PICTURES)
def test_sizes_are_those_of_pillow(name, monkeypatch):
    assert picture_size(PICTURES[name]) == open_picture(PICTURES[name]).size
    if name in FAST:
        monkeypatch.setattr(sizes, "open_picture", lambda data: pytest.fail("asked Pillow"))
        picture_size(PICTURES[name])


def test_a_second_frame_header_is_left_to_pillow():
    data = PICTURES["plain"]
    start = data.index(b"\xff\xc0")
    frame = bytearray(data[start : start + 19])
    frame[5:9] = struct.pack(">HH", 5, 6)
    both = data[:start] + bytes(frame) + data[start:]
    assert picture_size(both) == open_picture(both).size


@pytest.mark.parametrize("name", ["plain", "progressive", "fill bytes", "exif with a thumbnail", "png"])
def test_cut_and_damaged_headers_give_the_size_of_pillow_or_none(name):
    data = PICTURES[name]
    for end in range(0, min(len(data), 900), 3):
        if (size := pillow_size(data[:end])) is not None or not data.startswith(b"\x89PNG"):
            assert our_size(data[:end]) == size
    generator = np.random.default_rng(1)
    for _ in range(600):
        damaged = bytearray(data)
        damaged[generator.integers(0, min(len(data), 700))] = generator.integers(0, 256)
        size, expected = our_size(bytes(damaged)), pillow_size(bytes(damaged))
        # Pillow also reads segments that do not matter for the size, and may stumble over them
        assert size == expected or expected is None


def png_header(width, height):
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))


def test_a_picture_that_claims_too_much_is_refused():
    huge = bytearray(PICTURES["plain"])
    start = huge.index(b"\xff\xc0")
    huge[start + 5 : start + 9] = struct.pack(">HH", 65_000, 65_000)
    with pytest.raises(BadPicture, match="claims 65000 x 65000 pixels, more than 178956970"):
        picture_size(bytes(huge))
    with pytest.raises(BadPicture, match="claims 100000 x 100000 pixels, more than 178956970"):
        picture_size(png_header(100_000, 100_000))


@pytest.mark.parametrize("data", [b"", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"<html>", bytes(99), png_header(0, 9)])
def test_bytes_without_a_size_are_refused(data):
    with pytest.raises(BadPicture):
        picture_size(data)
