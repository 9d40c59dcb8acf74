import pytest
import torch

from hdscale.config.sections import StudentConfig
from hdscale.errors import UserError
from hdscale.student.build import build_student
from hdscale.student.decoder import build_decoder
from hdscale.vit.position import sincos_position_embedding

TINY = {"model": "vit_tiny_patch16_224", "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4, "drop_path": 0.0}
KEEP = torch.tensor([[0, 3, 4, 9], [1, 2, 5, 14]])  # of 4 x 4 patches


def build(seed=0, **changes):
    config = StudentConfig(**{**TINY, "decoder": "transformer", "decoder_depth": 2, **changes})
    return build_decoder(config, build_student(config, 32, seed=0), seed=seed)


def tokens(num_patches, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 1, 32, generator=generator), torch.randn(2, num_patches, 32, generator=generator)


def blocks_and_norm(decoder, x):
    for block in decoder.blocks:
        x = block(x)
    return decoder.norm(x)[:, 1:]


def test_mask_tokens_stand_in_the_images_order_where_nothing_was_seen():
    decoder = build(decoder_dim=24, mask_tokens="decoder")
    prefix, seen = tokens(4)
    positions = sincos_position_embedding(24, 4, 1)[0]
    images = []
    for image in range(2):
        rows = [decoder.embed(prefix[image, 0])]
        for patch in range(16):
            place = KEEP[image].tolist().index(patch) if patch in KEEP[image] else None
            rows.append(decoder.mask_token[0, 0] if place is None else decoder.embed(seen[image, place]))
        images.append(torch.stack(rows) + positions)
    expected = blocks_and_norm(decoder, torch.stack(images))
    torch.testing.assert_close(decoder(prefix, seen, KEEP), expected)


def test_kept_patches_alone_are_decoded_at_their_own_places():
    decoder = build()
    prefix, seen = tokens(4)
    positions = sincos_position_embedding(32, 4, 1)[0]
    rows = torch.stack([positions[[0, *(kept + 1).tolist()]] for kept in KEEP])
    expected = blocks_and_norm(decoder, torch.cat([prefix, seen], dim=1) + rows)
    torch.testing.assert_close(decoder(prefix, seen, KEEP), expected)


def test_all_patches_are_decoded_in_order_with_or_without_a_mask():
    decoder = build()
    prefix, patches = tokens(16)
    expected = blocks_and_norm(decoder, torch.cat([prefix, patches], dim=1) + sincos_position_embedding(32, 4, 1))
    torch.testing.assert_close(decoder(prefix, patches, None), expected)
    torch.testing.assert_close(decoder(prefix, patches, KEEP), expected)  # an encoder with mask tokens gives all


def test_parameters_exist_only_where_they_get_a_gradient():
    names = {name for name, _ in build().named_parameters()}
    assert not any(name.startswith(("embed", "mask_token")) for name in names)
    for changes in ({}, {"decoder_dim": 24, "mask_tokens": "decoder"}):
        decoder = build(**changes)
        prefix, seen = tokens(4)
        decoder(prefix, seen, KEEP).square().sum().backward()
        assert [name for name, p in decoder.named_parameters() if p.grad is None] == []


def test_sizes_are_the_recipes_or_the_students_own():
    own = build(decoder_depth=3, drop_path=0.2)
    assert len(own.blocks) == 3
    assert own.decoder_dim == 32
    assert own.blocks[0].attn.num_heads == 4
    rates = [getattr(block.drop_path1, "drop_prob", 0.0) for block in own.blocks]
    assert rates == pytest.approx([0, 0.1, 0.2])
    given = build(decoder_dim=48, decoder_heads=6)
    assert given.decoder_dim == 48
    assert given.blocks[0].attn.num_heads == 6
    assert build(decoder="linear") is None


def test_weights_follow_the_seed_and_leave_the_callers_random_state_alone():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first, same, other = (build(seed=seed).state_dict() for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not torch.equal(first["blocks.0.mlp.fc1.weight"], other["blocks.0.mlp.fc1.weight"])


@pytest.mark.parametrize("sizes", [{"decoder_dim": 30, "decoder_heads": 3}, {"decoder_dim": 36, "decoder_heads": 5}])
def test_widths_that_do_not_divide_are_refused(sizes):
    with pytest.raises(UserError, match=r"student\.decoder_dim must be a multiple of 4 and of student\.decoder_heads"):
        build(**sizes)


@pytest.mark.parametrize("mask_tokens", ["none", "decoder"])
def test_queries_and_keys_are_those_of_every_block_over_all_patches(mask_tokens):
    decoder = build(decoder_dim=24, decoder_heads=3, mask_tokens=mask_tokens)
    prefix, patches = tokens(16)
    x = decoder.embed(torch.cat([prefix, patches], dim=1)) + sincos_position_embedding(24, 4, 1)
    queries, keys = decoder.queries_and_keys(prefix, patches)
    assert len(queries) == len(keys) == 2
    for block, query, key in zip(decoder.blocks, queries, keys, strict=True):
        linear = block.attn.qkv
        parts = (block.norm1(x) @ linear.weight.T + linear.bias).split(24, dim=-1)
        for ours, part in zip((query, key), parts[:2], strict=True):
            torch.testing.assert_close(ours, part.unflatten(-1, (3, 8)).transpose(1, 2))
        x = block(x)
