"""Measure what this machine does with the real code: ratios within one run, never times of different ones.

python launch/benchmark.py data                                       # on pictures that it makes
python launch/benchmark.py data --shards shards/ --split train        # on yours
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from hdscale.cli import EXIT_DONE, run
from hdscale.data.benchmark import data_report, loading_contenders, read_cold, take_turns
from hdscale.data.index import open_shards
from hdscale.data.photos import make_photo_shards
from hdscale.errors import UserError
from hdscale.progress import Progress

if TYPE_CHECKING:
    from hdscale.data.index import ShardSet


def main(argv: list[str]) -> int:
    """Run the benchmark that the arguments name; return the exit code."""
    options = _parse(argv)
    for name in ("images", "rounds", "img_size"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(options, name)}")
    if options.shards is not None:
        _data(open_shards(options.shards, options.split), options)
        return EXIT_DONE
    with tempfile.TemporaryDirectory(prefix="hdscale-") as folder:
        with Progress("making JPEGs", options.images, "pictures", sys.stderr) as progress:
            make_photo_shards(Path(folder), options.images, progress)
        _data(open_shards(Path(folder), "train"), options)
    return EXIT_DONE


def _data(shards: ShardSet, options: argparse.Namespace) -> None:
    sizes = shards.index["size"]
    print(f"{len(sizes)} samples of {sizes.mean() / 1e3:.1f} KB, {options.images} a run, {options.rounds} rounds")
    contenders = loading_contenders(shards, options.images, options.img_size)
    with Progress("benchmark", len(contenders) * (options.rounds + 1), "runs", sys.stderr) as progress:
        rates = take_turns(contenders, options.rounds, progress)
    readings = [read_cold(shards, options.images, options.img_size, order) for order in ("global", "windowed")]
    print(data_report(rates, readings))
    if options.output is not None:
        figures = {"rates": {rate.name: rate.rounds for rate in rates}, "cold": [item._asdict() for item in readings]}
        try:
            options.output.write_text(json.dumps(figures, indent=2) + "\n")
        except OSError as error:
            raise UserError(f"--output {options.output} cannot be written ({error.strerror}): name another") from error


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="benchmark.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    data = commands.add_parser("data", help="images a second of the loader, of the usual pipeline, of decoders")
    data.add_argument("--shards", type=Path, help="folder of shards (default: 500 x 375 JPEGs that are made for this)")
    data.add_argument("--split", default="train", help="name of the split (default: %(default)s)")
    data.add_argument("--images", type=int, default=1536, help="a run of each contender (default: %(default)s)")
    data.add_argument("--rounds", type=int, default=5, help="of all contenders in turn (default: %(default)s)")
    data.add_argument("--img-size", type=int, default=224, help="side of a view in pixels (default: %(default)s)")
    data.add_argument("--output", type=Path, help="JSON file for all figures")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run(main)
