import io

import numpy as np
import pytest
from PIL import Image, ImageCms

from hdscale.shards.sources.stored_picture import Resize, stored_picture
from tests.helpers.files import encoded


def scene(width=60, height=40):
    coarse = Image.fromarray(np.random.default_rng(0).integers(0, 256, (5, 6, 3), dtype=np.uint8))
    return coarse.resize((width, height), Image.Resampling.BICUBIC)


def opened(picture):
    return Image.open(io.BytesIO(picture.data))


@pytest.mark.parametrize(
    ("size", "expected"), [((60, 40), (30, 20)), ((40, 61), (20, 30)), ((21, 2000), (20, 1905)), ((50, 50), (20, 20))]
)
def test_the_shorter_side_becomes_what_was_asked_for(size, expected):
    picture = stored_picture(encoded(scene(*size), "JPEG"), Resize(20))
    assert (picture.width, picture.height) == opened(picture).size == expected


@pytest.mark.parametrize("size", [(20, 15), (20, 20), (20, 90), (7, 5)])
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_pictures_that_are_not_larger_stay_byte_for_byte(size, kind):
    data = encoded(scene(*size), kind, quality=31)
    assert stored_picture(data, Resize(20)).data == data


@pytest.mark.parametrize(("kind", "extension"), [("JPEG", "jpg"), ("PNG", "png"), ("WEBP", "png"), ("GIF", "png")])
def test_jpeg_stays_jpeg_and_the_rest_becomes_png(kind, extension):
    picture = stored_picture(encoded(scene(), kind), Resize(20))
    assert picture.extension == extension
    assert (opened(picture).format, opened(picture).mode) == ({"jpg": "JPEG", "png": "PNG"}[extension], "RGB")


def test_pixels_are_those_of_lanczos():
    picture = stored_picture(encoded(scene(), "PNG"), Resize(20))
    expected = scene().resize((30, 20), Image.Resampling.LANCZOS)
    assert np.array_equal(np.asarray(opened(picture)), np.asarray(expected))


def test_the_quality_is_that_of_the_jpeg():
    data = encoded(scene(600, 400), "JPEG", quality=95)
    sizes = [len(stored_picture(data, Resize(200, quality)).data) for quality in (20, 90, 100)]
    assert sizes == sorted(set(sizes))
    tables = opened(stored_picture(data, Resize(200))).quantization
    assert tables == Image.open(io.BytesIO(encoded(scene(), "JPEG", quality=90))).quantization


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_orientation_and_profile_are_neither_applied_nor_kept(kind):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    picture = opened(stored_picture(encoded(scene(), kind, exif=exif, icc_profile=profile), Resize(20)))
    assert picture.size == (30, 20)
    assert not picture.getexif()
    assert "icc_profile" not in picture.info
