"""Hybrid Distillation as one run: student engine, teacher engines, masks, training loop."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any, NamedTuple, TextIO

from torch import nn

from hdscale.cli import EXIT_DONE
from hdscale.data.loader import view_fingerprint
from hdscale.distiller import build_distiller
from hdscale.engine.ranks import distributed
from hdscale.engine.zero import build_teacher_engine, checkpoint_function, configure_checkpointing, full_state
from hdscale.errors import UserError
from hdscale.flops import DecoderSizes, HeadSizes, ViTSizes, hybrid_step_flops
from hdscale.masking.fingerprint import mask_fingerprint
from hdscale.masking.progressive import expected_num_keep, patches_by_block
from hdscale.masking.store import MaskStore
from hdscale.runs.folder import mark_done
from hdscale.student.build import student_grid_size
from hdscale.teachers.build import build_teacher, mask_stages
from hdscale.teachers.targets import TeacherPair, masks_are_online
from hdscale.teachers.weights import weights_digest
from hdscale.training.run import identify, plan_run, start_engine, train_run
from hdscale.vit.pruning import KeptQueryBlock, QueryKeyBlock, is_plain

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from torch import Tensor

    from hdscale.config.recipe import Recipe
    from hdscale.data.index import ShardSet
    from hdscale.data.samples import KeepIndices
    from hdscale.distiller import Distiller
    from hdscale.engine.ranks import Ranks
    from hdscale.engine.zero import Engine
    from hdscale.student.build import Student
    from hdscale.teachers.build import FrozenTeacher
    from hdscale.training.run import Run
    from hdscale.types import Batch, Targets

_SECTIONS = ("feature_teacher", "relation_teacher")


class Teachers(NamedTuple):
    """The frozen models of a run, on the CPU, pruned to what the run takes from them."""

    feature: FrozenTeacher | None
    relation: FrozenTeacher | None

    def named(self) -> dict[str, FrozenTeacher]:
        """Return the teachers there are, by recipe section."""
        return {name: teacher for name, teacher in zip(_SECTIONS, self, strict=True) if teacher is not None}


class Session(NamedTuple):
    """A student engine and its teachers, ready for the first step."""

    run: Run
    ranks: Ranks
    engine: Engine
    pair: TeacherPair
    hosted: dict[str, nn.Module]
    keep_indices: KeepIndices | None

    def prepare(self, batch: Batch) -> tuple[Tensor, Targets]:
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
        before = held_digests(session.hosted)
        code = train_run(
            session.run,
            session.engine,
            session.ranks,
            session.prepare,
            keep_indices=session.keep_indices,
            stream=stream,
        )
        if held_digests(session.hosted) != before:
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
    run = plan_run(recipe, ds_config, allow_change=allow_change)
    teachers = build_teachers(recipe, grid_size)
    digests = dict.fromkeys(_SECTIONS, "none")
    digests |= {name: teacher.digest for name, teacher in teachers.named().items()}
    run = identify(run, digests, allow_change)
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
    run = run._replace(flops_per_image=_flops_per_image(recipe, distiller, teachers))
    with distributed() as ranks:
        configure_checkpointing(ds_config, ranks.world_size)
        # The student's engine first: a teacher's process groups must not become its own.
        engine = start_engine(run, distiller, ranks)
        hosted = host_teachers(teachers, recipe, teacher_ds_config, run.precision, ranks)
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


def _flops_per_image(recipe: Recipe, distiller: Distiller, teachers: Teachers) -> int:
    student, mask = distiller.student, recipe.mask
    patches = student.grid_size**2
    depth = teachers.relation.depth if teachers.relation is not None else 0
    is_projected = recipe.feature_teacher is not None and recipe.feature_teacher.target == "projected"
    decoder = None
    if distiller.decoder is not None:
        decoder = DecoderSizes(len(distiller.decoder.blocks), distiller.decoder.decoder_dim)
    head = HeadSizes(
        recipe.loss.features_on,
        recipe.student.mask_tokens,
        linear=recipe.student.decoder != "identity",
        decoder=decoder,
    )
    mask_blocks = 0
    if masks_are_online(mask):
        stages = mask_stages(mask, depth)
        mask_blocks = stages.layers[-1] + (stages.at == "output")
    return hybrid_step_flops(
        _sizes(student),
        None if teachers.feature is None else _sizes(teachers.feature),
        None if teachers.relation is None else _sizes(teachers.relation),
        expected_num_keep(mask, patches, depth),
        recipe.relation.layers,
        mask_blocks,
        head=head,
        projected_dim=teachers.feature.target_dim if teachers.feature and is_projected else 0,
        relation_target=recipe.relation.target,
        block_patches=patches_by_block(mask, patches, depth),
    )


def _sizes(model: Student | FrozenTeacher) -> ViTSizes:
    blocks = model.encoder.model.blocks
    mlp = getattr(blocks[0], "mlp", None)  # a teacher of first-block relations has none left
    weights = 0 if mlp is None else sum(layer.in_features * layer.out_features for layer in _linears(mlp))
    return ViTSizes(
        model.depth,
        model.embed_dim,
        model.grid_size**2,
        model.patch_size,
        model.num_prefix_tokens,
        weights / (2 * model.embed_dim**2),
        is_plain=is_plain(blocks[-1]) or isinstance(blocks[-1], KeptQueryBlock | QueryKeyBlock),
    )


def _linears(module: nn.Module) -> list[nn.Linear]:
    return [layer for layer in module.modules() if isinstance(layer, nn.Linear)]


def build_teachers(recipe: Recipe, grid_size: int) -> Teachers:
    """Build both teachers for a student of `grid_size` x `grid_size` patches.

    The relation teacher also gives the tokens of the mask layers where masks are made in the step.
    """
    feature = relation = None
    if recipe.feature_teacher is not None:
        feature = build_teacher(recipe.feature_teacher, role="feature", grid_size=grid_size, field="feature_teacher")
    if recipe.relation_teacher is not None:
        relation = build_teacher(
            recipe.relation_teacher,
            role="relation",
            grid_size=grid_size,
            relation_layers=recipe.relation.layers,
            layer_output=recipe.relation.target,
            mask=recipe.mask if masks_are_online(recipe.mask) else None,
            field="relation_teacher",
        )
    return Teachers(feature, relation)


def open_mask_store(run: Run, teacher: FrozenTeacher | None, num_patches: int) -> MaskStore | None:
    """Open the recipe's mask store and refuse masks of other data, views, seeds, settings or teachers.

    Raises:
        UserError: naming what differs.
    """
    recipe = run.recipe
    if not recipe.mask.by_teacher or recipe.mask.source != "store":
        return None
    store = MaskStore.open(recipe.mask.store)
    expected = store_fingerprint(recipe, run.shards, run.precision, teacher)
    assert recipe.data.views != "fresh", "checked by the recipe"
    store.check(expected, recipe.data.views)
    if store.manifest.num_patches != num_patches:
        raise UserError(
            f"{store.path / 'manifest.json'}: masks of {store.manifest.num_patches} patches, the student has "
            f"{num_patches}: run launch/precompute_masks.py with mask.store=OTHER_FOLDER"
        )
    return store


def store_fingerprint(
    recipe: Recipe, shards: ShardSet, precision: str, teacher: FrozenTeacher | None
) -> dict[str, Any]:
    """Return what the recipe's stored masks must have been made from.

    Raises:
        UserError: there is no relation teacher to check them against.
    """
    if teacher is None:
        raise UserError(
            f"mask.strategy {recipe.mask.strategy} needs the relation_teacher that made the masks in "
            f"{recipe.mask.store}: name it, with loss.alpha=0 for masks alone, or set mask.strategy=none"
        )
    return mask_fingerprint(
        recipe.mask,
        teacher_digest=teacher.digest,
        teacher_normalisation=(teacher.preprocess.mean, teacher.preprocess.std),
        view_fingerprint=view_fingerprint(recipe.data, recipe.run.seed),
        index_digest=shards.digest,
        seed=recipe.run.seed,
        precision=precision,
        depth=teacher.depth,
    )


def host_teachers(
    teachers: Teachers, recipe: Recipe, ds_config: Mapping[str, Any], precision: str, ranks: Ranks
) -> dict[str, nn.Module]:
    """Place the teachers as their `sharding` says, by recipe section; the student's engine must exist already."""
    return {
        name: build_teacher_engine(
            teacher, ds_config, sharding=getattr(recipe, name).sharding, precision=precision, ranks=ranks
        )
        for name, teacher in teachers.named().items()
    }


def held_digests(hosted: Mapping[str, nn.Module]) -> dict[str, str]:
    """Gather each hosted teacher's weights and return their sha256; every rank has to call it."""
    return {name: weights_digest(full_state(teacher)) for name, teacher in hosted.items()}
