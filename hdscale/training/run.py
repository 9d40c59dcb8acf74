"""A run: checked against its data and its folder before anything is built, then an engine that goes on from there."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from hdscale.cluster.arrival import check_same
from hdscale.cluster.launcher import planned_world_size
from hdscale.config.loading import is_allowed
from hdscale.config.recipe import Recipe
from hdscale.data.fingerprint import view_fingerprint
from hdscale.data.index import ShardSet, open_shards
from hdscale.data.loader import accumulation_steps
from hdscale.data.samples import MaskLookup
from hdscale.engine.ranks import Ranks, resolve_precision
from hdscale.engine.zero import build_student_engine, student_ds_config
from hdscale.engine.zero_internals import Engine
from hdscale.engine.zero_state import restore
from hdscale.errors import UserError
from hdscale.hashing import short_value
from hdscale.runs.checkpoint import Checkpoint, newest_checkpoint
from hdscale.runs.folder import check_recipe_unchanged, mark_done, run_folder_of, write_run_folder
from hdscale.student.build import student_grid_size
from hdscale.student.drop_path import use_sample_drop_path
from hdscale.training.gradient_norms import check_measurable
from hdscale.training.schedule import Schedule, build_schedule
from hdscale.types import Batch


class Run(NamedTuple):
    """A run that is known to make sense: no device is taken yet, and no other rank was asked."""

    recipe: Recipe
    ds_config: dict[str, Any]  # complete, as DeepSpeed takes it
    folder: Path
    shards: ShardSet
    schedule: Schedule
    accumulation: int  # micro-steps per optimizer step
    precision: str  # resolved: fp32, fp16 or bf16
    fingerprints: dict[str, Any]  # of everything that a resume may not change, by name
    checkpoint: Checkpoint | None  # what the run goes on from
    allow_change: Sequence[str]  # fields and fingerprints that may differ from the run's earlier start

    @property
    def start_step(self) -> int:
        """Optimizer steps done already."""
        return 0 if self.checkpoint is None else self.checkpoint.step

    @property
    def end_step(self) -> int:
        """Optimizer steps done when this start of the run ends."""
        total = self.schedule.total_steps
        return min(total, self.recipe.schedule.stop_after or total)


class Session(NamedTuple):
    """A run on all ranks, ready for its first step."""

    run: Run  # with the fingerprints of all that was built for it
    ranks: Ranks
    engine: Engine
    ask_teachers: Callable[[Batch], tuple[Any, ...]]
    """Takes a batch on the device, returns the engine's arguments; in pretraining, labels or a mask are the teacher."""
    look_up_masks: MaskLookup | None = None
    flops_per_image: float | None = None  # of one training step, for the log's `mfu`
    teacher_engines: Mapping[str, nn.Module] = MappingProxyType({})  # by recipe section
    flops_over_one_teacher: float | None = None  # of a step with both teachers, against the feature teacher alone


def planned_precision(recipe: Recipe) -> str:
    """Return the run's arithmetic on this machine's devices."""
    return resolve_precision(recipe.run.precision, torch.device("cuda" if torch.cuda.is_available() else "cpu"))


def check_run(
    recipe: Recipe,
    ds_config: Mapping[str, Any],
    allow_change: Sequence[str] = (),
    *,
    check_checkpoint: Callable[[Checkpoint], None] = lambda _: None,
) -> Run:
    """Check a run against its data and against what its folder already holds; the disk is read, nothing is built.

    Args:
        recipe: resolved.
        ds_config: checked file of `ds_configs/`.
        allow_change: fields and fingerprints that may differ from the run's earlier start.
        check_checkpoint: refuses what cannot go on whatever is changed or allowed, before the recipe is compared.

    Raises:
        UserError: whatever the person who started the run can mend.
    """
    student_grid_size(recipe.student, recipe.data.img_size)  # sizes that do not fit are found before any file is read
    check_measurable(recipe, ds_config)
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
        check_checkpoint(checkpoint)
        check_recipe_unchanged(folder, recipe, allow_change)
    completed = student_ds_config(ds_config, recipe.optim, accumulation=accumulation, precision=precision)
    run = Run(recipe, completed, folder, shards, schedule, accumulation, precision, {}, checkpoint, allow_change)
    return with_fingerprints(run, fingerprints)


def with_fingerprints(run: Run, fingerprints: Mapping[str, Any]) -> Run:
    """Add what is known now, such as the teachers' digests.

    Raises:
        UserError: the run's checkpoint was made with another one.
    """
    if run.checkpoint is not None:
        before = run.checkpoint.state["fingerprints"]
        for name in sorted(fingerprints):
            if before.get(name) != fingerprints[name] and not is_allowed(name, run.allow_change):
                raise UserError(
                    f"{run.checkpoint.path}: was made with another {name} ({short_value(before.get(name))}, now "
                    f"{short_value(fingerprints[name])}): put it back, choose another run.name, or pass "
                    f"--allow-change {name!r}"
                )
    return run._replace(fingerprints={**run.fingerprints, **fingerprints})


def start_engine(run: Run, module: nn.Module, ranks: Ranks) -> Engine:
    """Build the training engine, from the run's checkpoint when it has one, and write what the run was asked for."""
    _check_ranks_agree(run, ranks)
    if run.checkpoint is not None:
        _load_weights(module, run.checkpoint)
    if run.recipe.student.drop_path_per == "sample":
        use_sample_drop_path(module)
    engine = build_student_engine(module, run.ds_config, run.recipe.optim)
    if run.checkpoint is not None:
        restore(engine, run.checkpoint)
    if ranks.is_first:
        mark_done(run.folder, done=False)
        write_run_folder(run.folder, run.recipe, run.ds_config, ranks.world_size)
    dist.barrier()
    return engine


def _load_weights(module: nn.Module, checkpoint: Checkpoint) -> None:
    try:
        module.load_state_dict(checkpoint.module_state())
    except RuntimeError as error:  # a change that --allow-change lets through
        reason = " ".join(str(error).split())[:300]
        message = f"{checkpoint.path}: its weights do not fit what has changed in the recipe ({reason}): set it back"
        raise UserError(f"{message}, or choose another run.name", reported_by=0) from error


def _check_ranks_agree(run: Run, ranks: Ranks) -> None:
    """Compare what each rank has found out alone: one that read another checkpoint would train another model."""
    mine = {
        "checkpoint step": None if run.checkpoint is None else run.checkpoint.step,
        "gradient accumulation": run.accumulation,
        **run.fingerprints,
    }
    everyone: list[Any] = [None] * ranks.world_size
    dist.all_gather_object(everyone, {name: short_value(value) for name, value in mine.items()})
    check_same(everyone, ranks.hosts)
