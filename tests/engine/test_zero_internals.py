import weakref

import torch
from torch import nn

from hdscale.engine.zero_internals import release_gathered_weights


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
