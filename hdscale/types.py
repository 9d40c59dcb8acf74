"""Named tuples passed between stages.

Shape letters, project-wide: B images, C H W image, N patch tokens, K kept patch tokens, P prefix tokens (class and
registers), D student width, T teacher width, A attention heads, E head width.

Named tuples, because ZeRO-3 hooks look only into tuples, lists and dicts for the tensors of a module's output.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from torch import Tensor


class BadSample(NamedTuple):
    """A sample whose picture cannot be shown, and the one that was shown in its place."""

    sample_id: int
    shown_id: int
    shard: str  # file name
    name: str  # of the picture in the shard
    reason: str


class Batch(NamedTuple):
    """One micro-batch of one rank, as the loader yields it."""

    images: Tensor  # (B, 3, H, W) uint8, RGB, already augmented
    labels: Tensor  # (B,) int64
    sample_ids: Tensor  # (B,) int64: rows of the index
    views: Tensor  # (B,) int64: the augmented view of each sample (a batch may straddle two epochs)
    epochs: Tensor  # (B,) int64: the epoch each sample belongs to
    keep_indices: Tensor | None  # (B, K) int64 ascending, when masks come from a store
    bad: tuple[BadSample, ...] = ()  # what was found bad; all other fields are of the samples shown instead


class ViTOutput(NamedTuple):
    """What one forward of a vision transformer gives; a field nobody asked for is None or empty."""

    patch_tokens: Tensor | None  # (B, N or K, T): the last block's tokens, after the chosen final stage
    queries: tuple[Tensor, ...]  # per relation layer (B, A, P + N or K, E), as the attention uses them, not yet scaled
    keys: tuple[Tensor, ...]  # per relation layer (B, A, P + N or K, E)
    stage_tokens: tuple[Tensor, ...]  # per mask layer (B, N, T) patch tokens
    layer_tokens: tuple[Tensor, ...] = ()  # per relation layer (B, P + N or K, T), where they take the place of Q and K
    keep_indices: Tensor | None = None  # (B, K) int64 ascending, of a model that drops patches between its blocks
    prefix_tokens: Tensor | None = None
    """(B, P, T): class token and registers, as `patch_tokens`, but projected only by `Outputs.project_prefix`."""
    attention_bias: Tensor | None = None  # (B or 1, A, S, S): added to scaled logits of all S tokens that blocks see


class Targets(NamedTuple):
    """What the teachers say about one micro-batch: Eq. 1 without the student. Nothing here needs a gradient."""

    keep_indices: Tensor | None  # (B, K) int64 ascending; None: the student sees all N tokens
    features: Tensor | None
    """(B, S, T): the feature teacher's tokens, not standardised: first its class token where that is compared, then the
    K, N - K or N patches of `loss.features_on`."""
    relations: tuple[Tensor, ...]
    """Per relation layer (B, A or 1, P' + K, P' + K) float32, or tokens (B, P' + K, T) where `relation.target` asks for
    them; empty without that teacher."""


class ComparedTokens(NamedTuple):
    """At which tokens student and teachers are compared."""

    cls_in_relation: bool  # relations have the class token's row and column first
    cls_in_features: bool = False  # features have the class token's row first
    features_on: Literal["kept", "hidden", "all"] = "kept"  # the patches whose features are, as `loss.features_on`


class TeacherShapes(NamedTuple):
    """What a student has to fit of its teachers."""

    feature_dim: int | None = None  # T, width of the feature teacher's tokens; None without one
    feature_has_cls: bool = False  # whether the feature teacher has a class token
    relation_heads: int | None = None  # A, attention heads of the relation teacher; None without one
    relation_dim: int | None = None  # width of the relation teacher's tokens, where `relation.target` is tokens
    relation_has_cls: bool = False  # whether the relation teacher has a class token


class LossTerms(NamedTuple):
    """Scalars of one micro-step, on the device; `total` is the only one to call backward on."""

    total: Tensor
    feature: Tensor
    relation: Tensor
