"""Index WebDataset tars that others made, so that training reads them as they are.

    python data_tools/index_shards.py --input DIR --split train
    python data_tools/index_shards.py --input DIR --split val --pattern 'imagenet-val-*.tar' --classes names.txt

Writes SPLIT.index.npy, SPLIT.manifest.json and SPLIT.index-report.jsonl (all that was left out) beside the tars and
changes no byte of them. Running the same command again continues an interrupted run. A sample is one picture and what
shares its key, the name up to the first dot; tars need not be sorted.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from hdscale.cli import EXIT_DONE, EXIT_STOPPED, check_workers, run
from hdscale.data.manifest import Manifest
from hdscale.hashing import json_digest
from hdscale.progress import Progress
from hdscale.shards.indexer import IndexJob, index_split, tar_names
from hdscale.shards.labels import label_rule
from hdscale.shards.sources.classes import read_classes
from hdscale.shards.split import SplitSettings, check_settings

_NAMED_SKIPS = 10


def main(argv: list[str]) -> int:
    """Index the tars that the arguments name; return the exit code."""
    arguments = _parse(argv)
    check_settings(SplitSettings(split=arguments.split))
    check_workers(arguments.workers)
    classes = None if arguments.classes is None else read_classes(arguments.classes)
    job = IndexJob(
        folder=arguments.input,
        split=arguments.split,
        pattern=arguments.pattern,
        rule=label_rule(arguments.labels, None if classes is None else len(classes)),
        classes=classes,
        pictures=tuple(name.lower().lstrip(".") for name in arguments.pictures.split(",") if name),
        made_by={
            "tool": "index_shards",
            "pattern": arguments.pattern,
            "labels": arguments.labels,
            "pictures": arguments.pictures,
            "classes": None if classes is None else json_digest(classes),
        },
    )
    try:
        with Progress(arguments.split, len(tar_names(job)), "tars", sys.stderr) as progress:
            manifest = index_split(job, arguments.workers, progress)
    except KeyboardInterrupt:
        print("stopped; the same command continues where it was", file=sys.stderr)
        return EXIT_STOPPED
    _report(manifest, job)
    return EXIT_DONE


def _report(manifest: Manifest, job: IndexJob) -> None:
    size = sum(shard.bytes for shard in manifest.shards) / 1e6
    print(
        f"{manifest.split}: {manifest.num_samples} samples of {len(manifest.classes)} classes in "
        f"{len(manifest.shards)} tars, {size:.1f} MB, in {job.folder}"
    )
    if manifest.skipped:
        print(f"warning: some was left out; {job.report} names all of it:", file=sys.stderr)
        for skipped in manifest.skipped[:_NAMED_SKIPS]:
            print(f"  {skipped.name} {skipped.reason}", file=sys.stderr)


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="index_shards.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--input", type=Path, required=True, help="folder that holds the tars; the index goes there")
    parser.add_argument("--split", default="train", help="name of the split (default: %(default)s)")
    parser.add_argument("--pattern", default="*.tar", help="names of the split's tars (default: %(default)s)")
    parser.add_argument(
        "--labels",
        default="auto",
        help="cls: the .cls member; json:FIELD: a field of the .json member; none; "
        "auto: .cls, else the .json's label or cls, else none (default: %(default)s)",
    )
    parser.add_argument("--classes", type=Path, help="text file, one class name a line, in the order of the labels")
    parser.add_argument(
        "--pictures",
        default="",
        metavar="EXT,EXT",
        help="what follows the first dot of a picture's name, such as jpg, where a key has several pictures "
        "(default: whatever ends with jpg, jpeg, png or webp)",
    )
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: one a core)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run(main)
