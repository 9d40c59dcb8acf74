"""Check that shards are still those that their index was made for.

    python data_tools/verify_shards.py --shards shards/ --split train --quick
    python data_tools/verify_shards.py --shards shards/ --split train

--quick compares sizes and headers; without it every byte is read and every picture decoded. Exit code 0: all is well,
1: something is bad, and the report names it, one JSON object a line.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from hdscale.cli import EXIT_DONE, EXIT_STOPPED, check_workers, run
from hdscale.data.manifest import read_manifest
from hdscale.progress import Progress
from hdscale.shards.verifier import check_split

EXIT_BAD = 1


def main(argv: list[str]) -> int:
    """Check the shards that the arguments name; return the exit code."""
    arguments = _parse(argv)
    folder, split = arguments.shards, arguments.split
    report = arguments.report or folder / f"{split}.verify.jsonl"
    check_workers(arguments.workers)
    total = read_manifest(folder, split).num_samples
    try:
        with Progress(split, total, "samples", sys.stderr) as progress:
            summary = check_split(folder, split, arguments.quick, arguments.workers, report, progress)
    except KeyboardInterrupt:
        print("stopped; there is no report", file=sys.stderr)
        return EXIT_STOPPED
    depth = "quick check" if arguments.quick else "full check"
    if summary.bad_samples or summary.bad_files:
        print(
            f"{split}: {summary.bad_samples} of {summary.samples} samples and {summary.bad_files} files are bad "
            f"({depth}); {report} names them"
        )
        return EXIT_BAD
    print(f"{split}: all {summary.samples} samples are good ({depth})")
    return EXIT_DONE


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="verify_shards.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shards", type=Path, required=True, help="folder that holds the shards")
    parser.add_argument("--split", default="train", help="name of the split (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="sizes and headers only")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: one a core)")
    parser.add_argument("--report", type=Path, help="file of what is bad (default: SPLIT.verify.jsonl beside the tars)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run(main)
