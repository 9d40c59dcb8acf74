"""ZeRO-3 releases a gathered parameter after its module has run; here autograd is kept from holding on to it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import deepspeed
import torch
from deepspeed.ops.adam import DeepSpeedCPUAdam
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

if TYPE_CHECKING:
    from collections.abc import Iterable


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

    def forward_and_let_go(*args: Any, **kwargs: Any) -> Any:
        with saved_tensors_hooks(pack, unpack):
            return forward(*args, **kwargs)

    module.forward = forward_and_let_go


Engine: TypeAlias = Any
"""A `deepspeed.DeepSpeedEngine`: it gets its attributes at run time, where a type checker does not see them."""


def held_elements(module: nn.Module) -> int:
    """Count the parameter elements that this rank holds now, sharded or whole."""
    inner = inner_module(module)
    count = 0
    for parameter in inner.parameters():
        share = getattr(parameter, "ds_tensor", None)
        count += parameter.numel() + (share.numel() if share is not None and parameter.numel() == 0 else 0)
    return count


def inner_module(module: nn.Module) -> nn.Module:
    """Return what an engine wraps; anything else is returned as it is."""
    inner = module.module if isinstance(module, deepspeed.DeepSpeedEngine) else module
    assert isinstance(inner, nn.Module)
    return inner


def create_moments(engine: Engine) -> None:
    """Create AdamW's state now instead of at its first step.

    A checkpoint can then be restored before that step; and ZeRO-2 links each parameter to its moments once, inside the
    first group's first step, when the second group has none yet: with two groups, the public getters fail from then on.
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


def optimizer_groups(engine: Engine) -> list[list[int]]:
    """Elements of each trained parameter, by group of the optimizer."""
    zero = engine.optimizer
    if hasattr(zero, "fp16_groups"):  # ZeRO-3: sub-groups
        groups: dict[int, list[int]] = {}
        for number, sub_group in enumerate(zero.fp16_groups):
            groups.setdefault(zero.sub_group_to_group_id[number], []).extend(map(elements_of, sub_group))
        return list(groups.values())
    if hasattr(zero, "bit16_groups"):  # ZeRO-2
        return [list(map(elements_of, group)) for group in zero.round_robin_bit16_groups]  # in the order of parts
    return [list(map(elements_of, group["params"])) for group in zero.param_groups]


def elements_of(parameter: Any) -> int:
    """Count a parameter's elements, whole ones where it is sharded."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))
