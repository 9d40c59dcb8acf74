import pytest
import torch

from hdscale.config.sections import StudentConfig
from hdscale.errors import UserError
from hdscale.student.heads import build_head, build_layer_heads


def test_the_linear_head_has_the_teachers_width_and_follows_its_seed():
    first, same, other = (build_head(StudentConfig(), 12, 20, seed=seed) for seed in (1, 1, 2))
    assert first(torch.ones(2, 3, 12)).shape == (2, 3, 20)
    assert torch.equal(first.proj.weight, same.proj.weight)
    assert not torch.equal(first.proj.weight, other.proj.weight)


def test_the_identity_head_needs_equal_widths_and_has_no_parameters():
    config = StudentConfig(decoder="identity")
    head = build_head(config, 12, 12, seed=0)
    tokens = torch.randn(2, 3, 12)
    assert torch.equal(head(tokens), tokens)
    assert list(head.parameters()) == []
    with pytest.raises(
        UserError, match=r"student\.decoder identity .* has 12 .* teacher 20; set student\.decoder=linear"
    ):
        build_head(config, 12, 20, seed=0)


def test_layer_heads_start_from_different_places_and_follow_their_seed():
    heads, same, other = (build_layer_heads(3, 12, 20, seed=seed) for seed in (1, 1, 9))
    assert [head(torch.ones(2, 5, 12)).shape for head in heads] == [(2, 5, 20)] * 3
    drawn = [build_head(StudentConfig(), 12, 20, seed=1).proj.weight, *(head.proj.weight for head in heads)]
    # The feature head's weights are among them: with one seed, it would start where a layer's does.
    assert not any(torch.equal(drawn[i], drawn[j]) for i in range(4) for j in range(i))
    for one, again, changed in zip(heads, same, other, strict=True):
        assert torch.equal(one.proj.weight, again.proj.weight)
        assert not torch.equal(one.proj.weight, changed.proj.weight)
        assert one.proj.bias.abs().max() == 0


def test_weights_of_heads_are_small():
    assert build_head(StudentConfig(), 200, 300, seed=1).proj.weight.std().item() == pytest.approx(0.02, rel=0.05)


def test_layers_of_equal_widths_need_no_heads():
    assert build_layer_heads(3, 12, 12, seed=0) is None
    assert build_layer_heads(3, 12, 13, seed=0) is not None
