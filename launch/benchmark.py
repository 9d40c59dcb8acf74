"""Measure what this machine does with the real code: ratios within one run, never times of different ones.

python launch/benchmark.py data                                       # on pictures that it makes
python launch/benchmark.py data --shards shards/ --split train        # on yours
python launch/benchmark.py memory                                     # bytes a rank holds and moves, beside formulas
python launch/benchmark.py memory --resident --recipe R.yaml --ranks 2 student.checkpoint_every=1
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from hdscale.benchmarks.loading import loading_contenders, loading_report, read_cold, take_turns
from hdscale.benchmarks.memory_report import (
    MemoryOptions,
    launch,
    load_recipes,
    measure_here,
    memory_report,
    resident_report,
)
from hdscale.benchmarks.photographs import make_photo_shards
from hdscale.cli import EXIT_DONE, run
from hdscale.cluster.launcher import started_by_launcher
from hdscale.data.index import ShardSet, open_shards
from hdscale.errors import UserError
from hdscale.progress import Progress

ROOT = Path(__file__).resolve().parent.parent


def main(argv: list[str]) -> int:
    """Run the benchmark that the arguments name; return the exit code."""
    options = _parse(argv)
    if options.command == "memory":
        return _memory(options)
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
    print(loading_report(rates, readings))
    _write(options, {"rates": {rate.name: rate.rounds for rate in rates}, "cold": [one._asdict() for one in readings]})


def _memory(options: argparse.Namespace) -> int:
    """Measure on this launcher's ranks, or start a launcher for each number of ranks and show what they found."""
    asked = MemoryOptions(*(getattr(options, name) for name in MemoryOptions._fields))
    if started_by_launcher():
        measured = measure_here(asked, ROOT)
        if measured is not None:
            _write(options, measured)
        return EXIT_DONE
    load_recipes(asked, ROOT)  # mistakes are found before a launch
    measured = [one for ranks in asked.ranks for one in launch(Path(__file__), ["memory", *asked.words()], ranks)]
    print("\n\n".join(map(resident_report, measured)) if asked.resident else memory_report(measured))
    _write(options, measured)
    return EXIT_DONE


def _write(options: argparse.Namespace, figures: Any) -> None:
    if options.output is not None:
        try:
            options.output.write_text(json.dumps(figures, indent=2) + "\n")
        except OSError as error:
            raise UserError(f"--output {options.output} cannot be written ({error.strerror}): name another") from error


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="benchmark.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # set by the launcher
    commands = parser.add_subparsers(dest="command", required=True)
    data = commands.add_parser("data", help="images a second of the loader, of the usual pipeline, of decoders")
    data.add_argument("--shards", type=Path, help="folder of shards (default: 500 x 375 JPEGs that are made for this)")
    data.add_argument("--split", default="train", help="name of the split (default: %(default)s)")
    data.add_argument("--images", type=int, default=1536, help="a run of each contender (default: %(default)s)")
    data.add_argument("--rounds", type=int, default=5, help="of all contenders in turn (default: %(default)s)")
    data.add_argument("--img-size", type=int, default=224, help="side of a view in pixels (default: %(default)s)")
    data.add_argument("--output", type=Path, help="JSON file for all figures")
    memory = commands.add_parser("memory", help="bytes that a rank holds and moves, beside the formulas")
    memory.add_argument("--recipe", type=Path, help="YAML file (default: the default recipe, as a ViT-Ti)")
    memory.add_argument("--ranks", type=_numbers, default=[1, 2, 4], help="a launch for each (default: 1,2,4)")
    memory.add_argument("--stages", type=_numbers, default=[0, 2, 3], help="of ZeRO (default: 0,2,3)")
    memory.add_argument("--shrink", type=int, help="divides sizes in ds_configs/ (default: 1; without --recipe, 28)")
    memory.add_argument("--micro-batch-size", type=int, default=1, help="images a rank (default: %(default)s)")
    memory.add_argument("--variants", action="store_true", help="other settings of ZeRO-2 and 3, too")
    memory.add_argument("--resident", action="store_true", help="peak resident memory instead, of the last stage")
    memory.add_argument("--output", type=Path, help="JSON file for all figures")
    memory.add_argument("overrides", nargs="*", metavar="key=value", help="recipe fields")
    return parser.parse_args(argv)


def _numbers(text: str) -> list[int]:
    return [int(word) for word in text.split(",")]


if __name__ == "__main__":
    run(main)
