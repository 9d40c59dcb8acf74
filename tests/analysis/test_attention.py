"""Attention statistics against loops in float64."""

import math

import numpy as np
import pytest
import torch

from hdscale.analysis.attention import (
    attention_from_qk,
    drop_prefix,
    head_distance,
    normalized_mutual_information,
)


def random_attention(batch=3, heads=2, num_tokens=12, sharpness=2.0, dtype=torch.float32):
    logits = np.random.RandomState(0).standard_normal((batch, heads, num_tokens, num_tokens)) * sharpness
    return torch.from_numpy(logits).softmax(-1).to(dtype)


def reference_distance(attention, rows, columns, patch_size):
    batch, heads, n, _ = attention.shape
    out = np.zeros(heads)
    for head in range(heads):
        for image in range(batch):
            for q in range(n):
                for k in range(n):
                    down, across = q // columns - k // columns, q % columns - k % columns
                    out[head] += attention[image, head, q, k] * patch_size * math.hypot(down, across) / n / batch
    return out


def reference_nmi(attention):
    """I(q, k) = H(q) + H(k) - H(q, k), from the joint distribution."""

    def entropy(p):
        return -sum(x * math.log(x) for x in np.ravel(p) if x > 0)

    batch, heads, n, _ = attention.shape
    out = np.zeros(heads)
    for head in range(heads):
        for image in range(batch):
            joint = attention[image, head] / n
            h_q, h_k = entropy(joint.sum(1)), entropy(joint.sum(0))
            out[head] += (h_q + h_k - entropy(joint)) / math.sqrt(h_q * h_k) / batch if h_k > 0 else 0
    return out


@pytest.mark.parametrize("sharpness", [0.01, 2.0, 40.0])
def test_head_distance_equals_loops_in_float64(sharpness):
    attention = random_attention(sharpness=sharpness)
    ours = head_distance(attention, (3, 4), 16).numpy()
    np.testing.assert_allclose(ours, reference_distance(attention.double().numpy(), 3, 4, 16), rtol=1e-6)


@pytest.mark.parametrize("sharpness", [0.01, 2.0, 40.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nmi_equals_loops_in_float64(sharpness, dtype):
    attention = random_attention(sharpness=sharpness, dtype=dtype)
    ours = normalized_mutual_information(attention).numpy()
    np.testing.assert_allclose(ours, reference_nmi(attention.double().numpy()), rtol=0, atol=1e-6)


def test_a_head_that_looks_at_its_own_place_has_distance_0_and_nmi_1():
    identity = torch.eye(9).expand(2, 1, 9, 9)
    assert head_distance(identity, 3, 16).tolist() == [0.0]
    assert normalized_mutual_information(identity).item() == pytest.approx(1, abs=1e-12)


def test_a_head_that_looks_at_one_place_has_nmi_0_not_nan():
    collapsed = torch.zeros(2, 1, 9, 9)
    collapsed[..., 4] = 1
    assert normalized_mutual_information(collapsed).tolist() == [0.0]
    assert normalized_mutual_information(collapsed * (1 + 2**-23)).item() == pytest.approx(0, abs=1e-6)
    half = torch.cat([collapsed, torch.eye(9).expand(2, 1, 9, 9)])
    assert normalized_mutual_information(half).item() == pytest.approx(0.5, abs=1e-12)


def test_a_head_that_looks_everywhere_has_nmi_0_and_the_mean_distance():
    uniform = torch.full((1, 1, 4, 4), 0.25)
    assert normalized_mutual_information(uniform).item() == pytest.approx(0, abs=1e-12)
    assert head_distance(uniform, 2, 10).item() == pytest.approx((10 + 10 + math.sqrt(200)) / 4)


def test_a_single_patch_has_no_distance_and_no_information():
    one = torch.ones(1, 2, 1, 1)
    assert head_distance(one, 1, 16).tolist() == [0.0, 0.0]
    assert normalized_mutual_information(one).tolist() == [0.0, 0.0]


def test_prefix_tokens_are_removed_and_rows_renormalised():
    attention = random_attention(num_tokens=7)
    ours = drop_prefix(attention, 2)
    rows = attention.double().numpy()[..., 2:, 2:]
    np.testing.assert_allclose(ours.numpy(), rows / rows.sum(-1, keepdims=True), rtol=1e-6)
    attention[0, 0, 3] = torch.eye(7)[0]
    assert drop_prefix(attention, 2)[0, 0, 1].tolist() == pytest.approx([0.2] * 5)


@pytest.mark.parametrize("num_prefix_tokens", [0, 1, 5])
def test_attention_from_queries_and_keys_equals_softmax_in_float64(num_prefix_tokens):
    random = np.random.RandomState(1)
    query, key = random.standard_normal((2, 2, 3, 9, 8)) * 3
    logits = query @ key.swapaxes(-1, -2) / math.sqrt(8)
    full = np.exp(logits - logits.max(-1, keepdims=True))
    patches = full[..., num_prefix_tokens:, num_prefix_tokens:]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = attention_from_qk(torch.from_numpy(query).float(), torch.from_numpy(key).float(), num_prefix_tokens)
    assert ours.dtype == torch.float32
    np.testing.assert_allclose(ours.numpy(), patches / patches.sum(-1, keepdims=True), rtol=2e-5, atol=1e-7)


def test_a_grid_that_does_not_hold_the_patches_is_refused():
    with pytest.raises(AssertionError, match="12 patches do not fill 3 x 3"):
        head_distance(random_attention(), 3, 16)
