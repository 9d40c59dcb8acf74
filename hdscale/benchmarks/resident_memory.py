"""Resident memory of the ranks of a real run, beside the sum of what the formulas say."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import resource
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed as dist

from hdscale.benchmarks import memory_formulas as formulas
from hdscale.benchmarks.formula_inputs import (
    gathering_of,
    precision_of,
    teacher_counts,
    teacher_formula,
    teacher_gathering_of,
    tokens_of,
)
from hdscale.benchmarks.memory_formulas import Tokens
from hdscale.config.deepspeed import with_zero
from hdscale.config.recipe import Recipe
from hdscale.engine.ranks import distributed
from hdscale.engine.zero_internals import optimizer_groups
from hdscale.training.loop import run_loader, set_drop_path, to_device
from hdscale.training.run import Session
from hdscale.training.smoke import generated_session

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_SMALL_BLOCK = 2**20


class Resident(NamedTuple):
    """Bytes of resident memory of the rank that has most, and what they should be made of."""

    start_up: int  # at most until the first step
    steps: int  # at most in the steps
    parts: dict[str, int]  # always there; the first is measured, the others are formulas
    moments: dict[str, int]  # formulas of what comes on top; the largest counts

    @property
    def predicted(self) -> int:
        """What `steps` should be."""
        return sum(self.parts.values()) + max(self.moments.values())


def measure_resident(
    recipe: Recipe,
    warm_up: Recipe,
    ds_config: Mapping[str, Any],
    teacher_ds_config: Mapping[str, Any],
    micro_batch_size: int,
    steps: int,
) -> Resident:
    """Train a few steps in a process that has done nothing else, and compare its memory with the formulas.

    The kernel's peak is set back after the start-up, where each rank has whole models for a while.

    Args:
        recipe: what to train, at its real size.
        warm_up: a small one, trained first: what it leaves is the libraries' memory.
        ds_config: of the student.
        teacher_ds_config: of sharded teachers.
        micro_batch_size: images per rank and step.
        steps: to take.
    """
    return_freed_memory()
    with distributed() as ranks:
        small = with_zero(ds_config, {"reduce_bucket_size": 10**6})
        with generated_session(warm_up, 2, small, teacher_ds_config) as session:
            _train(session, 2)
            session.engine.destroy()
        del session
        gc.collect()
        baseline = resident_bytes()
        with generated_session(
            recipe, steps, ds_config, teacher_ds_config, micro_batch_size=micro_batch_size
        ) as session:
            start_up = resident_bytes("VmHWM")
            reset_peak()
            tokens = _train(session, steps)
            peak = resident_bytes("VmHWM")
            parts, moments = resident_parts(session, teacher_ds_config, tokens)
        everyone: list[Any] = [None] * ranks.world_size
        dist.all_gather_object(everyone, Resident(start_up, peak, {"libraries": baseline, **parts}, moments))
    return max(everyone, key=lambda one: one.steps)


def _train(session: Session, steps: int) -> Tokens:
    tokens = None
    for step, batch in enumerate(run_loader(session, 0, steps)):  # micro-steps are steps here
        set_drop_path(session, step, 0)
        images, targets = session.ask_teachers(to_device(batch, session.ranks))
        terms = session.engine(images, targets)
        session.engine.backward(terms.total)
        session.engine.step()
        tokens = tokens or tokens_of(session, images, targets.keep_indices)
    assert tokens is not None
    return tokens


def resident_parts(
    session: Session, teacher_ds_config: Mapping[str, Any], tokens: Tokens
) -> tuple[dict[str, int], dict[str, int]]:
    """Return the formulas' bytes of what is always there, and of the moments of which each has its own."""
    run, ranks = session.run, session.ranks
    zero, precision = run.ds_config["zero_optimization"], precision_of(run.precision)
    stage, groups = zero["stage"], optimizer_groups(session.engine)
    counts, size = [count for group in groups for count in group], formulas.element_bytes(precision)
    teachers = teacher_counts(session)
    parts: dict[str, int] = formulas.state_bytes(groups, stage, ranks.world_size, precision, ranks.rank)._asdict()
    parts["teachers"] = teacher_formula(session, teacher_ds_config)
    checkpointed = run.recipe.student.checkpoint_every == 1
    # Of a bucket, only what is filled is resident.
    bucket = size * min(zero["reduce_bucket_size"], sum(counts))
    part = max(map(sum, groups)) // ranks.world_size
    # To be sent, a bucket is copied; and where gloo scatters it, once more.
    passes = bucket + formulas.activation_bytes(tokens, precision, checkpoint=checkpointed)
    if stage == 3:
        gathering = gathering_of(run.ds_config)
        small = formulas.persistent_elements(counts, gathering.param_persistence_threshold)
        parts["small parameters, whole"] = size * small
        parts["gradient bucket"] = bucket
        passes += formulas.gathered_bytes(counts, gathering, precision)
        passes += bucket * (dist.get_backend() == "gloo")
        part = formulas.largest_sub_group(groups, ranks.world_size, zero.get("sub_group_size", 10**9))
    else:
        passes += bucket * (2 if zero.get("overlap_comm") else 1)
    sharded = [sizes for sizes, sharding in teachers if sharding != "replicate"]
    asked = teacher_gathering_of(teacher_ds_config)
    moments = {
        "while the teachers run": max(
            (formulas.gathered_bytes(sizes, asked, precision) for sizes in sharded), default=0
        ),
        "while the student runs": passes,
        "while the optimizer steps": formulas.step_bytes(part),
    }
    return parts, moments


def return_freed_memory() -> None:
    """Have the C library give back what is freed, so that resident memory is what is in use.

    By default glibc learns to keep blocks of up to 32 MB, and more than a third of a process's memory may be such.
    """
    with contextlib.suppress(OSError, AttributeError):  # glibc only
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_THRESHOLD, _SMALL_BLOCK)
        mallopt(_M_TRIM_THRESHOLD, _SMALL_BLOCK)


def reset_peak() -> bool:
    """Let the kernel's peak of resident memory start from now; False where it cannot."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def resident_bytes(field: str = "VmRSS") -> int:
    """Bytes of this process in memory now, or since the last `reset_peak` at most (`VmHWM`)."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
