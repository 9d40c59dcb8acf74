import pytest
import torch

from hdscale.config.recipe import StudentConfig
from hdscale.errors import UserError
from hdscale.student.heads import build_head


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
