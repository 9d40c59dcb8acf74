import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from hdscale.data import pictures
from hdscale.data.decode import decode_crop, decode_rgb, decode_view, decoder_version
from hdscale.data.pictures import BadPicture
from hdscale.data.views import ViewParameters, central_square
from tests.helpers.files import encoded


def scene(height=40, width=60, channels=3):
    """A smooth picture, (H, W, C) uint8."""
    generator = np.random.default_rng(0)
    coarse = Image.fromarray(generator.integers(0, 256, (5, 6, channels), dtype=np.uint8).squeeze())
    return np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).reshape(height, width, channels)


def decoded(data):
    tensor = decode_rgb(data)
    assert tensor.dtype == torch.uint8
    return tensor.permute(1, 2, 0).numpy().astype(int)


def over_white(colour, alpha):
    """Composite (H, W, C) over white by alpha (H, W, 1), both 0 .. 255."""
    share = alpha / 255
    return colour * share + 255 * (1 - share)


def test_rgb_png_keeps_every_value():
    assert np.array_equal(decoded(encoded(Image.fromarray(scene()), "PNG")), scene())


def test_lossless_webp_keeps_every_value():
    assert np.array_equal(decoded(encoded(Image.fromarray(scene()), "WEBP", lossless=True)), scene())


def test_jpeg_agrees_with_pillow():
    data = encoded(Image.fromarray(scene()), "JPEG", quality=95)
    assert np.abs(decoded(data) - np.asarray(Image.open(io.BytesIO(data))).astype(int)).max() <= 2


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_grey_becomes_three_equal_channels(kind):
    grey = scene(channels=1)[..., 0]
    rgb = decoded(encoded(Image.fromarray(grey), kind))
    assert rgb.shape == (40, 60, 3)
    assert np.array_equal(rgb[..., 0], rgb[..., 1])
    assert np.array_equal(rgb[..., 0], rgb[..., 2])
    assert np.abs(rgb[..., 0] - grey).max() <= (0 if kind == "PNG" else 12)


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_rgba_goes_over_white(kind):
    picture = scene(channels=4)
    options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    rgb = decoded(encoded(Image.fromarray(picture), kind, **options))
    assert np.abs(rgb - over_white(picture[..., :3], picture[..., 3:])).max() <= 1


def test_grey_with_alpha_goes_over_white():
    picture = scene(channels=2)
    rgb = decoded(encoded(Image.fromarray(picture, "LA"), "PNG"))
    assert np.abs(rgb - over_white(picture[..., :1].repeat(3, -1), picture[..., 1:])).max() <= 1


def test_a_palettes_transparent_colour_becomes_white():
    picture = Image.fromarray(np.array([[0, 1], [2, 1]], dtype=np.uint8), "P")
    picture.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    rgb = decoded(encoded(picture, "PNG", transparency=1))
    assert rgb.tolist() == [[[10, 20, 30], [255, 255, 255]], [[70, 80, 90], [255, 255, 255]]]


def test_a_transparent_colour_key_becomes_white():
    picture = np.array([[[1, 2, 3], [9, 9, 9]]], dtype=np.uint8)
    assert decoded(encoded(Image.fromarray(picture), "PNG", transparency=(1, 2, 3)))[0].tolist() == [[255] * 3, [9] * 3]


def test_cmyk_jpeg_agrees_with_pillow():
    data = encoded(Image.fromarray(scene()).convert("CMYK"), "JPEG", quality=95)
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)
    assert np.abs(decoded(data) - expected).max() <= 2


def test_16_bit_grey_keeps_its_upper_8_bits():
    levels = np.arange(64 * 64, dtype=np.uint16).reshape(64, 64) * 16
    rgb = decoded(encoded(Image.fromarray(levels), "PNG"))
    assert np.array_equal(rgb, (levels // 256)[..., None].repeat(3, -1))


def test_16_bit_rgb_keeps_its_upper_8_bits():
    levels = (np.arange(4 * 5 * 3, dtype=np.uint16) * 1092).reshape(4, 5, 3)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in levels)
    assert np.abs(decoded(png_file(5, 4, 16, 2, rows)) - levels // 256).max() <= 1


def test_one_bit_pictures_become_black_and_white():
    picture = Image.fromarray(np.array([[True, False]]))
    assert decoded(encoded(picture, "PNG")).tolist() == [[[255] * 3, [0] * 3]]


@pytest.mark.parametrize("img_size", [1, 7, 32])
def test_a_picture_of_one_pixel_fills_its_view(img_size):
    data = encoded(Image.new("RGB", (1, 1), (10, 20, 30)), "PNG")
    view = decode_view(data, (1, 1), ViewParameters(0, 0, 1, 1, flip=True), img_size)
    assert view.shape == (3, img_size, img_size)
    assert view.flatten(1).unique(dim=1).T.tolist() == [[10, 20, 30]]


def test_what_the_fast_decoder_refuses_goes_to_pillow(monkeypatch):
    def refuse(*_args, **_kwargs):
        raise RuntimeError("no")

    data = encoded(Image.fromarray(scene()), "JPEG")
    expected = decoded(data)
    monkeypatch.setattr("hdscale.data.decode.decode_image", refuse)
    assert np.abs(decoded(data) - expected).max() <= 2


def test_a_picture_that_claims_too_many_pixels_is_refused_before_it_is_decoded():
    with pytest.raises(BadPicture, match=r"exceeds limit of|claims 20000 x 20000"):
        decode_rgb(png_file(20000, 20000, 8, 2, b""))


def test_the_limit_on_pixels_is_our_own(monkeypatch):
    monkeypatch.setattr(pictures, "MAX_PIXELS", 40 * 60 - 1)
    with pytest.raises(BadPicture, match="claims 60 x 40 pixels, more than 2399"):
        decode_rgb(encoded(Image.fromarray(scene()), "PNG"))


def test_bytes_of_no_known_format_are_refused():
    with pytest.raises(BadPicture, match="is none of JPEG, PNG"):
        decode_rgb(b"not a picture")


def test_a_png_file_with_fewer_rows_than_its_header_says_does_not_end_the_process():
    white = decoded(png_file(100, 100, 8, 2, (b"\0" + b"\xff" * 300) * 5))  # torchvision dies here
    assert (white[:5].min(), white[5:].max()) == (255, 0)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_a_file_cut_short_is_refused(kind):
    data = encoded(Image.fromarray(scene()), kind)
    with pytest.raises(BadPicture, match="cannot be"):
        decode_rgb(data[: len(data) // 2])


@pytest.mark.parametrize("box", [(5, 3, 50, 30), (0, 0, 60, 40), (30, 20, 4, 3)])
def test_a_view_agrees_with_pillows_bicubic(box):
    left, top, width, height = box
    data = encoded(Image.fromarray(scene()), "PNG")
    view = decode_view(data, (60, 40), ViewParameters(*box, flip=False), 16)
    crop = Image.fromarray(scene()).crop((left, top, left + width, top + height))
    expected = np.asarray(crop.resize((16, 16), Image.Resampling.BICUBIC)).astype(int)
    assert np.abs(view.permute(1, 2, 0).numpy().astype(int) - expected).max() <= 1


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_a_flipped_view_is_the_mirror_image(kind):
    data = encoded(Image.fromarray(scene()), kind)
    boxes = [ViewParameters(5, 3, 40, 30, flip) for flip in (False, True)]
    straight, flipped = (decode_view(data, (60, 40), box, 16) for box in boxes)
    assert torch.equal(flipped, straight.flip(2))
    assert not torch.equal(flipped, straight)


def test_a_box_of_the_views_size_is_not_resampled():
    data = encoded(Image.fromarray(scene(40, 61)), "PNG")
    view = decode_view(data, (61, 40), central_square(61, 40), 40)
    assert np.array_equal(view.permute(1, 2, 0).numpy(), scene(40, 61)[:, 10:50])


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("box", [(5, 3, 50, 30), (59, 0, 1, 40), (0, 39, 60, 1)])
def test_a_crop_has_the_pixels_of_the_whole_picture(kind, box):
    left, top, width, height = box
    data = encoded(Image.fromarray(scene()), kind)
    crop = decode_crop(data, (60, 40), ViewParameters(*box, flip=True))
    assert torch.equal(crop, decode_rgb(data)[:, top : top + height, left : left + width])


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_a_picture_of_another_size_than_the_index_says_is_refused(kind):
    data = encoded(Image.fromarray(scene()), kind)
    with pytest.raises(BadPicture, match="is 60 x 40 pixels, not 60 x 41 as the index says"):
        decode_crop(data, (60, 41), ViewParameters(0, 0, 60, 40, flip=False))


def test_the_decoders_name_carries_versions():
    assert torch.__version__ in decoder_version()


def png_file(width, height, bit_depth, colour_type, rows):
    """A PNG file written by hand."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, bit_depth, colour_type, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
