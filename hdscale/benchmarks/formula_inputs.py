"""What the memory formulas ask of a session: sizes of its tensors, groups and teachers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from hdscale.benchmarks import memory_formulas as formulas
from hdscale.benchmarks.memory_formulas import Gathering, Tokens
from hdscale.engine.zero_internals import elements_of
from hdscale.training.run import Session


def teacher_counts(session: Session) -> list[tuple[list[int], Any]]:
    """Elements of each parameter of the teachers, and how each is sharded."""
    return [
        ([elements_of(parameter) for parameter in teacher.parameters()], getattr(session.run.recipe, name).sharding)
        for name, teacher in session.teacher_engines.items()
    ]


def teacher_formula(session: Session, teacher_ds_config: Mapping[str, Any]) -> int:
    """Bytes that a rank should hold of all teachers between steps."""
    threshold = gathering_of(teacher_ds_config).param_persistence_threshold
    return sum(
        formulas.teacher_bytes(
            counts,
            sharding,
            session.ranks.world_size,
            precision_of(session.run.precision),
            ranks_per_node=session.ranks.hosts.count(session.ranks.hosts[session.ranks.rank]),
            persistence_threshold=threshold,
        )
        for counts, sharding in teacher_counts(session)
    )


def tokens_of(session: Session, images: Tensor, keep_indices: Tensor | None) -> Tokens:
    """Return what of a micro-batch the student keeps activations for."""
    recipe, distiller = session.run.recipe, session.engine.module
    student = distiller.student
    patches = student.grid_size**2 if keep_indices is None else keep_indices.shape[1]
    head = distiller.head
    teacher_dim = 0 if head is None else getattr(head, "out_features", student.embed_dim)
    relations = len(recipe.relation.layers) if recipe.relation_teacher is not None else 0
    return Tokens(
        batch=len(images),
        num_tokens=patches + student.num_prefix_tokens,
        embedded_tokens=student.grid_size**2 + student.num_prefix_tokens,
        embed_dim=student.embed_dim,
        num_heads=student.num_heads,
        depth=student.depth,
        image_elements=images[0].numel(),
        teacher_dim=teacher_dim,
        num_compared=patches + distiller.cls_in_features,
        relation_tokens=patches + (student.num_prefix_tokens if distiller.cls_in_relation else 0),
        relation_layers=relations,
        # Draws by sample are there before the forward pass.
        drop_path=recipe.student.drop_path > 0 and recipe.student.drop_path_per == "rank",
    )


def gathering_of(ds_config: Mapping[str, Any]) -> Gathering:
    """Read the limits of what ZeRO-3 keeps gathered."""
    zero, plain = ds_config["zero_optimization"], Gathering()
    return Gathering(*(zero.get(f"stage3_{name}", getattr(plain, name)) for name in Gathering._fields))


def teacher_gathering_of(ds_config: Mapping[str, Any]) -> Gathering:
    """Without reuse: a pass without gradients uses each parameter once."""
    return gathering_of(ds_config)._replace(max_reuse_distance=0)


def precision_of(name: str) -> Any:
    """Return a resolved precision as the formulas take it."""
    assert name in ("fp32", "fp16", "bf16"), "resolved"
    return name
