"""Bytes of the tensors that exist: what engines hold, and what operations allocate on the way."""

from __future__ import annotations

import contextlib
import weakref
from collections import Counter
from typing import TYPE_CHECKING, Any

import deepspeed.comm.comm as deepspeed_comm
import torch
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hdscale.engine.zero_internals import storage_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hdscale.engine.zero_internals import Engine


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
