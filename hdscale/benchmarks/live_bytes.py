"""Bytes that operations allocate and have not freed yet, by label."""

from __future__ import annotations

import contextlib
import weakref
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


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
