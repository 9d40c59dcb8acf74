"""Masks of every sample and view, made ahead of training by the relation teacher on all ranks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from hdscale.cli import EXIT_DONE, EXIT_STOPPED
from hdscale.config.recipe import Recipe
from hdscale.data.fingerprint import view_fingerprint
from hdscale.data.index import ShardSet, open_shards
from hdscale.data.loader import SequentialLoader
from hdscale.engine.ranks import Ranks, distributed
from hdscale.engine.zero import build_teacher_engine
from hdscale.errors import UserError
from hdscale.masking.bits import pack_indices, row_bytes
from hdscale.masking.fingerprint import mask_fingerprint
from hdscale.masking.progressive import expected_num_keep
from hdscale.masking.store import MaskStore
from hdscale.progress import Progress
from hdscale.student.build import student_grid_size
from hdscale.teachers.build import FrozenTeacher, build_teacher
from hdscale.teachers.targets import online_keep_indices
from hdscale.training.run import Run, planned_precision
from hdscale.training.stop import StopFlag


def precompute_masks(recipe: Recipe, ds_config: Mapping[str, Any], *, stream: TextIO | None = None) -> int:
    """Fill the recipe's mask store; what an earlier start has written stays.

    Args:
        recipe: `mask`, `relation_teacher` and `data` count.
        ds_config: checked DeepSpeed config of teachers with `sharding: zero3`.
        stream: where the first rank shows progress.

    Returns:
        The exit code: done, or stopped on request; whole parts stay.
    """
    if not recipe.mask.chosen_by_teacher:
        raise UserError(f"mask.strategy {recipe.mask.strategy} needs no stored masks; progressive and direct do")
    if recipe.data.views == "fresh":
        raise UserError("data.views fresh has no end to store: set a number of views, or train with mask.source=online")
    if recipe.relation_teacher is None:
        raise UserError("relation_teacher is null: masks come from it; name one")
    shards = open_shards(Path(recipe.data.shards), recipe.data.split)
    precision = planned_precision(recipe)
    grid_size = student_grid_size(recipe.student, recipe.data.img_size)
    teacher = build_teacher(
        recipe.relation_teacher, role="relation", grid_size=grid_size, mask=recipe.mask, field="relation_teacher"
    )
    fingerprint = store_fingerprint(recipe, shards, precision, teacher)
    num_keep = expected_num_keep(recipe.mask, grid_size**2, teacher.depth)
    assert num_keep is not None, "both teacher masks drop tokens"
    with distributed() as ranks:
        if ranks.is_first:
            MaskStore.create(
                recipe.mask.store, fingerprint, shards.num_samples, grid_size**2, num_keep, recipe.data.views
            )
        dist.barrier()
        store = MaskStore.open(recipe.mask.store)
        sharding = recipe.relation_teacher.sharding
        engine = build_teacher_engine(teacher, ds_config, sharding=sharding, precision=precision, ranks=ranks)
        return _fill(_Writer(recipe, shards, store, engine, ranks), stream)


def open_mask_store(run: Run, teacher: FrozenTeacher | None, num_patches: int) -> MaskStore | None:
    """Open the recipe's mask store and refuse masks of other data, views, seeds, settings or teachers.

    Raises:
        UserError: naming what differs.
    """
    recipe = run.recipe
    if not recipe.mask.chosen_by_teacher or recipe.mask.source != "store":
        return None
    store = MaskStore.open(recipe.mask.store)
    expected = store_fingerprint(recipe, run.shards, run.precision, teacher)
    assert recipe.data.views != "fresh", "checked by the recipe"
    store.check(expected, recipe.data.views)
    if store.manifest.num_patches != num_patches:
        raise UserError(
            f"{store.path / 'manifest.json'}: masks of {store.manifest.num_patches} patches, the student has "
            f"{num_patches}: run launch/precompute_masks.py with mask.store=OTHER_FOLDER"
        )
    return store


def store_fingerprint(
    recipe: Recipe, shards: ShardSet, precision: str, teacher: FrozenTeacher | None
) -> dict[str, Any]:
    """Return what the recipe's stored masks must have been made from.

    Raises:
        UserError: there is no relation teacher to check them against.
    """
    if teacher is None:
        raise UserError(
            f"mask.strategy {recipe.mask.strategy} needs the relation_teacher that made the masks in "
            f"{recipe.mask.store}: name it, with loss.alpha=0 for masks alone, or set mask.strategy=none"
        )
    return mask_fingerprint(
        recipe.mask,
        teacher_digest=teacher.digest,
        teacher_normalisation=(teacher.preprocess.mean, teacher.preprocess.std),
        view_fingerprint=view_fingerprint(recipe.data, recipe.run.seed),
        index_digest=shards.digest,
        seed=recipe.run.seed,
        precision=precision,
        depth=teacher.depth,
    )


class _Writer(NamedTuple):
    recipe: Recipe
    shards: ShardSet
    store: MaskStore
    teacher: nn.Module
    ranks: Ranks


def _fill(writer: _Writer, stream: TextIO | None) -> int:
    store, ranks = writer.store, writer.ranks
    missing = store.missing_parts()
    # Nobody may write a part before everybody has listed the missing ones: the ranks would disagree on the work.
    dist.barrier()
    total = sum(len(store.part_samples(part)) for _, part in missing)
    stop = StopFlag()
    with Progress("masks", total, "masks", stream if ranks.is_first else None) as progress:
        for place, (view, part) in enumerate(missing):
            packed = _part(writer, view, part, progress, stop)
            if packed is None:
                return EXIT_STOPPED
            if place % ranks.world_size == ranks.rank:
                store.write_part(view, part, packed)
    dist.barrier()
    return EXIT_DONE


def _part(writer: _Writer, view: int, part: int, progress: Progress, stop: StopFlag) -> np.ndarray | None:
    """Compute one part on all ranks, each a stretch of it, and return it whole on every rank; None: stopped.

    Every rank runs the teacher equally often, on the last sample again where its stretch has ended: a sharded teacher
    waits for all ranks in each forward.
    """
    samples, ranks = writer.store.part_samples(part), writer.ranks
    batch_size = writer.recipe.optim.micro_batch_size
    stretch = -(-len(samples) // ranks.world_size)
    first = samples.start + ranks.rank * stretch
    wanted = np.minimum(np.arange(first, first + stretch), samples.stop - 1)
    loader = SequentialLoader(
        writer.shards, writer.recipe.data, writer.recipe.run.seed, sample_ids=wanted, view=view, batch_size=batch_size
    )
    num_patches = writer.store.manifest.num_patches
    rows: list[np.ndarray] = []
    for batch in loader:
        images = batch.images.to(ranks.device)
        kept = online_keep_indices(writer.teacher, images, writer.recipe.mask)
        rows.append(pack_indices(kept.cpu().numpy(), num_patches))
        progress(len(images) * ranks.world_size)
        if stop.any_rank():
            return None
    mine = torch.from_numpy(np.concatenate(rows)).to(ranks.device)
    everyone = torch.empty(ranks.world_size * stretch, row_bytes(num_patches), dtype=torch.uint8, device=ranks.device)
    dist.all_gather_into_tensor(everyone, mine)
    return everyone[: len(samples)].cpu().numpy()
