"""Train a teacher of the recipe's student architecture: a masked autoencoder or a supervised classifier.

deepspeed launch/pretrain_teacher.py --method mae --recipe launch/recipes/demo_teacher.yaml run.name=mae
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from hdscale.cli import run
from hdscale.config.deepspeed import load_ds_config
from hdscale.config.loading import check_allowed, load_recipe

ROOT = Path(__file__).resolve().parent.parent


def main(argv: list[str]) -> int:
    """Run the command; return its exit code. The teacher is `encoder.safetensors` in the run folder."""
    parser = argparse.ArgumentParser(prog="pretrain_teacher.py", description=str(__doc__).splitlines()[0])
    parser.add_argument("--method", required=True, choices=["mae", "supervised"])
    parser.add_argument("--recipe", type=Path, required=True, help="YAML file")
    parser.add_argument("--ds_config", type=Path, default=ROOT / "ds_configs/zero2.json")
    parser.add_argument("--allow-change", action="append", default=[], metavar="FIELD", help="continue a changed run")
    parser.add_argument("--local_rank", help="set by the launcher")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="recipe fields, such as optim.lr=3e-4")
    options = parser.parse_intermixed_args(argv)
    check_allowed(options.allow_change)
    recipe = load_recipe(options.recipe, options.overrides)
    ds_config = load_ds_config(options.ds_config)

    # Torch and DeepSpeed take seconds to import: a mistake in a recipe is found before that.
    from hdscale.cluster.arrival import all_hosts

    with all_hosts(recipe, ds_config=ds_config):
        from hdscale.engine.zero import check_zero_section
        from hdscale.training.pretrain import pretrain

        check_zero_section(options.ds_config, ds_config)
        return pretrain(recipe, options.method, ds_config, allow_change=options.allow_change, stream=sys.stderr)


if __name__ == "__main__":
    run(main)
