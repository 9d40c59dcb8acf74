import numpy as np

from hdscale.vit.position import sincos_position_embedding


def reference(embed_dim: int, grid_size: int) -> np.ndarray:
    """He et al.'s get_2d_sincos_pos_embed, value by value."""
    table = np.zeros((grid_size * grid_size, embed_dim))
    quarter = embed_dim // 4
    for row in range(grid_size):
        for column in range(grid_size):
            for channel in range(embed_dim):
                place = column if channel < embed_dim // 2 else row
                within = channel % (embed_dim // 2)
                angle = place / 10000 ** ((within % quarter) / quarter)
                table[row * grid_size + column, channel] = np.sin(angle) if within < quarter else np.cos(angle)
    return table


def test_the_embedding_is_that_of_mae_with_zeros_for_prefix_tokens():
    ours = sincos_position_embedding(16, 3, num_prefix_tokens=1)
    assert ours.shape == (1, 10, 16)
    assert not ours[0, 0].any()
    np.testing.assert_allclose(ours[0, 1:].numpy(), reference(16, 3), atol=1e-7)
