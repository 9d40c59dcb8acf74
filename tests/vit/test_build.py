import pytest
import torch

from hdscale.errors import UserError
from hdscale.vit.build import create_teacher_vit, create_vit

ARCH = {"model_name": "vit_tiny_patch16_224", "img_size": 32, "depth": 2, "embed_dim": 48, "num_heads": 3}


def test_weights_follow_the_seed_and_leave_the_random_state_alone():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first, same, other = (create_vit("student.model", ARCH, seed=seed).state_dict() for seed in (1, 1, 2))
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not torch.equal(first["blocks.0.attn.qkv.weight"], other["blocks.0.attn.qkv.weight"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_name": "vit_smal_patch16_224"}, r"student\.model must be a timm model, .* did you mean vit_small"),
        ({"model_name": "eva02_tiny_patch14_224", "num_heads": None}, r"VisionTransformer, got a Eva; choose a vit_"),
        ({"num_heads": 5}, r"student\.model: timm cannot create vit_tiny.*num_heads=5.*divisible"),
        (
            {"model_name": "vit_tiny_patch16_224.nobody"},
            r"student\.model: timm cannot create vit_tiny_patch16_224\.nobody",
        ),
        ({"model_name": "vit_small_patch16_18x2_224"}, r"must have blocks of one attention.*got ParallelThingsBlock"),
        ({"model_name": "vit_base_patch16_xp_224"}, r"must have blocks of one attention.*got ParallelScalingBlock"),
        ({"img_size": (32, 48)}, r"student\.model must have a fixed square grid of patches, got 2 x 3"),
    ],
)
def test_models_that_cannot_be_run_are_refused_in_one_line(changes, message):
    with pytest.raises(UserError, match=message) as caught:
        create_vit("student.model", {**ARCH, **changes})
    assert "\n" not in str(caught.value)


def test_teachers_of_parallel_blocks_are_refused_too():
    with pytest.raises(UserError, match=r"feature_teacher\.name must have blocks of one attention.*choose a plain ViT"):
        create_teacher_vit("feature_teacher.name", {**ARCH, "model_name": "vit_small_patch16_18x2_224"})
