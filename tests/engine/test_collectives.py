"""Counts, formulas and clocks, with one process or none; what two ranks really move stands in test_memory.py."""

from types import SimpleNamespace

import deepspeed.comm as ds_comm
import pytest
import torch
import torch.distributed as dist
from deepspeed.comm.torch import TorchBackend

from hdscale.engine import collectives as module
from hdscale.engine.collectives import Collectives, HostClock, Operation, StreamClock, watch_collectives
from hdscale.engine.ranks import distributed

RANKS = 4


@pytest.fixture
def group(monkeypatch):
    """Rank 1 of four, as far as the formulas can see."""
    monkeypatch.setattr(dist, "get_world_size", lambda group=None: -1 if group == "others" else RANKS)
    monkeypatch.setattr(dist, "get_rank", lambda group=None: 1)
    monkeypatch.setattr(dist, "get_group_rank", lambda group, rank: rank - 4)


def moved(name, *args, **kwargs):
    collectives = Collectives(HostClock())
    collectives.watched(name, lambda *_, **__: None)(*args, **kwargs)
    count = collectives.read().operations[name]
    return count.payload_bytes, count.sent_bytes, count.received_bytes


@pytest.fixture
def clock(monkeypatch):
    """The host's time as far as the clock can see: a list of one number."""
    now = [100.0]
    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    return now


def takes(seconds, clock, result=None):
    """A call of that many seconds."""

    def call(*_, **__):
        clock[0] += seconds
        return result

    return call


def floats(count):
    return torch.zeros(count)


@pytest.mark.usefixtures("group")
def test_each_collective_moves_what_its_ring_says():
    shares, whole = [floats(25) for _ in range(RANKS)], floats(100)
    assert moved("all_reduce", whole, None, None, True) == (400, 600, 600)
    assert moved("all_reduce_coalesced", tensors=[whole, whole]) == (800, 1200, 1200)
    assert moved("reduce_scatter_tensor", floats(25), input_tensor=whole) == (400, 300, 300)
    assert moved("reduce_scatter", floats(25), shares) == (400, 300, 300)
    assert moved("all_gather_into_tensor", output_tensor=whole, input_tensor=floats(25)) == (400, 300, 300)
    assert moved("all_gather", shares, floats(25)) == (400, 300, 300)
    assert moved("all_gather_coalesced", [whole, whole], [floats(25)] * 2) == (800, 600, 600)
    assert moved("all_to_all_single", floats(100), whole) == (400, 300, 300)
    assert moved("all_to_all", shares, shares) == (400, 300, 300)
    assert moved("barrier") == (0, 0, 0)


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize(("root", "sent", "received"), [(0, 400, 400), (1, 400, 0), (2, 0, 400)])
def test_a_broadcast_is_a_chain_from_its_source_and_a_reduction_the_same_backwards(root, sent, received):
    assert moved("broadcast", floats(100), root) == (400, sent, received)
    assert moved("reduce", floats(100), dst=root) == (400, received, sent)
    assert moved("broadcast", floats(100), src=root + 4, group="a group of ranks 4 to 7") == (400, sent, received)


@pytest.mark.usefixtures("group")
def test_reducing_a_part_to_each_rank_in_turn_is_a_reduce_scatter():
    collectives = Collectives(HostClock())
    reduce = collectives.watched("reduce", lambda *_, **__: None)
    for rank in range(RANKS):
        reduce(floats(25), rank)
    assert collectives.read().operations["reduce"][:4] == (RANKS, 400, 300, 300)


@pytest.mark.usefixtures("group")
def test_calls_for_groups_of_others_are_not_counted():
    collectives = Collectives(HostClock())
    collectives.watched("all_reduce", lambda *_, **__: None)(floats(100), group="others")
    assert collectives.read().operations == {}


@pytest.mark.usefixtures("group")
def test_reading_starts_anew_unless_told_otherwise(clock):
    collectives = Collectives(HostClock())
    reduce = collectives.watched("all_reduce", takes(0.25, clock))
    reduce(floats(100))
    first = collectives.read(reset=False)
    clock[0] += 8  # outside of any call
    reduce(floats(100))
    second = collectives.read()
    assert (first.operations["all_reduce"].calls, second.operations["all_reduce"].calls) == (1, 2)
    assert (first.seconds, second.seconds) == (0.25, 0.5)
    assert second.total == second.operations["all_reduce"]
    assert collectives.read() == ({},)
    assert collectives.read().total == Operation()


class Work:
    def __init__(self, clock):
        self.clock = clock

    def wait(self, timeout=None):
        self.clock[0] += 2.0
        return timeout

    def is_completed(self):
        return "asked the handle"


@pytest.mark.usefixtures("group")
def test_the_wait_for_a_handle_is_timed_and_the_handle_stays_what_it_was(clock):
    collectives = Collectives(HostClock())
    work = collectives.watched("all_reduce", takes(0.25, clock, Work(clock)))(floats(100), async_op=True)
    clock[0] += 8  # the computation goes on meanwhile
    assert collectives.read(reset=False).seconds == 0.25
    assert work.wait(7) == 7
    assert work.is_completed() == "asked the handle"
    assert collectives.read().seconds == 2.25


@pytest.mark.usefixtures("group")
def test_a_wait_that_fails_is_timed_and_fails(clock):
    collectives = Collectives(HostClock())
    failing = SimpleNamespace(wait=lambda: takes(2.0, clock)() or 1 / 0)
    work = collectives.watched("all_reduce", takes(0.25, clock, failing))(floats(100), async_op=True)
    with pytest.raises(ZeroDivisionError):
        work.wait()
    assert collectives.read().seconds == 2.25


class Event:
    """A device that is always `behind` events late."""

    behind, recorded = 0, 0

    def record(self):
        Event.recorded += 1
        self.time = Event.recorded

    def query(self):
        return self.time <= Event.recorded - Event.behind

    def synchronize(self):
        Event.behind = 0

    def elapsed_time(self, other):
        return 1000.0 * (other.time - self.time)


def test_a_stream_clock_waits_only_when_read_and_keeps_few_events(monkeypatch):
    made = []
    monkeypatch.setattr(Event, "behind", 5)
    clock = StreamClock(lambda: made.append(Event()) or made[-1])
    for _ in range(50):
        clock.stop("all_reduce", clock.start())
    assert Event.behind == 5  # nobody has waited
    assert len(made) < 12
    assert clock.seconds() == {"all_reduce": 50.0}
    assert Event.behind == 0


def test_deepspeed_calls_are_counted_whoever_holds_its_backend():
    with distributed():
        backend = ds_comm.comm.cdb
        collectives = watch_collectives()
        assert watch_collectives() is collectives
        ds_comm.all_reduce(torch.ones(3))
        ds_comm.all_gather_into_tensor(torch.empty(2), torch.ones(2), async_op=True).wait()
        backend.broadcast(torch.ones(5), 0)
        dist.all_reduce(torch.ones(7))  # ours, not DeepSpeed's
        counts = {name: count[:4] for name, count in collectives.read().operations.items()}
    assert counts == {"all_reduce": (1, 12, 0, 0), "all_gather_into_tensor": (1, 8, 0, 0), "broadcast": (1, 20, 0, 0)}
    with distributed():  # another group, another backend
        assert watch_collectives() is not collectives


def test_every_watched_collective_is_a_method_of_the_backend():
    assert all(callable(getattr(TorchBackend, name)) for name in module._OPERATIONS)
