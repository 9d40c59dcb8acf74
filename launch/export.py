"""Write a run's student as safetensors that timm loads.

python launch/export.py --run runs/NAME --output student.safetensors [--step N]
"""

from __future__ import annotations

import argparse
from pathlib import Path

from hdscale.cli import EXIT_DONE, run
from hdscale.config.loading import load_run_recipe
from hdscale.errors import UserError
from hdscale.export import export_student, loading_code
from hdscale.runs.checkpoint import (
    CHECKPOINT_FOLDER,
    Checkpoint,
    CorruptCheckpointError,
    open_checkpoint,
    require_checkpoint,
)


def main(argv: list[str]) -> int:
    """Run the command; return its exit code."""
    parser = argparse.ArgumentParser(prog="export.py", description=str(__doc__).splitlines()[0])
    parser.add_argument("--run", type=Path, required=True, help="folder of a run")
    parser.add_argument("--output", type=Path, required=True, help="file to write, NAME.safetensors")
    parser.add_argument("--step", type=int, help="checkpoint to take; left out: the newest")
    options = parser.parse_args(argv)
    recipe = load_run_recipe(options.run)
    checkpoint = require_checkpoint(options.run) if options.step is None else _checkpoint_at(options.run, options.step)
    kind = checkpoint.state["fingerprints"].get("method", "student")
    how = {"kind": kind, "cls_in_loss": checkpoint.state.get("cls_in_loss", False)}  # older ones never were
    weights, img_size = checkpoint.module_state(), recipe.data.img_size
    arch = export_student(weights, recipe.student, img_size, options.output, **how)
    print(f"{options.output}: {kind} of {options.run} at step {checkpoint.step}\n")
    print(loading_code(arch, options.output, recipe.student, cls_in_loss=how["cls_in_loss"]))
    return EXIT_DONE


def _checkpoint_at(run_folder: Path, step: int) -> Checkpoint:
    root = run_folder / CHECKPOINT_FOLDER
    steps = ", ".join(str(int(path.name.removeprefix("step-"))) for path in sorted(root.glob("step-*")))
    has = f"{root} has the steps {steps or 'none'}"
    if not (root / f"step-{step:09d}").is_dir():
        raise UserError(f"--step {step}: there is no such checkpoint; {has}")
    try:
        return open_checkpoint(root / f"step-{step:09d}")
    except CorruptCheckpointError as error:
        raise UserError(f"--step {step}: {error}; {has}") from error


if __name__ == "__main__":
    run(main)
