import io
import multiprocessing
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.io import ImageReadMode, decode_image

from hdscale.data.jpeg import decode_jpeg_region, jpeg_decoder_version
from hdscale.data.pictures import BadPicture
from hdscale.data.views import ViewParameters

pytestmark = pytest.mark.skipif(
    jpeg_decoder_version() == "no nvimgcodec", reason="no wheel of nvImageCodec for this platform"
)

KINDS = {
    "4:2:0": {"subsampling": "4:2:0"},
    "4:2:2": {"subsampling": "4:2:2"},
    "4:4:4": {"subsampling": "4:4:4", "quality": 98},
    "progressive": {"progressive": True},
    "restart markers": {"restart_marker_blocks": 3},
    "RGB inside": {"keep_rgb": True, "subsampling": "4:4:4"},
    "turned by EXIF": {"exif": b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"},
    "grey": {},
}


def jpeg(kind, width, height):
    """A picture with edges and noise, so that neighbouring blocks differ."""
    generator = np.random.default_rng(width * 1000 + height)
    coarse = generator.integers(0, 256, (height // 7 + 2, width // 9 + 2, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize((width, height), Image.Resampling.NEAREST)
    buffer = io.BytesIO()
    (image.convert("L") if kind == "grey" else image).save(buffer, "JPEG", **KINDS[kind])
    return buffer.getvalue()


def full(data):
    picture = decode_image(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode=ImageReadMode.RGB)
    return picture.permute(1, 2, 0).numpy()


@pytest.mark.parametrize("kind", list(KINDS))
@given(st.data())
@settings(max_examples=40, deadline=None)
def test_a_region_has_the_pixels_of_a_full_decode_bit_by_bit(kind, data):
    width, height = data.draw(st.integers(16, 150)), data.draw(st.integers(1, 150))
    left, top = data.draw(st.integers(0, width - 16)), data.draw(st.integers(0, height - 1))
    box_width, box_height = data.draw(st.integers(16, width - left)), data.draw(st.integers(1, height - top))
    content = jpeg(kind, width, height)
    box = ViewParameters(left, top, box_width, box_height, flip=False)
    region = decode_jpeg_region(content, (width, height), box)
    assert region is not None
    assert np.array_equal(region, full(content)[top : top + box_height, left : left + box_width])


@pytest.mark.parametrize("left", [0, 4])
def test_a_region_of_one_column_is_left_to_the_full_decoder(left):
    assert decode_jpeg_region(jpeg("4:2:0", 5, 92), (5, 92), ViewParameters(left, 15, 1, 42, flip=False)) is None


def whole(data, width=60, height=40):
    return decode_jpeg_region(data, (width, height), ViewParameters(0, 0, width, height, flip=False))


def test_other_pictures_are_left_to_other_decoders():
    assert whole(b"") is None
    assert whole(b"\xff\xd8\xff no picture \xff\xd9") is None
    buffer = io.BytesIO()
    Image.new("CMYK", (60, 40)).save(buffer, "JPEG")
    assert whole(buffer.getvalue()) is None


def test_a_file_that_is_cut_below_the_region_is_left_to_the_strict_decoder():
    data = jpeg("4:2:0", 300, 900)
    top = ViewParameters(0, 0, 16, 8, flip=False)
    assert decode_jpeg_region(data, (300, 900), top) is not None
    assert decode_jpeg_region(data[: len(data) - 1000], (300, 900), top) is None


def test_a_picture_of_another_size_is_refused():
    with pytest.raises(BadPicture, match="is 60 x 40 pixels, not 61 x 40 as the index says"):
        whole(jpeg("4:2:0", 60, 40), 61, 40)


def test_a_decoder_used_before_a_fork_works_in_the_child():
    data = jpeg("4:2:0", 60, 40)
    assert whole(data) is not None
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert np.array_equal(pool.apply_async(whole, (data,)).get(timeout=60), whole(data))


def test_the_first_use_is_silent():
    code = "import test_jpeg; assert test_jpeg.whole(test_jpeg.jpeg('grey', 60, 40)) is not None"
    command = [sys.executable, "-c", code]
    ran = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parent)
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "", "")


def test_machines_without_the_library_take_the_full_decoder(monkeypatch):
    monkeypatch.setattr("hdscale.data.jpeg._library", lambda: None)
    assert whole(jpeg("4:2:0", 60, 40)) is None
    assert jpeg_decoder_version() == "no nvimgcodec"


def test_the_decoders_name_carries_its_version():
    from nvidia import nvimgcodec

    assert jpeg_decoder_version() == f"nvimgcodec {nvimgcodec.__version__}"
