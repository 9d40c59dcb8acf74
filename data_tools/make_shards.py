"""Pack pictures into WebDataset tar shards with an index and a manifest.

    python data_tools/make_shards.py --source imagefolder --input DIR --output shards/ --val-fraction 0.02
    python data_tools/make_shards.py --source synset-tars --input DIR_OR_TAR --output shards/ --only-classes FILE
    python data_tools/make_shards.py --source csv --input FILE.csv --root DIR --output shards/ --resize-short 256
    python data_tools/make_shards.py --source digits --output shards/ --val-fraction 0.2

Running the same command again continues an interrupted run. EXIF orientation and colour profiles are not applied.
Several machines share the work in one folder: each runs the command with another --part i/n, and when all are through,
one runs it with --finish. The shards are the same, byte for byte, as those of one machine.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from hdscale.cli import EXIT_DONE, EXIT_STOPPED, check_workers, run
from hdscale.data.manifest import Manifest
from hdscale.errors import UserError
from hdscale.progress import Progress
from hdscale.shards.sources.base import Listing, Source
from hdscale.shards.sources.classes import read_class_list
from hdscale.shards.sources.csv_list import CsvList
from hdscale.shards.sources.digits import Digits
from hdscale.shards.sources.image_folder import ImageFolder
from hdscale.shards.sources.packed_names import PackedNames
from hdscale.shards.sources.stored_picture import DEFAULT_QUALITY, Resize
from hdscale.shards.sources.synset_tars import SynsetTars
from hdscale.shards.split import MachineShare, SplitSettings, assign_splits, check_settings, parse_part
from hdscale.shards.writer import SplitJob, finish_split, part_samples, write_part, write_split

_NAMED_SKIPS = 10


def main(argv: list[str]) -> int:
    """Make the shards that the arguments ask for; return the exit code."""
    try:
        _make(_parse(argv))
    except KeyboardInterrupt:
        print("stopped; the same command continues where it was", file=sys.stderr)
        return EXIT_STOPPED
    return EXIT_DONE


def _make(arguments: argparse.Namespace) -> None:
    settings = SplitSettings(arguments.split, arguments.val_fraction, arguments.samples_per_shard, arguments.seed)
    check_settings(settings)
    check_workers(arguments.workers)
    part, resize = _part(arguments), _resize(arguments)
    source = _source(arguments, resize)
    listing = _listing(source, arguments.input)
    for words in listing.left_out:
        print(f"left out: {words}", file=sys.stderr)
    _warn(listing)
    for job in _jobs(arguments, settings, source, listing, resize):
        if part is not None:
            _write_part(job, part, arguments.workers)
        else:
            manifest = finish_split(job) if arguments.finish else _write_split(job, arguments.workers)
            _report(manifest, arguments.output)
    _warn(listing)  # again: the first time was hours ago


def _listing(source: Source, path: Path | None) -> Listing:
    try:
        return source.listing()
    except OSError as error:
        reason = f"{error.filename or path}: {error.strerror or error}"
        raise UserError(f"--input {path} cannot be listed ({reason}): mend that and run again") from error


def _warn(listing: Listing) -> None:
    for words in listing.damaged:
        print(f"warning: {words}", file=sys.stderr)


def _jobs(
    arguments: argparse.Namespace, settings: SplitSettings, source: Source, listing: Listing, resize: Resize | None
) -> Iterator[SplitJob]:
    """Yield the splits."""
    made_by = {"tool": "make_shards", "source": source.name, "listing": listing.digest(), **settings._asdict()}
    if resize is not None:
        made_by |= {"resize_short": resize.short_side, "quality": resize.quality}
    names = listing.names if isinstance(listing.names, PackedNames) else PackedNames(listing.names)
    for split, rows in assign_splits(listing, settings).items():
        yield SplitJob(
            source=source,
            output=arguments.output,
            split=split,
            classes=listing.classes,
            names=names.take(rows),
            labels=listing.labels[rows],
            samples_per_shard=settings.samples_per_shard,
            made_by=made_by,
            places=None if listing.places is None else listing.places[rows],
        )


def _write_split(job: SplitJob, workers: int) -> Manifest:
    with Progress(job.split, len(job.names), "samples", sys.stderr) as progress:
        return write_split(job, workers, progress)


def _write_part(job: SplitJob, part: MachineShare, workers: int) -> None:
    label = f"{job.split}, part {part.number}/{part.total}"
    with Progress(label, part_samples(job, part), "samples", sys.stderr) as progress:
        write_part(job, part, workers, progress)
    print(f"{label}: written; when all parts are, run the same command with --finish instead of --part")


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
    defaults = SplitSettings()
    parser = argparse.ArgumentParser(
        prog="make_shards.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--source", choices=("imagefolder", "synset-tars", "csv", "digits"), required=True)
    parser.add_argument(
        "--input",
        type=Path,
        help="imagefolder: folder with one folder of pictures a class; synset-tars: folder with one CLASS.tar a class, "
        "or a tar of such tars; csv: file with the columns path and label (class names, or integers 0 .. n - 1)",
    )
    parser.add_argument("--root", type=Path, help="csv: folder of relative paths (default: the file's)")
    parser.add_argument("--only-classes", type=Path, help="file with one class a line: only these, labels in its order")
    parser.add_argument("--output", type=Path, required=True, help="folder for the shards; created when missing")
    parser.add_argument("--split", default=defaults.split, help="name of the split (default: %(default)s)")
    parser.add_argument("--val-fraction", type=float, help="share that goes into a second split, val")
    parser.add_argument(
        "--samples-per-shard", type=int, default=defaults.samples_per_shard, help="default: %(default)s"
    )
    parser.add_argument(
        "--resize-short",
        type=int,
        metavar="PX",
        help="make larger pictures smaller: shorter side PX, JPEG stays JPEG, others become PNG; the rest is untouched",
    )
    parser.add_argument("--quality", type=int, help=f"of resized JPEGs, 1 .. 100 (default: {DEFAULT_QUALITY})")
    parser.add_argument("--part", metavar="i/n", help="write the share of machine i of n (1 .. n) only")
    parser.add_argument("--finish", action="store_true", help="join what all parts wrote to index and manifest")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: one a core)")
    parser.add_argument("--seed", type=int, default=defaults.seed, help="of the shuffle (default: %(default)s)")
    return parser.parse_args(argv)


def _part(arguments: argparse.Namespace) -> MachineShare | None:
    if arguments.part is None:
        return None
    if arguments.finish:
        raise UserError("--finish joins all parts, so that it goes without --part: run it once, after the last part")
    return parse_part(arguments.part)


def _resize(arguments: argparse.Namespace) -> Resize | None:
    short_side, quality = arguments.resize_short, arguments.quality
    if short_side is None:
        if quality is not None:
            raise UserError("--quality is for pictures that --resize-short makes smaller: give both or neither")
        return None
    if short_side < 1:
        raise UserError(f"--resize-short must be at least 1 pixel, got {short_side}")
    if quality is not None and not 1 <= quality <= 100:
        raise UserError(f"--quality must be from 1 to 100, got {quality}")
    return Resize(short_side, DEFAULT_QUALITY if quality is None else quality)


def _source(arguments: argparse.Namespace, resize: Resize | None) -> Source:
    if arguments.root is not None and arguments.source != "csv":
        raise UserError(f"--root is for --source csv, not for {arguments.source}: leave it out")
    if arguments.source == "digits":
        if resize is not None or arguments.only_classes is not None:
            raise UserError("--source digits takes neither --resize-short nor --only-classes: leave them out")
        if arguments.input is not None:
            raise UserError(f"--source digits needs no --input, got {arguments.input}: leave it out")
        return Digits()
    if arguments.input is None:
        what = {
            "imagefolder": "the folder that holds one folder of pictures a class",
            "synset-tars": "the folder that holds one tar a class, or a tar of such tars",
            "csv": "the file with the columns path and label",
        }[arguments.source]
        raise UserError(f"--source {arguments.source} needs --input: {what}")
    only = None if arguments.only_classes is None else read_class_list(arguments.only_classes)
    if arguments.source == "imagefolder":
        return ImageFolder(arguments.input, only, resize)
    if arguments.source == "synset-tars":
        return SynsetTars(arguments.input, only, resize)
    return CsvList(arguments.input, arguments.root, only, resize)


if __name__ == "__main__":
    run(main)
