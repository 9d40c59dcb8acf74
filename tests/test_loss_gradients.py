"""Gradients of every loss variant against central differences.

The losses compute in float32 on purpose, where finite differences of them would be noise. So the differences are taken
of references written here in float64, which the losses' values are compared with first; `gradcheck` then holds the
references' own formulas to the same standard.
"""

from itertools import product

import pytest
import torch

from hdscale.losses import feature_loss, relation_loss, token_relation

B, A, S, E, T = 2, 2, 4, 3, 5
STEP = 1e-6
RELATIONS = [
    (scale, heads, loss, beta)
    for scale, heads in product(("scaled", "raw", "softmax", "centred"), ("per_head", "merged"))
    for loss, beta in (("smooth_l1", 0.1), ("smooth_l1", 2.0), ("kl", 2.0))
    if loss == "smooth_l1" or scale == "softmax"
]


def draw(*shape, seed, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    # Values that float32 holds exactly: both sides then differentiate at the same point.
    return (torch.randn(*shape, generator=generator) * scale).double()


def relation_of(query, key, scale, heads):
    product_of_heads = torch.einsum("baie,baje->baij", query, key)
    width = E
    if heads == "merged":
        product_of_heads, width = product_of_heads.sum(1, keepdim=True), A * E
    if scale == "raw":
        return product_of_heads
    logits = product_of_heads / width**0.5
    if scale == "centred":
        return logits - logits.mean(-1, keepdim=True)
    return logits if scale == "scaled" else logits.exp() / logits.exp().sum(-1, keepdim=True)


def smooth_l1(difference, beta):
    size = difference.abs()
    return torch.where(size < beta, size**2 / (2 * beta), size - beta / 2).mean()


def relation_reference(query, key, teacher, scale, heads, loss, beta):
    relation = relation_of(query, key, scale, heads)
    if loss == "smooth_l1":
        return smooth_l1(relation - teacher, beta)
    return (teacher * (teacher.log() - relation.log())).sum(-1).mean()


def feature_reference(student, teacher, beta, target_norm):
    if target_norm == "layer_norm":
        centred = teacher - teacher.mean(-1, keepdim=True)
        teacher = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    return smooth_l1(student - teacher, beta)


def central_differences(function, at):
    gradient = torch.zeros_like(at)
    for place in range(at.numel()):
        shift = torch.zeros_like(at).view(-1)
        shift[place] = STEP
        shift = shift.view_as(at)
        gradient.view(-1)[place] = (function(at + shift) - function(at - shift)) / (2 * STEP)
    return gradient


def assert_gradient(ours, function, at):
    expected = central_differences(function, at)
    assert expected.abs().max() > 0
    assert (ours.double() - expected).abs().max() <= 2e-5 * expected.abs().max()


@pytest.mark.parametrize(("scale", "heads", "loss", "beta"), RELATIONS)
def test_relation_gradients_equal_central_differences(scale, heads, loss, beta):
    query, key = draw(B, A, S, E, seed=1), draw(B, A, S, E, seed=2)
    teacher = relation_of(draw(B, A, S, E, seed=3), draw(B, A, S, E, seed=4), scale, heads).float().double()
    ours = [tensor.float().requires_grad_() for tensor in (query, key)]
    value = relation_loss(token_relation(*ours, scale, heads), teacher.float(), beta, loss)
    value.backward()

    def reference(query, key):
        return relation_reference(query, key, teacher, scale, heads, loss, beta)

    assert value.item() == pytest.approx(reference(query, key).item(), rel=1e-5, abs=1e-7)
    assert_gradient(ours[0].grad, lambda query: reference(query, key), query)
    assert_gradient(ours[1].grad, lambda key: reference(query, key), key)
    assert torch.autograd.gradcheck(reference, (query.requires_grad_(), key.requires_grad_()))


@pytest.mark.parametrize("beta", [0.3, 2.0])
@pytest.mark.parametrize("target_norm", ["layer_norm", "none"])
def test_feature_gradients_equal_central_differences(target_norm, beta):
    student, teacher = draw(B, S, T, seed=5), draw(B, S, T, seed=6, scale=3.0) + 4
    ours = student.float().requires_grad_()
    value = feature_loss(ours, teacher.float(), beta, target_norm)
    value.backward()

    def reference(student):
        return feature_reference(student, teacher, beta, target_norm)

    assert value.item() == pytest.approx(reference(student).item(), rel=1e-5)
    assert_gradient(ours.grad, reference, student)
    assert torch.autograd.gradcheck(reference, (student.requires_grad_(),))
