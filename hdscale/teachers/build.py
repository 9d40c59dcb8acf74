"""Frozen teachers by name or file."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Literal, NamedTuple, Self

import torch
from torch import Tensor, nn

from hdscale.config.recipe import Recipe, TeacherConfig
from hdscale.config.sections import MaskConfig
from hdscale.errors import UserError
from hdscale.masking.progressive import keep_share, stage_layers
from hdscale.teachers.load import load_source
from hdscale.teachers.weights import weights_digest
from hdscale.types import TeacherShapes, ViTOutput
from hdscale.vit.build import ViT, img_size, num_heads, patch_size, weight_dtype
from hdscale.vit.encoder import LayerOutput, Outputs, ViTEncoder
from hdscale.vit.preprocess import Preprocess
from hdscale.vit.rel_pos import resize_rel_pos_bias

TEACHER_SECTIONS = ("feature_teacher", "relation_teacher")
"""Sections of the recipe, in the order of the fields of `Teachers`."""


class Teachers(NamedTuple):
    """The frozen models of a run, on the CPU, pruned to what the run takes from them."""

    feature: FrozenTeacher | None
    relation: FrozenTeacher | None

    def named(self) -> dict[str, FrozenTeacher]:
        """Return the teachers there are, by recipe section."""
        return {name: teacher for name, teacher in zip(TEACHER_SECTIONS, self, strict=True) if teacher is not None}

    def shapes(self) -> TeacherShapes:
        """Return what a student has to fit."""
        return TeacherShapes(
            feature_dim=None if self.feature is None else self.feature.target_dim,
            feature_has_cls=self.feature is not None and self.feature.has_cls,
            relation_heads=None if self.relation is None else self.relation.num_heads,
            relation_dim=None if self.relation is None else self.relation.embed_dim,
            relation_has_cls=self.relation is not None and self.relation.has_cls,
        )


def build_teachers(recipe: Recipe, grid_size: int) -> Teachers:
    """Build both teachers for a student of `grid_size` x `grid_size` patches.

    The relation teacher also gives the tokens of the mask layers where masks are made in the step.
    """
    feature = relation = None
    if recipe.feature_teacher is not None:
        feature = build_teacher(
            recipe.feature_teacher, role="feature", grid_size=grid_size, cls=recipe.loss.cls == "include"
        )
    if recipe.relation_teacher is not None:
        relation = build_teacher(
            recipe.relation_teacher,
            role="relation",
            grid_size=grid_size,
            relation_layers=recipe.relation.layers,
            layer_output=recipe.relation.target,
            mask=recipe.mask if recipe.mask.is_online else None,
            field="relation_teacher",
        )
    return Teachers(feature, relation)


class FrozenTeacher(nn.Module):
    """A backbone that never trains and never leaves eval mode, with its own preprocessing."""

    def __init__(self, encoder: ViTEncoder, preprocess: Preprocess, *, depth: int, num_heads: int, digest: str) -> None:
        """Freeze an encoder.

        Args:
            encoder: possibly pruned.
            preprocess: to the model's own input size, mean and deviation.
            depth: blocks of the whole model; a pruned one may have none left.
            num_heads: attention heads of such a block.
            digest: of the whole model's weights, whatever was pruned since.
        """
        super().__init__()
        model = encoder.model
        self.encoder = encoder
        self.preprocess = preprocess
        self.depth = depth
        self.digest = digest
        self.embed_dim = int(model.embed_dim)
        self.target_dim = int(model.num_classes) if encoder.outputs.final == "projected" else self.embed_dim
        self.num_heads = num_heads
        self.num_prefix_tokens = int(model.num_prefix_tokens)
        self.has_cls = model.cls_token is not None
        self.patch_size = patch_size(model)
        self.grid_size = int(model.patch_embed.grid_size[0])
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> Self:
        """Stay in eval mode whatever the parent module asks for."""
        del mode
        return super().train(False)

    def forward(self, images: Tensor, keep_indices: Tensor | None = None) -> ViTOutput:
        """Run on all N patches.

        Args:
            images: (B, 3, H, W) uint8; resized to the teacher's input size.
            keep_indices: (B, K) int64 ascending: give Q, K and final tokens of these patches only; None: of all.
        """
        # Not inference_mode: smooth_l1_loss refuses inference tensors.
        with torch.no_grad():
            return self.encoder(self.preprocess(images, weight_dtype(self.encoder.model)), keep_indices)


def build_teacher(
    config: TeacherConfig,
    *,
    role: Literal["feature", "relation"] | None = None,
    grid_size: int | None = None,
    relation_layers: Sequence[int] = (),
    layer_output: LayerOutput = "relation",
    mask: MaskConfig | None = None,
    cls: bool = False,
    field: str = "feature_teacher",
) -> FrozenTeacher:
    """Build a frozen teacher in float32 on the CPU, pruned to what its role uses.

    Args:
        config: the recipe's section.
        role: `feature` gives final tokens, `relation` gives what relation and mask layers say and no final tokens.
            None: both, nothing pruned.
        grid_size: the student's; None: the teacher's own at `config.img_size` or its native input size.
        relation_layers: blocks that give `layer_output`, 0-indexed, negative from the end.
        layer_output: of `hdscale.vit.encoder.Outputs`; the recipe's `relation.target`.
        mask: the recipe's section, to get the tokens by which the mask's strategy chooses; None: no such tokens.
        cls: a projected target is wanted of the class token, too; a model without one leaves it out.
        field: the section's name, for messages.

    Raises:
        UserError: an unknown name, weights that are not there or do not fit, no projection to give, a grid that cannot
            be the student's, or a layer that the teacher does not have.
    """
    model, mean, std = load_source(config, field)
    _set_input_size(model, config, grid_size, field)
    depth, heads, digest = len(model.blocks), num_heads(model), weights_digest(model.state_dict())
    stages = MaskStages((), "output") if mask is None else mask_stages(mask, depth)
    final = None if role == "relation" else config.target
    project_prefix = cls and final == "projected" and model.cls_token is not None
    encoder = ViTEncoder(
        model,
        Outputs(relation_layers, layer_output, *stages, final, project_prefix),
        tokens="full",
        prune=role is not None,
        drop=partial(keep_share, keep_ratio=mask.stage_keep_ratio) if mask and mask.in_teacher == "drop" else None,
    )
    return FrozenTeacher(encoder, Preprocess(img_size(model), mean, std), depth=depth, num_heads=heads, digest=digest)


class MaskStages(NamedTuple):
    """Between which blocks of the relation teacher tokens are compared."""

    layers: tuple[int, ...]
    at: Literal["output", "input"]


def mask_stages(mask: MaskConfig, depth: int) -> MaskStages:
    """Return the blocks of a relation teacher of this depth at which a mask's strategy looks.

    Raises:
        UserError: `mask.layers` are not blocks of that teacher.
    """
    if mask.strategy == "progressive":
        return MaskStages(stage_layers(depth, mask.layers), mask.at)
    return MaskStages((depth - 1,) if mask.strategy == "direct" else (), "output")


def _set_input_size(model: ViT, config: TeacherConfig, grid_size: int | None, field: str) -> None:
    """Choose the input so that the teacher's patches are the student's; position embeddings are interpolated."""
    side = patch_size(model)
    if grid_size is None:
        wanted = config.img_size or img_size(model)
        if wanted % side:
            raise UserError(f"{field}.img_size must be a multiple of the patch size {side}, got {wanted}")
    else:
        wanted = config.img_size or grid_size * side
        if wanted != grid_size * side:
            raise UserError(
                f"{field}.img_size must be {grid_size * side}, so that patches of {side} px give the student's grid of "
                f"{grid_size} x {grid_size}, got {wanted}; or leave it out"
            )
    model.set_input_size((wanted, wanted))
    resize_rel_pos_bias(model)
