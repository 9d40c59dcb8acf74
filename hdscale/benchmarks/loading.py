"""How many images per second one core loads: hdscale's loader beside what others do, in turn in one run.

A machine's speed drifts, so figures of different runs cannot be compared; ratios of one round can.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from statistics import median
from typing import Literal, NamedTuple

import numpy as np
import torch

from hdscale.benchmarks.usual_pipeline import jpeg_decoders, usual_pipeline, view_makers
from hdscale.config.sections import DataConfig
from hdscale.data.decode import decode_view
from hdscale.data.index import ShardSet
from hdscale.data.loader import RankShare, TrainLoader
from hdscale.data.order import build_order
from hdscale.data.views import ViewParameters, view_parameters
from hdscale.grid import grid

LOADER = "hdscale's loader: tar to uint8 batches"
USUAL = "usual pipeline: webdataset, Pillow, torchvision to float batches"
DECODE = "decode alone: "
VIEW = "decode, crop, resize, flip: "

BATCH_SIZE = 64
_SEED = 0
_JPEG_START = b"\xff\xd8\xff"


class Rates(NamedTuple):
    """Images per second of one contender, round by round."""

    name: str
    rounds: tuple[float, ...]

    def against(self, other: Rates) -> Rates:
        """Return the ratios to another contender's, round by round."""
        ratios = tuple(mine / theirs for mine, theirs in zip(self.rounds, other.rounds, strict=True))
        return Rates(f"{self.name} / {other.name}", ratios)

    @property
    def median(self) -> float:
        """Middle of all rounds."""
        return median(self.rounds)


class ColdReading(NamedTuple):
    """Loading from shards that are not in the page cache."""

    order: str
    cold: float  # images per second
    warm: float  # the same images again
    picture_bytes: int  # of the pictures that were shown
    bytes_read: int  # from the disk, read-ahead included; 0 where the kernel does not count them


def loading_contenders(shards: ShardSet, num_images: int, img_size: int) -> dict[str, Callable[[], int]]:
    """Name hdscale's loader, the usual pipeline, whole-picture decoders, and ways to make a view.

    Decoders and view makers get JPEG bytes that are in memory already, and are left out where the shards hold none.

    Args:
        shards: opened split.
        num_images: of each contender, rounded up to whole batches.
        img_size: side of the views in pixels.

    Returns:
        By name, functions that do the work once and return how many images that were.
    """
    num_steps = -(-num_images // BATCH_SIZE)
    loader = _loader(shards, DataConfig(img_size=img_size, workers=0), num_steps)
    contenders: dict[str, Callable[[], int]] = {
        LOADER: lambda: sum(len(batch.images) for batch in loader),
        USUAL: lambda: usual_pipeline(shards, num_steps * BATCH_SIZE, img_size, BATCH_SIZE),
    }
    ids = np.concatenate([batch.sample_ids.numpy() for batch in loader])
    views = (_view(shards, sample_id) for sample_id in ids.tolist())
    jpegs = [view for view in views if view.data.startswith(_JPEG_START)]
    if jpegs:
        for name, decode in jpeg_decoders().items():
            contenders[DECODE + name] = _over(jpegs, lambda jpeg, decode=decode: decode(jpeg.data))
        contenders[VIEW + "hdscale"] = _over(jpegs, lambda jpeg: decode_view(*jpeg, img_size))
        for name, view in view_makers().items():
            contenders[VIEW + name] = _over(jpegs, lambda jpeg, view=view: view(jpeg.data, jpeg.box, img_size))
    return contenders


def take_turns(
    contenders: Mapping[str, Callable[[], int]], rounds: int, progress: Callable[[int, str], object]
) -> list[Rates]:
    """Run all contenders on one core, one after the other, round after round; the first round does not count.

    Args:
        contenders: from `loading_contenders`.
        rounds: that count.
        progress: called with 1 and the contender's name after each run.
    """
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    with _one_core():
        for turn in range(rounds + 1):
            for name, function in contenders.items():
                started = time.perf_counter()
                count = function()
                if turn:
                    rates[name].append(count / (time.perf_counter() - started))
                progress(1, name)
    return [Rates(name, tuple(found)) for name, found in rates.items()]


def read_cold(shards: ShardSet, num_images: int, img_size: int, order: Literal["global", "windowed"]) -> ColdReading:
    """Take the shards out of the page cache, load images in this process, and load the same ones again.

    Args:
        shards: opened split; other programs that read it are slowed down once.
        num_images: rounded up to whole batches.
        img_size: side of the views in pixels.
        order: the recipe's `data.order`; windows are of an eighth of the shards, at most the default.
    """
    window = min(DataConfig().window_shards, -(-len(shards.manifest.shards) // 8))
    config = DataConfig(img_size=img_size, workers=0, order=order, window_shards=window)
    loader = _loader(shards, config, -(-num_images // BATCH_SIZE))
    for entry in shards.manifest.shards:
        _forget(shards.folder / entry.name)
    with _one_core():
        before = _bytes_read()
        cold, ids = _timed(loader)
        bytes_read = _bytes_read() - before
        warm, _ = _timed(loader)
    return ColdReading(order, cold, warm, int(shards.index["size"][ids].sum()), bytes_read)


def loading_report(rates: Sequence[Rates], readings: Sequence[ColdReading]) -> str:
    """Return all figures as a table: medians, and the smallest and largest of all rounds in brackets."""
    ours = next(rate for rate in rates if rate.name == LOADER)
    header = ("one core", f"{'images/s':>18}", "loader against it")
    turns = grid(header, [(rate.name, _spread(rate, 0), _spread(ours.against(rate), 2)) for rate in rates])
    cold = grid(
        ("cold page cache", "images/s", "of warm", "read / pictures' bytes"),
        [(one.order, f"{one.cold:.0f}", f"{one.cold / one.warm:.0%}", _amplification(one)) for one in readings],
        align="<>><",
    )
    return "\n".join([*turns, "", *cold])


def _spread(rate: Rates, digits: int) -> str:
    return f"{rate.median:.{digits}f} ({min(rate.rounds):.{digits}f} .. {max(rate.rounds):.{digits}f})"


def _amplification(reading: ColdReading) -> str:
    if not reading.bytes_read:  # a network file system, or pages that could not be dropped
        return "not measured: the kernel counted no disk reads"
    return f"{reading.bytes_read / reading.picture_bytes:.2f}"


class _View(NamedTuple):
    data: bytes
    size: tuple[int, int]
    box: ViewParameters


def _view(shards: ShardSet, sample_id: int) -> _View:
    record = shards.index[sample_id]
    width, height = int(record["width"]), int(record["height"])
    return _View(shards.read(sample_id), (width, height), view_parameters(_SEED, 0, sample_id, width, height))


def _loader(shards: ShardSet, config: DataConfig, num_steps: int) -> TrainLoader:
    share = RankShare(rank=0, world_size=1, global_batch_size=BATCH_SIZE, micro_batch_size=BATCH_SIZE)
    return TrainLoader(shards, build_order(shards.index, config, _SEED), config, _SEED, share, range(num_steps))


def _timed(loader: TrainLoader) -> tuple[float, np.ndarray]:
    """Return images per second of one pass, and which samples it showed."""
    started = time.perf_counter()
    ids = np.concatenate([batch.sample_ids.numpy() for batch in loader])
    return len(ids) / (time.perf_counter() - started), ids


def _over(jpegs: Sequence[_View], function: Callable[[_View], object]) -> Callable[[], int]:
    def run() -> int:
        for jpeg in jpegs:
            with suppress(RuntimeError, ValueError, OSError):  # some decoders refuse what others show
                function(jpeg)
        return len(jpegs)

    return run


@contextmanager
def _one_core() -> Iterator[None]:
    """Keep this process, and torch in it, on one core."""
    threads, cores = torch.get_num_threads(), os.sched_getaffinity(0)
    torch.set_num_threads(1)
    os.sched_setaffinity(0, {max(cores)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)
        torch.set_num_threads(threads)


def _forget(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)  # only clean pages can be dropped
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def _bytes_read() -> int:
    """Return what this process has made the disk read so far; always 0 where the kernel does not count that."""
    try:
        lines = Path("/proc/self/io").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes:"))
