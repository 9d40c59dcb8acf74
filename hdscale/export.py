"""A trained student as a file that timm loads, and that can be somebody's teacher."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from hdscale.config.sections import StudentConfig
from hdscale.errors import UserError
from hdscale.student.build import STATE_PREFIX, Student, student_arch
from hdscale.student.load import load_student
from hdscale.teachers.files import save_teacher_file
from hdscale.vit.beit import to_beit


def export_student(
    weights: Mapping[str, Tensor],
    config: StudentConfig,
    img_size: int,
    output: Path,
    *,
    kind: str = "student",
    cls_in_loss: bool = False,
) -> dict[str, Any]:
    """Write the ViT of a checkpoint, without heads, decoders and mask tokens, in float32.

    `timm.create_model(**arch).load_state_dict(load_file(output), strict=True)` takes the file; mean, deviation, arch
    and whether the class token was in a loss are in its metadata. A student with `rel_pos_bias` becomes timm's Beit.

    Args:
        weights: parameters and buffers of a `Distiller`, `MaskedAutoencoder` or `SupervisedClassifier`.
        config: the recipe's `student` section.
        img_size: the recipe's `data.img_size`.
        output: ends in .safetensors.
        kind: how it was trained: student, mae, supervised.
        cls_in_loss: whether a loss has looked at the class token, if there is one.

    Returns:
        The arguments of `timm.create_model`.

    Raises:
        UserError: the weights are of another architecture, or timm cannot hold the student, or the file cannot be
            written.
    """
    student = load_student(config, img_size, weights)  # in float32, whatever the weights are
    arch = student_arch(config, img_size)
    everything = student.state_dict().items()
    state = {name.removeprefix(STATE_PREFIX): value for name, value in everything if name.startswith(STATE_PREFIX)}
    if config.rel_pos_bias:
        arch, state = to_beit(_beit_sizes(student, arch), state)
    try:
        said = cls_in_loss if student.has_cls else None
        save_teacher_file(output, state, arch, config.mean, config.std, kind=kind, cls_in_loss=said)
    except OSError as error:
        raise UserError(f"{output} cannot be written ({error.strerror}): choose another --output") from error
    return arch


def _beit_sizes(student: Student, arch: Mapping[str, Any]) -> dict[str, Any]:
    """Name all sizes: those that the student's timm name stands for are not Beit's."""
    mlp: Any = student.encoder.model.blocks[0].mlp
    sizes = {
        "patch_size": student.patch_size,
        "embed_dim": student.embed_dim,
        "depth": student.depth,
        "num_heads": student.num_heads,
        "mlp_ratio": mlp.fc1.out_features / student.embed_dim,
        "init_values": 0.0,
    }
    return {**sizes, **arch}


def loading_code(arch: Mapping[str, Any], output: Path, config: StudentConfig, *, cls_in_loss: bool = False) -> str:
    """Return the Python lines that load an exported file and read features, ready to paste.

    Args:
        arch: from `export_student`.
        output: the file.
        config: the recipe's section.
        cls_in_loss: whether a loss has looked at the class token; one that no loss saw is marked.
    """
    with torch.device("meta"):
        model: Any = timm.create_model(**arch)
    sizes = "".join(f", {name}={value!r}" for name, value in arch.items() if name != "model_name")
    tokens = "model.forward_features(images)"
    if not isinstance(model.fc_norm, nn.Identity):  # where timm would pool first, which is not what was trained
        tokens = f"model.fc_norm({tokens})"
    mark = "" if cls_in_loss else "; not trained to be read: in no loss of this run"
    readings = {"class_token": f"tokens[:, 0]  # (B, {model.embed_dim}){mark}"} if model.cls_token is not None else {}
    readings["patch_mean"] = f"tokens[:, {model.num_prefix_tokens}:].mean(dim=1)  # (B, {model.embed_dim})"
    return "\n".join(
        [
            "import timm",
            "from safetensors.torch import load_file",
            "",
            f"model = timm.create_model({arch['model_name']!r}{sizes})",
            f"model.load_state_dict(load_file({str(output)!r}), strict=True)",
            "",
            f"def features(images):  # in [0, 1], less mean {config.mean}, over deviation {config.std}",
            f"    tokens = {tokens}",
            *(f"    {name} = {code}" for name, code in readings.items()),
            f"    return {', '.join(readings)}",
        ]
    )
