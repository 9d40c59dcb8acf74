"""What the ranks of a real run hold and move, counted in the tensors that exist, beside `hdscale.planning.memory`."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import hashlib
import resource
import weakref
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import deepspeed.comm.comm as deepspeed_comm
import torch
import torch.distributed as dist
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hdscale.engine.assembly import run_loader
from hdscale.engine.collectives import Operation, watch_collectives
from hdscale.engine.ranks import distributed
from hdscale.engine.smoke import generated_session
from hdscale.engine.trainer import seed_everything, to_device
from hdscale.planning import memory as formulas
from hdscale.planning.memory import Gathering, Tokens

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from hdscale.config.recipe import Recipe
    from hdscale.engine.collectives import Traffic
    from hdscale.engine.distillation import Session
    from hdscale.engine.engines import Engine

_STEPS = 3
"""ZeRO-3 records in the first two which parameter follows on which; the third is what all others are like."""


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_SMALL_BLOCK = 2**20


class Trial(NamedTuple):
    """One way to train a recipe."""

    name: str
    stage: int
    accumulation: int = 1
    checkpoint_every: int = 0
    sharding: str = "zero3"  # of the teachers
    zero: Mapping[str, Any] = {}
    teacher_zero: Mapping[str, Any] = {}


class Figure(NamedTuple):
    """Bytes of one rank, or of the rank that has most."""

    what: str
    measured: int
    formula: int | None


class Measured(NamedTuple):
    """A trial's outcome: bytes of the rank that has most, of one optimizer step."""

    trial: str
    stage: int
    ranks: int
    accumulation: int
    memory: list[Figure]
    traffic: list[Figure]  # sent by collective, student and teachers
    operations: dict[str, dict[str, Operation]]
    losses: list[float]
    targets: str  # a digest of what the teachers said last


def measure(
    trials: Iterable[Trial],
    recipe: Recipe,
    ds_configs: Mapping[int, Mapping[str, Any]],
    teacher_ds_config: Mapping[str, Any],
    micro_batch_size: int,
) -> list[Measured]:
    """Train a few steps of each trial on generated pictures; every rank gets the same answer.

    Args:
        trials: to run in turn.
        recipe: what to train, at its real size.
        ds_configs: of the student, by ZeRO stage.
        teacher_ds_config: of sharded teachers.
        micro_batch_size: images a rank and micro-step.
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
) -> Measured:
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
        dist.all_gather_object(everyone, (steps.memory_figures(teacher_config), steps.traffic_figures(teacher_config)))
        operations = {who: dict(traffic.operations) for who, traffic in steps.traffic.items()}
        measured = Measured(
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
    return measured


def with_zero(ds_config: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Replace values of a DeepSpeed config's `zero_optimization`."""
    return {**ds_config, "zero_optimization": {**ds_config["zero_optimization"], **values}}


def _with_settings(recipe: Recipe, trial: Trial) -> Recipe:
    values = recipe.model_dump()
    values["student"]["checkpoint_every"] = trial.checkpoint_every
    for name in ("feature_teacher", "relation_teacher"):
        if values[name] is not None:
            values[name]["sharding"] = trial.sharding
    return type(recipe).model_validate(values)


def _largest(by_rank: list[list[Figure]]) -> list[Figure]:
    return [max(figures, key=lambda figure: figure.measured) for figures in zip(*by_rank, strict=True)]


class _Steps:
    """Runs optimizer steps and remembers the last one."""

    def __init__(self, session: Session, trial: Trial) -> None:
        self.session, self.trial = session, trial
        self.losses: list[float] = []
        self.traffic: dict[str, Traffic] = {}
        self.targets = ""
        self.held: dict[str, int] = {}
        self._collectives = watch_collectives()
        self._batches = iter(run_loader(session.run, session.ranks, 0, _STEPS, session.keep_indices))
        self._tokens: Tokens | None = None

    def run_one(self) -> None:
        session, engine = self.session, self.session.engine
        parts: dict[str, list[Traffic]] = {"student": [], "teachers": []}
        self._collectives.read()
        for micro_step in range(self.trial.accumulation):
            seed_everything(session.run.recipe.run.seed, 0, micro_step, session.ranks.rank)
            with LiveBytes() as teachers_made, label_gathers(teachers_made):
                images, targets = session.prepare(to_device(next(self._batches), session.ranks))
            parts["teachers"].append(self._collectives.read())
            with LiveBytes() as made, label_gathers(made), _most_in_buckets(engine) as buckets:
                terms = engine(images, targets)
                activations = made.now[""]
                engine.backward(terms.total)
            self.held = {
                **held_bytes(engine),
                "activations": activations,
                "gathered": made.peak["gathered"],
                "teachers gathered": teachers_made.peak["gathered"],
                "buckets": buckets.most,
            }
            self._tokens = self._tokens or _tokens(session, images, targets.keep_indices)
            self.losses.append(terms.total.item())
            self.targets = _digest(targets)
            if self.trial.checkpoint_every:
                self.held["recomputed block"] = _block_bytes(engine, self._tokens)
            engine.step()
            parts["student"].append(self._collectives.read())
        self.traffic = {who: _together(traffics) for who, traffics in parts.items()}
        self.held["between steps"] = held_bytes(engine)["gathered"]
        self.held["teachers"] = sum(parameter_bytes(teacher) for teacher in session.hosted.values())

    def memory_figures(self, teacher_ds_config: Mapping[str, Any]) -> list[Figure]:
        run, held = self.session.run, self.held
        zero = run.ds_config["zero_optimization"]
        groups, ranks = optimizer_groups(self.session.engine), self.session.ranks.world_size
        precision = _precision(run.precision)
        states = formulas.state_bytes(groups, self.trial.stage, ranks, precision, self.session.ranks.rank)  # type: ignore[arg-type]
        figures = [Figure(name, held[name], formula) for name, formula in states._asdict().items()]
        teacher = teacher_formula(self.session, teacher_ds_config)
        figures.append(Figure("teachers", held["teachers"], teacher))
        assert self._tokens is not None
        every = self.trial.checkpoint_every
        activations = held["activations"] + (held["recomputed block"] if every else 0)
        formula = formulas.activation_bytes(self._tokens, precision, checkpoint=bool(every)) if every <= 1 else None
        figures.append(Figure("activations", activations, formula))
        if self.trial.stage:
            room = formulas.bucket_bytes(
                self.trial.stage,  # type: ignore[arg-type]
                zero["reduce_bucket_size"],
                precision,
                overlap_comm=zero.get("overlap_comm", False),
            )
            figures.append(Figure("gradient buckets", held["buckets"], room))
        if self.trial.stage == 3 and ranks > 1:
            own, counts = _gathering(run.ds_config), [count for group in groups for count in group]
            figures.append(
                Figure(
                    "gathered, at most",
                    held["gathered"],
                    formulas.live_bytes(counts, own, precision),
                )
            )
            small = formulas.persistent_elements(counts, own.param_persistence_threshold)
            figures.append(
                Figure("gathered, between steps", held["between steps"], formulas.element_bytes(precision) * small)
            )
        if self.trial.sharding == "zero3" and ranks > 1:
            asked = _teacher_gathering(teacher_ds_config)
            sizes = [counts for counts, _ in teacher_counts(self.session)]
            live = max((formulas.live_bytes(counts, asked, precision) for counts in sizes), default=0)
            figures.append(Figure("teachers gathered, at most", held["teachers gathered"], live))
        return figures

    def traffic_figures(self, teacher_ds_config: Mapping[str, Any]) -> list[Figure]:
        run, ranks = self.session.run, self.session.ranks.world_size
        zero = run.ds_config["zero_optimization"]
        precision = _precision(run.precision)
        payload = formulas.student_traffic(
            optimizer_groups(self.session.engine),
            self.trial.stage,  # type: ignore[arg-type]
            ranks,
            precision,
            accumulation=self.trial.accumulation,
            multi_rank_bucket_allreduce=zero.get("use_multi_rank_bucket_allreduce", True)
            or not zero.get("reduce_scatter", True),
            gathering=_gathering(run.ds_config),
        )
        figures = []
        for name in sorted({*payload, *self.traffic["student"].operations}):
            sent = self.traffic["student"].operations.get(name, Operation()).sent_bytes
            figures.append(Figure(f"student {name}", sent, formulas.moved_bytes({name: payload.get(name, 0)}, ranks)))
        sent = self.traffic["student"].total.sent_bytes
        figures.append(Figure("student", sent, formulas.moved_bytes(payload, ranks)))
        teachers = 0
        if self.trial.sharding == "zero3":
            threshold = _gathering(teacher_ds_config).param_persistence_threshold
            for counts, _ in teacher_counts(self.session):
                teachers += formulas.teacher_traffic(
                    counts, ranks, precision, accumulation=self.trial.accumulation, persistence_threshold=threshold
                )
        sent = self.traffic["teachers"].total.sent_bytes
        figures.append(Figure("teachers", sent, formulas.moved_bytes({"all_gather_into_tensor": teachers}, ranks)))
        return figures


def teacher_counts(session: Session) -> list[tuple[list[int], Any]]:
    """Elements of each parameter of the hosted teachers, and how each is sharded."""
    return [
        ([_elements(parameter) for parameter in teacher.parameters()], getattr(session.run.recipe, name).sharding)
        for name, teacher in session.hosted.items()
    ]


def teacher_formula(session: Session, teacher_ds_config: Mapping[str, Any]) -> int:
    """Bytes that a rank should hold of all teachers between steps."""
    threshold = _gathering(teacher_ds_config).param_persistence_threshold
    return sum(
        formulas.teacher_bytes(
            counts,
            sharding,
            session.ranks.world_size,
            _precision(session.run.precision),
            persistence_threshold=threshold,
        )
        for counts, sharding in teacher_counts(session)
    )


def optimizer_groups(engine: Engine) -> list[list[int]]:
    """Elements of each trained parameter, by group of the optimizer."""
    zero = engine.optimizer
    if hasattr(zero, "fp16_groups"):  # ZeRO-3: sub-groups
        groups: dict[int, list[int]] = {}
        for number, sub_group in enumerate(zero.fp16_groups):
            groups.setdefault(zero.sub_group_to_group_id[number], []).extend(map(_elements, sub_group))
        return list(groups.values())
    if hasattr(zero, "bit16_groups"):  # ZeRO-2
        return [list(map(_elements, group)) for group in zero.round_robin_bit16_groups]  # in the order of parts
    return [list(map(_elements, group["params"])) for group in zero.param_groups]


def held_bytes(engine: Engine) -> dict[str, int]:
    """Bytes of a student's parameters, gradients, optimizer state and gathered parameters; before `step`, that is."""
    zero, parameters = engine.optimizer, list(engine.module.parameters())
    gathered = 0
    if hasattr(zero, "fp16_groups"):
        own = [parameter.ds_tensor for parameter in parameters]
        gathered = storage_bytes(parameter.data for parameter in parameters)
        gradients, masters, states = (
            [zero.grad_partitions_flat_buffer],
            zero.fp32_partitioned_groups_flat,
            zero.optimizer,
        )
    elif hasattr(zero, "bit16_groups"):
        own, masters, states = parameters, zero.single_partition_of_fp32_groups, zero.optimizer
        gradients = [gradient for group in zero.averaged_gradients.values() for gradient in group or ()]
    else:
        own, masters, states = parameters, [], zero
        gradients = [parameter.grad for parameter in parameters]
    moments = [value for state in states.state.values() for value in state.values() if isinstance(value, Tensor)]
    return {
        "parameters": storage_bytes(own),
        "gradients": storage_bytes(gradients),
        "optimizer": storage_bytes([*masters, *moments]),
        "gathered": gathered,
    }


def parameter_bytes(module: nn.Module) -> int:
    """Bytes that a rank holds of a possibly sharded module's parameters: shards, and what is whole."""
    parameters: list[Any] = list(module.parameters())
    shards = [parameter.ds_tensor for parameter in parameters if hasattr(parameter, "ds_tensor")]
    return storage_bytes([*shards, *(parameter.data for parameter in parameters)])


def storage_bytes(tensors: Iterable[Tensor | None]) -> int:
    """Bytes of the tensors' memory, each storage once."""
    storages = [tensor.untyped_storage() for tensor in tensors if tensor is not None and tensor.numel()]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


class LiveBytes(TorchDispatchMode):
    """Follows the memory that operations inside the block allocate, until it is freed; by label."""

    def __init__(self) -> None:
        super().__init__()
        self.now: Counter[str] = Counter()
        self.peak: Counter[str] = Counter()
        self._label = ""
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """Run an operation; what it returns in memory of its own is new."""
        given = {_address(tensor) for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, Tensor)}
        output = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor) and _address(tensor) not in given | self._known:
                self._follow(tensor.untyped_storage())
        return output

    @contextlib.contextmanager
    def labelled(self, label: str) -> Iterator[None]:
        """Count what is allocated meanwhile under a label."""
        before, self._label = self._label, label
        try:
            yield
        finally:
            self._label = before

    def _follow(self, storage: torch.UntypedStorage) -> None:
        address, size, label = storage._cdata, storage.nbytes(), self._label
        self._known.add(address)
        self.now[label] += size
        self.peak[label] = max(self.peak[label], self.now[label])
        weakref.finalize(storage, self._freed, address, size, label)

    def _freed(self, address: int, size: int, label: str) -> None:
        self._known.discard(address)
        self.now[label] -= size


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


@contextlib.contextmanager
def label_gathers(made: LiveBytes) -> Iterator[None]:
    """Count under `gathered` what ZeRO-3 allocates when it fetches a module's parameters, prefetched ones included."""
    fetch = PartitionedParameterCoordinator.fetch_sub_module

    def labelled(*args: Any, **kwargs: Any) -> Any:
        with made.labelled("gathered"):
            return fetch(*args, **kwargs)

    PartitionedParameterCoordinator.fetch_sub_module = labelled
    try:
        yield
    finally:
        PartitionedParameterCoordinator.fetch_sub_module = fetch


class _Buckets:
    most = 0


@contextlib.contextmanager
def _most_in_buckets(engine: Engine) -> Iterator[_Buckets]:
    """Look at DeepSpeed's gradient buckets whenever it reduces one."""
    backend, seen = deepspeed_comm.cdb, _Buckets()
    names = ("all_reduce", "reduce", "reduce_scatter_tensor")
    calls = {name: getattr(backend, name) for name in names}

    def looking(call: Any) -> Any:
        def looked(*args: Any, **kwargs: Any) -> Any:
            buckets = getattr(engine.optimizer, "ipg_buckets", {}).values()
            buffers = [bucket.buffer for bucket in buckets]
            tensors = [tensor for buffer in buffers for tensor in (buffer if isinstance(buffer, list) else [buffer])]
            seen.most = max(seen.most, storage_bytes(tensors))
            return call(*args, **kwargs)

        return looked

    for name, call in calls.items():
        setattr(backend, name, looking(call))
    try:
        yield seen
    finally:
        for name, call in calls.items():
            setattr(backend, name, call)


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


def _tokens(session: Session, images: Tensor, keep_indices: Tensor | None) -> Tokens:
    recipe, distiller = session.run.recipe, session.engine.module
    student = distiller.student
    patches = student.grid_size**2 if keep_indices is None else keep_indices.shape[1]
    head = distiller.head
    teacher_dim = 0 if head is None else getattr(head, "out_features", student.embed_dim)
    relations = len(recipe.relation.layers) if recipe.relation_teacher is not None else 0
    return Tokens(
        batch=len(images),
        num_tokens=patches + student.num_prefix_tokens,
        embedded_tokens=student.grid_size**2 + student.num_prefix_tokens,
        embed_dim=student.embed_dim,
        num_heads=student.num_heads,
        depth=student.depth,
        image_elements=images[0].numel(),
        teacher_dim=teacher_dim,
        num_compared=patches,
        relation_tokens=patches + (student.num_prefix_tokens if distiller.cls_in_relation else 0),
        relation_layers=relations,
        drop_path=recipe.student.drop_path > 0,
    )


def _gathering(ds_config: Mapping[str, Any]) -> Gathering:
    zero, plain = ds_config["zero_optimization"], Gathering()
    return Gathering(*(zero.get(f"stage3_{name}", getattr(plain, name)) for name in Gathering._fields))


def _teacher_gathering(ds_config: Mapping[str, Any]) -> Gathering:
    """Without reuse: a pass without gradients uses each parameter once."""
    return _gathering(ds_config)._replace(max_reuse_distance=0)


def _elements(parameter: Any) -> int:
    return int(getattr(parameter, "ds_numel", parameter.numel()))


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
        micro_batch_size: images a rank and step.
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
    for batch in run_loader(session.run, session.ranks, 0, steps, session.keep_indices):
        images, targets = session.prepare(to_device(batch, session.ranks))
        terms = session.engine(images, targets)
        session.engine.backward(terms.total)
        session.engine.step()
        tokens = tokens or _tokens(session, images, targets.keep_indices)
    assert tokens is not None
    return tokens


def resident_parts(
    session: Session, teacher_ds_config: Mapping[str, Any], tokens: Tokens
) -> tuple[dict[str, int], dict[str, int]]:
    """Return the formulas' bytes of what is always there, and of the moments of which each has its own."""
    run, ranks = session.run, session.ranks
    zero, precision = run.ds_config["zero_optimization"], _precision(run.precision)
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
        gathering = _gathering(run.ds_config)
        small = formulas.persistent_elements(counts, gathering.param_persistence_threshold)
        parts["small parameters, whole"] = size * small
        parts["gradient bucket"] = bucket
        passes += formulas.live_bytes(counts, gathering, precision)
        passes += bucket * (dist.get_backend() == "gloo")
        part = formulas.largest_sub_group(groups, ranks.world_size, zero.get("sub_group_size", 10**9))
    else:
        passes += bucket * (2 if zero.get("overlap_comm") else 1)
    sharded = [sizes for sizes, sharding in teachers if sharding != "replicate"]
    asked = _teacher_gathering(teacher_ds_config)
    moments = {
        "while the teachers run": max((formulas.live_bytes(sizes, asked, precision) for sizes in sharded), default=0),
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


def _precision(name: str) -> Any:
    assert name in ("fp32", "fp16", "bf16"), "resolved"
    return name


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
