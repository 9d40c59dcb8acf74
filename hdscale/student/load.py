"""A trained student and its decoder, built again from a recipe and a checkpoint's weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from hdscale.config.sections import StudentConfig
from hdscale.errors import UserError
from hdscale.student.build import Student, build_student
from hdscale.student.decoder import TransformerDecoder, build_decoder

_STUDENT_NAMES = ("student", "encoder")
"""What the wrapped modules call the ViT they train: here, and in hdscale.pretraining."""


def load_student(config: StudentConfig, img_size: int, weights: Mapping[str, Tensor]) -> Student:
    """Rebuild a trained student in eval mode, without its head.

    Args:
        config: as it was trained.
        img_size: side of the views in pixels, as it was trained.
        weights: of a `Distiller`, or of a model of hdscale.pretraining, whose encoder is a student as well.

    Raises:
        UserError: the weights are of another architecture.
    """
    student = build_student(config, img_size, seed=0)
    _load(student, weights, _STUDENT_NAMES)
    return student.eval()


def load_decoder(config: StudentConfig, student: Student, weights: Mapping[str, Tensor]) -> TransformerDecoder | None:
    """Rebuild the decoder that a student was trained with, in eval mode; None where it had none.

    Args:
        config: as it was trained.
        student: from `load_student`.
        weights: of a `Distiller`.

    Raises:
        UserError: the weights are of another architecture.
    """
    decoder = build_decoder(config, student, seed=0)
    if decoder is None or not any(name.startswith("decoder.") for name in weights):
        return None
    _load(decoder, weights, ("decoder",))
    return decoder.eval()


def _load(module: nn.Module, weights: Mapping[str, Tensor], names: Sequence[str]) -> None:
    """Load the weights of whatever was called so in the module that was trained."""
    own = {name.partition(".")[2]: tensor for name, tensor in weights.items() if name.partition(".")[0] in names}
    try:
        module.load_state_dict(own, strict=True)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"the checkpoint does not fit student.* and data.img_size of its recipe.yaml, put the original recipe "
            f"back: {reason}"
        ) from error
