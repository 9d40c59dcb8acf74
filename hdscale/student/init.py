"""Initial weights of the student, its decoder and its heads, by `student.init`."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hdscale.hashing import hash_int

Init = Literal["mae", "timm", "fd"]

_STD = 0.02
_KEYS = {"student": 0x73747564, "decoder": 0x6465636F}
"""Streams of their own: heads start from the seed itself, and equal draws would make equal matrices of equal shapes."""


def draw_weights(
    module: nn.Module, blocks: Iterable[nn.Module], init: Init, *, seed: int, stream: Literal["student", "decoder"]
) -> None:
    """Draw the weights of a transformer anew, in place; the caller's random state is left alone.

    Norms, layer scale and the bias of relative positions stay as they were built: 1 and 0, what the recipe says, and 0.

    Args:
        module: with all Linears, the patch embedding, and tokens, which are known by their names.
        blocks: the module's transformer blocks, in order.
        init: `timm` leaves everything as it was built.
        seed: of the weights.
        stream: what is drawn; one run's student and decoder have nothing in common.
    """
    if init == "timm":
        return
    generator = torch.Generator().manual_seed(hash_int(seed, _KEYS[stream]))
    for part in module.modules():
        if isinstance(part, nn.Linear):
            _draw_matrix(part.weight, init, generator)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
        elif isinstance(part, nn.Conv2d):
            if init == "mae":
                nn.init.xavier_uniform_(part.weight.view(len(part.weight), -1), generator=generator)
                _draw_bias(part, generator)  # that MAE's code does not touch
            else:
                _draw_as_torch(part, generator)
    for name, parameter in module.named_parameters():
        if name.endswith("_token"):
            _draw_token(parameter, init, generator)
    if init == "fd":
        _shrink_branches(blocks)


def draw_head(linear: nn.Linear, init: Init, *, seed: int) -> None:
    """Draw the weights of a Linear from student to teacher width, in place; FD's is a 1x1 convolution of PyTorch's."""
    generator = torch.Generator().manual_seed(seed)
    if init == "fd":
        _draw_as_torch(linear, generator)
        return
    if init == "timm":
        nn.init.normal_(linear.weight, std=_STD, generator=generator)
    else:
        nn.init.xavier_uniform_(linear.weight, generator=generator)
    nn.init.zeros_(linear.bias)


def _draw_matrix(weight: Tensor, init: Init, generator: torch.Generator) -> None:
    if init == "mae":
        nn.init.xavier_uniform_(weight, generator=generator)
    else:
        _draw_cut_off(weight, generator)


def _draw_token(token: Tensor, init: Init, generator: torch.Generator) -> None:
    if init == "mae":
        nn.init.normal_(token, std=_STD, generator=generator)
    else:
        _draw_cut_off(token, generator)


def _draw_cut_off(tensor: Tensor, generator: torch.Generator) -> None:
    """Draw from a normal distribution cut off at one deviation (BEiT, FD): what is left deviates by 0.54 of it."""
    nn.init.trunc_normal_(tensor, std=_STD, a=-_STD, b=_STD, generator=generator)


def _draw_as_torch(layer: nn.Linear | nn.Conv2d, generator: torch.Generator) -> None:
    """Draw what PyTorch draws when it builds a layer, from a generator of the caller's."""
    nn.init.kaiming_uniform_(layer.weight, a=math.sqrt(5), generator=generator)
    _draw_bias(layer, generator)


def _draw_bias(layer: nn.Linear | nn.Conv2d, generator: torch.Generator) -> None:
    if layer.bias is not None:
        bound = 1 / math.sqrt(layer.weight[0].numel())
        nn.init.uniform_(layer.bias, -bound, bound, generator=generator)


def _shrink_branches(blocks: Iterable[nn.Module]) -> None:
    """Divide the last Linears of attention and MLP by the root of twice their block's number, from 1 (BEiT, FD)."""
    with torch.no_grad():
        for number, block in enumerate(blocks, start=1):
            parts: Any = block
            for linear in (parts.attn.proj, parts.mlp.fc2):
                linear.weight.div_(math.sqrt(2 * number))
