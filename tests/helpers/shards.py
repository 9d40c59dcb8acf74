"""Fixtures of shards: all digits, damaged copies, and writing any source."""

import shutil
from pathlib import Path

import pytest

from hdscale.config.sections import DataConfig
from hdscale.data.index import open_shards
from hdscale.shards.sources.digits import Digits
from hdscale.shards.split import SplitSettings, assign_splits
from hdscale.shards.writer import SplitJob, write_split


@pytest.fixture(scope="session")
def digit_folder(tmp_path_factory):
    """All digits in 18 shards of 100, the last one smaller; read only."""
    folder = tmp_path_factory.mktemp("digits")
    write_source(Digits(), folder, SplitSettings(samples_per_shard=100))
    return folder


@pytest.fixture(scope="session")
def digits(digit_folder):
    return open_shards(digit_folder, "train")


@pytest.fixture
def damaged(digit_folder, tmp_path):
    """Open a copy of the digits and spoil some samples then, as happens while training runs."""

    def opened(sample_ids):
        shards = open_shards(shutil.copytree(digit_folder, tmp_path / "shards"), "train")
        spoil(shards, sample_ids)
        return shards

    return opened


@pytest.fixture
def view_config():
    return DataConfig(img_size=8, workers=0, window_shards=4)


def spoil(shards, sample_ids):
    """Overwrite some bytes of samples in the middle of their pictures: sizes and headers stay."""
    for sample_id in sample_ids:
        record = shards.index[sample_id]
        with (shards.folder / shards.manifest.shards[record["shard"]].name).open("r+b") as file:
            file.seek(int(record["offset"]) + 40)
            file.write(b"damage")


def write_source(source, folder: Path, settings: SplitSettings, workers=0, listing=None):
    """Write all splits of a source; return their manifests."""
    listing = listing or source.listing()
    manifests = []
    for split, rows in assign_splits(listing, settings).items():
        job = SplitJob(
            source=source,
            output=folder,
            split=split,
            classes=listing.classes,
            names=[listing.names[row] for row in rows],
            labels=listing.labels[rows],
            samples_per_shard=settings.samples_per_shard,
            made_by={"listing": listing.digest(), **settings._asdict()},
        )
        manifests.append(write_split(job, workers, lambda count: None))
    return manifests


@pytest.fixture
def write():
    """`write_source`, for tests that need nothing else of this file."""
    return write_source
