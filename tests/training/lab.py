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

ROOT = Path(__file__).resolve().parents[2]
ONLINE = ["optim.micro_batch_size=16", "mask.source=online", "student.checkpoint_every=1"]
SHORT = ["student.drop_path=0.3", "schedule.epochs=2.67"]  # 10 steps


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
        return load_recipe(self.folder / "recipe.yaml", [f"run.name={name}", *overrides])

    def distill(self, name, stage, *overrides):
        return distill(self.recipe(name, *overrides), self.configs[stage], self.teacher)

    def session(self, name, stage, *overrides):
        return started(self.recipe(name, *overrides), self.configs[stage], self.teacher_all)

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
