"""Compute the masks of every sample and view with the relation teacher, into the recipe's mask store.

deepspeed launch/precompute_masks.py --recipe R.yaml [key=value ...]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from hdscale.cli import run
from hdscale.config.deepspeed import load_ds_config
from hdscale.config.loading import load_recipe

ROOT = Path(__file__).resolve().parent.parent


def main(argv: list[str]) -> int:
    """Run the command; return its exit code: 0 finished, 75 stopped, whole parts stay."""
    parser = argparse.ArgumentParser(prog="precompute_masks.py", description=str(__doc__).splitlines()[0])
    parser.add_argument("--recipe", type=Path, default=ROOT / "launch/recipes/vit_l_in21k.yaml", help="YAML file")
    parser.add_argument("--teacher_ds_config", type=Path, default=ROOT / "ds_configs/teacher_zero3.json")
    parser.add_argument("--local_rank", help="set by the launcher")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="recipe fields, such as mask.store=masks/")
    options = parser.parse_intermixed_args(argv)
    recipe = load_recipe(options.recipe, options.overrides)
    ds_config = load_ds_config(options.teacher_ds_config, stages=(3,))

    # Torch and DeepSpeed take seconds to import: a mistake in a recipe is found before that.
    from hdscale.cluster.arrival import all_hosts

    with all_hosts(recipe, teacher_ds_config=ds_config):
        from hdscale.engine.zero import check_zero_section
        from hdscale.training.masks import precompute_masks

        check_zero_section(options.teacher_ds_config, ds_config)
        return precompute_masks(recipe, ds_config, stream=sys.stderr)


if __name__ == "__main__":
    run(main)
