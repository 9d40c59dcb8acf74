"""The one module DeepSpeed wraps: the student, its removable decoder and feature head, and Eq. 1.

Teachers stay outside: inside, ZeRO-3 would partition them with the student and every checkpoint would carry them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from hdscale.config.sections import LossConfig, RelationConfig, StudentConfig
from hdscale.errors import UserError
from hdscale.losses import feature_loss, relation_loss, token_relation
from hdscale.student.build import Student, build_student
from hdscale.student.decoder import TransformerDecoder, build_decoder
from hdscale.student.heads import build_head, build_layer_heads
from hdscale.types import LossTerms, Targets, TeacherShapes, ViTOutput
from hdscale.vit.tokens import compared_tokens, other_indices, take_rows, token_rows


class Distiller(nn.Module):
    """Student and feature head in, Eq. 1 out.

    Which modules run depends on what the module was built with, never on the batch or the rank: ranks that run modules
    a different number of times deadlock ZeRO-3.
    """

    def __init__(
        self,
        student: Student,
        head: nn.Module | None,
        relation: RelationConfig,
        loss: LossConfig,
        *,
        cls_in_relation: bool,
        cls_in_features: bool = False,
        layer_heads: nn.ModuleList | None = None,
        decoder: TransformerDecoder | None = None,
    ) -> None:
        """Take built parts.

        Args:
            student: gives final patch tokens, and Q and K of the relation layers when there is a relation teacher.
            head: student or decoder width to feature teacher width; None without a feature teacher.
            relation: how relations are made and compared.
            loss: weights of Eq. 1.
            cls_in_relation: the teacher's relations have the class token as their first row and column.
            cls_in_features: the teacher's features have the class token as their first row.
            layer_heads: student tokens to what `relation.target` asks for, one per relation layer; None: as they are.
            decoder: blocks before the head; None: none.
        """
        super().__init__()
        self.student = student
        self.decoder = decoder
        self.head = head
        self.relation = relation
        self.loss = loss
        self.cls_in_relation = cls_in_relation
        self.cls_in_features = cls_in_features
        self.layer_heads = layer_heads

    def forward(self, images: Tensor, targets: Targets) -> LossTerms:
        """Return Eq. 1 of one micro-batch; a teacher that was left out gives a zero term.

        Args:
            images: (B, 3, H, W) uint8.
            targets: the teachers' side; its `keep_indices` choose the student's tokens.
        """
        output = self.student(images, targets.keep_indices)
        feature = self._feature_term(output, targets)
        relation = self._relation_term(output, targets)
        return LossTerms(feature + self.loss.alpha * relation, feature, relation)

    @property
    def cls_in_loss(self) -> bool:
        """Whether a loss looks at the final class token, as one of the features or of a relation layer's tokens."""
        last = self.student.depth - 1
        is_token = self.relation.target == "features" and last in self.student.encoder.outputs.relation_layers
        return self.cls_in_features or (is_token and self.cls_in_relation)

    def _feature_term(self, output: ViTOutput, targets: Targets) -> Tensor:
        assert (self.head is None) == (targets.features is None), "head and feature teacher come together"
        assert output.patch_tokens is not None
        if self.head is None or targets.features is None:
            return torch.zeros((), device=output.patch_tokens.device)
        tokens = output.patch_tokens
        if self.decoder is not None:
            prefix, cls = output.prefix_tokens, self.cls_in_features
            tokens = self.decoder(prefix, tokens, targets.keep_indices, cls=cls)  # (B, (1) + K or N, decoder width)
        elif self.cls_in_features:
            assert output.prefix_tokens is not None
            tokens = torch.cat([output.prefix_tokens[:, :1], tokens], dim=1)
        tokens = self.head(self._compared(tokens, targets.keep_indices))  # (B, (1) + K, N - K or N, T)
        return feature_loss(tokens, targets.features, self.loss.beta, self.loss.target_norm)

    def _compared(self, tokens: Tensor, keep_indices: Tensor | None) -> Tensor:
        """Take the patches of `loss.features_on` out of all N, where there are that many, or the K kept ones.

        The class token, which comes first if it is there, always stays.
        """
        if keep_indices is None or self.loss.features_on == "all":
            return tokens
        num_cls = int(self.cls_in_features)
        num_patches = tokens.shape[1] - num_cls
        if self.loss.features_on == "hidden":
            return take_rows(tokens, token_rows(other_indices(keep_indices, num_patches), num_cls))
        return tokens if num_patches == keep_indices.shape[1] else take_rows(tokens, token_rows(keep_indices, num_cls))

    def _relation_term(self, output: ViTOutput, targets: Targets) -> Tensor:
        assert output.patch_tokens is not None
        is_relation = self.relation.target == "relation"
        terms = self._relation_terms(output, targets) if is_relation else self._token_terms(output, targets)
        assert len(terms) == len(targets.relations), "the teacher has said something about each relation layer"
        if not terms:
            return torch.zeros((), device=output.patch_tokens.device)
        return torch.stack(terms).mean()

    def _relation_terms(self, output: ViTOutput, targets: Targets) -> list[Tensor]:
        """Compare relations, layer by layer (Eq. 3)."""
        terms = []
        for query, key, target in zip(output.queries, output.keys, targets.relations, strict=True):
            query, key = self._related_tokens(query), self._related_tokens(key)
            relation = token_relation(query, key, self.relation.scale, self.relation.heads)
            terms.append(relation_loss(relation, target, self.loss.beta, self.relation.loss))
        return terms

    def _token_terms(self, output: ViTOutput, targets: Targets) -> list[Tensor]:
        """Compare the tokens of relation layers (Table 5's MSA and T)."""
        terms = []
        for place, (tokens, target) in enumerate(zip(output.layer_tokens, targets.relations, strict=True)):
            tokens = self._related_tokens(tokens)
            if self.layer_heads is not None:
                tokens = self.layer_heads[place](tokens)
            terms.append(feature_loss(tokens, target, self.loss.beta, self.loss.target_norm))
        return terms

    def _related_tokens(self, x: Tensor) -> Tensor:
        return compared_tokens(x, self.student.num_prefix_tokens, cls=self.cls_in_relation)


def compares_cls(section: RelationConfig | LossConfig, *, student_has_cls: bool, teacher_has_cls: bool) -> bool:
    """Tell whether a term compares the class token: its section asks for it, and both sides have one.

    Relations have its row and column then (TinyMIM, FD), features its row (dBOT, FD).
    """
    return section.cls == "include" and student_has_cls and teacher_has_cls


def check_heads(relation: RelationConfig, *, student_heads: int, teacher_heads: int) -> None:
    """Refuse head counts that cannot be compared head by head."""
    if (relation.target, relation.heads) == ("relation", "per_head") and student_heads != teacher_heads:
        raise UserError(
            f"relation.heads: per_head needs equal head counts, the student has {student_heads} and the relation "
            f"teacher {teacher_heads}; set relation.heads=merged, or student.num_heads={teacher_heads}"
        )


def build_distiller(
    student: StudentConfig,
    relation: RelationConfig,
    loss: LossConfig,
    *,
    img_size: int,
    seed: int,
    teachers: TeacherShapes,
    checkpoint_fn: Callable[..., Any] | None = None,
) -> Distiller:
    """Build student, decoder, head and losses for the teachers there are.

    Args:
        student: the recipe's section.
        relation: the recipe's section.
        loss: the recipe's section.
        img_size: side of the views in pixels.
        seed: of the initial weights.
        teachers: what the student has to fit.
        checkpoint_fn: `f(function, *tensors)`, which recomputes; left out: torch's, non-reentrant.

    Raises:
        UserError: no teacher at all, or head counts or widths that do not fit.
    """
    if teachers.feature_dim is None and teachers.relation_heads is None:
        raise UserError("feature_teacher and relation_teacher are both null: a student needs at least one of them")
    layers = relation.layers if teachers.relation_heads is not None else ()
    model = build_student(
        student,
        img_size,
        seed=seed,
        relation_layers=layers,
        layer_output=relation.target,
        checkpoint_fn=checkpoint_fn,
    )
    if teachers.relation_heads is not None:
        check_heads(relation, student_heads=model.num_heads, teacher_heads=teachers.relation_heads)
    head = decoder = None
    if teachers.feature_dim is not None:
        decoder = build_decoder(student, model, seed=seed)
        width = model.embed_dim if decoder is None else decoder.decoder_dim
        head = build_head(student, width, teachers.feature_dim, seed=seed)
    layer_heads = None
    if teachers.relation_heads is not None and relation.target != "relation":
        assert teachers.relation_dim is not None, "token targets have a width"
        how = {"token_head": relation.token_head, "init": student.init, "seed": seed}
        layer_heads = build_layer_heads(len(layers), model.embed_dim, teachers.relation_dim, **how)
    has = model.has_cls
    return Distiller(
        model,
        head,
        relation,
        loss,
        cls_in_relation=compares_cls(relation, student_has_cls=has, teacher_has_cls=teachers.relation_has_cls),
        cls_in_features=compares_cls(loss, student_has_cls=has, teacher_has_cls=teachers.feature_has_cls),
        layer_heads=layer_heads,
        decoder=decoder,
    )
