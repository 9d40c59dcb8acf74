import math

import numpy as np
import pytest
import torch

from hdscale.config.sections import PretrainConfig, StudentConfig
from hdscale.errors import UserError
from hdscale.pretraining import MaskedAutoencoder, SupervisedClassifier, mae_keep_indices, normalized_patches
from hdscale.student.build import build_student
from hdscale.student.load import load_student
from hdscale.types import Batch
from hdscale.vit.position import sincos_position_embedding

STUDENT = StudentConfig(
    model="vit_tiny_patch16_224", patch_size=8, embed_dim=32, depth=3, num_heads=4, mlp_ratio=2.0, drop_path=0.0
)
CONFIG = PretrainConfig(decoder_dim=16, decoder_depth=2, decoder_heads=2)


@pytest.fixture
def images():
    return torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def keep_indices():
    return torch.tensor([[0, 1, 7, 9], [2, 3, 4, 15], [5, 6, 8, 10], [11, 12, 13, 14]])


@pytest.fixture
def autoencoder():
    return MaskedAutoencoder(build_student(STUDENT, 32, seed=0), CONFIG, seed=1)


@pytest.fixture
def classifier():
    return SupervisedClassifier(build_student(STUDENT, 32, seed=0), 5, CONFIG, seed=1)


def make_batch(images, epoch):
    ids = torch.arange(len(images))
    return Batch(images, ids, ids, torch.zeros_like(ids), torch.full_like(ids, epoch), None)


def reference_patches(images, patch_size):
    """Cut and standardise with loops, float64; deviation with n - 1 as in MAE's code."""
    pixels = (images.numpy() / 255 - np.array(STUDENT.mean)[:, None, None]) / np.array(STUDENT.std)[:, None, None]
    rows = []
    for image in pixels:
        for top in range(0, image.shape[1], patch_size):
            for left in range(0, image.shape[2], patch_size):
                patch = image[:, top : top + patch_size, left : left + patch_size].transpose(1, 2, 0).ravel()
                rows.append((patch - patch.mean()) / math.sqrt(patch.var(ddof=1) + 1e-6))
    return np.array(rows).reshape(len(images), -1, 3 * patch_size**2)


def decode_by_hand(autoencoder, images, keep_indices):
    """MAE's decoder, image by image and token by token: (B, N, 3 p^2)."""
    decoder, positions = autoencoder.decoder, sincos_position_embedding(16, 4)[0]
    seen = autoencoder.encoder(images, keep_indices)
    rows = []
    for image, kept in enumerate(keep_indices.tolist()):
        row = [decoder.embed(seen.prefix_tokens[image, 0])]  # at the position zero
        for patch in range(16):
            token = decoder.embed(seen.patch_tokens[image, kept.index(patch)]) if patch in kept else decoder.mask_token
            row.append(token.flatten() + positions[patch])
        rows.append(torch.stack(row))
    x = torch.stack(rows)
    for block in decoder.blocks:
        x = block(x)
    return autoencoder.pixels(decoder.norm(x))[:, 1:]


def losses_of(module, *args, steps=40):
    optimizer = torch.optim.AdamW(module.parameters(), lr=3e-3)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        terms = module(*args)
        terms.total.backward()
        optimizer.step()
        losses.append(terms.total.item())
    return losses


def test_patches_equal_a_loop_in_numpy(images):
    mean, std = (torch.tensor(values)[:, None, None] for values in (STUDENT.mean, STUDENT.std))
    pixels = (images.double() / 255 - mean) / std
    np.testing.assert_allclose(
        normalized_patches(pixels, 8).numpy(), reference_patches(images, 8), rtol=1e-5, atol=1e-6
    )


def test_a_flat_patch_has_a_finite_target():
    assert torch.equal(normalized_patches(torch.full((1, 3, 8, 8), 0.5), 8), torch.zeros(1, 1, 192))


def test_mae_loss_is_the_mean_squared_error_on_hidden_patches(autoencoder, images, keep_indices):
    with torch.no_grad():
        predicted = decode_by_hand(autoencoder, images, keep_indices).double().numpy()
        terms = autoencoder(images, keep_indices)
    wanted = reference_patches(images, 8)
    errors = [
        ((predicted[b, n] - wanted[b, n]) ** 2).mean()
        for b in range(4)
        for n in range(16)
        if n not in keep_indices[b].tolist()
    ]
    assert len(errors) == 4 * 12
    assert terms.total.item() == pytest.approx(np.mean(errors), rel=1e-5)
    assert terms.feature.item() == terms.relation.item() == 0


def test_the_class_token_goes_through_the_decoder_and_is_trained_by_it(autoencoder, images, keep_indices):
    seen = autoencoder.encoder(images, keep_indices)
    decoded = autoencoder.decoder(seen.prefix_tokens, seen.patch_tokens, keep_indices)
    assert decoded.shape == (4, 16, 16)
    other = autoencoder.decoder(-seen.prefix_tokens, seen.patch_tokens, keep_indices)
    assert (decoded - other).abs().amax(dim=(1, 2)).min() > 1e-4
    # Through the decoder alone: what enters it is cut off from the encoder.
    prefix = seen.prefix_tokens.detach().requires_grad_()
    autoencoder.decoder(prefix, seen.patch_tokens.detach(), keep_indices).square().sum().backward()
    assert prefix.grad.abs().amax(dim=(1, 2)).min() > 0


def test_hidden_pixels_do_not_reach_the_encoder(autoencoder, images, keep_indices):
    changed = images.clone()
    changed[0, :, 24:, 8:16] = 255 - changed[0, :, 24:, 8:16]  # patch 13, hidden in image 0
    before = autoencoder.encoder(images, keep_indices).patch_tokens
    assert torch.equal(before, autoencoder.encoder(changed, keep_indices).patch_tokens)


def test_mae_loss_falls_and_every_parameter_gets_a_gradient(autoencoder, images, keep_indices):
    losses = losses_of(autoencoder, images, keep_indices)
    assert losses[-1] < 0.8 * losses[0]
    assert [name for name, p in autoencoder.named_parameters() if p.grad is None] == []


def test_classifier_loss_starts_near_chance_and_falls(classifier, images):
    losses = losses_of(classifier, images, torch.tensor([0, 4, 2, 1]))
    assert losses[0] == pytest.approx(math.log(5), abs=0.3)
    assert losses[-1] < 0.5 * losses[0]
    assert [name for name, p in classifier.named_parameters() if p.grad is None] == []


def test_classifier_loss_is_the_smoothed_cross_entropy_of_pooled_patch_tokens(classifier, images):
    labels = torch.tensor([0, 4, 2, 1])
    with torch.no_grad():
        pooled = classifier.encoder(images).patch_tokens.double().numpy().mean(axis=1)
        loss = classifier(images, labels).total.item()
    logits = pooled @ classifier.classifier.weight.detach().double().numpy().T
    log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    wanted = np.full((4, 5), 0.1 / 5)
    wanted[np.arange(4), labels] += 0.9
    assert loss == pytest.approx(-(wanted * log_p).sum(axis=1).mean(), rel=1e-5)


def test_mae_masks_change_with_the_epoch_and_keep_a_quarter(images):
    first = mae_keep_indices(make_batch(images, 0), 16, 0.75, seed=3)
    assert first.shape == (4, 4)
    assert torch.equal(first, mae_keep_indices(make_batch(images, 0), 16, 0.75, seed=3))
    assert not torch.equal(first, mae_keep_indices(make_batch(images, 1), 16, 0.75, seed=3))


@pytest.mark.parametrize("sizes", [(18, 3), (16, 3)])
def test_a_decoder_width_that_does_not_divide_is_refused(sizes):
    config = PretrainConfig(decoder_dim=sizes[0], decoder_heads=sizes[1])
    with pytest.raises(
        UserError, match=r"pretrain\.decoder_dim must be a multiple of 4 and of pretrain\.decoder_heads 3"
    ):
        MaskedAutoencoder(build_student(STUDENT, 32, seed=0), config, seed=0)


def test_equal_seeds_give_equal_weights_and_leave_the_global_generator_alone():
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = MaskedAutoencoder(build_student(STUDENT, 32, seed=0), CONFIG, seed=1).state_dict()
    assert torch.equal(torch.get_rng_state(), state)
    second = MaskedAutoencoder(build_student(STUDENT, 32, seed=0), CONFIG, seed=1).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("fixture", ["autoencoder", "classifier"])
def test_the_encoder_of_a_pretrained_model_loads_as_a_student(fixture, images, request):
    module = request.getfixturevalue(fixture).eval()
    loaded = load_student(STUDENT, 32, module.state_dict())
    assert torch.equal(loaded(images).patch_tokens, module.encoder(images).patch_tokens)
