"""Recipes, configs and shorthands of the scenarios."""

import contextlib
import shutil
from pathlib import Path

import torch.distributed as dist
from torch.optim.optimizer import register_optimizer_step_pre_hook

from hdscale.config.deepspeed import load_ds_config
from hdscale.config.loading import load_recipe
from hdscale.training.distill import distill
from tests.helpers.sessions import started

ROOT = Path(__file__).resolve().parents[3]
DROP_PATH = "student.drop_path=0.3"
# Sharded teachers take half of a step. Where they are not the question, stage 3 shows them and stage 2 goes without.
REPLICATED = [f"{role}_teacher.sharding=replicate" for role in ("feature", "relation")]
SCHEDULE = "schedule.epochs=2.14"  # STEPS of tests.helpers.whole_runs


class Lab:
    """Recipes, configs and shorthands."""

    def __init__(self, folder, ranks):
        self.folder, self.ranks = folder, ranks
        self.teacher = load_ds_config(ROOT / "ds_configs/teacher_zero3.json")
        self.teacher_all = load_ds_config(folder / "teacher_all.json")
        self.configs = {
            2: load_ds_config(ROOT / "ds_configs/zero2.json"),
            3: load_ds_config(ROOT / "ds_configs/zero3.json"),
            "3all": load_ds_config(folder / "zero3_all.json"),
        }

    def recipe(self, name, *overrides):
        return load_recipe(self.folder / "recipe.yaml", [f"run.name={name}", SCHEDULE, *overrides])

    def distill(self, name, stage, *overrides):
        return distill(self.recipe(name, *overrides), self.configs[stage], self.teacher)

    def session(self, name, stage, *overrides):
        return started(self.recipe(name, *overrides), self.configs[stage], self.teacher)

    def run_folder(self, name):
        return self.folder / "runs" / name

    def everyone(self, value):
        values = [None] * self.ranks.world_size
        dist.all_gather_object(values, value)
        return values

    def copy_run(self, name, copy):
        if self.ranks.is_first:
            shutil.copytree(self.run_folder(name), self.run_folder(copy))
        dist.barrier()


@contextlib.contextmanager
def watched_optimizers():
    """Yield a list of the optimizers' names and rates, one entry per call of `step`: what moved the weights."""
    steps = []
    hook = register_optimizer_step_pre_hook(
        lambda optimizer, *_: steps.append(
            [type(optimizer).__name__, [group["lr"] for group in optimizer.param_groups]]
        )
    )
    try:
        yield steps
    finally:
        hook.remove()
