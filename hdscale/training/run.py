"""What every run needs, checked before a device is taken; and the way from there to a finished run folder."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist

from hdscale.cluster.arrival import check_same
from hdscale.data.fingerprint import view_fingerprint
from hdscale.data.index import open_shards
from hdscale.data.loader import accumulation_steps
from hdscale.engine.ranks import resolve_precision
from hdscale.engine.zero import build_student_engine, student_ds_config
from hdscale.engine.zero_state import restore
from hdscale.errors import UserError
from hdscale.runs.checkpoint import newest_checkpoint
from hdscale.runs.folder import check_recipe_unchanged, is_allowed, mark_done, run_folder_of, write_run_folder
from hdscale.training.schedule import Schedule, build_schedule

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import nn

    from hdscale.config.recipe import Recipe
    from hdscale.data.index import ShardSet
    from hdscale.engine.ranks import Ranks
    from hdscale.engine.zero_internals import Engine
    from hdscale.runs.checkpoint import Checkpoint


class Run(NamedTuple):
    """A run that is known to make sense: nothing here has touched a device or another rank."""

    recipe: Recipe
    ds_config: dict[str, Any]
    folder: Path
    shards: ShardSet
    schedule: Schedule
    accumulation: int
    precision: str
    fingerprints: dict[str, Any]
    checkpoint: Checkpoint | None
    flops_per_image: float | None = None  # of one training step, for the log's `mfu`


def planned_world_size() -> int:
    """Return how many ranks the launcher has started, before they meet."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def planned_precision(recipe: Recipe) -> str:
    """Return the run's arithmetic on this machine's devices."""
    return resolve_precision(recipe.run.precision, torch.device("cuda" if torch.cuda.is_available() else "cpu"))


def check_run(
    recipe: Recipe,
    ds_config: Mapping[str, Any],
    *,
    allow_change: Sequence[str],
) -> Run:
    """Check a run against its data and against what its folder already holds.

    Args:
        recipe: resolved.
        ds_config: checked file of `ds_configs/`.
        allow_change: fields and fingerprints that may differ from the run's earlier start.

    Raises:
        UserError: whatever the person who started the run can mend.
    """
    folder = run_folder_of(recipe)
    shards = open_shards(Path(recipe.data.shards), recipe.data.split)
    schedule = build_schedule(recipe.schedule, recipe.optim, shards.num_samples)
    accumulation = accumulation_steps(
        recipe.optim.global_batch_size, recipe.optim.micro_batch_size, planned_world_size()
    )
    precision = planned_precision(recipe)
    views = view_fingerprint(recipe.data, recipe.run.seed)
    fingerprints = {"data": shards.digest, "precision": precision, **{f"view {name}": views[name] for name in views}}
    checkpoint = newest_checkpoint(folder)
    if checkpoint is not None:
        check_recipe_unchanged(folder, recipe, allow_change)
        _check_fingerprints(checkpoint, fingerprints, allow_change)
    completed = student_ds_config(ds_config, recipe.optim, accumulation=accumulation, precision=precision)
    return Run(recipe, completed, folder, shards, schedule, accumulation, precision, fingerprints, checkpoint)


def with_fingerprints(run: Run, fingerprints: Mapping[str, str], allow_change: Sequence[str]) -> Run:
    """Add what was not known yet, such as the teachers' digests, and check the checkpoint against it, too."""
    if run.checkpoint is not None:
        _check_fingerprints(run.checkpoint, fingerprints, allow_change)
    return run._replace(fingerprints={**run.fingerprints, **fingerprints})


def start_engine(run: Run, module: nn.Module, ranks: Ranks) -> Engine:
    """Build the training engine, from the run's checkpoint when it has one, and write what the run was asked for."""
    _check_ranks_agree(run, ranks)
    if run.checkpoint is not None:
        module.load_state_dict(run.checkpoint.module_state())
    engine = build_student_engine(module, run.ds_config, run.recipe.optim)
    if run.checkpoint is not None:
        restore(engine, run.checkpoint)
    if ranks.is_first:
        mark_done(run.folder, done=False)
        write_run_folder(run.folder, run.recipe, run.ds_config, ranks.world_size)
    dist.barrier()
    return engine


def _check_fingerprints(checkpoint: Checkpoint, now: Mapping[str, Any], allow_change: Sequence[str]) -> None:
    before = checkpoint.state["fingerprints"]
    for name in sorted(now):
        if before.get(name) != now[name] and not is_allowed(name, allow_change):
            raise UserError(
                f"{checkpoint.path}: was made with another {name} ({_short(before.get(name))}, now "
                f"{_short(now[name])}): put it back, choose another run.name, or pass --allow-change {name!r}"
            )


def _short(value: Any) -> str:
    is_digest = isinstance(value, str) and len(value) == 64
    return f"sha256 {value[:12]}..." if is_digest else str(value)


def _check_ranks_agree(run: Run, ranks: Ranks) -> None:
    """Compare what each rank has found out alone: one that read another checkpoint would train another model."""
    mine = {
        "checkpoint step": None if run.checkpoint is None else run.checkpoint.step,
        "gradient accumulation": run.accumulation,
        **run.fingerprints,
    }
    everyone: list[Any] = [None] * ranks.world_size
    dist.all_gather_object(everyone, {name: _short(value) for name, value in mine.items()})
    check_same(everyone, ranks.hosts)
