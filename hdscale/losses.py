"""The two losses of Eq. 1: pure functions, float32 inside whatever comes in, weights applied by the caller."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

TARGET_EPS = 1e-6
"""Added to a target token's variance before it is standardised (dBOT)."""


def token_relation(
    query: Tensor,
    key: Tensor,
    scale: Literal["scaled", "raw", "softmax", "centred"] = "scaled",
    heads: Literal["per_head", "merged"] = "per_head",
) -> Tensor:
    """Relate every token to every other: R = QK^T (Eq. 2).

    Args:
        query: (B, A, S, E) of S tokens, prefix tokens included or not, any floating type.
        key: (B, A, S, E).
        scale: `raw` is QK^T itself, `scaled` divides it by the root of the summed width, `softmax` then normalises each
            row (TinyMIM), and `centred` takes off each row's mean instead: a constant along a row changes no attention.
        heads: `merged` sums QK^T over the heads, which is the product over the full width A * E.

    Returns:
        (B, A, S, S), or (B, 1, S, S) when merged, float32.
    """
    assert query.shape == key.shape, f"query {tuple(query.shape)} and key {tuple(key.shape)} differ"
    with torch.autocast(query.device.type, enabled=False):
        query, key = query.float(), key.float()  # before the product: raw logits overflow float16
        if heads == "merged":
            query = query.transpose(1, 2).flatten(2).unsqueeze(1)  # (B, 1, S, A * E)
            key = key.transpose(1, 2).flatten(2).unsqueeze(1)  # (B, 1, S, A * E)
        if scale != "raw":
            query = query / math.sqrt(query.shape[-1])
        relation = query @ key.transpose(-2, -1)  # (B, A or 1, S, S)
        if scale == "centred":
            return relation - relation.mean(dim=-1, keepdim=True)
        return relation.softmax(dim=-1) if scale == "softmax" else relation


def relation_loss(
    student_relation: Tensor,
    teacher_relation: Tensor,
    beta: float,
    loss: Literal["smooth_l1", "kl"] = "smooth_l1",
) -> Tensor:
    """Compare the relations of one layer (Eq. 3).

    Args:
        student_relation: (B, A or 1, S, S) from `token_relation`.
        teacher_relation: (B, A or 1, S, S).
        beta: where smooth L1 turns from square to line; `kl` does not use it.
        loss: `smooth_l1`, the mean over all entries; `kl`, KL(teacher || student) of relations under softmax, the mean
            over rows (TinyMIM).

    Returns:
        A float32 scalar.
    """
    assert student_relation.shape == teacher_relation.shape, (
        f"student {tuple(student_relation.shape)} and teacher {tuple(teacher_relation.shape)} relations differ in shape"
    )
    with torch.autocast(student_relation.device.type, enabled=False):
        student, teacher = student_relation.float(), teacher_relation.float()
        if loss == "smooth_l1":
            return F.smooth_l1_loss(student, teacher, beta=beta)
        # A probability that underflowed to 0 would make the logarithm, and with it the whole loss, infinite.
        log_student = student.clamp_min(torch.finfo(torch.float32).tiny).log()
        return F.kl_div(log_student, teacher, reduction="none").sum(dim=-1).mean()


def feature_loss(
    student_tokens: Tensor,
    teacher_tokens: Tensor,
    beta: float,
    target_norm: Literal["layer_norm", "none"] = "layer_norm",
) -> Tensor:
    """Compare last-layer tokens (the first term of Eq. 1).

    Args:
        student_tokens: (B, S, T) of S tokens, the class token included or not, already in the teacher's width.
        teacher_tokens: (B, S, T), as the teacher gives them.
        beta: where smooth L1 turns from square to line.
        target_norm: `layer_norm` standardises each teacher token first, without affine parameters (dBOT, FD).

    Returns:
        A float32 scalar: smooth L1, the mean over all entries.
    """
    assert student_tokens.shape == teacher_tokens.shape, (
        f"student {tuple(student_tokens.shape)} and teacher {tuple(teacher_tokens.shape)} tokens differ in shape"
    )
    with torch.autocast(student_tokens.device.type, enabled=False):
        student, teacher = student_tokens.float(), teacher_tokens.float()
        if target_norm == "layer_norm":
            teacher = F.layer_norm(teacher, teacher.shape[-1:], eps=TARGET_EPS)
        return F.smooth_l1_loss(student, teacher, beta=beta)
