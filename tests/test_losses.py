"""Losses and their gradients against NumPy in float64, with gradients by hand."""

import numpy as np
import pytest
import torch

from hdscale.losses import feature_loss, relation_loss, token_relation

B, A, S, E, T = 2, 3, 7, 5, 11


def randn(*shape, seed=0, scale=1.0):
    return torch.from_numpy(np.random.RandomState(seed).standard_normal(shape) * scale).float()


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def reference_relation(query, key, scale, heads):
    """Loops over images, heads and tokens, float64."""
    b, a, s, e = query.shape
    out = np.zeros((b, a, s, s))
    for image in range(b):
        for head in range(a):
            for i in range(s):
                for j in range(s):
                    out[image, head, i, j] = np.dot(query[image, head, i], key[image, head, j])
    if heads == "merged":
        out, e = out.sum(axis=1, keepdims=True), a * e
    if scale != "raw":
        out = out / np.sqrt(e)
    if scale == "centred":
        return out - np.array([[[[row.sum() / s] for row in head] for head in image] for image in out])
    return softmax(out) if scale == "softmax" else out


def reference_smooth_l1(x, y, beta):
    """Value and gradient in x."""
    difference = x - y
    small = np.abs(difference) < beta
    value = np.where(small, difference**2 / (2 * beta), np.abs(difference) - beta / 2).mean()
    return value, np.where(small, difference / beta, np.sign(difference)) / x.size


def assert_close(ours, reference):
    ours = ours.detach().double().numpy()
    assert np.abs(ours - reference).max() <= 1e-5 * np.abs(reference).max()


@pytest.mark.parametrize("heads", ["per_head", "merged"])
@pytest.mark.parametrize("scale", ["scaled", "raw", "softmax", "centred"])
def test_relations_equal_loops_in_float64(scale, heads):
    query, key = randn(B, A, S, E, seed=1), randn(B, A, S, E, seed=2)
    ours = token_relation(query, key, scale, heads)
    assert ours.dtype == torch.float32
    assert ours.shape == (B, A if heads == "per_head" else 1, S, S)
    assert_close(ours, reference_relation(query.double().numpy(), key.double().numpy(), scale, heads))


def test_centred_relations_see_what_attention_sees_and_no_more():
    """A vector that all keys have in common adds a constant to each row, which no softmax over the row can see."""
    query, key = randn(B, A, S, E, seed=1), randn(B, A, S, E, seed=2)
    shifted = key + randn(1, A, 1, E, seed=5)
    for scale, rtol in (("centred", 1e-4), ("softmax", 1e-4)):
        torch.testing.assert_close(
            token_relation(query, key, scale), token_relation(query, shifted, scale), rtol=rtol, atol=1e-5
        )
    assert not torch.allclose(token_relation(query, key), token_relation(query, shifted), atol=0.1)


@pytest.mark.parametrize("heads", ["per_head", "merged"])
@pytest.mark.parametrize("scale", ["scaled", "raw", "softmax", "centred"])
@pytest.mark.parametrize("beta", [0.3, 2.0])
def test_relation_loss_and_its_gradients_equal_a_derivation_by_hand(beta, scale, heads):
    query, key = randn(B, A, S, E, seed=1).requires_grad_(), randn(B, A, S, E, seed=2).requires_grad_()
    teacher = token_relation(randn(B, A, S, E, seed=3), randn(B, A, S, E, seed=4), scale, heads)
    loss = relation_loss(token_relation(query, key, scale, heads), teacher, beta)
    loss.backward()

    q, k = query.detach().double().numpy(), key.detach().double().numpy()
    relation = reference_relation(q, k, scale, heads)
    value, gradient = reference_smooth_l1(relation, teacher.double().numpy(), beta)
    if scale == "softmax":
        gradient = relation * (gradient - (gradient * relation).sum(-1, keepdims=True))
    if scale == "centred":
        gradient = gradient - gradient.mean(-1, keepdims=True)
    if scale != "raw":
        gradient = gradient / np.sqrt(E if heads == "per_head" else A * E)
    gradient = np.broadcast_to(gradient, (B, A, S, S))
    assert loss.shape == ()
    assert loss.item() == pytest.approx(value, rel=1e-5)
    assert_close(query.grad, gradient @ k)
    assert_close(key.grad, np.swapaxes(gradient, -1, -2) @ q)


@pytest.mark.parametrize("heads", ["per_head", "merged"])
def test_kl_and_its_gradients_equal_a_derivation_by_hand(heads):
    query, key = randn(B, A, S, E, seed=1).requires_grad_(), randn(B, A, S, E, seed=2).requires_grad_()
    teacher = token_relation(randn(B, A, S, E, seed=3), randn(B, A, S, E, seed=4), "softmax", heads)
    loss = relation_loss(token_relation(query, key, "softmax", heads), teacher, beta=2.0, loss="kl")
    loss.backward()

    q, k, t = query.detach().double().numpy(), key.detach().double().numpy(), teacher.double().numpy()
    student = reference_relation(q, k, "softmax", heads)
    rows = student.size // S
    assert loss.item() == pytest.approx((t * (np.log(t) - np.log(student))).sum() / rows, rel=1e-5)
    gradient = (student - t) / rows / np.sqrt(E if heads == "per_head" else A * E)
    gradient = np.broadcast_to(gradient, (B, A, S, S))
    assert_close(query.grad, gradient @ k)
    assert_close(key.grad, np.swapaxes(gradient, -1, -2) @ q)


def test_kl_stays_finite_when_probabilities_underflow():
    logits = torch.tensor([[[[0.0, -300.0], [0.0, 0.0]]]]).requires_grad_()
    teacher = torch.tensor([[[[0.0, 1.0], [0.5, 0.5]]]])
    loss = relation_loss(logits.softmax(-1), teacher, beta=2.0, loss="kl")
    loss.backward()
    assert torch.isfinite(loss)
    assert loss > 40
    assert torch.isfinite(logits.grad).all()


@pytest.mark.parametrize("beta", [0.3, 2.0])
@pytest.mark.parametrize("target_norm", ["layer_norm", "none"])
def test_feature_loss_and_its_gradient_equal_a_derivation_by_hand(target_norm, beta):
    student, teacher = randn(B, S, T, seed=5).requires_grad_(), randn(B, S, T, seed=6, scale=3.0) + 4
    loss = feature_loss(student, teacher, beta, target_norm)
    loss.backward()

    target = teacher.double().numpy()
    if target_norm == "layer_norm":
        target = (target - target.mean(-1, keepdims=True)) / np.sqrt(target.var(-1, keepdims=True) + 1e-6)
    value, gradient = reference_smooth_l1(student.detach().double().numpy(), target, beta)
    assert loss.shape == ()
    assert loss.item() == pytest.approx(value, rel=1e-5)
    assert_close(student.grad, gradient)


def test_target_tokens_without_contrast_stay_finite_under_layer_norm():
    loss = feature_loss(torch.zeros(1, 2, T), torch.full((1, 2, T), 1e4), 2.0)
    assert loss == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_raw_relations_of_large_half_precision_logits_stay_finite_and_float32(dtype):
    query = torch.full((1, 1, 2, 64), 200.0, dtype=dtype)
    for context in (torch.autocast("cpu", enabled=False), torch.autocast("cpu", dtype=torch.bfloat16)):
        with context:
            relation = token_relation(query, query, "raw")
        assert relation.dtype == torch.float32
        assert (relation == 64 * 200.0**2).all()


def test_losses_are_float32_inside_whatever_comes_in_and_under_autocast():
    student, teacher = randn(B, S, T, seed=5).half(), randn(B, S, T, seed=6).half()
    expected = feature_loss(student.float(), teacher.float(), 2.0)
    relations = token_relation(randn(B, A, S, E, seed=1), randn(B, A, S, E, seed=2)).half()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = feature_loss(student, teacher, 2.0)
        related = relation_loss(relations, relations.flip(0), 2.0)
    assert ours.dtype == related.dtype == torch.float32
    assert torch.equal(ours, expected)
    assert torch.equal(related, relation_loss(relations.float(), relations.flip(0).float(), 2.0))


def test_tensors_that_would_broadcast_are_refused():
    with pytest.raises(AssertionError, match="differ in shape"):
        feature_loss(torch.zeros(2, 3, 4), torch.zeros(2, 1, 4), 2.0)
    with pytest.raises(AssertionError, match="differ in shape"):
        relation_loss(torch.zeros(2, 3, 4, 4), torch.zeros(2, 1, 4, 4), 2.0)
    with pytest.raises(AssertionError, match="differ"):
        token_relation(torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 5, 4))
