"""Photographs without a network: what the benchmark decodes when nobody names shards."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

from hdscale.hashing import hash_int, uniform_int
from hdscale.shards.sources.base import Listing
from hdscale.shards.sources.stored_picture import Picture
from hdscale.shards.split import SplitSettings
from hdscale.shards.writer import SplitJob, write_split

WIDTH, HEIGHT = 500, 375
"""The most frequent size of ImageNet's pictures."""

_QUALITY = 92  # 57 KB per picture on average
_LARGEST = (569, 427)  # window of that shape in the photographs, which have 640 x 427 pixels
_SMALLEST_SHARE = 0.5  # of its sides
_SHARDS = 24  # several windows of `data.order: windowed`


class Photographs:
    """Windows of the two photographs that scikit-learn carries, as JPEGs of 500 x 375 pixels; all differ."""

    name = "photos"

    def __init__(self, count: int) -> None:
        """Say how many windows there are."""
        self.count = count

    def listing(self) -> Listing:
        """Name the windows by their number; classes are the photographs."""
        labels = np.arange(self.count, dtype=np.int32) % 2
        return Listing(("china", "flower"), [f"photo-{number:06d}" for number in range(self.count)], labels, [])

    def read(self, name: str, place: None = None) -> Picture:
        """Cut a window out, whose place and size its number decides, and encode it."""
        del place
        number = int(name.removeprefix("photo-"))
        photograph = Image.fromarray(_photographs()[number % 2])
        share, across, down = (uniform_int(hash_int(number, draw)) for draw in range(3))
        width, height = (int(side * (_SMALLEST_SHARE + (1 - _SMALLEST_SHARE) * share)) for side in _LARGEST)
        left = int(across * (photograph.width - width + 1))
        top = int(down * (photograph.height - height + 1))
        window = photograph.resize(
            (WIDTH, HEIGHT), Image.Resampling.BICUBIC, box=(left, top, left + width, top + height)
        )
        buffer = io.BytesIO()
        window.save(buffer, "JPEG", quality=_QUALITY)
        return Picture(buffer.getvalue(), "jpg", WIDTH, HEIGHT)


@cache
def _photographs() -> list[np.ndarray]:
    """Return both, (427, 640, 3) uint8."""
    from sklearn.datasets import load_sample_images  # takes a second to import

    return load_sample_images().images  # pyright: ignore[reportAttributeAccessIssue]


def make_photo_shards(folder: Path, count: int, progress: Callable[[int], None]) -> None:
    """Write `count` photographs into the split `train` of an empty folder; progress is told how many are done."""
    source, settings = Photographs(count), SplitSettings(samples_per_shard=-(-count // _SHARDS))
    listing = source.listing()
    job = SplitJob(
        source=source,
        output=folder,
        split=settings.split,
        classes=listing.classes,
        names=listing.names,
        labels=listing.labels,
        samples_per_shard=settings.samples_per_shard,
        made_by={"source": source.name, "count": count},
    )
    write_split(job, os.cpu_count() or 1, progress)
