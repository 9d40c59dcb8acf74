"""Sources, options and pictures of all kinds, through the command."""

import io
import json
import os
import struct
import subprocess
import sys
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_tools.make_shards import main
from hdscale.cli import EXIT_USER_ERROR, exit_code
from hdscale.data.index import open_shards
from hdscale.shards.sources.base import sample_key
from tests.helpers.files import encoded

ROOT = Path(__file__).resolve().parents[2]


def noise(seed, width=12, height=9):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.fixture
def folder(tmp_path):
    """Three classes of four JPEGs each: as folders, as a folder of tars and as a CSV file."""
    lines = ["path,label"]
    (tmp_path / "tars").mkdir()
    for label in range(3):
        with tarfile.open(tmp_path / f"tars/n{label}.tar", "w") as tar:
            for number in range(4):
                name = f"n{label}_{number}.JPEG"
                path = tmp_path / "pictures" / f"n{label}" / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(encoded(noise(10 * label + number), "JPEG"))
                tar.add(path, name)
                lines.append(f"n{label}/{name},n{label}")
    (tmp_path / "list.csv").write_text("\n".join(lines))
    return tmp_path


def make(folder, output, *more):
    return main(["--output", str(folder / output), "--samples-per-shard", "5", "--workers", "1", *map(str, more)])


def sources(folder):
    return {
        "imagefolder": ["--source", "imagefolder", "--input", folder / "pictures"],
        "synset-tars": ["--source", "synset-tars", "--input", folder / "tars"],
        "csv": ["--source", "csv", "--input", folder / "list.csv", "--root", folder / "pictures"],
    }


def shard_bytes(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*.tar")}


def made_by(folder):
    return json.loads((folder / "train.manifest.json").read_text())["made_by"]


@pytest.mark.parametrize("options", [[], ["--only-classes", "classes.txt"], ["--resize-short", "6"]])
def test_all_sources_give_the_same_shards_of_the_same_pictures(folder, options, monkeypatch):
    monkeypatch.chdir(folder)
    (folder / "classes.txt").write_text("n2\nn0\n")
    for name, arguments in sources(folder).items():
        make(folder, name, *arguments, *options)
    first, *others = (shard_bytes(folder / name) for name in sources(folder))
    assert all(other == first for other in others)
    shards = open_shards(folder / "csv", "train")
    assert shards.classes == (("n2", "n0") if "--only-classes" in options else ("n0", "n1", "n2"))
    for row in range(shards.num_samples):
        assert shards.classes[shards.index["label"][row]] == shards.member_name(row)[:2]
    assert (shards.index["height"] == (6 if "--resize-short" in options else 9)).all()


def test_untouched_pictures_keep_their_bytes_and_shards_their_settings(folder):
    make(folder, "plain", *sources(folder)["imagefolder"])
    make(folder, "resized", *sources(folder)["imagefolder"], "--resize-short", 9)
    assert shard_bytes(folder / "plain") == shard_bytes(folder / "resized")
    assert set(made_by(folder / "plain")) == {
        *("tool", "source", "listing", "split", "val_fraction", "samples_per_shard", "seed")
    }
    assert made_by(folder / "resized") == made_by(folder / "plain") | {"resize_short": 9, "quality": 90}


def test_a_cut_tar_is_told_before_and_after_the_work(folder, capsys):
    tar = folder / "tars/n1.tar"
    tar.write_bytes(tar.read_bytes()[:2500])
    assert make(folder, "shards", *sources(folder)["synset-tars"]) == 0
    told = [line for line in capsys.readouterr().err.splitlines() if "n1.tar is cut short" in line]
    assert len(told) == 2
    assert told[0].startswith("warning: ")
    assert open_shards(folder / "shards", "train").num_samples == 9


MISTAKES = {
    "--quality 80": "--quality is for pictures that --resize-short makes smaller",
    "--resize-short 0": "--resize-short must be at least 1 pixel, got 0",
    "--resize-short 256 --quality 101": "--quality must be from 1 to 100, got 101",
    "--resize-short 256 --quality 0": "--quality must be from 1 to 100, got 0",
    "--part 5/4": "--part must be i/n with i from 1 to n, such as 2/4 for the second of four, got 5/4",
    "--part 1/2 --finish": "--finish joins all parts, so that it goes without --part",
    "--finish": "has no part of split train",
    "--root pictures": "--root is for --source csv, not for imagefolder",
    "--only-classes nowhere.txt": "--only-classes nowhere.txt cannot be read",
    "--only-classes wrong.txt": "--only-classes names 1 of 1 classes that --input pictures lacks (dogs)",
    "--source digits --resize-short 4": "--source digits takes neither --resize-short nor --only-classes",
    "--source digits --only-classes wrong.txt": "--source digits takes neither",
    "--source digits --input pictures": "--source digits needs no --input, got pictures",
    "--source csv --input list.csv": "n0/n0_",
    "--source csv --input missing.csv": "--input missing.csv cannot be read",
    "--source synset-tars --input missing": "--input missing is neither a folder of tars nor a tar of tars",
    f"--input {'x' * 300}": "--input xxx",
    f"--source synset-tars --input {'x' * 300}": "--input xxx",
    f"--output {'x' * 300}": "--output xxx",
}


@pytest.mark.parametrize("options", MISTAKES)
def test_a_mistake_is_one_line_and_exit_code_2(folder, options, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    (folder / "wrong.txt").write_text("dogs\n")
    command = ["--source", "imagefolder", "--input", "pictures", "--output", "shards", "--workers", "1"]
    assert exit_code(main, [*command, *options.split()]) == EXIT_USER_ERROR
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert MISTAKES[options] in line


@pytest.mark.parametrize("source", ["csv", "synset-tars", "imagefolder"])
def test_a_source_without_input_says_what_it_needs(source, tmp_path, capsys):
    assert exit_code(main, ["--source", source, "--output", str(tmp_path / "shards")]) == EXIT_USER_ERROR
    assert f"--source {source} needs --input: the f" in capsys.readouterr().err


def test_an_index_that_another_tool_made_is_not_overwritten(folder, capsys):
    assert make(folder, "shards", *sources(folder)["imagefolder"]) == 0
    manifest = folder / "shards/train.manifest.json"
    manifest.write_text(manifest.read_text().replace('"make_shards"', '"index_shards"'))
    before = manifest.read_bytes()
    command = ["--output", str(folder / "shards"), "--workers", "1", *map(str, sources(folder)["imagefolder"])]
    assert exit_code(main, command) == EXIT_USER_ERROR
    assert "shards holds the split train of index_shards already: choose another" in capsys.readouterr().err
    assert manifest.read_bytes() == before


READ_WITH_WEBDATASET = """
import sys
import zlib

import numpy as np
import webdataset

samples = webdataset.WebDataset(sys.argv[2:], shardshuffle=False).decode(sys.argv[1]).to_tuple("__key__", "jpg", "cls")
for key, image, label in samples:
    pixels = np.asarray(image)  # from Pillow or as it is
    print(key, label, pixels.dtype, *pixels.shape, zlib.crc32(pixels.tobytes()))
"""


@pytest.mark.parametrize("decoder", ["rgb8", "pil"])
def test_plain_webdataset_reads_the_same_pixels(folder, decoder):
    make(folder, "shards", *sources(folder)["synset-tars"])
    urls = sorted(map(str, (folder / "shards").glob("*.tar")))
    command = [sys.executable, "-c", READ_WITH_WEBDATASET, decoder, *urls]
    output = subprocess.run(command, env=os.environ | {"WDS_SECURE": "1"}, capture_output=True, text=True, check=True)
    seen = [line.split() for line in output.stdout.splitlines()]
    shards = open_shards(folder / "shards", "train")
    assert [line[0] for line in seen] == [shards.member_name(row).removesuffix(".jpg") for row in range(12)]
    for key, label, *pixels in seen:
        with Image.open(folder / "pictures" / f"n{label}" / f"{key[3:7]}.JPEG") as image:
            expected = np.asarray(image.convert("RGB"))
        assert key.startswith(f"n{label}_n{label}_")
        assert pixels == ["uint8", "9", "12", "3", str(zlib.crc32(expected.tobytes()))]


def png_that_claims(width, height):
    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def odd_pictures():
    """Files by name, and their pixels or the reason why they are skipped."""
    red, blue = (Image.new("RGB", (6, 4), colour) for colour in ("red", "blue"))
    whole = encoded(noise(1, 64, 64), "JPEG")
    claims_jpeg = bytearray(encoded(red, "JPEG"))
    frame = claims_jpeg.index(b"\xff\xc0")
    claims_jpeg[frame + 5 : frame + 9] = struct.pack(">HH", 65_000, 65_000)
    bits = Image.fromarray(np.full((4, 6), 0xABCD, dtype=np.uint16))
    frames = {"save_all": True, "append_images": [blue], "duration": 100}
    cmyk = Image.new("CMYK", (6, 4), (0, 255, 255, 0))
    return {
        "truncated.jpg": (whole[:-600], "cannot be decoded"),
        "zero.jpg": (b"", "is none of JPEG"),
        "text.jpg": (b"<html>404</html>", "is none of JPEG"),
        "claims.png": (png_that_claims(100_000, 100_000), "100000|exceeds limit"),
        "claims.jpg": (bytes(claims_jpeg), "65000|exceeds limit"),
        "cmyk.jpg": (encoded(cmyk, "JPEG", quality=100), (255, 0, 0)),
        "bits.png": (encoded(bits, "PNG"), (0xAB,) * 3),
        "gif.webp": (encoded(red, "GIF", **frames), (255, 0, 0)),
        "animated.webp": (encoded(red, "WEBP", lossless=True, **frames), (255, 0, 0)),
        "animated.png": (encoded(red, "PNG", **frames), (255, 0, 0)),
        "one.png": (encoded(Image.new("RGB", (1, 1), (1, 2, 3)), "PNG"), (1, 2, 3)),
        "one.jpg": (encoded(Image.new("RGB", (1, 1), (128, 128, 128)), "JPEG"), (128,) * 3),
    }


@pytest.mark.parametrize("options", [[], ["--resize-short", "2"]])
def test_odd_pictures_are_decoded_or_skipped_and_named(tmp_path, options, capsys):
    odd = odd_pictures()
    (tmp_path / "pictures/a").mkdir(parents=True)
    for name, (data, _) in odd.items():
        (tmp_path / "pictures/a" / name).write_bytes(data)
    assert make(tmp_path, "shards", "--source", "imagefolder", "--input", tmp_path / "pictures", *options) == 0
    shards = open_shards(tmp_path / "shards", "train")
    reasons = {skipped.name.removeprefix("a/"): skipped.reason for skipped in shards.manifest.skipped}
    messages = capsys.readouterr().err
    colours = {shards.member_name(row)[:-4]: colour_of(shards.read(row)) for row in range(shards.num_samples)}
    for name, (_, expected) in odd.items():
        if isinstance(expected, str):
            reason = reasons.pop(name)
            assert any(words in reason for words in expected.split("|"))
            assert f"a/{name} {reason}" in messages
        else:
            assert np.abs(colours.pop(sample_key(f"a/{name}")) - expected).max() <= 2
    assert (reasons, colours) == ({}, {})


def colour_of(data):
    """The one colour of a stored picture."""
    pixels = np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).reshape(-1, 3).astype(int)
    assert (np.ptp(pixels, axis=0) <= 2).all()
    return pixels[0]
