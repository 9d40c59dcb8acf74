"""hdscale's own weight files: safetensors that say how to build their model."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hdscale.errors import UserError
from hdscale.staging import staged


class TeacherFile(NamedTuple):
    """What a file says about its model."""

    arch: dict[str, Any]  # arguments of timm.create_model
    mean: tuple[float, ...]  # per channel, of the image in [0, 1]
    std: tuple[float, ...]
    kind: str  # how it was trained: mae, supervised, student
    state: dict[str, Tensor]  # by timm's names
    cls_in_loss: bool | None  # whether a loss has looked at the class token; None: nobody says


def save_teacher_file(
    path: str | Path,
    state: Mapping[str, Tensor],
    arch: Mapping[str, Any],
    mean: Sequence[float],
    std: Sequence[float],
    *,
    kind: str,
    cls_in_loss: bool | None = None,
) -> None:
    """Write weights that `timm.create_model(**arch).load_state_dict` takes strictly, and that can be a teacher.

    The file is staged and renamed: under its name it is whole or absent.

    Args:
        path: ends in .safetensors.
        state: tensors by timm's names.
        arch: JSON-able arguments of `timm.create_model`.
        mean: per channel, of the image in [0, 1].
        std: per channel.
        kind: how it was trained: mae, supervised, student.
        cls_in_loss: whether a loss has looked at the class token; None: there is none, or nobody knows.

    Raises:
        UserError: another suffix, which readers would take for a torch checkpoint.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise UserError(f"{path} must end in .safetensors")
    path.parent.mkdir(parents=True, exist_ok=True)
    about = {"timm": dict(arch), "mean": list(mean), "std": list(std), "kind": kind}
    if cls_in_loss is not None:
        about["cls_in_loss"] = cls_in_loss
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}
    with staged(path) as temporary:
        save_file(tensors, temporary, metadata={"hdscale": json.dumps(about, sort_keys=True), "format": "pt"})


def load_teacher_file(path: str | Path, field: str) -> TeacherFile:
    """Read a file that `save_teacher_file` wrote.

    Args:
        path: the file.
        field: the recipe's field that named it, for messages.

    Raises:
        UserError: no such file, or not such a file.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{field}: there is no file {path}; launch/pretrain_teacher.py or launch/export.py writes one")
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {})["hdscale"])
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        arch = {"model_name": about["timm"]["model_name"], **about["timm"]}
        said = tuple(about["mean"]), tuple(about["std"]), about["kind"]
        return TeacherFile(arch, *said, state, about.get("cls_in_loss"))
    except (SafetensorError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise UserError(
            f"{field}: {path} is not a file of hdscale's; for other people's weights set source to timm or open_clip"
        ) from error


def stored_normalisation(path: str | Path) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Return mean and deviation from a file that `save_teacher_file` wrote; None for other files."""
    said = _said_by(path)
    return None if said is None else (tuple(said["mean"]), tuple(said["std"]))


def class_token_in_no_loss(path: str | Path) -> bool:
    """Tell whether a file of hdscale's has a class token that no loss is known to have looked at."""
    said = _said_by(path)
    return said is not None and not said.get("cls_in_loss", False)


def _said_by(path: str | Path) -> dict[str, Any] | None:
    if Path(path).suffix != ".safetensors":
        return None
    with safe_open(path, framework="pt") as file:
        about = (file.metadata() or {}).get("hdscale")
    return None if about is None else json.loads(about)
