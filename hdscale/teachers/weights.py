"""Read files of weights, and fit them to a timm model."""

from __future__ import annotations

import argparse
import hashlib
import pickle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.models.eva import Eva
from timm.models.eva import checkpoint_filter_fn as convert_eva
from timm.models.vision_transformer import checkpoint_filter_fn as convert_vit
from torch import Tensor

from hdscale.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from hdscale.vit.build import ViT

_WRAPPERS = ("model", "state_dict")
# Heads, MAE's decoder and mask tokens: parts of other people's checkpoints that a teacher's features do not use.
_UNUSED = ("head", "fc_norm", "attn_pool", "decoder_", "mask_token", "pre_logits")


def read_state(path: str | Path, field: str) -> dict[str, Tensor]:
    """Read a safetensors file or a torch checkpoint without running code from it.

    `model` and `state_dict` wrappers and a `module.` prefix on all names are removed.

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
        state: Any = load_file(path) if path.suffix == ".safetensors" else _torch_load(path)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        reason = " ".join(str(error).split())[:120]
        raise UserError(f"{field}: {path} is neither a safetensors file nor a torch checkpoint: {reason}") from error
    for wrapper in _WRAPPERS:
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    if not isinstance(state, dict) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{field}: {path} must hold tensors by name, or hold them under model or state_dict")
    if all(name.startswith("module.") for name in state):
        state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    return state


def fit_state(model: ViT, state: Mapping[str, Tensor], *, source: str) -> None:
    """Load weights into a model; timm converts other layouts and interpolates position embeddings.

    Args:
        model: changed in place.
        state: tensors by name: timm's, MAE's, DeiT's, DINO's or open_clip's.
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


def _torch_load(path: Path) -> Any:
    # MAE's and DeiT's checkpoints carry their command line as a Namespace, which is plain data.
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(path, map_location="cpu", weights_only=True)


def _listed(what: str, names: Iterable[str]) -> str:
    names = list(names)
    if not names:
        return ""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{what}: {', '.join(names[:3])}{more}"
