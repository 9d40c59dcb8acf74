"""What decides a mask: everything that must be equal before stored masks may be used."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from hdscale.config.sections import MaskConfig
from hdscale.masking.progressive import stage_layers


def mask_fingerprint(
    mask: MaskConfig,
    *,
    teacher_digest: str,
    teacher_normalisation: tuple[Sequence[float], Sequence[float]],
    view_fingerprint: dict[str, Any],
    index_digest: str,
    seed: int,
    precision: str,
    depth: int,
) -> dict[str, Any]:
    """Name each part that decides a mask, in the words of error messages.

    Args:
        mask: the recipe's section; only the fields its strategy uses count.
        teacher_digest: sha256 of the relation teacher's weights.
        teacher_normalisation: mean and deviation of the images it is fed: of equal weights, names may differ in them.
        view_fingerprint: what decides the pixels of an augmented view, by name.
        index_digest: sha256 of the shards' index.
        seed: the run's seed.
        precision: the teacher's arithmetic: masks of bf16 and fp32 teachers differ.
        depth: blocks of the relation teacher.

    Returns:
        Plain JSON values by name.
    """
    parts: dict[str, Any] = {
        "relation teacher's weights": teacher_digest,
        "relation teacher's mean and deviation": teacher_normalisation,
        "relation teacher's precision": precision,
        "index of the shards": index_digest,
        "run.seed": seed,
        "mask.strategy": mask.strategy,
        "mask.images_per_forward": mask.images_per_forward,
    }
    if mask.strategy == "progressive":
        parts["mask.stage_keep_ratio"] = mask.stage_keep_ratio
        parts["mask.layers"] = stage_layers(depth, mask.layers)
        parts["mask.at"] = mask.at
        if mask.in_teacher != "full":  # stores that are older than this field know no other
            parts["mask.in_teacher"] = mask.in_teacher
    else:
        parts["mask.keep_ratio"] = mask.keep_ratio
    parts.update({f"view {name}": value for name, value in view_fingerprint.items()})
    return json.loads(json.dumps(parts))  # as a manifest gives it back: lists for tuples
