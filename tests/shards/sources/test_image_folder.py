import io
import os

import numpy as np
import pytest
from PIL import Image

from hdscale.data.pictures import BadPicture
from hdscale.errors import UserError
from hdscale.shards.sources.base import sample_key
from hdscale.shards.sources.digits import Digits
from hdscale.shards.sources.image_folder import ImageFolder

RED = Image.new("RGB", (6, 4), (200, 10, 30))


def save(image, path, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)
    return path


def test_classes_are_the_sorted_folders_and_pictures_the_sorted_files_in_them(tmp_path):
    for name in ("b/2.png", "b/1.JPG", "a/deep/er/x.webp", "a/y.jpeg"):
        save(RED, tmp_path / name)
    listing = ImageFolder(tmp_path).listing()
    assert listing.classes == ("a", "b")
    assert listing.names == ["a/deep/er/x.webp", "a/y.jpeg", "b/1.JPG", "b/2.png"]
    assert listing.labels.tolist() == [0, 0, 1, 1]
    assert listing.left_out == []


def test_what_is_not_taken_is_named_and_hidden_files_are_not_looked_at(tmp_path):
    for name in ("a/1.png", "a/.hidden.png", ".cache/2.png", "a/.git/3.png"):
        save(RED, tmp_path / name)
    (tmp_path / "a/notes.txt").write_text("")
    (tmp_path / "empty").mkdir()
    listing = ImageFolder(tmp_path).listing()
    assert listing.names == ["a/1.png"]
    assert listing.classes == ("a",)
    assert [words.split(" with")[0] for words in listing.left_out] == ["1 files", "class folder empty,"]


def test_a_list_of_classes_gives_the_labels_and_an_empty_class_keeps_its_own(tmp_path):
    for name in ("a/1.png", "b/1.png", "c/1.png"):
        save(RED, tmp_path / name)
    (tmp_path / "empty").mkdir()
    listing = ImageFolder(tmp_path, only=("c", "empty", "a")).listing()
    assert listing.classes == ("c", "empty", "a")
    assert listing.names == ["c/1.png", "a/1.png"]
    assert listing.labels.tolist() == [0, 2]
    assert listing.left_out == ["1 classes that --only-classes does not name", "class folder empty, without pictures"]
    with pytest.raises(UserError, match=r"--only-classes names 1 of 2 classes that --input .* lacks \(d\)"):
        ImageFolder(tmp_path, only=("d", "a")).listing()


def test_links_that_lead_back_are_named_and_others_followed(tmp_path):
    for name in ("a/1.png", "a/deep/2.png", "b/3.png", "elsewhere/4.png"):
        save(RED, tmp_path / "pictures" / name)
    (tmp_path / "pictures/elsewhere").rename(tmp_path / "elsewhere")
    for link, target in (
        ("a/self", "."),
        ("a/deep/up", ".."),
        ("a/all", "../.."),
        ("a/other", "../b"),
        ("b/back", "../a"),
        ("b/away", "../../elsewhere"),
    ):
        (tmp_path / "pictures" / link).symlink_to(target)
    listing = ImageFolder(tmp_path / "pictures").listing()
    of_a = ["a/1.png", "a/deep/2.png", "a/other/3.png", "a/other/away/4.png"]
    of_b = ["b/3.png", "b/away/4.png", "b/back/1.png", "b/back/deep/2.png"]
    assert listing.names == of_a + of_b
    links = [
        "a/all",
        "a/deep/up",
        "a/other/back",
        "a/self",
        "b/back/all",
        "b/back/deep/up",
        "b/back/other",
        "b/back/self",
    ]
    assert listing.left_out == [f"link {name}, which leads back to a folder that it is in" for name in links]


def test_a_folder_that_cannot_be_read_is_no_empty_one(tmp_path, monkeypatch):
    save(RED, tmp_path / "a/1.png")
    save(RED, tmp_path / "a/locked/2.png")
    scandir = os.scandir

    def refuse(path):  # what chmod does for everybody but root
        if os.fspath(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(PermissionError, match="locked"):
        ImageFolder(tmp_path).listing()


def test_what_is_no_regular_file_is_not_read(tmp_path):
    save(RED, tmp_path / "a/1.png")
    os.mkfifo(tmp_path / "a/2.png")
    (tmp_path / "a/3.png").symlink_to("/dev/zero")
    source = ImageFolder(tmp_path)
    assert source.listing().names == ["a/1.png", "a/2.png", "a/3.png"]
    for name in ("a/2.png", "a/3.png"):
        with pytest.raises(OSError, match="it is no regular file"):
            source.read(name)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(UserError, match=r"--input .*nowhere is not a folder"):
        ImageFolder(tmp_path / "nowhere").listing()


def test_a_folder_without_class_folders_is_refused(tmp_path):
    save(RED, tmp_path / "1.png")
    with pytest.raises(UserError, match=r"has no class folder with .jpg, .jpeg, .png, .webp files in it"):
        ImageFolder(tmp_path).listing()


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("name", ["1.jpg", "1.png"])
def test_plain_jpeg_and_png_bytes_stay_as_they_are(tmp_path, mode, name):
    path = save(RED.convert(mode), tmp_path / "a" / name)
    picture = ImageFolder(tmp_path).read(f"a/{name}")
    assert picture == (path.read_bytes(), path.suffix[1:], 6, 4)


@pytest.mark.parametrize(
    ("image", "name", "expected"),
    [
        (Image.new("RGBA", (6, 4), (200, 10, 30, 0)), "1.png", (255, 255, 255)),
        (RED, "1.webp", (200, 10, 30)),
        (RED.quantize(), "1.png", (200, 10, 30)),
        (Image.fromarray(np.full((4, 6), 0x1234, dtype=np.uint16)), "1.png", (0x12,) * 3),
        (Image.new("CMYK", (6, 4), (0, 0, 0, 255)), "1.jpg", (0, 0, 0)),
    ],
)
def test_other_pictures_become_lossless_rgb(tmp_path, image, name, expected):
    options = {"lossless": True} if name.endswith("webp") else {}
    save(image, tmp_path / "a" / name, **options)
    picture = ImageFolder(tmp_path).read(f"a/{name}")
    stored = Image.open(io.BytesIO(picture.data))
    assert (stored.format, stored.mode, stored.size) == ("PNG", "RGB", (6, 4))
    assert picture[1:] == ("png", 6, 4)
    assert (np.asarray(stored) == expected).all()


def test_the_content_decides_not_the_extension(tmp_path):
    save(RED, tmp_path / "a/1.jpg", format="PNG")
    assert ImageFolder(tmp_path).read("a/1.jpg").extension == "png"


def test_a_file_cut_short_is_bad(tmp_path):
    path = save(Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)), tmp_path / "a/1.jpg")
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(BadPicture, match="cannot be decoded"):
        ImageFolder(tmp_path).read("a/1.jpg")


def test_orientation_is_not_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    save(RED, tmp_path / "a/1.jpg", exif=exif)
    assert ImageFolder(tmp_path).read("a/1.jpg")[2:] == (6, 4)


def test_keys_have_no_dots_and_differ_where_names_do():
    names = ["a/x.jpg", "a/x.png", "a/x.y.jpg", "a/x_y.jpg", "a_x.jpg", "b/x.jpg", "ä/ö.jpg", "a/" + "z" * 200 + ".jpg"]
    keys = [sample_key(name) for name in names]
    assert len(set(keys)) == len(names)
    assert all(key.isascii() and "." not in key and "/" not in key and len(key) <= 80 for key in keys)
    assert keys[0].startswith("a_x-")


def test_names_that_are_no_text_have_keys_and_digests(tmp_path):
    name = b"\xff.png".decode(errors="surrogateescape")
    save(RED, tmp_path / "a" / "1.png").rename(tmp_path / "a" / name)
    listing = ImageFolder(tmp_path).listing()
    assert listing.names == [f"a/{name}"]
    assert sample_key(listing.names[0]).isascii()
    assert len(listing.digest()) == 64


def test_a_listings_digest_changes_with_names_labels_and_classes():
    listing = Digits().listing()
    changed = [
        listing._replace(names=["other", *listing.names[1:]]),
        listing._replace(labels=listing.labels[::-1]),
        listing._replace(classes=("zero", *listing.classes[1:])),
    ]
    assert len({one.digest() for one in [listing, *changed]}) == 4
    assert Digits().listing().digest() == listing.digest()


def test_digits_are_eight_pixels_wide_and_use_the_whole_range():
    source = Digits()
    pixels = np.stack([np.asarray(Image.open(io.BytesIO(source.read(f"digit-{row:04d}").data))) for row in range(20)])
    assert pixels.shape == (20, 8, 8)
    assert (pixels.min(), pixels.max()) == (0, 255)
