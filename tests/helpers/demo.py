"""The demo's recipe over pictures and teachers that cost nothing: for launches on several hosts."""

import json
import shutil

from tests.conftest import NUM_SAMPLES, write_shards, write_teacher
from tests.helpers.launcher import ROOT

STEPS = 12
SHARDED = ["feature_teacher.sharding=zero3", "relation_teacher.sharding=zero3"]


def write_demo(folder):
    """Write what the demo's recipe needs: pictures, and teachers of its sizes with random weights."""
    write_shards(folder)
    for seed, name in enumerate(("feature", "relation"), 1):
        write_teacher(folder / f"{name}.safetensors", seed, embed_dim=64, num_heads=4)
    shutil.copy(ROOT / "launch/recipes/demo_hybrid.yaml", folder / "recipe.yaml")


def demo_overrides(folder, name):
    """Return the overrides of a run of `STEPS` steps with that name."""
    values = {
        "run.name": name,
        "run.root": folder / "runs",
        "data.shards": folder / "shards",
        "feature_teacher.weights": folder / "feature.safetensors",
        "relation_teacher.weights": folder / "relation.safetensors",
        "mask.source": "online",
        "optim.global_batch_size": 16,
        "optim.micro_batch_size": 8,
        "schedule.epochs": (STEPS + 0.5) * 16 / NUM_SAMPLES,
        "log.every_steps": 1,
        "student.drop_path": 0.2,
    }
    return [f"{key}={value}" for key, value in values.items()]


def logged(folder, name):
    """Return the lines of a run's log."""
    return [json.loads(line) for line in (folder / "runs" / name / "metrics.jsonl").read_text().splitlines()]


def losses(folder, name):
    """Return a run's logged losses by step; every step stands there exactly once."""
    lines = logged(folder, name)
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [line["loss"] for line in lines]
