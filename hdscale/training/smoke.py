"""A few steps of any recipe at its real size, on generated pictures and with teachers of random weights."""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import numpy as np
import torch.distributed as dist
from PIL import Image

from hdscale.cli import EXIT_DONE
from hdscale.cluster.launcher import planned_world_size
from hdscale.config.recipe import Recipe, TeacherConfig
from hdscale.engine.ranks import distributed
from hdscale.flops import count_flops
from hdscale.masking.bits import pack_indices
from hdscale.masking.progressive import expected_num_keep
from hdscale.masking.random import random_keep_indices
from hdscale.masking.store import MaskStore
from hdscale.shards.sources.image_folder import ImageFolder
from hdscale.shards.split import SplitSettings, assign_splits
from hdscale.shards.writer import SplitJob, write_split
from hdscale.teachers.build import FrozenTeacher
from hdscale.training.distill import build_models, start
from hdscale.training.loop import run_loader, set_drop_path, to_device, train_step
from hdscale.training.masks import store_fingerprint
from hdscale.training.meter import peak_memory_gb
from hdscale.training.run import Run, Session, check_run
from hdscale.types import Batch

_PICTURE = (375, 500)  # height, width in pixels: ImageNet's usual


class _Figures(NamedTuple):
    seconds: list[float]
    losses: list[float]
    flops: int
    over_one_teacher: float | None
    memory_gb: list[float]


def smoke(
    recipe: Recipe, steps: int, ds_config: Mapping[str, Any], teacher_ds_config: Mapping[str, Any], *, stream: TextIO
) -> int:
    """Run optimizer steps with micro-batch 1 and no accumulation; print time, FLOPs and peak memory.

    Everything is the recipe's but the pictures (noise), the teachers' weights (random, of the real shapes), stored
    masks (random, of the real size) and the batch. Nothing is left behind.

    Returns:
        The exit code.
    """
    with generated_session(recipe, steps, ds_config, teacher_ds_config) as session:
        figures = _run_steps(session, steps)
        if session.ranks.is_first:
            stage = ds_config["zero_optimization"]["stage"]
            _print(session.run.recipe, figures, f"ZeRO-{stage}, {session.run.precision}", stream)
    return EXIT_DONE


@contextlib.contextmanager
def generated_session(
    recipe: Recipe,
    steps: int,
    ds_config: Mapping[str, Any],
    teacher_ds_config: Mapping[str, Any],
    *,
    micro_batch_size: int = 1,
    accumulation: int = 1,
) -> Iterator[Session]:
    """Start a session for a few optimizer steps that needs no file; what it wrote goes at the end.

    Args:
        recipe: all of it is taken but pictures, teachers' weights, stored masks and the batch size.
        steps: optimizer steps; as many pictures are generated.
        ds_config: checked DeepSpeed config of the student.
        teacher_ds_config: the same of teachers with `sharding: zero3` or `node`.
        micro_batch_size: replaces the recipe's.
        accumulation: micro-steps per optimizer step.
    """
    world_size = planned_world_size()
    global_batch_size = micro_batch_size * accumulation * world_size
    # Each rank generates the same pictures in a folder of its own: they need not share a disk for this.
    with tempfile.TemporaryDirectory(prefix="hdscale-smoke-") as folder:
        _write_shards(Path(folder), recipe, steps * global_batch_size)
        small = _smoke_recipe(recipe, Path(folder), micro_batch_size, global_batch_size)
        run = check_run(small, ds_config)
        models = build_models(run, _random_masks)
        with distributed() as ranks:
            yield start(run, models, ranks, teacher_ds_config)


def _run_steps(session: Session, steps: int) -> _Figures:
    ranks = session.ranks
    batches = iter(run_loader(session, 0, steps))
    seconds: list[float] = []
    losses: list[float] = []
    flops = 0
    for step in range(steps):
        set_drop_path(session, step, 0)
        start = time.perf_counter()
        # The first step is counted: that leaves attention unfused, which costs a little time and memory.
        if step == 0:
            flops = count_flops(lambda: losses.append(_step(session, batches)))
        else:
            losses.append(_step(session, batches))
        seconds.append(time.perf_counter() - start)
    memory: list[Any] = [None] * ranks.world_size
    dist.all_gather_object(memory, peak_memory_gb(ranks))
    return _Figures(seconds, losses, flops, session.flops_over_one_teacher, memory)


def _step(session: Session, batches: Iterator[Batch]) -> float:
    terms = train_step(session, to_device(next(batches), session.ranks))
    return terms.total.item()


def _print(recipe: Recipe, figures: _Figures, how: str, stream: TextIO) -> None:
    ranks = len(figures.memory_gb)
    print(
        f"smoke run of {recipe.run.name}: {ranks} ranks, {how}, micro-batch 1, no accumulation; generated pictures, "
        "teachers of random weights, stored masks random",
        file=stream,
    )
    for step, (seconds, loss) in enumerate(zip(figures.seconds, figures.losses, strict=True), 1):
        counted = " (counted, attention unfused)" if step == 1 else ""
        print(f"step {step}: {seconds:.2f} s, loss {loss:.4f}{counted}", file=stream)
    print(f"FLOPs an image: {figures.flops / 1e9:.2f} GFLOP, recomputation included", file=stream)
    if figures.over_one_teacher is not None:
        print(
            f"FLOPs against the feature teacher alone, no masks: {figures.over_one_teacher:.3f} times, without "
            "recomputation (the paper's Appendix D: about 1.2 times the time, ViT-B)",
            file=stream,
        )
    memory = ", ".join(f"{value:.2f}" for value in figures.memory_gb)
    print(f"peak memory a rank: {memory} GB, start-up included", file=stream, flush=True)


def _write_shards(folder: Path, recipe: Recipe, num_samples: int) -> None:
    noise = np.random.RandomState(0)
    pictures = folder / "pictures" / "noise"
    pictures.mkdir(parents=True)
    for number in range(num_samples):
        pixels = noise.randint(0, 256, (*_PICTURE, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(pictures / f"{number:06d}.jpg")
    source = ImageFolder(pictures.parent)
    listing = source.listing()
    rows = assign_splits(listing, SplitSettings(split=recipe.data.split))[recipe.data.split]
    job = SplitJob(
        source=source,
        output=folder / "shards",
        split=recipe.data.split,
        classes=listing.classes,
        names=[listing.names[row] for row in rows],
        labels=listing.labels[rows],
        samples_per_shard=1000,
        made_by={"tool": "smoke"},
    )
    write_split(job, 0, lambda _: None)


def _smoke_recipe(recipe: Recipe, folder: Path, micro_batch_size: int, global_batch_size: int) -> Recipe:
    values = recipe.model_dump()
    values["run"] |= {"root": str(folder / "runs")}
    values["data"] |= {"shards": str(folder / "shards"), "workers": 0}
    values["optim"] |= {"micro_batch_size": micro_batch_size, "global_batch_size": global_batch_size}
    values["schedule"] |= {"epochs": 1, "warmup_epochs": 0, "stop_after": None}
    values["mask"] |= {"store": str(folder / "masks"), "images_per_forward": 1}
    for name in ("feature_teacher", "relation_teacher"):
        teacher: TeacherConfig | None = getattr(recipe, name)
        if teacher is not None and teacher.source != "file":
            values[name] |= {"weights": "random"}
    return type(recipe).model_validate(values)


def _random_masks(run: Run, teacher: FrozenTeacher | None, num_patches: int) -> MaskStore | None:
    """Write a store with masks of the right size; what they keep does not change the cost."""
    mask, views = run.recipe.mask, run.recipe.data.views
    if not mask.chosen_by_teacher or mask.source != "store":
        return None
    fingerprint = store_fingerprint(run.recipe, run.shards, run.precision, teacher)
    assert teacher is not None, "store_fingerprint refuses that"
    assert views != "fresh", "checked by the recipe"
    num_keep = expected_num_keep(mask, num_patches, teacher.depth)
    assert num_keep is not None, "teacher masks drop tokens"
    num_samples = run.shards.num_samples
    store = MaskStore.create(mask.store, fingerprint, num_samples, num_patches, num_keep, views)
    for view, part in store.missing_parts():
        samples = np.array(store.part_samples(part))
        kept = random_keep_indices(samples, np.full_like(samples, view), num_patches, num_keep, run.recipe.run.seed)
        store.write_part(view, part, pack_indices(kept.numpy(), num_patches))
    return store
