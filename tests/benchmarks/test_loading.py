import numpy as np
import pytest
import torch
from webdataset.writer import TarWriter

from hdscale.benchmarks import loading as benchmark
from hdscale.benchmarks.loading import (
    DECODE,
    LOADER,
    USUAL,
    VIEW,
    ColdReading,
    Rates,
    loading_contenders,
    loading_report,
)
from hdscale.benchmarks.photographs import HEIGHT, WIDTH, Photographs, make_photo_shards
from hdscale.benchmarks.usual_pipeline import jpeg_decoders, usual_pipeline, view_makers
from hdscale.data.decode import decode_rgb, decode_view
from hdscale.data.index import open_shards
from hdscale.data.views import view_parameters
from hdscale.errors import UserError
from hdscale.shards.indexer import IndexJob, index_split
from hdscale.shards.labels import label_rule


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    make_photo_shards(folder, 48, lambda count: None)
    return open_shards(folder, "train")


def test_photos_are_different_jpegs_of_real_size(photos):
    pictures = [photos.read(row) for row in range(48)]
    assert len(set(pictures)) == 48
    assert all(decode_rgb(data).shape == (3, HEIGHT, WIDTH) for data in pictures)
    assert 45e3 < np.mean([len(data) for data in pictures]) < 70e3
    assert Photographs(48).read("photo-000007").data == Photographs(9).read("photo-000007").data
    assert len(photos.manifest.shards) == 24


def test_every_decoder_gives_the_pixels_of_ours(photos):
    data = photos.read(3)
    for name, decode in jpeg_decoders().items():
        assert torch.equal(decode(data), decode_rgb(data)), name


def test_every_way_to_a_view_gives_ours_or_nearly(photos):
    data, makers = photos.read(3), view_makers()
    for view in range(4):  # flipped ones among them
        box = view_parameters(0, view, 3, WIDTH, HEIGHT)
        expected = decode_view(data, (WIDTH, HEIGHT), box, 64)
        for name, make in makers.items():
            pixels = torch.as_tensor(make(data, box, 64))
            if "resize(box=)" in name:  # other rounding
                difference = pixels.permute(2, 0, 1).float() - expected.float()
                assert difference.abs().mean() < 1
            else:
                assert torch.equal(pixels, expected), name


def test_the_usual_pipeline_starts_again_when_the_shards_are_short(photos):
    assert usual_pipeline(photos, 100, 32, 16) == 112  # 3 batches of 48 samples, 3 again, 1 more


@pytest.fixture
def odd(tmp_path, photos):
    """Shards of others: dotted keys, one picture cut short, one that some decoders refuse, one sample without any."""
    good = photos.read(3)
    scan = good.index(b"\xff\xda") + 40
    pictures = [good, good[:-9000], good[:scan] + b"\xff\xc4" + good[scan + 2 :], good]
    with TarWriter(str(tmp_path / "a.tar"), encoder=False) as tar:
        for number, data in enumerate(pictures):
            tar.write({"__key__": f"{number}", "img.jpg": data, "cls": b"1"})
        tar.write({"__key__": "alone", "cls": b"1"})
    job = IndexJob(tmp_path, "train", "*.tar", label_rule("auto", None), None, (), {"tool": "index_shards"})
    index_split(job, 0, lambda count, note: None)
    return open_shards(tmp_path, "train")


def test_pictures_that_not_everybody_shows_do_not_end_the_benchmark(odd):
    assert odd.num_samples == 4
    contenders = loading_contenders(odd, 64, 32)
    assert {name: function() for name, function in contenders.items() if name in (LOADER, USUAL)} == {
        LOADER: 64,
        USUAL: 64,
    }
    assert all(function() for function in contenders.values())


def test_the_usual_pipeline_without_a_picture_ends(odd):
    (odd.folder / "a.tar").write_bytes(bytes(10240))
    with pytest.raises(UserError, match=r"webdataset and Pillow find no picture in split train"):
        usual_pipeline(odd, 64, 32, 16)


def test_contenders_do_equally_much_work(photos):
    contenders = loading_contenders(photos, 130, 32)  # whole batches: 192
    assert {name: function() for name, function in contenders.items()} == dict.fromkeys(contenders, 192)
    assert [name for name in contenders if not name.startswith((DECODE, VIEW))] == [LOADER, USUAL]
    assert len(contenders) == 3 + len(jpeg_decoders()) + len(view_makers())


def test_png_shards_leave_jpeg_decoders_out(digits):
    assert list(loading_contenders(digits, 64, 8)) == [LOADER, USUAL]


def test_contenders_take_turns_and_the_first_round_does_not_count(monkeypatch):
    clock = iter(range(100))
    monkeypatch.setattr(benchmark.time, "perf_counter", lambda: next(clock))
    calls, told = [], []

    def run(name, count):
        return lambda: calls.append(name) or count

    contenders = {"a": run("a", 6), "b": run("b", 3)}
    rates = benchmark.take_turns(contenders, 2, lambda count, name: told.append((count, name)))
    assert calls == ["a", "b"] * 3
    assert told == [(1, "a"), (1, "b")] * 3
    assert rates == [Rates("a", (6, 6)), Rates("b", (3, 3))]


def test_the_report_compares_round_by_round():
    rates = [Rates(LOADER, (300.0, 100.0, 200.0)), Rates(USUAL, (100.0, 50.0, 40.0))]
    readings = [ColdReading("global", 50.0, 100.0, 1000, 1500), ColdReading("windowed", 80.0, 100.0, 1000, 0)]
    lines = loading_report(rates, readings).splitlines()
    assert lines[1].split()[-8:] == ["200", "(100", "..", "300)", "1.00", "(1.00", "..", "1.00)"]
    assert lines[2].split()[-8:] == ["50", "(40", "..", "100)", "3.00", "(2.00", "..", "5.00)"]
    assert lines[-2].split() == ["global", "50", "50%", "1.50"]
    assert lines[-1].split()[:3] == ["windowed", "80", "80%"]
    assert "not measured" in lines[-1]


def test_cold_reading_counts_the_pictures_it_showed(photos):
    reading = benchmark.read_cold(photos, 64, 32, "global")  # 64 positions: 16 samples come twice
    assert min(reading.cold, reading.warm) > 0
    assert reading.order == "global"
    assert 64 * 45e3 < reading.picture_bytes < 64 * 70e3
    # Where shards lie in memory (tmpfs) nothing is read from a disk.
    assert reading.bytes_read == 0 or reading.bytes_read > 0.5 * photos.index["size"].sum()
