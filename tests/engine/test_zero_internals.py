import contextlib
import weakref
from types import SimpleNamespace

import deepspeed.comm.comm as deepspeed_comm
import pytest
import torch
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator
from torch import nn

from hdscale.engine.zero_internals import (
    around_gathers,
    largest_buckets,
    own_share,
    read_loss_scaler,
    release_gathered_weights,
    write_loss_scaler,
)


def build():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.GELU(), nn.Linear(5, 6), nn.LayerNorm(6), nn.Linear(6, 6, bias=False))
    for parameter in model.parameters():
        parameter.ds_numel = parameter.numel()
    return model


def run_as_zero_3_does(model):
    """Take the memory of all parameters away between forward and backward pass, and give it back in another place."""
    shards = [parameter.detach().clone() for parameter in model.parameters()]
    gathered = [weakref.ref(parameter.untyped_storage()) for parameter in model.parameters()]
    loss = model(torch.arange(12.0).view(2, 6)).square().sum()
    for parameter in model.parameters():
        parameter.data = torch.empty(0)
    kept = sum(storage() is not None for storage in gathered)
    for parameter, shard in zip(model.parameters(), shards, strict=True):
        # Gathered parameters lie behind each other in one buffer.
        parameter.data = torch.cat([torch.zeros(3), shard.flatten()])[3:].view_as(shard)
    loss.backward()
    return kept, [parameter.grad for parameter in model.parameters()]


def test_the_graph_lets_go_of_gathered_parameters_and_gives_the_same_gradients():
    plain, changed = build(), build()
    release_gathered_weights(changed)
    kept, gradients = run_as_zero_3_does(plain)
    assert kept == 2, "F.linear saves a view of its weight where its input needs a gradient"
    kept_now, gradients_now = run_as_zero_3_does(changed)
    assert kept_now == 0
    assert all(map(torch.equal, gradients, gradients_now))


def test_a_forward_pass_without_gradients_is_left_alone():
    model = build()
    expected = model(torch.ones(2, 6))
    release_gathered_weights(model)
    with torch.no_grad():
        assert torch.equal(model(torch.ones(2, 6)), expected)


@pytest.mark.parametrize(("count", "ranks"), [(6, 2), (5, 2), (5, 4), (1, 3)])
def test_the_shares_of_all_ranks_are_the_value_and_zeros_behind_it(count, ranks):
    value = torch.arange(1.0, count + 1).view(1, count)
    share = -(-count // ranks)

    def share_of(rank):
        optimizer = SimpleNamespace(_get_param_partition_rank=lambda _: rank)
        return own_share(SimpleNamespace(ds_tensor=torch.empty(share), _z3_optimizer=optimizer), value)

    shares = [share_of(rank) for rank in range(ranks)]
    assert [len(one) for one in shares] == [share] * ranks
    assert torch.cat(shares).tolist() == [*value.flatten().tolist(), *[0.0] * (share * ranks - count)]


def test_a_loss_scaler_is_put_back_unless_the_precision_is_another():
    def engine(**fields):
        return SimpleNamespace(optimizer=SimpleNamespace(loss_scaler=SimpleNamespace(**fields)))

    dynamic = {"cur_scale": 8.0, "cur_iter": 5, "last_overflow_iter": 2, "cur_hysteresis": 1}
    assert read_loss_scaler(engine(**dynamic, scale_window=7)) == dynamic
    assert read_loss_scaler(engine(cur_scale=1.0)) == {"cur_scale": 1.0}
    resumed = engine(**{**dynamic, "cur_scale": 65536.0, "cur_iter": 0})
    write_loss_scaler(resumed, dynamic)
    assert read_loss_scaler(resumed) == dynamic
    static = engine(cur_scale=1.0)
    write_loss_scaler(static, dynamic)
    assert read_loss_scaler(static) == {"cur_scale": 1.0}


def test_each_gather_is_inside_a_context_of_its_own_until_the_block_ends(monkeypatch):
    seen = []
    monkeypatch.setattr(PartitionedParameterCoordinator, "fetch_sub_module", lambda _, module: seen.append(module))

    @contextlib.contextmanager
    def context():
        seen.append("enter")
        yield
        seen.append("exit")

    with around_gathers(context):
        PartitionedParameterCoordinator.fetch_sub_module(None, "block 0")
        PartitionedParameterCoordinator.fetch_sub_module(None, "block 1")
    PartitionedParameterCoordinator.fetch_sub_module(None, "block 2")
    assert seen == ["enter", "block 0", "exit", "enter", "block 1", "exit", "block 2"]


def test_buckets_are_measured_whenever_one_is_reduced(monkeypatch):
    reduced = []
    calls = dict.fromkeys(("all_reduce", "reduce", "reduce_scatter_tensor"), reduced.append)
    backend = SimpleNamespace(**calls)
    monkeypatch.setattr(deepspeed_comm, "cdb", backend)
    buckets = {torch.float16: SimpleNamespace(buffer=None), torch.float32: SimpleNamespace(buffer=[])}
    engine = SimpleNamespace(optimizer=SimpleNamespace(ipg_buckets=buckets))
    with largest_buckets(engine) as largest:
        for size in (10, 30, 20):
            buckets[torch.float16].buffer = torch.zeros(size, dtype=torch.float16)
            buckets[torch.float32].buffer = [torch.zeros(size), torch.zeros(size)]
            backend.all_reduce(size)
    assert largest.num_bytes == 30 * 2 + 2 * 30 * 4
    assert reduced == [10, 30, 20]
    assert vars(backend) == calls
