"""The two sides of every held-out measurement: training samples to learn from, held-out samples to judge by."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from hdscale.config.sections import DataConfig, EvaluationConfig
from hdscale.data.index import ShardSet, open_shards, require_labels
from hdscale.data.loader import SequentialLoader
from hdscale.data.manifest import manifest_path
from hdscale.errors import UserError

_BATCH_SIZE = 32


class HeldOut(NamedTuple):
    """Both sides, in central views without augmentation; iterate as often as needed."""

    train: SequentialLoader
    val: SequentialLoader
    num_train: int
    num_val: int
    img_size: int  # side of the views in pixels


def open_held_out(data: DataConfig, evaluation: EvaluationConfig, *, train_samples: int | None = None) -> HeldOut:
    """Open `data.split` and `evaluation.split`.

    Args:
        data: what is trained on, and the size of its views.
        evaluation: names the split that is held out.
        train_samples: take only the first so many training samples (shards are shuffled when they are made).

    Raises:
        UserError: train_samples below 1, no held-out split, it is the one that is trained on, or samples lack labels.
    """
    if train_samples is not None and train_samples < 1:
        raise UserError(f"--train-samples must be at least 1, got {train_samples}: leave it out for all")
    folder = Path(data.shards)
    if evaluation.split == data.split:
        raise UserError(
            f"evaluation.split must be another split than data.split, got {data.split} for both: samples would find "
            "themselves as neighbours"
        )
    train = open_shards(folder, data.split)
    if not manifest_path(folder, evaluation.split).is_file():
        raise UserError(
            f"{manifest_path(folder, evaluation.split)} is missing, evaluation needs held-out samples: make the shards "
            "with data_tools/make_shards.py --val-fraction 0.1, or name another split in evaluation.split"
        )
    val = open_shards(folder, evaluation.split)
    for shards in (train, val):
        require_labels(shards, "k-NN")
    num_train = min(train.num_samples, train_samples or train.num_samples)
    return HeldOut(
        _loader(train, data, num_train), _loader(val, data, val.num_samples), num_train, val.num_samples, data.img_size
    )


def _loader(shards: ShardSet, data: DataConfig, count: int) -> SequentialLoader:
    return SequentialLoader(shards, data, 0, sample_ids=range(count), view=None, batch_size=_BATCH_SIZE)
