"""A world small enough for whole runs: 60 pictures in shards, two teachers of random weights, one recipe."""

import json
import os
import shutil
from pathlib import Path
from typing import NamedTuple

# `make test-gpu` sets it. All other tests are for CPUs, whatever the machine has, and so is what they start.
ON_GPU = os.environ.get("HDSCALE_TEST_ON_GPU") == "1"
if not ON_GPU:
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
# Torch's store asks the name server for the name of every address it connects to, to no purpose. An answer that is
# lost costs one second instead of five, here and in what tests launch.
os.environ["RES_OPTIONS"] = "timeout:1 attempts:1"

# ruff: noqa: E402 - torch and DeepSpeed read the environment
import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image

from hdscale.shards.sources.image_folder import ImageFolder
from hdscale.shards.split import SplitSettings, assign_splits
from hdscale.shards.writer import SplitJob, write_split
from hdscale.teachers.files import save_teacher_file

pytest_plugins = ["tests.helpers.launcher", "tests.helpers.ranks", "tests.helpers.shards"]

ROOT = Path(__file__).resolve().parents[1]
NUM_SAMPLES = 60


# What tests of these folders share is made once, by a launch: one of pytest-xdist's processes takes the whole folder.
# They come first, and with them files that take minutes, so that no process ends long before the other.
SHARING = ("tests/launch/hosts", "tests/training/scenarios")
LONG = (*SHARING, "tests/benchmarks/test_memory.py", "tests/ablation/test_ablate_command.py")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    from xdist.scheduler import LoadScopeScheduling

    class ByFolderOrFile(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            file = nodeid.partition("::")[0]
            folder = file.rpartition("/")[0]
            return folder if folder in SHARING else file

    config.option.loadscopereorder = False
    return ByFolderOrFile(config, log)


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: not item.nodeid.startswith(LONG))
    if ON_GPU and torch.cuda.is_available():
        return
    reason = "no GPU is visible" if ON_GPU else "needs a GPU: make test-gpu"
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason=reason))


class World(NamedTuple):
    """Where the files are."""

    folder: Path
    recipe: Path


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """Read only, but for the run folders and mask stores that tests name themselves."""
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def own_world(tmp_path, world):
    """A world to spoil."""
    shutil.copytree(world.folder / "shards", tmp_path / "shards")
    for name in ("feature", "relation"):
        shutil.copy(world.folder / f"{name}.safetensors", tmp_path)
    return write_settings(tmp_path)


def make_world(folder: Path) -> World:
    write_shards(folder)
    for seed, name in enumerate(("feature", "relation"), 1):
        write_teacher(folder / f"{name}.safetensors", seed)
    return write_settings(folder)


def write_settings(folder: Path) -> World:
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(recipe_values(folder)))
    # ZeRO-3 that shards everything: the shipped thresholds leave most of a tiny model whole.
    for source, name in (("zero3", "zero3_all"), ("teacher_zero3", "teacher_all")):
        values = json.loads((ROOT / f"ds_configs/{source}.json").read_text())
        values["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        (folder / f"{name}.json").write_text(json.dumps(values))
    return World(folder, recipe)


def recipe_values(folder: Path) -> dict:
    return {
        "run": {"root": str(folder / "runs"), "name": "run", "precision": "fp32"},
        "data": {"shards": str(folder / "shards"), "img_size": 32, "views": 2, "workers": 0, "order": "global"},
        "student": {
            "model": "vit_tiny_patch16_224",
            "patch_size": 4,
            "embed_dim": 48,
            "depth": 4,
            "num_heads": 3,
            "drop_path": 0.0,
        },
        "feature_teacher": {"source": "file", "weights": str(folder / "feature.safetensors")},
        "relation_teacher": {"source": "file", "weights": str(folder / "relation.safetensors")},
        "mask": {"store": str(folder / "masks"), "images_per_forward": 8},
        "optim": {"global_batch_size": 16, "micro_batch_size": 8, "lr": 1e-3, "clip": 0.43},
        # 20 steps of 16, so that batches straddle epochs of 60 samples.
        "schedule": {"epochs": 5.34, "warmup_epochs": 1, "min_lr": 1e-5},
        "checkpoint": {"every_steps": 1000},
        "log": {"every_steps": 1},
    }


def write_shards(folder: Path, seed: int = 0) -> None:
    random = np.random.RandomState(seed)
    for number in range(NUM_SAMPLES):
        picture = folder / f"pictures-{seed}" / f"class{number % 3}" / f"{number:03d}.png"
        picture.parent.mkdir(parents=True, exist_ok=True)
        coarse = Image.fromarray(random.randint(0, 256, (5, 6, 3), dtype=np.uint8))
        coarse.resize((48, 40), Image.Resampling.BICUBIC).save(picture)
    source = ImageFolder(folder / f"pictures-{seed}")
    listing = source.listing()
    for split, rows in assign_splits(listing, SplitSettings()).items():
        job = SplitJob(
            source=source,
            output=folder / "shards",
            split=split,
            classes=listing.classes,
            names=[listing.names[row] for row in rows],
            labels=listing.labels[rows],
            samples_per_shard=25,
            made_by={"seed": seed},
        )
        write_split(job, 0, lambda _: None)


def write_teacher(path: Path, seed: int, **sizes: int) -> None:
    arch = {"model_name": "vit_tiny_patch16_224", "img_size": 32, "patch_size": 4, "num_classes": 0}
    arch |= {"embed_dim": 48, "depth": 4, "num_heads": 3} | sizes
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        state = timm.create_model(**arch).state_dict()
        # timm's weights are so small that all relations are near zero.
        state = {name: value * 4 if value.ndim == 2 else value for name, value in state.items()}
    save_teacher_file(path, state, arch, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25), kind="mae")
