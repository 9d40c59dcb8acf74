"""Train a teacher: a masked autoencoder or a supervised classifier, in the same loop as the student."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TextIO

from torch import nn

from hdscale.cli import EXIT_DONE
from hdscale.config.recipe import Recipe
from hdscale.data.index import require_labels
from hdscale.engine.ranks import distributed
from hdscale.errors import UserError
from hdscale.export import export_student
from hdscale.pretraining import MaskedAutoencoder, SupervisedClassifier, mae_keep_indices
from hdscale.runs.checkpoint import WEIGHT, Checkpoint, require_checkpoint
from hdscale.runs.folder import mark_done
from hdscale.student.build import build_student
from hdscale.training.loop import train_run
from hdscale.training.run import Session, check_run, start_engine, with_fingerprints
from hdscale.types import Batch

ENCODER_FILE = "encoder.safetensors"
"""In the run folder: what a recipe's teacher section names as `weights`."""


def pretrain(
    recipe: Recipe,
    method: str,
    ds_config: Mapping[str, Any],
    *,
    allow_change: Sequence[str] = (),
    stream: TextIO | None = None,
) -> int:
    """Train the recipe's `student` architecture as a teacher; return the exit code.

    Args:
        recipe: `student`, `data`, `optim`, `schedule` and `pretrain` count.
        method: `mae` (75 % of the patches hidden, decoder thrown away) or `supervised`.
        ds_config: checked DeepSpeed config.
        allow_change: what may differ from the run's earlier start.
        stream: where the first rank shows progress.
    """
    run = check_run(recipe, ds_config, allow_change, check_checkpoint=_refuse_earlier_decoder)
    run = with_fingerprints(run, {"method": method})
    if method == "supervised":
        require_labels(run.shards, "--method supervised")
    module, engine_arguments = _build(recipe, method, len(run.shards.classes))
    with distributed() as ranks:
        session = Session(run, ranks, start_engine(run, module, ranks), engine_arguments)
        code = train_run(session, stream)
        if code == EXIT_DONE and ranks.is_first:
            state = require_checkpoint(run.folder).module_state()
            export_student(state, recipe.student, recipe.data.img_size, run.folder / ENCODER_FILE, kind=method)
            mark_done(run.folder, done=True)
    return code


def _refuse_earlier_decoder(checkpoint: Checkpoint) -> None:
    """Refuse the MAE of a version whose decoder got patch tokens alone and held the pixels' Linear itself."""
    if "decoder.pixels.weight" in checkpoint.names(WEIGHT):
        raise UserError(
            f"{checkpoint.path}: this MAE is of an earlier version, whose decoder lacks the class token, and cannot go "
            "on: choose another run.name, or move the folder away (its encoder.safetensors, if it has one, stays good "
            "as a teacher)"
        )


def _build(recipe: Recipe, method: str, num_classes: int) -> tuple[nn.Module, Callable[[Batch], tuple[Any, ...]]]:
    """Return what is trained, and what turns a batch into its arguments."""
    seed = recipe.run.seed
    if recipe.student.mask_tokens == "encoder":
        raise UserError(f"student.mask_tokens must be none for method {method}, got encoder: it has masks of its own")
    if recipe.log.gradient_norms_every:
        raise UserError(
            f"log.gradient_norms_every must be 0 for method {method}, got {recipe.log.gradient_norms_every}: it "
            "measures the two terms of a distilled student's loss"
        )
    encoder = build_student(recipe.student, recipe.data.img_size, seed=seed)
    if method == "supervised":
        classifier = SupervisedClassifier(encoder, num_classes, recipe.pretrain, seed=seed)
        return classifier, lambda batch: (batch.images, batch.labels)
    num_patches = encoder.grid_size**2
    autoencoder = MaskedAutoencoder(encoder, recipe.pretrain, seed=seed)
    ratio = recipe.pretrain.mask_ratio
    return autoencoder, lambda batch: (batch.images, mae_keep_indices(batch, num_patches, ratio, seed))
