"""What DeepSpeed's collectives move and how long they hold the computation up, counted where it calls them.

Counted is the payload of each call; what a rank sends and receives for it follows from the ring algorithm, with N
payload bytes and R ranks in the group:

- all-reduce: 2 N (R-1)/R each way, a reduce-scatter followed by an all-gather;
- reduce-scatter, of N bytes that each rank has, and all-gather, of N bytes that each rank gets: N (R-1)/R each way;
- all-to-all: N (R-1)/R each way, all but what a rank keeps;
- broadcast: a chain from the source, along which everybody passes on N but the last; reduce: the same chain backwards.
  Reducing a part of 1/R to each rank in turn is N (R-1)/R each way.

Barriers have no payload, pickled objects none that is known before; their calls and seconds are counted.
"""

from __future__ import annotations

import functools
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from hdscale.engine.zero_internals import communication_backend

_COUNTERS = "hdscale_collectives"
"""The attribute of DeepSpeed's backend that holds its counters."""


class Operation(NamedTuple):
    """Of all calls of one collective, on this rank."""

    calls: int = 0
    payload_bytes: int = 0
    sent_bytes: int = 0
    received_bytes: int = 0
    seconds: float = 0.0

    def __add__(self, other: tuple[Any, ...]) -> Operation:
        """Sum field by field."""
        return Operation(*(mine + theirs for mine, theirs in zip(self, other, strict=True)))


class Traffic(NamedTuple):
    """What was counted since the last reset, by DeepSpeed's name of the collective."""

    operations: Mapping[str, Operation]

    @property
    def total(self) -> Operation:
        """All collectives together."""
        return sum(self.operations.values(), Operation())

    @property
    def seconds(self) -> float:
        """How long collectives held the computation up."""
        return self.total.seconds


class Collectives:
    """The counters of one communication backend.

    Seconds are the host's on a CPU: inside blocking calls and inside `wait()` of the others. On a GPU they are the
    stream's that makes the call or waits; DeepSpeed gives gradients a stream of their own when `overlap_comm` is set,
    and then they may have passed while another stream computed.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._counts: dict[str, Operation] = {}

    def read(self, *, reset: bool = True) -> Traffic:
        """Return what was counted; on a GPU, this waits for the collectives called so far."""
        seconds = self._clock.seconds()
        operations = {
            name: self._counts.get(name, Operation())._replace(seconds=seconds.get(name, 0.0))
            for name in sorted({*self._counts, *seconds})  # waiting for an older call has seconds only
        }
        if reset:
            self._counts.clear()
            seconds.clear()
        return Traffic(operations)

    def watched(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """Return `call`, the backend's method of that name, with counters around it."""
        describe, moved = _OPERATIONS[name]

        @functools.wraps(call)
        def counted(*args: Any, **kwargs: Any) -> Any:
            payload = describe(*args, **kwargs)
            size = dist.get_world_size(payload.group)
            if size < 0:  # this rank is not of the group: the call does nothing
                return call(*args, **kwargs)
            started = self._clock.start()
            work = call(*args, **kwargs)
            self._clock.stop(name, started)
            count = Operation(1, payload.num_bytes, *moved(payload, size))
            self._counts[name] = self._counts.get(name, Operation()) + count
            return _TimedWork(work, name, self._clock) if hasattr(work, "wait") else work

        return counted


def watch_collectives() -> Collectives:
    """Count DeepSpeed's collectives from now on; the ranks must have met. Asked again, return the same counters.

    The methods of DeepSpeed's one backend object are replaced, so that it makes no difference who holds the object.
    A process group that is taken down takes its backend and the counters with it.
    """
    backend = communication_backend()
    assert backend is not None, "deepspeed.init_distributed comes first"
    collectives = getattr(backend, _COUNTERS, None)
    if collectives is None:
        collectives = Collectives(StreamClock() if torch.cuda.is_available() else HostClock())
        for name in _OPERATIONS:
            setattr(backend, name, collectives.watched(name, getattr(backend, name)))
        setattr(backend, _COUNTERS, collectives)
    return collectives


class Clock(Protocol):
    """Sums seconds by name."""

    def start(self) -> Any:
        """Return what `stop` needs."""
        ...

    def stop(self, name: str, started: Any) -> None:
        """Add the time since `started`."""
        ...

    def seconds(self) -> dict[str, float]:
        """Return the sums; to clear them is to start anew."""
        ...


class HostClock:
    """The host's time."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}

    def start(self) -> float:
        """Return the time."""
        return time.perf_counter()

    def stop(self, name: str, started: float) -> None:
        """Add the time since `started`."""
        self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - started

    def seconds(self) -> dict[str, float]:
        """Return the sums; to clear them is to start anew."""
        return self._seconds


class StreamClock:
    """The current CUDA stream's time between two events. Nothing waits for the device until the sums are read."""

    def __init__(self, new_event: Callable[[], Any] | None = None) -> None:
        self._new_event = new_event or functools.partial(torch.cuda.Event, enable_timing=True)
        self._seconds: dict[str, float] = {}
        self._open: deque[tuple[str, Any, Any]] = deque()
        self._free: list[Any] = []

    def start(self) -> Any:
        """Record an event on the current stream."""
        event = self._free.pop() if self._free else self._new_event()
        event.record()
        return event

    def stop(self, name: str, started: Any) -> None:
        """Record another one; take in the pairs that the device has passed, so that few stay open."""
        self._open.append((name, started, self.start()))
        while self._open and self._open[0][2].query():
            self._close()

    def seconds(self) -> dict[str, float]:
        """Wait for all pairs and return the sums; to clear them is to start anew."""
        while self._open:
            self._open[0][2].synchronize()
            self._close()
        return self._seconds

    def _close(self) -> None:
        name, started, stopped = self._open.popleft()
        self._seconds[name] = self._seconds.get(name, 0.0) + started.elapsed_time(stopped) / 1e3
        self._free += [started, stopped]


class _TimedWork:
    """The handle of an asynchronous call, whose waiting is timed."""

    def __init__(self, work: Any, name: str, clock: Clock) -> None:
        self._work, self._name, self._clock = work, name, clock

    def wait(self, *args: Any, **kwargs: Any) -> Any:
        started = self._clock.start()
        try:
            return self._work.wait(*args, **kwargs)
        finally:
            self._clock.stop(self._name, started)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)


class _Payload(NamedTuple):
    num_bytes: int
    group: Any = None
    root: int | None = None  # global rank of the source or the destination


def _ring(payload: _Payload, size: int) -> tuple[int, int]:
    """Return sent and received bytes of one turn round the ring."""
    share = payload.num_bytes * (size - 1) // size
    return share, share


def _two_rings(payload: _Payload, size: int) -> tuple[int, int]:
    share = 2 * payload.num_bytes * (size - 1) // size
    return share, share


def _chain(payload: _Payload, size: int) -> tuple[int, int]:
    """From the root on: everybody but the root receives, everybody but the last sends."""
    place = _place(payload, size)
    return payload.num_bytes * (place < size - 1), payload.num_bytes * (place > 0)


def _chain_back(payload: _Payload, size: int) -> tuple[int, int]:
    received, sent = _chain(payload, size)
    return sent, received


def _nothing(payload: _Payload, size: int) -> tuple[int, int]:
    del payload, size
    return 0, 0


def _place(payload: _Payload, size: int) -> int:
    """Return this rank's distance from the root along the ring."""
    assert payload.root is not None
    root = payload.root if payload.group is None else dist.get_group_rank(payload.group, payload.root)
    return (dist.get_rank(payload.group) - root) % size


def _listed(tensors: Sequence[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


# Each takes what the method of that name takes (deepspeed/comm/torch.py), by place or by name. What ZeRO never calls
# (gather, scatter, point to point) is not here.
_OPERATIONS: dict[str, tuple[Callable[..., _Payload], Callable[[_Payload, int], tuple[int, int]]]] = {
    "all_reduce": (lambda tensor, op=None, group=None, async_op=False: _Payload(tensor.nbytes, group), _two_rings),
    "all_reduce_coalesced": (
        lambda tensors, op=None, group=None, async_op=False: _Payload(_listed(tensors), group),
        _two_rings,
    ),
    "reduce": (
        lambda tensor, dst, op=None, group=None, async_op=False: _Payload(tensor.nbytes, group, dst),
        _chain_back,
    ),
    "reduce_scatter": (
        lambda output, input_list, op=None, group=None, async_op=False: _Payload(_listed(input_list), group),
        _ring,
    ),
    "reduce_scatter_tensor": (
        lambda output_tensor, input_tensor, op=None, group=None, async_op=False: _Payload(input_tensor.nbytes, group),
        _ring,
    ),
    "all_gather": (
        lambda tensor_list, tensor, group=None, async_op=False: _Payload(_listed(tensor_list), group),
        _ring,
    ),
    "all_gather_into_tensor": (
        lambda output_tensor, input_tensor, group=None, async_op=False: _Payload(output_tensor.nbytes, group),
        _ring,
    ),
    "all_gather_coalesced": (
        lambda output_tensors, input_tensors, group=None, async_op=False: _Payload(_listed(output_tensors), group),
        _ring,
    ),
    "all_to_all_single": (lambda output, input, *_, group=None, **__: _Payload(input.nbytes, group), _ring),
    "all_to_all": (
        lambda output_tensor_list, input_tensor_list, group=None, async_op=False: _Payload(
            _listed(input_tensor_list), group
        ),
        _ring,
    ),
    "broadcast": (lambda tensor, src, group=None, async_op=False: _Payload(tensor.nbytes, group, src), _chain),
    "barrier": (lambda group=None, async_op=False, device_ids=None: _Payload(0, group), _nothing),
    "all_gather_object": (lambda object_list, obj, group=None: _Payload(0, group), _nothing),
    "broadcast_object_list": (lambda object_list, src, group=None, device=None: _Payload(0, group), _nothing),
}
