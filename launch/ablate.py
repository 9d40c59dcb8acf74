"""Train the rows of one of the paper's tables and write them beside the paper's figures.

python launch/ablate.py 8 --scale demo                    # scanned digits, two CPU ranks, some 15 minutes
python launch/ablate.py 3 --scale b-in1k --seeds 3        # ViT-B on ImageNet-1K, as in the paper
python launch/ablate.py 8 --rows none,progressive-70 --dry-run
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

from hdscale.ablation.jobs import Settings, check_overrides
from hdscale.ablation.paper_tables import TABLES, find_table
from hdscale.ablation.scales import SCALES, find_scale
from hdscale.cli import EXIT_DONE, EXIT_STOPPED, run
from hdscale.errors import UserError


def main(argv: list[str]) -> int:
    """Make the table that the arguments name; return the exit code: 1 when a row failed, 75 when stopped."""
    options = _parse(argv)
    table, scale = find_table(options.table), find_scale(options.scale)
    for name in ("seeds", "ranks"):
        if (value := getattr(options, name)) is not None and value < 1:
            raise UserError(f"--{name} must be at least 1, got {value}")
    if options.hostfile is not None and not options.hostfile.is_file():
        raise UserError(f"--hostfile {options.hostfile} does not exist: write one line `HOST slots=GPUS` a machine")
    rows = table.select([key for key in options.rows.split(",") if key])
    output = options.output or Path("ablations") / scale.name
    if output.exists() and not output.is_dir():
        raise UserError(f"--output {output} is a file: choose another folder")
    check_overrides(options.overrides, scale, table)

    # torch takes seconds to import: a mistake is found before that.
    from hdscale.ablation.make_table import Ablation, ablate, table_files
    from hdscale.ablation.running import Launcher, listing

    settings = Settings(table, scale, output, tuple(options.overrides))
    ablation = Ablation(settings, rows, options.seeds, f"python launch/ablate.py {shlex.join(argv)}")
    launcher = Launcher(scale, options.ranks or scale.ranks, options.hostfile, output / "logs", sys.stderr)
    if options.dry_run:
        print(listing(ablation.jobs(), launcher))
        return EXIT_DONE
    code = ablate(ablation, launcher, sys.stderr)
    page = table_files(settings)[0]
    if code != EXIT_STOPPED and page.is_file():
        print(f"{page.read_text()}\n{page}")
    return code


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="ablate.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("table", help=f"one of {', '.join(TABLES)}")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="recipe fields of all rows")
    parser.add_argument("--scale", default="demo", help=f"one of {', '.join(SCALES)} (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=1, help="runs a row, seeds 0 to N - 1 (default: %(default)s)")
    parser.add_argument("--rows", default="", help="keys, divided by commas, as --dry-run shows them (default: all)")
    parser.add_argument("--output", type=Path, help="folder of tables and runs (default: ablations/SCALE)")
    parser.add_argument("--ranks", type=int, help="processes a machine (default: the scale's)")
    parser.add_argument("--hostfile", type=Path, help="machines, for the DeepSpeed launcher (default: this one)")
    parser.add_argument("--dry-run", action="store_true", help="print rows and commands, run nothing")
    return parser.parse_intermixed_args(argv)


if __name__ == "__main__":
    run(main)
