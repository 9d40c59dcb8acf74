"""Pack pictures into WebDataset tar shards with an index and a manifest.

    python data_tools/make_shards.py --source imagefolder --input DIR --output shards/ --val-fraction 0.02
    python data_tools/make_shards.py --source digits --output shards/ --val-fraction 0.2

Running the same command again continues an interrupted run. EXIF orientation and colour profiles are not applied.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from hdscale.cli import EXIT_DONE, EXIT_STOPPED, run
from hdscale.data.manifest import Manifest
from hdscale.data.plan import PlanSettings, check_settings, plan_splits
from hdscale.data.sources import Digits, ImageFolder, Source
from hdscale.data.writer import SplitJob, write_split
from hdscale.errors import UserError
from hdscale.progress import Progress

_NAMED_SKIPS = 10


def main(argv: list[str]) -> int:
    """Make the shards that the arguments ask for; return the exit code."""
    arguments = _parse(argv)
    settings = PlanSettings(arguments.split, arguments.val_fraction, arguments.samples_per_shard, arguments.seed)
    check_settings(settings)
    source = _source(arguments)
    listing = source.listing()
    for words in listing.left_out:
        print(f"left out: {words}", file=sys.stderr)
    made_by = {"tool": "make_shards", "source": source.name, "listing": listing.digest(), **settings._asdict()}
    for split, rows in plan_splits(listing, settings).items():
        job = SplitJob(
            source=source,
            output=arguments.output,
            split=split,
            classes=listing.classes,
            names=[listing.names[row] for row in rows],
            labels=listing.labels[rows],
            samples_per_shard=settings.samples_per_shard,
            made_by=made_by,
        )
        try:
            with Progress(split, len(rows), "samples", sys.stderr) as progress:
                manifest = write_split(job, arguments.workers, progress)
        except KeyboardInterrupt:
            print("stopped; the same command continues where it was", file=sys.stderr)
            return EXIT_STOPPED
        _report(manifest, arguments.output)
    return EXIT_DONE


def _report(manifest: Manifest, folder: Path) -> None:
    size = sum(shard.bytes for shard in manifest.shards) / 1e6
    print(
        f"{manifest.split}: {manifest.num_samples} samples of {len(manifest.classes)} classes in "
        f"{len(manifest.shards)} shards, {size:.1f} MB, in {folder}"
    )
    if manifest.skipped:
        print(f"warning: {len(manifest.skipped)} pictures skipped, listed in the manifest:", file=sys.stderr)
        for skipped in manifest.skipped[:_NAMED_SKIPS]:
            print(f"  {skipped.name} {skipped.reason}", file=sys.stderr)


def _parse(argv: list[str]) -> argparse.Namespace:
    defaults = PlanSettings()
    parser = argparse.ArgumentParser(
        prog="make_shards.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--source", choices=("imagefolder", "digits"), required=True)
    parser.add_argument("--input", type=Path, help="imagefolder: folder that holds one folder of pictures a class")
    parser.add_argument("--output", type=Path, required=True, help="folder for the shards; created when missing")
    parser.add_argument("--split", default=defaults.split, help="name of the split (default: %(default)s)")
    parser.add_argument("--val-fraction", type=float, help="share that goes into a second split, val")
    parser.add_argument(
        "--samples-per-shard", type=int, default=defaults.samples_per_shard, help="default: %(default)s"
    )
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: one a core)")
    parser.add_argument("--seed", type=int, default=defaults.seed, help="of the shuffle (default: %(default)s)")
    return parser.parse_args(argv)


def _source(arguments: argparse.Namespace) -> Source:
    if arguments.source == "digits":
        return Digits()
    if arguments.input is None:
        raise UserError("--source imagefolder needs --input: the folder that holds one folder of pictures a class")
    return ImageFolder(arguments.input)


if __name__ == "__main__":
    run(main)
