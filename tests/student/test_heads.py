import pytest
import torch

from hdscale.config.sections import StudentConfig
from hdscale.errors import UserError
from hdscale.student.heads import build_head, build_layer_heads


def layer_heads(num_layers, embed_dim, target_dim, *, seed, token_head="norm_linear"):
    return build_layer_heads(num_layers, embed_dim, target_dim, token_head=token_head, init="mae", seed=seed)


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
    heads, same, other = (layer_heads(3, 12, 20, seed=seed) for seed in (1, 1, 9))
    assert [head(torch.ones(2, 5, 12)).shape for head in heads] == [(2, 5, 20)] * 3
    drawn = [build_head(StudentConfig(), 12, 20, seed=1).proj.weight, *(head.proj.weight for head in heads)]
    # The feature head's weights are among them: with one seed, it would start where a layer's does.
    assert not any(torch.equal(drawn[i], drawn[j]) for i in range(4) for j in range(i))
    for one, again, changed in zip(heads, same, other, strict=True):
        assert torch.equal(one.proj.weight, again.proj.weight)
        assert not torch.equal(one.proj.weight, changed.proj.weight)
        assert one.proj.bias.abs().max() == 0


@pytest.mark.parametrize("target_dim", [12, 20])
def test_tokens_of_layers_go_through_a_norm_and_a_linear_even_to_equal_widths(target_dim):
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(2, 5, 12, generator=generator) * 3 + 1
    for head in layer_heads(3, 12, target_dim, seed=0):
        with torch.no_grad():
            head.norm.weight.uniform_(0.5, 2, generator=generator)
            head.norm.bias.uniform_(-1, 1, generator=generator)
            found = head(tokens)
        normed = (tokens - tokens.mean(-1, keepdim=True)) / (tokens.var(-1, keepdim=True, correction=0) + 1e-6).sqrt()
        wanted = (normed * head.norm.weight + head.norm.bias) @ head.proj.weight.T + head.proj.bias
        torch.testing.assert_close(found, wanted)


def test_heads_by_width_have_a_linear_alone_and_only_between_different_widths():
    assert layer_heads(3, 12, 12, seed=0, token_head="width") is None
    heads = layer_heads(3, 12, 13, seed=0, token_head="width")
    assert [name for name, _ in heads[0].named_parameters()] == ["proj.weight", "proj.bias"]
    tokens = torch.randn(2, 5, 12)
    assert torch.equal(heads[0](tokens), heads[0].proj(tokens))
