"""The digest that stands for a teacher: names, shapes and values, in the order of the names."""

import hashlib
import struct

import pytest
import torch

from hdscale.teachers.weights import weights_digest

STATE = {"b": torch.tensor([[1.0, 2.0], [3.0, 4.0]]), "a": torch.tensor([5.0, 6.0]), "c": torch.tensor([7.0, 8.0])}


def test_the_digest_is_of_names_shapes_and_float32_values_by_name():
    text = b"a (2,)\n" + struct.pack("<2f", 5, 6) + b"b (2, 2)\n" + struct.pack("<4f", 1, 2, 3, 4)
    text += b"c (2,)\n" + struct.pack("<2f", 7, 8)
    assert weights_digest(STATE) == hashlib.sha256(text).hexdigest()


@pytest.mark.parametrize(
    "change",
    [
        {"b": STATE["b"].reshape(4)},
        {"b": STATE["b"].reshape(1, 4)},
        {"b": STATE["b"].T},
        {"b": STATE["b"].flip(0)},
        {"a": STATE["c"], "c": STATE["a"]},
        {"a": torch.tensor([5.0]), "b": torch.tensor([[6.0, 1.0], [2.0, 3.0]]), "c": torch.tensor([4.0, 7.0, 8.0])},
        {"d": torch.tensor([])},
        {"c": torch.tensor([7.0, 8.0000005])},
    ],
    ids=["flat", "other_axes", "transposed", "rows", "exchanged", "other_borders", "one_more_of_none", "one_bit"],
)
def test_each_change_of_shape_order_place_or_value_changes_the_digest(change):
    assert weights_digest(STATE | change) != weights_digest(STATE)


def test_another_name_changes_the_digest():
    renamed = {("aa" if name == "a" else name): value for name, value in STATE.items()}
    assert weights_digest(renamed) != weights_digest(STATE)
    assert weights_digest({name: STATE[name] for name in "ab"}) != weights_digest(STATE)


def test_neither_the_order_of_the_dictionary_nor_strides_nor_an_exact_float_type_change_the_digest():
    assert weights_digest({name: STATE[name] for name in "cab"}) == weights_digest(STATE)
    assert weights_digest(STATE | {"b": STATE["b"].T.contiguous().T}) == weights_digest(STATE)
    assert weights_digest({name: value.bfloat16() for name, value in STATE.items()}) == weights_digest(STATE)
    grad = {name: value.clone().requires_grad_() for name, value in STATE.items()}
    assert weights_digest(grad) == weights_digest(STATE)
