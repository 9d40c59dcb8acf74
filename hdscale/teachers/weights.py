"""Read files of weights, and fit them to a timm model."""

from __future__ import annotations

import argparse
import hashlib
import pickle
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy
import torch
from numpy._core.multiarray import scalar as numpy_scalar
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.models.eva import Eva
from timm.models.eva import checkpoint_filter_fn as convert_eva
from timm.models.vision_transformer import checkpoint_filter_fn as convert_vit
from torch import Tensor

from hdscale.errors import UserError
from hdscale.teachers.layouts import known_layout
from hdscale.teachers.torchscript import is_torchscript, read_torchscript
from hdscale.vit.build import ViT

# What checkpoints keep weights under. DINO evaluates the teacher, a moving average of the student.
_WRAPPERS = ("model", "module", "state_dict", "teacher", "student")
# Heads, MAE's decoder and mask tokens: parts of other people's checkpoints that a teacher's features do not use.
_UNUSED = ("head", "fc_norm", "attn_pool", "decoder_", "mask_token", "masked_embed", "lm_head", "pre_logits")
# Plain data that checkpoints carry beside their weights: command lines, and DINO's learning rates.
_SAFE: list[Any] = [
    argparse.Namespace,
    numpy.dtype,
    type(numpy.dtype(numpy.float64)),
    (numpy_scalar, "numpy.core.multiarray.scalar"),
    (numpy_scalar, "numpy._core.multiarray.scalar"),
]


def read_state(path: str | Path, field: str) -> dict[str, Tensor]:
    """Read a safetensors file, a torch checkpoint or a TorchScript archive without running code from it.

    Wrappers such as `model` or `state_dict` are removed, and layouts that timm does not know are renamed.

    Args:
        path: the file.
        field: the recipe's field that named it, for messages.

    Raises:
        UserError: no such file, or not a file of tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{field}: there is no file {path}; give a file of weights")
    try:
        state: Any = _load(path, field)
    except UserError:
        raise
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        reason = " ".join(str(error).split())[:120]
        raise UserError(f"{field}: {path} is neither a safetensors file nor a torch checkpoint: {reason}") from error
    for wrapper in _WRAPPERS:
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    if not isinstance(state, dict) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{field}: {path} must hold tensors by name, or hold them under {', '.join(_WRAPPERS)}")
    return known_layout(state)


def fit_state(model: ViT, state: Mapping[str, Tensor], *, source: str) -> None:
    """Load weights into a model; timm converts other layouts and interpolates position embeddings.

    Args:
        model: changed in place.
        state: tensors by name, as `read_state` gives them.
        source: field and file, for messages.

    Raises:
        UserError: tensors are missing, left over or of another shape.
    """
    wanted = model.state_dict()
    try:
        if isinstance(model, Eva):
            found = convert_eva(dict(state), model)
        else:
            found = convert_vit(dict(state), model, adapt_layer_scale=True)
    except (RuntimeError, ValueError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"{source} does not fit the model: {reason}; name the model that the file was made with"
        ) from error
    found = {name: value for name, value in found.items() if name in wanted or not name.startswith(_UNUSED)}
    problems = [
        _listed("missing", sorted(wanted.keys() - found.keys())),
        _listed("left over", sorted(found.keys() - wanted.keys())),
        _listed(
            "of another shape",
            [
                f"{name} {tuple(found[name].shape)} for {tuple(tensor.shape)}"
                for name, tensor in wanted.items()
                if name in found and found[name].shape != tensor.shape
            ],
        ),
    ]
    if any(problems):
        reasons = "; ".join(problem for problem in problems if problem)
        raise UserError(f"{source} does not fit the model: {reasons}; name the model that the file was made with")
    model.load_state_dict(found)


def weights_digest(state: Mapping[str, Tensor]) -> str:
    """Return the sha256 of weights: sorted names, shapes and float32 values."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().to("cpu", torch.float32).contiguous()
        digest.update(f"{name} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.numpy().data)
    return digest.hexdigest()


def _load(path: Path, field: str) -> Any:
    if path.suffix == ".safetensors":
        return load_file(path)
    if is_torchscript(path):
        return read_torchscript(path, field)
    with torch.serialization.safe_globals(_SAFE):
        return torch.load(path, map_location="cpu", weights_only=True)


def _listed(what: str, names: Iterable[str]) -> str:
    names = list(names)
    if not names:
        return ""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{what}: {', '.join(names[:3])}{more}"
