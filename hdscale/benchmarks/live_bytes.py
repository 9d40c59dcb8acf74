"""Bytes of the tensors that exist: what engines hold, and what operations allocate on the way."""

from __future__ import annotations

import contextlib
import weakref
from collections import Counter
from typing import TYPE_CHECKING, Any

import deepspeed.comm.comm as deepspeed_comm
import torch
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from hdscale.engine.zero import Engine


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
def most_in_buckets(engine: Engine) -> Iterator[_Buckets]:
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
