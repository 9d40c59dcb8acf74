import pytest
import torch

from hdscale.vit.tokens import compared_tokens


@pytest.mark.parametrize(
    ("num_prefix", "cls", "rows"),
    [
        (0, False, [0, 1, 2]),
        (1, False, [1, 2, 3]),
        (1, True, [0, 1, 2, 3]),
        (5, False, [5, 6, 7]),
        (5, True, [0, 5, 6, 7]),
    ],
)
def test_relations_are_of_patches_and_the_class_token_where_asked(num_prefix, cls, rows):
    x = torch.randn(2, 4, num_prefix + 3, 8)
    assert torch.equal(compared_tokens(x, num_prefix, cls=cls), x[:, :, rows])
