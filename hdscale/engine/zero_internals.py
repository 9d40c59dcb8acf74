"""All that hdscale knows of DeepSpeed's insides, which may change with any release: attributes, modules, file names.

Written against DeepSpeed 0.19.8. Each function says in which of DeepSpeed's files the names that it relies on stand;
`tests/engine/test_zero_internals_alone.py` keeps those names out of every other file.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import deepspeed
import deepspeed.comm.comm as deepspeed_comm
import torch
from deepspeed.ops.adam import DeepSpeedCPUAdam
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator
from deepspeed.utils import groups
from deepspeed.utils.logging import set_log_level_from_string
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

Engine: TypeAlias = Any
"""A `deepspeed.DeepSpeedEngine`: it gets its attributes at run time, where a type checker does not see them."""

_SCALER_FIELDS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
_REDUCTIONS = ("all_reduce", "reduce", "reduce_scatter_tensor")


def quiet_deepspeed() -> None:
    """Let DeepSpeed log warnings only: a run has its own log, DeepSpeed's repeats its configuration on every rank.

    Relies on `set_log_level_from_string` in utils/logging.py.
    """
    set_log_level_from_string("warning")


def communication_backend() -> Any:
    """Return the one object through which DeepSpeed calls collectives; None before the ranks have met.

    Relies on `cdb` in comm/comm.py, a `TorchBackend` (comm/torch.py) whose methods DeepSpeed calls, whoever holds it.
    """
    return deepspeed_comm.cdb


def forget_communication_backend() -> None:
    """Have DeepSpeed make a new backend for the next process group: it would take the old one for that group's.

    Relies on `cdb` in comm/comm.py.
    """
    deepspeed_comm.cdb = None


def forget_mesh() -> None:
    """Make DeepSpeed forget the last mesh it was given, which the whole process keeps: the next engine would take it.

    Relies on `mpu` in utils/groups.py.
    """
    groups.mpu = None


def unlink_shared_memory(rank: int) -> None:
    """Take back the name of DeepSpeed's buffer for ranks of one host, 67 MB each, which it would leave behind.

    All ranks must have opened it; the memory goes with the last of them.

    Relies on its name: `deepspeed_allreduce_buffer`, user, address, port and rank (ops/csrc/cpu/comm/shm.cpp).
    """
    meeting_point = f"{os.environ['MASTER_ADDR']}_{os.environ['MASTER_PORT']}"
    name = f"deepspeed_allreduce_buffer_{os.getuid()}_{meeting_point}_{rank}"
    Path("/dev/shm", name).unlink(missing_ok=True)


def parse_zero_section(section: Mapping[str, Any]) -> None:
    """Read a `zero_optimization` section as DeepSpeed will.

    Relies on the pydantic model `DeepSpeedZeroConfig` in runtime/zero/config.py.

    Raises:
        pydantic.ValidationError: DeepSpeed would refuse it.
    """
    DeepSpeedZeroConfig(**section)


def inner_module(module: nn.Module) -> nn.Module:
    """Return what an engine wraps; anything else is returned as it is."""
    inner = module.module if isinstance(module, deepspeed.DeepSpeedEngine) else module
    assert isinstance(inner, nn.Module)
    return inner


def is_sharded(parameter: Any) -> bool:
    """Tell whether ZeRO-3 has split a parameter.

    Relies on `ds_id`, which runtime/zero/partition_parameters.py gives each parameter that it splits.
    """
    return hasattr(parameter, "ds_id")


def elements_of(parameter: Any) -> int:
    """Count a parameter's elements, whole ones where it is sharded.

    Relies on `ds_numel` (runtime/zero/partition_parameters.py): a released parameter is empty.
    """
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def own_share(parameter: Any, value: Tensor) -> Tensor:
    """Cut this rank's flat share of a ZeRO-3 parameter out of a whole value, padded with zeros where that ends.

    DeepSpeed's setters of full tensors read past the end of a parameter that the ranks do not divide evenly; those of
    local tensors take this.

    Relies on `ds_tensor` (runtime/zero/partition_parameters.py), and on `_z3_optimizer` and
    `_get_param_partition_rank` (runtime/zero/stage3.py).
    """
    share = parameter.ds_tensor.numel()
    rank = parameter._z3_optimizer._get_param_partition_rank(parameter)
    padded = torch.nn.functional.pad(value.flatten(), (0, max(0, share * (rank + 1) - value.numel())))
    return padded[share * rank : share * (rank + 1)]


def held_elements(module: nn.Module) -> int:
    """Count the parameter elements that this rank holds now, sharded or whole.

    Relies on `ds_tensor` (runtime/zero/partition_parameters.py).
    """
    inner = inner_module(module)
    count = 0
    for parameter in inner.parameters():
        share = getattr(parameter, "ds_tensor", None)
        count += parameter.numel() + (share.numel() if share is not None and parameter.numel() == 0 else 0)
    return count


def parameter_bytes(module: nn.Module) -> int:
    """Bytes that a rank holds of a possibly sharded module's parameters: shards, and what is whole.

    Relies on `ds_tensor` (runtime/zero/partition_parameters.py).
    """
    parameters: list[Any] = list(module.parameters())
    shards = [parameter.ds_tensor for parameter in parameters if hasattr(parameter, "ds_tensor")]
    return storage_bytes([*shards, *(parameter.data for parameter in parameters)])


def storage_bytes(tensors: Iterable[Tensor | None]) -> int:
    """Bytes of the tensors' memory, each storage once."""
    storages = [tensor.untyped_storage() for tensor in tensors if tensor is not None and tensor.numel()]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


class _View(NamedTuple):
    """Stands in the graph for a view of a parameter."""

    parameter: Any
    shape: tuple[int, ...]
    stride: tuple[int, ...]


def release_gathered_weights(module: nn.Module) -> None:
    """Have the graph of a module that ZeRO-3 has sharded refer to its parameters instead of keeping their memory.

    `F.linear` saves a transposed view of its weight, which keeps what was gathered for the forward pass until the
    backward pass, whole models of it. DeepSpeed's answer, `memory_efficient_linear`, replaces `F.linear` in the whole
    process and changes last digits. A parameter is gathered again before its module's backward pass anyway: the view is
    made anew then, and the arithmetic is the same.

    Relies on `ds_numel` (runtime/zero/partition_parameters.py), and on ZeRO-3 gathering into `parameter.data`.
    """
    by_elements: dict[int, list[Any]] = {}
    for parameter in module.parameters():
        by_elements.setdefault(int(parameter.ds_numel), []).append(parameter)  # pyright: ignore[reportAttributeAccessIssue]

    def pack(tensor: Tensor) -> Tensor | _View:
        for parameter in by_elements.get(tensor.numel(), ()):
            if parameter.data_ptr() == tensor.data_ptr() and parameter.dtype == tensor.dtype:
                return _View(parameter, tuple(tensor.shape), tensor.stride())
        return tensor

    def unpack(packed: Tensor | _View) -> Tensor:
        if not isinstance(packed, _View):
            return packed
        whole = packed.parameter.data
        assert whole.numel(), "DeepSpeed gathers a module's parameters before its backward pass"
        return whole.as_strided(packed.shape, packed.stride, whole.storage_offset())

    forward = module.forward

    def forward_and_release(*args: Any, **kwargs: Any) -> Any:
        with saved_tensors_hooks(pack, unpack):
            return forward(*args, **kwargs)

    module.forward = forward_and_release


def create_moments(engine: Engine) -> None:
    """Create AdamW's state now instead of at its first step.

    A checkpoint can then be restored before that step; and ZeRO-2 links each parameter to its moments once, inside the
    first group's first step, when the second group has none yet: with two groups, the public getters fail from then on.

    Relies on `fp32_partitioned_groups_flat` (runtime/zero/stage3.py), and on `single_partition_of_fp32_groups` and
    `_lazy_init_hp_params_optimizer_state` (runtime/zero/stage_1_and_2.py).
    """
    zero = engine.optimizer
    if engine.zero_optimization_stage() == 0:  # only ever measured: nothing is sharded, nothing restored
        return
    is_stage3 = hasattr(zero, "fp32_partitioned_groups_flat")
    on_cpu_adam = isinstance(zero.optimizer, DeepSpeedCPUAdam)
    for flat in zero.fp32_partitioned_groups_flat if is_stage3 else zero.single_partition_of_fp32_groups:
        zero.optimizer.state[flat] = {
            "step": 0 if on_cpu_adam else torch.tensor(0.0),
            "exp_avg": torch.zeros_like(flat),
            "exp_avg_sq": torch.zeros_like(flat),
        }
    if not is_stage3:
        zero._lazy_init_hp_params_optimizer_state()


def moments_by_partition(engine: Engine) -> list[MutableMapping[str, Any]]:
    """Return AdamW's state of each partition that this rank updates: `step`, `exp_avg` and `exp_avg_sq`.

    Relies on both ZeRO optimizers keeping the one they wrap as `optimizer` (runtime/zero/stage3.py and
    runtime/zero/stage_1_and_2.py).
    """
    return list(engine.optimizer.optimizer.state.values())


def read_loss_scaler(engine: Engine) -> dict[str, Any]:
    """Return what the loss scaler remembers; a static one has no `cur_hysteresis`.

    Relies on `loss_scaler` of the ZeRO optimizers (runtime/zero/stage3.py, runtime/zero/stage_1_and_2.py), and on its
    fields, such as `cur_scale` (runtime/fp16/loss_scaler.py).
    """
    scaler = engine.optimizer.loss_scaler
    return {field: getattr(scaler, field) for field in _SCALER_FIELDS if hasattr(scaler, field)}


def write_loss_scaler(engine: Engine, values: Mapping[str, Any]) -> None:
    """Give the loss scaler what `read_loss_scaler` returned, unless the run goes on in another precision.

    Relies on `loss_scaler` of the ZeRO optimizers (runtime/zero/stage3.py, runtime/zero/stage_1_and_2.py), and on
    `cur_hysteresis`, which only a dynamic scaler has (runtime/fp16/loss_scaler.py).
    """
    scaler = engine.optimizer.loss_scaler
    was_dynamic = "cur_hysteresis" in values
    if was_dynamic == hasattr(scaler, "cur_hysteresis"):
        for field, value in values.items():
            setattr(scaler, field, value)


def optimizer_groups(engine: Engine) -> list[list[int]]:
    """Elements of each trained parameter, by group of the optimizer.

    Relies on `fp16_groups` and `sub_group_to_group_id` (runtime/zero/stage3.py), and on `bit16_groups` and
    `round_robin_bit16_groups` (runtime/zero/stage_1_and_2.py).
    """
    zero = engine.optimizer
    if hasattr(zero, "fp16_groups"):  # ZeRO-3: sub-groups
        by_group: dict[int, list[int]] = {}
        for number, sub_group in enumerate(zero.fp16_groups):
            by_group.setdefault(zero.sub_group_to_group_id[number], []).extend(map(elements_of, sub_group))
        return list(by_group.values())
    if hasattr(zero, "bit16_groups"):  # ZeRO-2
        return [list(map(elements_of, group)) for group in zero.round_robin_bit16_groups]  # in the order of parts
    return [list(map(elements_of, group["params"])) for group in zero.param_groups]


def held_bytes(engine: Engine) -> dict[str, int]:
    """Bytes of a student's parameters, gradients, optimizer state and gathered parameters; before `step`, that is.

    Relies on `fp16_groups`, `fp32_partitioned_groups_flat` and `grad_partitions_flat_buffer` (runtime/zero/stage3.py),
    on `bit16_groups`, `single_partition_of_fp32_groups` and `averaged_gradients` (runtime/zero/stage_1_and_2.py), and
    on `ds_tensor` (runtime/zero/partition_parameters.py).
    """
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


@contextlib.contextmanager
def around_gathers(enter: Callable[[], contextlib.AbstractContextManager[Any]]) -> Iterator[None]:
    """Inside the block, fetch each module's parameters, prefetched ones included, inside a context of its own.

    Relies on ZeRO-3 gathering everything through `PartitionedParameterCoordinator.fetch_sub_module`
    (runtime/zero/partitioned_param_coordinator.py).
    """
    fetch = PartitionedParameterCoordinator.fetch_sub_module

    def fetch_inside(*args: Any, **kwargs: Any) -> Any:
        with enter():
            return fetch(*args, **kwargs)

    PartitionedParameterCoordinator.fetch_sub_module = fetch_inside
    try:
        yield
    finally:
        PartitionedParameterCoordinator.fetch_sub_module = fetch


class LargestBuckets:
    """Bytes that an engine's gradient buckets had at most, whenever one was reduced."""

    num_bytes = 0


@contextlib.contextmanager
def largest_buckets(engine: Engine) -> Iterator[LargestBuckets]:
    """Look at DeepSpeed's gradient buckets whenever it reduces one inside the block.

    Relies on `ipg_buckets`, by dtype, whose `buffer` is a tensor (runtime/zero/stage3.py) or a list of tensors
    (runtime/zero/stage_1_and_2.py), and on `cdb` (comm/comm.py), whose methods reduce them.
    """
    backend, largest = communication_backend(), LargestBuckets()
    calls = {name: getattr(backend, name) for name in _REDUCTIONS}

    def looking(call: Callable[..., Any]) -> Callable[..., Any]:
        def looked(*args: Any, **kwargs: Any) -> Any:
            buckets = getattr(engine.optimizer, "ipg_buckets", {}).values()
            buffers = [bucket.buffer for bucket in buckets]
            tensors = [tensor for buffer in buffers for tensor in (buffer if isinstance(buffer, list) else [buffer])]
            largest.num_bytes = max(largest.num_bytes, storage_bytes(tensors))
            return call(*args, **kwargs)

        return looked

    for name, call in calls.items():
        setattr(backend, name, looking(call))
    try:
        yield largest
    finally:
        for name, call in calls.items():
            setattr(backend, name, call)
