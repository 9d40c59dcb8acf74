"""Hybrid Distillation as one run: student engine, teacher engines, masks, training loop."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any, NamedTuple, TextIO

from torch import nn

from hdscale.cli import EXIT_DONE
from hdscale.distiller import build_distiller
from hdscale.engine.ranks import distributed
from hdscale.engine.zero import build_teacher_engine, checkpoint_function, configure_checkpointing, full_state
from hdscale.flops import step_flops_per_image
from hdscale.masking.store import MaskStore
from hdscale.runs.folder import mark_done
from hdscale.student.build import student_grid_size
from hdscale.teachers.build import TEACHER_SECTIONS, build_teachers
from hdscale.teachers.targets import TeacherPair
from hdscale.teachers.weights import weights_digest
from hdscale.training.loop import train_run
from hdscale.training.masks import open_mask_store
from hdscale.training.run import check_run, start_engine, with_fingerprints

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from torch import Tensor

    from hdscale.config.recipe import Recipe
    from hdscale.data.samples import MaskLookup
    from hdscale.engine.ranks import Ranks
    from hdscale.engine.zero_internals import Engine
    from hdscale.teachers.build import FrozenTeacher, Teachers
    from hdscale.training.run import Run
    from hdscale.types import Batch, Targets


class Session(NamedTuple):
    """A student engine and its teachers, ready for the first step."""

    run: Run
    ranks: Ranks
    engine: Engine
    pair: TeacherPair
    teacher_engines: dict[str, nn.Module]
    look_up_masks: MaskLookup | None

    def ask_teachers(self, batch: Batch) -> tuple[Tensor, Targets]:
        """Ask the teachers about a batch and return the engine's arguments."""
        return batch.images, self.pair(batch)


def distill(
    recipe: Recipe,
    ds_config: Mapping[str, Any],
    teacher_ds_config: Mapping[str, Any],
    *,
    allow_change: Sequence[str] = (),
    stream: TextIO | None = None,
) -> int:
    """Train the recipe's student; return the exit code.

    Args:
        recipe: resolved.
        ds_config: checked DeepSpeed config of the student.
        teacher_ds_config: the same of teachers with `sharding: zero3`.
        allow_change: what may differ from the run's earlier start.
        stream: where the first rank shows progress.

    Raises:
        UserError: before any device is taken.
        RuntimeError: a teacher's weights have changed.
    """
    with start_session(recipe, ds_config, teacher_ds_config, allow_change=allow_change) as session:
        before = teacher_digests(session.teacher_engines)
        code = train_run(
            session.run,
            session.engine,
            session.ranks,
            session.ask_teachers,
            look_up_masks=session.look_up_masks,
            stream=stream,
        )
        if teacher_digests(session.teacher_engines) != before:
            raise RuntimeError("a teacher's weights have changed during training: the run's targets cannot be trusted")
        if code == EXIT_DONE and session.ranks.is_first:
            mark_done(session.run.folder, done=True)
    return code


@contextlib.contextmanager
def start_session(
    recipe: Recipe,
    ds_config: Mapping[str, Any],
    teacher_ds_config: Mapping[str, Any],
    *,
    allow_change: Sequence[str] = (),
    open_store: Callable[[Run, FrozenTeacher | None, int], MaskStore | None] | None = None,
) -> Iterator[Session]:
    """Check a recipe, then build student and teachers on all ranks; leave the process group at the end.

    Args:
        recipe: as for `distill`, like the next three.
        ds_config: see there.
        teacher_ds_config: see there.
        allow_change: see there.
        open_store: takes run, relation teacher and number of patches; left out: `open_mask_store`.
    """
    grid_size = student_grid_size(recipe.student, recipe.data.img_size)
    # Cheap checks first: teachers may be gigabytes from the network.
    run = check_run(recipe, ds_config, allow_change=allow_change)
    teachers = build_teachers(recipe, grid_size)
    digests = dict.fromkeys(TEACHER_SECTIONS, "none")
    digests |= {name: teacher.digest for name, teacher in teachers.named().items()}
    run = with_fingerprints(run, digests, allow_change)
    store = (open_store or open_mask_store)(run, teachers.relation, grid_size**2)
    distiller = build_distiller(
        recipe.student,
        recipe.relation,
        recipe.loss,
        img_size=recipe.data.img_size,
        seed=recipe.run.seed,
        feature_dim=None if teachers.feature is None else teachers.feature.target_dim,
        relation_heads=None if teachers.relation is None else teachers.relation.num_heads,
        relation_dim=None if teachers.relation is None else teachers.relation.embed_dim,
        teacher_has_cls=teachers.relation is not None and teachers.relation.has_cls,
        checkpoint_fn=checkpoint_function(ds_config),
    )
    run = run._replace(flops_per_image=step_flops_per_image(recipe, distiller, teachers))
    with distributed() as ranks:
        configure_checkpointing(ds_config, ranks.world_size)
        # The student's engine first: a teacher's process groups must not become its own.
        engine = start_engine(run, distiller, ranks)
        hosted = build_teacher_engines(teachers, recipe, teacher_ds_config, run.precision, ranks)
        pair = TeacherPair(
            hosted.get("feature_teacher"),
            hosted.get("relation_teacher"),
            relation_config=recipe.relation,
            mask_config=recipe.mask,
            seed=recipe.run.seed,
            num_patches=grid_size**2,
            cls_in_relation=distiller.cls_in_relation,
            features_on=recipe.loss.features_on,
        )
        yield Session(run, ranks, engine, pair, hosted, None if store is None else store.keep_indices)


def build_teacher_engines(
    teachers: Teachers, recipe: Recipe, ds_config: Mapping[str, Any], precision: str, ranks: Ranks
) -> dict[str, nn.Module]:
    """Place the teachers as their `sharding` says, by recipe section; the student's engine must exist already."""
    return {
        name: build_teacher_engine(
            teacher, ds_config, sharding=getattr(recipe, name).sharding, precision=precision, ranks=ranks
        )
        for name, teacher in teachers.named().items()
    }


def teacher_digests(hosted: Mapping[str, nn.Module]) -> dict[str, str]:
    """Gather each hosted teacher's weights and return their sha256; every rank has to call it."""
    return {name: weights_digest(full_state(teacher)) for name, teacher in hosted.items()}
