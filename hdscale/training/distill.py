"""Hybrid Distillation as one run: what is checked, what is built, what DeepSpeed takes over, and the loop."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TextIO

from torch import Tensor, nn

from hdscale.cli import EXIT_DONE
from hdscale.config.recipe import Recipe
from hdscale.data.samples import MaskLookup
from hdscale.distiller import Distiller, build_distiller
from hdscale.engine.ranks import Ranks, distributed
from hdscale.engine.zero import build_teacher_engine, checkpoint_function, configure_checkpointing, full_state
from hdscale.flops import flops_over_one_teacher, step_flops_per_image
from hdscale.masking.store import MaskStore
from hdscale.runs.folder import mark_done
from hdscale.student.build import student_grid_size
from hdscale.teachers.build import TEACHER_SECTIONS, FrozenTeacher, Teachers, build_teachers
from hdscale.teachers.files import class_token_in_no_loss
from hdscale.teachers.targets import TeacherPair
from hdscale.teachers.weights import weights_digest
from hdscale.training.loop import train_run
from hdscale.training.masks import open_mask_store
from hdscale.training.run import Run, Session, check_run, start_engine, with_fingerprints
from hdscale.types import Batch, ComparedTokens, Targets


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
        teacher_ds_config: the same of teachers with `sharding: zero3` or `node`.
        allow_change: what may differ from the run's earlier start.
        stream: where the first rank shows progress.

    Raises:
        UserError: before any device is taken.
        RuntimeError: a teacher's weights have changed.
    """
    run = check_run(recipe, ds_config, allow_change)  # cheap checks first: teachers may be gigabytes from the network
    models = build_models(run)
    with distributed() as ranks:
        note = note_on_class_token(recipe, models)
        if note is not None and stream is not None and ranks.is_first:
            print(note, file=stream, flush=True)
        session = start(run, models, ranks, teacher_ds_config)
        before = teacher_digests(session.teacher_engines)
        code = train_run(session, stream)
        if teacher_digests(session.teacher_engines) != before:
            raise RuntimeError("a teacher's weights have changed during training: the run's targets cannot be trusted")
        if code == EXIT_DONE and ranks.is_first:
            mark_done(run.folder, done=True)
    return code


class Models(NamedTuple):
    """What a run trains and whom it asks, built on the CPU."""

    distiller: Distiller
    teachers: Teachers
    look_up_masks: MaskLookup | None  # None: masks are made in the step, or there are none
    flops_per_image: float  # of one training step
    flops_over_one_teacher: float | None  # against the feature teacher alone; None where a teacher is missing


def build_models(
    run: Run, open_store: Callable[[Run, FrozenTeacher | None, int], MaskStore | None] = open_mask_store
) -> Models:
    """Build student, losses and teachers, and open the mask store; no device is taken, no rank is asked.

    Args:
        run: checked.
        open_store: takes run, relation teacher and number of patches; `open_mask_store`, or what stands for it.

    Raises:
        UserError: a teacher cannot be built, or is not the checkpoint's; masks are of another teacher or other data.
    """
    recipe = run.recipe
    grid_size = student_grid_size(recipe.student, recipe.data.img_size)
    teachers = build_teachers(recipe, grid_size)
    with_fingerprints(run, _fingerprints(teachers))
    store = open_store(run, teachers.relation, grid_size**2)
    distiller = build_distiller(
        recipe.student,
        recipe.relation,
        recipe.loss,
        img_size=recipe.data.img_size,
        seed=recipe.run.seed,
        teachers=teachers.shapes(),
        checkpoint_fn=checkpoint_function(run.ds_config),
    )
    return Models(
        distiller,
        teachers,
        None if store is None else store.keep_indices,
        step_flops_per_image(recipe, distiller, teachers),
        flops_over_one_teacher(recipe, distiller, teachers),
    )


def note_on_class_token(recipe: Recipe, models: Models) -> str | None:
    """Say who lacks the class token that `loss.cls` asks for, or that nothing has trained it; None: all is as asked."""
    config = recipe.feature_teacher
    if recipe.loss.cls == "exclude" or config is None:
        return None
    if models.distiller.cls_in_features:
        if config.source != "file" or not class_token_in_no_loss(config.weights):
            return None
        return (
            f"loss.cls include: no loss has looked at the class token of {config.weights}; loss.cls=exclude compares "
            "patches only"
        )
    who = "the feature teacher" if models.distiller.student.has_cls else "the student"
    return f"loss.cls include: {who} has no class token, features are compared at patches only"


def start(run: Run, models: Models, ranks: Ranks, teacher_ds_config: Mapping[str, Any]) -> Session:
    """Hand the models over to DeepSpeed on all ranks.

    Args:
        run: checked.
        models: of that run, whole on the CPU.
        ranks: this process.
        teacher_ds_config: checked DeepSpeed config of teachers with `sharding: zero3` or `node`.
    """
    recipe, distiller = run.recipe, models.distiller
    run = with_fingerprints(run, _fingerprints(models.teachers))
    configure_checkpointing(run.ds_config, ranks.world_size)
    # The student's engine first: a teacher's process groups must not become its own.
    engine = start_engine(run, distiller, ranks)
    teacher_engines = build_teacher_engines(models.teachers, recipe, teacher_ds_config, run.precision, ranks)
    pair = TeacherPair(
        teacher_engines.get("feature_teacher"),
        teacher_engines.get("relation_teacher"),
        relation_config=recipe.relation,
        mask_config=recipe.mask,
        seed=recipe.run.seed,
        num_patches=distiller.student.grid_size**2,
        compared=ComparedTokens(distiller.cls_in_relation, distiller.cls_in_features, recipe.loss.features_on),
    )

    def ask_teachers(batch: Batch) -> tuple[Tensor, Targets]:
        return batch.images, pair(batch)

    return Session(
        run,
        ranks,
        engine,
        ask_teachers,
        models.look_up_masks,
        models.flops_per_image,
        teacher_engines,
        models.flops_over_one_teacher,
    )


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


def teacher_digests(teacher_engines: Mapping[str, nn.Module]) -> dict[str, str]:
    """Gather each placed teacher's weights and return their sha256; every rank has to call it."""
    return {name: weights_digest(full_state(teacher)) for name, teacher in teacher_engines.items()}


def _fingerprints(teachers: Teachers) -> dict[str, str]:
    """Return what a resume compares of the teachers, by recipe section."""
    return dict.fromkeys(TEACHER_SECTIONS, "none") | {name: one.digest for name, one in teachers.named().items()}
