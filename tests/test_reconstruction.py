"""Features at kept, hidden and all patches, with mask tokens in the student or its decoder."""

import numpy as np
import pytest
import torch

from hdscale.config.sections import LossConfig, MaskConfig, RelationConfig, StudentConfig
from hdscale.distiller import build_distiller
from hdscale.losses import token_relation
from hdscale.student.load import load_student
from hdscale.teachers.targets import TeacherPair
from hdscale.types import Batch, ComparedTokens, Targets, TeacherShapes, ViTOutput
from hdscale.vit.tokens import other_indices

SIZES = {"model": "vit_tiny_patch16_224", "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 4}
KEEP = torch.tensor([[0, 3, 4, 9, 12], [1, 2, 5, 6, 10]])  # of 4 x 4 patches
DECODER = {"decoder": "transformer", "decoder_depth": 1, "decoder_dim": 24}
WAYS = [
    ("none", "linear", "kept"),
    ("none", "transformer", "kept"),
    ("encoder", "linear", "kept"),
    ("encoder", "linear", "hidden"),
    ("encoder", "linear", "all"),
    ("encoder", "transformer", "hidden"),
    ("decoder", "transformer", "kept"),
    ("decoder", "transformer", "hidden"),
    ("decoder", "transformer", "all"),
]


def make(mask_tokens, decoder, features_on, **changes):
    more = DECODER if decoder == "transformer" else {}
    student = StudentConfig(**SIZES, drop_path=0.0, mask_tokens=mask_tokens, **more, **changes)
    return build_distiller(
        student,
        RelationConfig(),
        LossConfig(features_on=features_on),
        img_size=32,
        seed=1,
        teachers=TeacherShapes(feature_dim=20, relation_heads=4, relation_has_cls=True),
    )


def at(features_on, keep, all_patches):
    """Pick rows patch by patch: (B, N, T) to those the loss is taken at."""
    picked = []
    for patches, kept in zip(all_patches, keep.tolist(), strict=True):
        wanted = {"kept": kept, "hidden": [n for n in range(16) if n not in kept], "all": range(16)}[features_on]
        picked.append(torch.stack([patches[n] for n in wanted]))
    return torch.stack(picked)


def make_targets(features_on):
    generator = torch.Generator().manual_seed(2)
    features = at(features_on, KEEP, torch.randn(2, 16, 20, generator=generator) * 3 + 1)
    relations = tuple(torch.randn(2, 4, 6, 6, generator=generator) for _ in range(2))
    return Targets(KEEP, features, relations)


@pytest.fixture
def images():
    return torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def smooth_l1(difference, beta=2.0):
    size = np.abs(difference)
    return np.where(size < beta, 0.5 * size**2 / beta, size - 0.5 * beta).mean()


def encode_with_mask_tokens(distiller, images, *, keep=KEEP):
    """Run the student's own timm model on patches of which the others were replaced before positions are added."""
    encoder = distiller.student.encoder
    x = encoder.model.patch_embed(distiller.student.preprocess(images, torch.float32)).clone()
    for image in range(2):
        for patch in range(16):
            if patch not in keep[image]:
                x[image, patch] = encoder.mask_token[0, 0]
    x = encoder.model.norm_pre(encoder.model._pos_embed(x))
    inputs = []
    for block in encoder.model.blocks:
        inputs.append(x)
        x = block(x)
    return encoder.model.norm(x), inputs


@pytest.mark.parametrize(("mask_tokens", "decoder", "features_on"), WAYS)
def test_every_parameter_gets_a_gradient_and_the_loss_falls(mask_tokens, decoder, features_on, images):
    distiller, targets = make(mask_tokens, decoder, features_on), make_targets(features_on)
    optimizer = torch.optim.AdamW(distiller.parameters(), lr=3e-3)
    losses = []
    for _ in range(15):
        optimizer.zero_grad()
        terms = distiller(images, targets)
        terms.total.backward()
        losses.append(terms.total.item())
        assert [name for name, p in distiller.named_parameters() if p.grad is None or not p.grad.any()] == []
        optimizer.step()
    assert losses[-1] < 0.9 * losses[0]
    assert ("student.encoder.mask_token" in dict(distiller.named_parameters())) == (mask_tokens == "encoder")
    assert ("decoder.mask_token" in dict(distiller.named_parameters())) == (mask_tokens == "decoder")


@pytest.mark.parametrize("features_on", ["kept", "hidden", "all"])
def test_mask_tokens_in_the_encoder_equal_timm_on_replaced_patches(features_on, images):
    distiller, targets = make("encoder", "linear", features_on), make_targets(features_on)
    with torch.no_grad():
        tokens, inputs = encode_with_mask_tokens(distiller, images)
        predicted = at(features_on, KEEP, distiller.head(tokens[:, 1:]))
        wanted = targets.features
        wanted = (wanted - wanted.mean(-1, keepdim=True)) / (wanted.var(-1, keepdim=True, correction=0) + 1e-6).sqrt()
        terms = distiller(images, targets)
        assert terms.feature.item() == pytest.approx(smooth_l1((predicted - wanted).numpy()), rel=1e-5)
        # Relations are of the class token and the kept patches.
        layers = []
        for layer, target in zip((1, 2), targets.relations, strict=True):
            block = distiller.student.encoder.model.blocks[layer]
            qkv = block.attn.qkv(block.norm1(inputs[layer])).unflatten(2, (3, 4, 8)).permute(2, 0, 3, 1, 4)
            rows = [[0, *(kept + 1).tolist()] for kept in KEEP]
            query, key = (torch.stack([x[image][:, rows[image]] for image in range(2)]) for x in qkv[:2])
            layers.append(smooth_l1((token_relation(query, key) - target).numpy()))
        assert terms.relation.item() == pytest.approx(np.mean(layers), rel=1e-5)


@pytest.mark.parametrize("features_on", ["kept", "hidden", "all"])
def test_mask_tokens_in_the_decoder_leave_the_encoder_to_kept_patches(features_on, images):
    distiller, targets = make("decoder", "transformer", features_on), make_targets(features_on)
    with torch.no_grad():
        seen = distiller.student(images, KEEP)
        assert seen.patch_tokens.shape == (2, 5, 32)
        decoded = distiller.decoder(seen.prefix_tokens, seen.patch_tokens, KEEP)
        assert decoded.shape == (2, 16, 24)
        predicted = at(features_on, KEEP, distiller.head(decoded))
        wanted = torch.nn.functional.layer_norm(targets.features, (20,), eps=1e-6)
        feature = distiller(images, targets).feature
    assert feature.item() == pytest.approx(smooth_l1((predicted - wanted).numpy()), rel=1e-5)


def test_hidden_patches_are_not_seen_but_change_the_target_alone(images):
    """What stands at a dropped patch must not reach a prediction."""
    other = images.clone()
    other[0, :, :8, 8:16] = 255 - other[0, :, :8, 8:16]  # patch 1, which is dropped
    for mask_tokens, decoder in (("encoder", "linear"), ("decoder", "transformer")):
        distiller, targets = make(mask_tokens, decoder, "hidden"), make_targets("hidden")
        with torch.no_grad():
            assert torch.equal(distiller(images, targets).total, distiller(other, targets).total)


@pytest.mark.parametrize("features_on", ["kept", "hidden", "all"])
def test_the_feature_teacher_is_asked_for_the_compared_patches(features_on, images):
    everything = torch.arange(2 * 16 * 3).view(2, 16, 3)

    def teacher(_images, indices):
        patches = everything if indices is None else torch.stack([e[i] for e, i in zip(everything, indices)])  # noqa: B905
        return ViTOutput(patches, (), (), ())

    pair = TeacherPair(
        teacher,
        None,
        relation_config=RelationConfig(),
        mask_config=MaskConfig(strategy="direct"),
        seed=0,
        num_patches=16,
        compared=ComparedTokens(cls_in_relation=True, features_on=features_on),
    )
    ids = torch.arange(2)
    targets = pair(Batch(images, ids, ids, ids * 0, ids * 0, KEEP))
    assert torch.equal(targets.features, at(features_on, KEEP, everything))
    assert targets.keep_indices is KEEP


def test_other_indices_are_the_complement_in_order():
    generator = torch.Generator().manual_seed(0)
    for num_keep in (1, 7, 15, 16):
        order = torch.rand(5, 16, generator=generator).argsort(dim=1)[:, :num_keep].sort(dim=1).values
        other = other_indices(order, 16)
        assert [sorted(set(range(16)) - set(row)) for row in order.tolist()] == other.tolist()


@pytest.mark.parametrize("mask_tokens", ["encoder", "decoder"])
def test_a_loaded_student_sees_whole_images_and_has_no_decoder(mask_tokens, images):
    decoder = "linear" if mask_tokens == "encoder" else "transformer"
    distiller = make(mask_tokens, decoder, "hidden").eval()
    config = StudentConfig(
        **SIZES, drop_path=0.0, mask_tokens=mask_tokens, **(DECODER if decoder == "transformer" else {})
    )
    loaded = load_student(config, 32, distiller.state_dict())
    with torch.no_grad():
        assert torch.equal(loaded(images).patch_tokens, distiller.student(images).patch_tokens)
    assert not any("decoder" in name for name, _ in loaded.named_parameters())
