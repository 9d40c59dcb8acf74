"""Train a student by Hybrid Distillation; start it with the DeepSpeed launcher.

deepspeed --hostfile hosts launch/train.py --ds_config ds_configs/zero2.json [--recipe R.yaml] [key=value ...]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from hdscale.cli import run
from hdscale.config.deepspeed import load_ds_config
from hdscale.config.loading import check_allowed, load_recipe
from hdscale.errors import UserError

ROOT = Path(__file__).resolve().parent.parent


def main(argv: list[str]) -> int:
    """Run the command; return its exit code: 0 finished, 75 stopped with a checkpoint."""
    parser = argparse.ArgumentParser(prog="train.py", description=str(__doc__).splitlines()[0])
    parser.add_argument("--recipe", type=Path, default=ROOT / "launch/recipes/vit_l_in21k.yaml", help="YAML file")
    parser.add_argument("--ds_config", type=Path, default=ROOT / "ds_configs/zero2.json", help="student's")
    parser.add_argument(
        "--teacher_ds_config", type=Path, default=ROOT / "ds_configs/teacher_zero3.json", help="of zero3 teachers"
    )
    parser.add_argument("--allow-change", action="append", default=[], metavar="FIELD", help="continue a changed run")
    parser.add_argument("--smoke", type=int, metavar="STEPS", help="a few steps on generated data, random teachers")
    parser.add_argument("--local_rank", help="set by the launcher")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="recipe fields, such as optim.lr=3e-4")
    options = parser.parse_intermixed_args(argv)
    if options.smoke is not None and options.smoke < 1:
        raise UserError(f"--smoke must be at least 1 step, got {options.smoke}")
    check_allowed(options.allow_change)
    recipe = load_recipe(options.recipe, options.overrides)
    ds_config = load_ds_config(options.ds_config)
    teacher_ds_config = load_ds_config(options.teacher_ds_config, stages=(3,))

    # Torch and DeepSpeed take seconds to import: a mistake in a recipe is found before that.
    from hdscale.cluster.arrival import all_hosts

    with all_hosts(recipe, ds_config=ds_config, teacher_ds_config=teacher_ds_config):
        from hdscale.engine.zero import check_zero_section
        from hdscale.training.distill import distill
        from hdscale.training.smoke import smoke

        check_zero_section(options.ds_config, ds_config)
        check_zero_section(options.teacher_ds_config, teacher_ds_config)
        if options.smoke is not None:
            return smoke(recipe, options.smoke, ds_config, teacher_ds_config, stream=sys.stdout)
        return distill(recipe, ds_config, teacher_ds_config, allow_change=options.allow_change, stream=sys.stderr)


if __name__ == "__main__":
    run(main)
