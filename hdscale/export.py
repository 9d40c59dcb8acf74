"""A trained student as a file that timm loads, and that can be somebody's teacher."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from hdscale.config.sections import StudentConfig
from hdscale.errors import UserError
from hdscale.student.build import STATE_PREFIX, Student, student_arch
from hdscale.student.load import load_student
from hdscale.teachers.files import save_teacher_file
from hdscale.vit.beit import to_beit


def export_student(
    weights: Mapping[str, Tensor], config: StudentConfig, img_size: int, output: Path, *, kind: str = "student"
) -> dict[str, Any]:
    """Write the ViT of a checkpoint, without heads, decoders and mask tokens, in float32.

    `timm.create_model(**arch).load_state_dict(load_file(output), strict=True)` takes the file; mean, deviation and arch
    are in its metadata. A student with `rel_pos_bias` becomes timm's Beit.

    Args:
        weights: parameters and buffers of a `Distiller`, `MaskedAutoencoder` or `SupervisedClassifier`.
        config: the recipe's `student` section.
        img_size: the recipe's `data.img_size`.
        output: ends in .safetensors.
        kind: how it was trained: student, mae, supervised.

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
        save_teacher_file(output, state, arch, config.mean, config.std, kind=kind)
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


def loading_code(arch: Mapping[str, Any], output: Path, config: StudentConfig) -> str:
    """Return the Python lines that load an exported file, ready to paste."""
    sizes = "".join(f", {name}={value!r}" for name, value in arch.items() if name != "model_name")
    return "\n".join(
        [
            "import timm",
            "from safetensors.torch import load_file",
            "",
            f"model = timm.create_model({arch['model_name']!r}{sizes})",
            f"model.load_state_dict(load_file({str(output)!r}), strict=True)",
            f"# images in [0, 1], less mean {config.mean}, over deviation {config.std}",
        ]
    )
