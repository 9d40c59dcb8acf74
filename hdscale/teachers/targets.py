"""Both teachers and the choice of tokens: everything a student is told about one micro-batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from hdscale.config.sections import MaskConfig, RelationConfig
from hdscale.losses import token_relation
from hdscale.masking.counts import num_kept
from hdscale.masking.progressive import keep_least_redundant, progressive_keep_indices
from hdscale.masking.random import random_keep_indices
from hdscale.types import Batch, ComparedTokens, Targets, ViTOutput
from hdscale.vit.tokens import compared_tokens, other_indices, take_rows, token_rows


class TeacherPair:
    """Ask both teachers about a batch.

    Not a module: teachers are engines or modules of their own, and never part of what is trained.
    """

    def __init__(
        self,
        feature: Callable[..., ViTOutput] | None,
        relation: Callable[..., ViTOutput] | None,
        *,
        relation_config: RelationConfig,
        mask_config: MaskConfig,
        seed: int,
        num_patches: int,
        compared: ComparedTokens,
    ) -> None:
        """Take built teachers.

        Args:
            feature: `f(images, keep_indices)`: a `FrozenTeacher` or an engine around one; None: no feature term.
            relation: the same; None: no relation term. With online masks, it was built with their section.
            relation_config: how Q and K become relations.
            mask_config: which patches are kept.
            seed: of random masks.
            num_patches: N.
            compared: of which tokens relations and features are given.
        """
        self.feature = feature
        self.relation = relation
        self.relation_config = relation_config
        self.mask_config = mask_config
        self.seed = seed
        self.num_patches = num_patches
        self.compared = compared

    def __call__(self, batch: Batch) -> Targets:
        """Choose the kept patches and return what the teachers say of them."""
        with torch.no_grad():
            if self.mask_config.is_online:
                keep_indices, relations = self._masks_and_relations(batch.images)
            else:
                keep_indices = self._given_indices(batch)
                relations = self._relations(batch.images, keep_indices)
            features = None
            if self.feature is not None:
                features = self._features(self.feature(batch.images, self._feature_indices(keep_indices)))
            return Targets(keep_indices, features, relations)

    def _features(self, output: ViTOutput) -> Tensor | None:
        if not self.compared.cls_in_features:
            return output.patch_tokens
        assert output.prefix_tokens is not None
        assert output.patch_tokens is not None
        return torch.cat([output.prefix_tokens[:, :1], output.patch_tokens], dim=1)

    def _feature_indices(self, keep_indices: Tensor | None) -> Tensor | None:
        if keep_indices is None or self.compared.features_on == "all":
            return None
        return keep_indices if self.compared.features_on == "kept" else other_indices(keep_indices, self.num_patches)

    def _given_indices(self, batch: Batch) -> Tensor | None:
        mask = self.mask_config
        if mask.strategy == "none":
            return None
        if mask.strategy == "random":
            num_keep = num_kept(self.num_patches, mask.keep_ratio)
            drawn_for = batch.epochs if mask.random_per == "epoch" else batch.views
            indices = random_keep_indices(batch.sample_ids, drawn_for, self.num_patches, num_keep, self.seed)
            return indices.to(batch.images.device)
        assert batch.keep_indices is not None, "the loader reads stored masks"
        return batch.keep_indices

    def _relations(self, images: Tensor, keep_indices: Tensor | None) -> tuple[Tensor, ...]:
        if self.relation is None:
            return ()
        output = self.relation(images, keep_indices)
        num_patches = self.num_patches if keep_indices is None else keep_indices.shape[1]
        return self._related(output, num_patches)

    def _masks_and_relations(self, images: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Run the relation teacher once, for masks and for relations of the tokens they keep."""
        assert self.relation is not None, "the recipe checks this"
        kept, relations = [], []
        for output, size in grouped_forward(self.relation, images, self.mask_config.images_per_forward):
            keep_indices = choose_keep_indices(output, self.mask_config)
            kept.append(keep_indices[:size])
            if output.keep_indices is None:
                output = _at_patches(output, keep_indices, self.num_patches)
            relations.append([layer[:size] for layer in self._related(output, keep_indices.shape[1])])
        return torch.cat(kept), tuple(torch.cat(layer) for layer in zip(*relations, strict=True))

    def _related(self, output: ViTOutput, num_patches: int) -> tuple[Tensor, ...]:
        """Turn an output of `num_patches` patches into relations (B, A or 1, S, S) or tokens (B, S, T) by layer."""
        config, cls = self.relation_config, self.compared.cls_in_relation
        relations = [compared_tokens(x, x.shape[1] - num_patches, cls=cls) for x in output.layer_tokens]
        for pair in zip(output.queries, output.keys, strict=True):
            query, key = (compared_tokens(x, x.shape[2] - num_patches, cls=cls) for x in pair)
            relations.append(token_relation(query, key, config.scale, config.heads))
        return tuple(relations)


def online_keep_indices(relation: Callable[..., ViTOutput], images: Tensor, mask: MaskConfig) -> Tensor:
    """Compute the masks of any number of images (B, 3, H, W) uint8, as training would: (B, K) int64 ascending."""
    with torch.no_grad():
        outputs = grouped_forward(relation, images, mask.images_per_forward)
        return torch.cat([choose_keep_indices(output, mask)[:size] for output, size in outputs])


def choose_keep_indices(output: ViTOutput, mask: MaskConfig) -> Tensor:
    """Choose patches by the relation teacher's stage tokens (Eq. 4, or Table 8's direct mask), or as it did: (B, K)."""
    if output.keep_indices is not None:
        return output.keep_indices
    if mask.strategy == "progressive":
        return progressive_keep_indices(output.stage_tokens, mask.stage_keep_ratio)
    (tokens,) = output.stage_tokens
    return keep_least_redundant(tokens, num_kept(tokens.shape[1], mask.keep_ratio))


def grouped_forward(
    teacher: Callable[..., ViTOutput], images: Tensor, images_per_forward: int
) -> Iterator[tuple[ViTOutput, int]]:
    """Run a teacher on groups of exactly this many images; the last one is filled up with its last image.

    A matrix product rounds by its shape: in groups of one size, an image gets the same mask in any batch.

    Yields:
        The output of a group, and how many of its images are real.
    """
    for group in images.split(images_per_forward):
        size = len(group)
        if size < images_per_forward:
            group = torch.cat([group, group[-1:].expand(images_per_forward - size, -1, -1, -1)])
        yield teacher(group), size


def _at_patches(output: ViTOutput, keep_indices: Tensor, num_patches: int) -> ViTOutput:
    """Keep what relation layers say of prefix tokens and kept patches: (..., P + N, E) to (..., P + K, E)."""
    layers = {name: getattr(output, name) for name in ("queries", "keys", "layer_tokens")}
    given = [tensor for tensors in layers.values() for tensor in tensors]
    if not given:
        return output
    rows = token_rows(keep_indices, given[0].shape[-2] - num_patches)
    return output._replace(**{name: tuple(take_rows(x, rows) for x in tensors) for name, tensors in layers.items()})
