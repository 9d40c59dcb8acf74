"""Measure candidates on held-out samples: their features, their k-NN accuracy, their attention layer by layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TextIO

import torch
from torch import Tensor

from hdscale.analysis.curves import AttentionCurves, attention_curves
from hdscale.config.sections import EvaluationConfig
from hdscale.evaluation.accuracy import Accuracy
from hdscale.evaluation.candidates import Candidate, Role
from hdscale.evaluation.held_out import HeldOut
from hdscale.evaluation.knn import Features, extract_features, knn_accuracy, pooled, raw_pixels
from hdscale.progress import Progress
from hdscale.student.build import Student
from hdscale.student.decoder import TransformerDecoder
from hdscale.teachers.build import FrozenTeacher
from hdscale.types import ViTOutput
from hdscale.vit.build import weight_dtype
from hdscale.vit.encoder import Outputs, ViTEncoder


class SummaryRow(NamedTuple):
    """One row of the summary."""

    name: str
    role: Role
    knn: Accuracy
    curves: AttentionCurves | None  # of every layer; None without attention
    images_per_second: float | None


def held_out_features(candidate: Candidate, held_out: HeldOut, device: torch.device, stream: TextIO | None) -> Features:
    """Take mean-pooled patch tokens, or pixels, of both sides.

    Args:
        candidate: moved to the device.
        held_out: both sides.
        device: where the model runs.
        stream: where to show progress.
    """
    model = None if candidate.model is None else candidate.model.to(device).eval()

    def encode(images: Tensor) -> Tensor:
        if model is None:
            return raw_pixels(images)
        tokens = model(images.to(device)).patch_tokens
        assert tokens is not None
        return pooled(tokens)

    with Progress(f"features, {candidate.name}", held_out.num_train + held_out.num_val, "images", stream) as progress:
        train = extract_features(encode, held_out.train, progress)
        val = extract_features(encode, held_out.val, progress)
    return Features(*train, *val)


def measure_attention(
    candidate: Candidate, held_out: HeldOut, num_images: int, device: torch.device
) -> AttentionCurves | None:
    """Compute head distance and NMI of every layer and head over held-out images; None without attention.

    Distances are in pixels of the view, whatever size a teacher is fed: teachers have their student's grid.

    Args:
        candidate: moved to the device.
        held_out: its held-out side is used.
        num_images: how many.
        device: where the model runs.
    """
    model = candidate.model
    if model is None:
        return None
    model.to(device).eval()
    # Around the same blocks: features need no Q and K, attention needs no final norm.
    encoder = ViTEncoder(model.encoder.model, Outputs(range(model.depth), final=None), tokens="full").eval()

    def encode(images: Tensor) -> ViTOutput:
        return encoder(model.preprocess(images.to(device), weight_dtype(encoder.model)))

    return _curves(encode, model, held_out, num_images)


def measure_decoder_attention(
    student: Student, decoder: TransformerDecoder, held_out: HeldOut, num_images: int, device: torch.device
) -> AttentionCurves:
    """Compute head distance and NMI of every layer and head of a student's decoder (Figures 2(b) and 3(a)).

    No patch is masked.

    Args:
        student: moved to the device.
        decoder: that it was trained with; moved to the device, too.
        held_out: its held-out side is used.
        num_images: how many.
        device: where the models run.
    """
    student.to(device).eval()
    decoder.to(device).eval()

    def encode(images: Tensor) -> ViTOutput:
        output = student(images.to(device))
        assert output.prefix_tokens is not None
        assert output.patch_tokens is not None
        queries, keys = decoder.queries_and_keys(output.prefix_tokens, output.patch_tokens)
        return output._replace(queries=queries, keys=keys, attention_bias=None)

    return _curves(encode, student, held_out, num_images)


def _curves(
    encode: Callable[[Tensor], ViTOutput], model: Student | FrozenTeacher, held_out: HeldOut, num_images: int
) -> AttentionCurves:
    return attention_curves(
        encode,
        held_out.val,
        num_images=num_images,
        num_prefix_tokens=model.num_prefix_tokens,
        grid_size=model.grid_size,
        patch_size=held_out.img_size // model.grid_size,
    )


def measure(
    candidate: Candidate, held_out: HeldOut, evaluation: EvaluationConfig, device: torch.device, stream: TextIO | None
) -> SummaryRow:
    """Fill one row of the summary: k-NN accuracy of mean-pooled tokens or pixels, head distance and NMI of every layer.

    Args:
        candidate: moved to the device.
        held_out: both sides for k-NN, the held-out one for attention.
        evaluation: `neighbors` and `attention_images`.
        device: where the model runs.
        stream: where to show progress.
    """
    knn = knn_accuracy(*held_out_features(candidate, held_out, device, stream), evaluation.neighbors)
    curves = measure_attention(candidate, held_out, evaluation.attention_images, device)
    return SummaryRow(candidate.name, candidate.role, knn, curves, candidate.images_per_second)
