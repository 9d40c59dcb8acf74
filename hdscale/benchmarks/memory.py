"""What the ranks of a real run hold and move, counted in the tensors that exist, beside the formulas."""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_leaves

from hdscale.benchmarks import memory_formulas as formulas
from hdscale.benchmarks.formula_inputs import (
    gathering_of,
    precision_of,
    teacher_counts,
    teacher_formula,
    teacher_gathering_of,
    tokens_of,
)
from hdscale.benchmarks.live_bytes import LiveBytes
from hdscale.benchmarks.memory_formulas import Tokens
from hdscale.benchmarks.resident_memory import return_freed_memory
from hdscale.config.deepspeed import with_zero
from hdscale.config.recipe import Recipe
from hdscale.engine.collectives import Operation, Traffic, watch_collectives
from hdscale.engine.ranks import distributed
from hdscale.engine.zero_internals import (
    Engine,
    around_gathers,
    held_bytes,
    largest_buckets,
    optimizer_groups,
    parameter_bytes,
)
from hdscale.training.loop import run_loader, set_drop_path, to_device
from hdscale.training.run import Session
from hdscale.training.smoke import generated_session

_STEPS = 3
"""ZeRO-3 records in the first two which parameter follows on which; the third is what all others are like."""


class Trial(NamedTuple):
    """One way to train a recipe."""

    name: str
    stage: int
    accumulation: int = 1
    checkpoint_every: int = 0
    sharding: str = "zero3"  # of the teachers
    zero: Mapping[str, Any] = {}
    teacher_zero: Mapping[str, Any] = {}


class Measured(NamedTuple):
    """Bytes of one rank, or of the rank that has most."""

    what: str
    measured: int
    formula: int | None


class TrialResult(NamedTuple):
    """A trial's outcome: bytes of the rank that has most, of one optimizer step."""

    trial: str
    stage: int
    ranks: int
    accumulation: int
    memory: list[Measured]
    traffic: list[Measured]  # sent by collective, student and teachers
    operations: dict[str, dict[str, Operation]]
    losses: list[float]
    targets: str  # a digest of what the teachers said last


def measure(
    trials: Iterable[Trial],
    recipe: Recipe,
    ds_configs: Mapping[int, Mapping[str, Any]],
    teacher_ds_config: Mapping[str, Any],
    micro_batch_size: int,
) -> list[TrialResult]:
    """Train a few steps of each trial on generated pictures; every rank gets the same answer.

    Args:
        trials: to run in turn.
        recipe: what to train, at its real size.
        ds_configs: of the student, by ZeRO stage.
        teacher_ds_config: of sharded teachers.
        micro_batch_size: images per rank and micro-step.
    """
    return_freed_memory()
    with distributed():
        return [_measure(trial, recipe, ds_configs, teacher_ds_config, micro_batch_size) for trial in trials]


def _measure(
    trial: Trial,
    recipe: Recipe,
    ds_configs: Mapping[int, Mapping[str, Any]],
    teacher_ds_config: Mapping[str, Any],
    micro_batch_size: int,
) -> TrialResult:
    ds_config = with_zero(ds_configs[trial.stage], {"stage": trial.stage, **trial.zero})
    teacher_config = with_zero(teacher_ds_config, trial.teacher_zero)
    with generated_session(
        _with_settings(recipe, trial),
        _STEPS,
        ds_config,
        teacher_config,
        micro_batch_size=micro_batch_size,
        accumulation=trial.accumulation,
    ) as session:
        steps = _Steps(session, trial)
        for _ in range(_STEPS):
            steps.run_one()
        everyone: list[Any] = [None] * session.ranks.world_size
        mine = steps.measured_memory(teacher_config), steps.measured_traffic(teacher_config)
        dist.all_gather_object(everyone, mine)
        operations = {who: dict(traffic.operations) for who, traffic in steps.traffic.items()}
        result = TrialResult(
            trial.name,
            trial.stage,
            session.ranks.world_size,
            trial.accumulation,
            _largest([memory for memory, _ in everyone]),
            _largest([traffic for _, traffic in everyone]),
            operations,
            steps.losses,
            steps.targets,
        )
        session.engine.destroy()
    del session, steps
    gc.collect()
    return result


def _with_settings(recipe: Recipe, trial: Trial) -> Recipe:
    values = recipe.model_dump()
    values["student"]["checkpoint_every"] = trial.checkpoint_every
    for name in ("feature_teacher", "relation_teacher"):
        if values[name] is not None:
            values[name]["sharding"] = trial.sharding
    return type(recipe).model_validate(values)


def _largest(by_rank: list[list[Measured]]) -> list[Measured]:
    return [max(same, key=lambda one: one.measured) for same in zip(*by_rank, strict=True)]


class _Steps:
    """Runs optimizer steps and remembers the last one."""

    def __init__(self, session: Session, trial: Trial) -> None:
        self.session, self.trial = session, trial
        self.losses: list[float] = []
        self.traffic: dict[str, Traffic] = {}
        self.targets = ""
        self.held: dict[str, int] = {}
        self._collectives = watch_collectives()
        self._batches = iter(run_loader(session, 0, _STEPS))
        self._tokens: Tokens | None = None

    def run_one(self) -> None:
        session, engine = self.session, self.session.engine
        parts: dict[str, list[Traffic]] = {"student": [], "teachers": []}
        self._collectives.read()
        for micro_step in range(self.trial.accumulation):
            set_drop_path(session, 0, micro_step)
            with LiveBytes() as teachers_made, _counting_gathers(teachers_made):
                images, targets = session.ask_teachers(to_device(next(self._batches), session.ranks))
            parts["teachers"].append(self._collectives.read())
            with LiveBytes() as made, _counting_gathers(made), largest_buckets(engine) as buckets:
                terms = engine(images, targets)
                activations = made.now[""]
                engine.backward(terms.total)
            self.held = {
                **held_bytes(engine),
                "activations": activations,
                "gathered": made.peak["gathered"],
                "teachers gathered": teachers_made.peak["gathered"],
                "buckets": buckets.num_bytes,
            }
            self._tokens = self._tokens or tokens_of(session, images, targets.keep_indices)
            self.losses.append(terms.total.item())
            self.targets = _digest(targets)
            if self.trial.checkpoint_every:
                self.held["recomputed block"] = _block_bytes(engine, self._tokens)
            engine.step()
            parts["student"].append(self._collectives.read())
        self.traffic = {who: _together(traffics) for who, traffics in parts.items()}
        self.held["between steps"] = held_bytes(engine)["gathered"]
        self.held["teachers"] = sum(parameter_bytes(teacher) for teacher in session.teacher_engines.values())

    def measured_memory(self, teacher_ds_config: Mapping[str, Any]) -> list[Measured]:
        run, held = self.session.run, self.held
        zero = run.ds_config["zero_optimization"]
        groups, ranks = optimizer_groups(self.session.engine), self.session.ranks.world_size
        precision = precision_of(run.precision)
        states = formulas.state_bytes(groups, self.trial.stage, ranks, precision, self.session.ranks.rank)  # type: ignore[arg-type]
        found = [Measured(name, held[name], formula) for name, formula in states._asdict().items()]
        teacher = teacher_formula(self.session, teacher_ds_config)
        found.append(Measured("teachers", held["teachers"], teacher))
        assert self._tokens is not None
        every = self.trial.checkpoint_every
        activations = held["activations"] + (held["recomputed block"] if every else 0)
        formula = formulas.activation_bytes(self._tokens, precision, checkpoint=bool(every)) if every <= 1 else None
        found.append(Measured("activations", activations, formula))
        if self.trial.stage:
            room = formulas.bucket_bytes(
                self.trial.stage,  # type: ignore[arg-type]
                zero["reduce_bucket_size"],
                precision,
                overlap_comm=zero.get("overlap_comm", False),
            )
            found.append(Measured("gradient buckets", held["buckets"], room))
        if self.trial.stage == 3 and ranks > 1:
            own, counts = gathering_of(run.ds_config), [count for group in groups for count in group]
            found.append(
                Measured(
                    "gathered, at most",
                    held["gathered"],
                    formulas.gathered_bytes(counts, own, precision),
                )
            )
            small = formulas.persistent_elements(counts, own.param_persistence_threshold)
            found.append(
                Measured("gathered, between steps", held["between steps"], formulas.element_bytes(precision) * small)
            )
        if self.trial.sharding == "zero3" and ranks > 1:
            asked = teacher_gathering_of(teacher_ds_config)
            sizes = [counts for counts, _ in teacher_counts(self.session)]
            live = max((formulas.gathered_bytes(counts, asked, precision) for counts in sizes), default=0)
            found.append(Measured("teachers gathered, at most", held["teachers gathered"], live))
        return found

    def measured_traffic(self, teacher_ds_config: Mapping[str, Any]) -> list[Measured]:
        run, ranks = self.session.run, self.session.ranks.world_size
        zero = run.ds_config["zero_optimization"]
        precision = precision_of(run.precision)
        payload = formulas.student_traffic(
            optimizer_groups(self.session.engine),
            self.trial.stage,  # type: ignore[arg-type]
            ranks,
            precision,
            accumulation=self.trial.accumulation,
            multi_rank_bucket_allreduce=zero.get("use_multi_rank_bucket_allreduce", True)
            or not zero.get("reduce_scatter", True),
            gathering=gathering_of(run.ds_config),
        )
        found = []
        for name in sorted({*payload, *self.traffic["student"].operations}):
            sent = self.traffic["student"].operations.get(name, Operation()).sent_bytes
            found.append(Measured(f"student {name}", sent, formulas.moved_bytes({name: payload.get(name, 0)}, ranks)))
        sent = self.traffic["student"].total.sent_bytes
        found.append(Measured("student", sent, formulas.moved_bytes(payload, ranks)))
        teachers = 0
        if self.trial.sharding == "zero3":
            threshold = gathering_of(teacher_ds_config).param_persistence_threshold
            for counts, _ in teacher_counts(self.session):
                teachers += formulas.teacher_traffic(
                    counts, ranks, precision, accumulation=self.trial.accumulation, persistence_threshold=threshold
                )
        sent = self.traffic["teachers"].total.sent_bytes
        found.append(Measured("teachers", sent, formulas.moved_bytes({"all_gather_into_tensor": teachers}, ranks)))
        return found


def _counting_gathers(made: LiveBytes) -> AbstractContextManager[None]:
    """Count under `gathered` what ZeRO-3 allocates when it fetches a module's parameters, prefetched ones included."""
    return around_gathers(lambda: made.labelled("gathered"))


def _block_bytes(engine: Engine, tokens: Tokens) -> int:
    """Measure what a block run on its own leaves for its backward pass; only where parameters stay whole."""
    if engine.zero_optimization_stage() == 3:
        return formulas.block_activation_bytes(tokens, "fp32")
    block = engine.module.student.encoder.model.blocks[0]
    parameter = next(block.parameters())
    x = torch.zeros(tokens.batch, tokens.num_tokens, tokens.embed_dim, dtype=parameter.dtype, device=parameter.device)
    with LiveBytes() as made:
        output = block(x.requires_grad_())
        size = made.now[""]
    del output
    return size


def _digest(targets: Any) -> str:
    digest = hashlib.sha256()
    for tensor in tree_leaves(tuple(targets)):
        if isinstance(tensor, Tensor):
            digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _together(traffics: list[Traffic]) -> Traffic:
    operations: dict[str, Operation] = {}
    for traffic in traffics:
        for name, operation in traffic.operations.items():
            operations[name] = operations.get(name, Operation()) + operation
    return type(traffics[0])(operations)
