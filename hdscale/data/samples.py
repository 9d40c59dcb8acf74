"""From sample ids to the tensors of a batch; a bad sample is replaced by another, the same one everywhere."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import numpy as np
import torch
from torch import Tensor

from hdscale.config.sections import DataConfig
from hdscale.data.decode import decode_view
from hdscale.data.index import ShardSet
from hdscale.data.pictures import BadPicture
from hdscale.data.views import central_square, view_parameters
from hdscale.errors import UserError
from hdscale.hashing import hash_int
from hdscale.types import BadSample, Batch

MaskLookup = Callable[[np.ndarray, np.ndarray], np.ndarray | Tensor]
"""Takes sample ids (B,) and their views (B,), returns the ascending indices (B, K) of the tokens that are kept."""

EVAL_VIEW = -1
"""`Batch.views` of samples that are shown without augmentation."""

_SUBSTITUTES = 10  # tried for a bad sample
_SUBSTITUTE_KEY = 0x737562  # "sub": separates this hash from the others


def load_batch(
    shards: ShardSet,
    config: DataConfig,
    seed: int,
    sample_ids: np.ndarray,
    views: np.ndarray,
    epochs: np.ndarray,
    look_up_masks: MaskLookup | None = None,
) -> Batch | UserError:
    """Read, decode and cut the samples of one batch and look their masks up.

    Args:
        shards: where they are read.
        config: how views are cut, and the size of the result.
        seed: `run.seed`.
        sample_ids: (B,) rows of the index; a bad one is replaced by `substitute`.
        views: (B,) augmented views, or EVAL_VIEW.
        epochs: (B,) handed on.
        look_up_masks: asked for the samples that are shown, substitutes among them.

    Returns:
        The batch; or a user's error, unraised: an exception that leaves a worker process is wrapped into a traceback of
        many lines, a value is not.
    """
    shown_ids, bad = np.array(sample_ids), []
    shape = (len(sample_ids), 3, config.img_size, config.img_size)
    images = torch.empty(shape, dtype=torch.uint8, memory_format=torch.channels_last)  # as views come
    shards.prefetch(sample_ids)
    try:
        for place, (sample_id, view) in enumerate(zip(sample_ids.tolist(), views.tolist(), strict=True)):
            images[place], shown_ids[place], found = _show(shards, config, seed, sample_id, view)
            bad += found
        kept = None if look_up_masks is None else torch.as_tensor(look_up_masks(shown_ids, views))
    except UserError as error:
        return error
    return Batch(
        images=images,
        labels=torch.from_numpy(shards.index["label"][shown_ids].astype(np.int64)),
        sample_ids=torch.from_numpy(shown_ids),
        views=torch.from_numpy(views),
        epochs=torch.from_numpy(epochs),
        keep_indices=kept,
        bad=tuple(bad),
    )


def _show(
    shards: ShardSet, config: DataConfig, seed: int, sample_id: int, view: int
) -> tuple[Tensor, int, list[BadSample]]:
    """Return a sample in one view, or another one in its place; which one that was; and all that were bad."""
    bad: dict[int, str] = {}
    candidate = sample_id
    for attempt in range(1, _SUBSTITUTES + 2):
        try:
            image = _image(shards, config, seed, candidate, view)
        except BadPicture as error:
            bad[candidate] = str(error)
            candidate = substitute(sample_id, attempt, shards.num_samples)
        else:
            return image, candidate, [BadSample(i, candidate, *shards.locate(i), bad[i]) for i in bad]
    shard, name = shards.locate(sample_id)
    raise UserError(
        f"{shards.folder / shard}: {name} (sample {sample_id}) {bad[sample_id]}, and none of {_SUBSTITUTES} others can "
        f"be shown in its place: check the disk, and run {_verify(shards)}"
    )


def substitute(sample_id: int, attempt: int, num_samples: int) -> int:
    """Return the sample that takes the place of a bad one: the same on every rank and in every run.

    Args:
        sample_id: the bad one.
        attempt: 1 for the first substitute, one more each time that a substitute turns out bad.
        num_samples: rows of the index.
    """
    return hash_int(_SUBSTITUTE_KEY, sample_id, attempt) % num_samples


def _image(shards: ShardSet, config: DataConfig, seed: int, sample_id: int, view: int) -> Tensor:
    """Return one sample in one view, (3, img_size, img_size) uint8."""
    record = shards.index[sample_id]
    width, height = size = int(record["width"]), int(record["height"])
    if view == EVAL_VIEW:
        parameters = central_square(width, height)
    else:
        scale, ratio = config.crop_scale, config.crop_ratio
        parameters = view_parameters(seed, view, sample_id, width, height, scale=scale, ratio=ratio, hflip=config.hflip)
    return decode_view(shards.read(sample_id), size, parameters, config.img_size)


def too_many_bad(
    known: Collection[int], new: Sequence[BadSample], shards: ShardSet, config: DataConfig
) -> UserError | None:
    """Say what ends the work, when new bad samples bring their share above `data.max_bad_fraction`.

    Args:
        known: ids of all that were found so far.
        new: what was found just now.
        shards: the split.
        config: holds the fraction.

    Returns:
        An error to be raised, naming the last one; None while there are few enough, or no new ones.
    """
    allowed = int(config.max_bad_fraction * shards.num_samples)
    if not new or len(known) <= allowed:
        return None
    last = new[-1]
    return UserError(
        f"{shards.folder}: {len(known)} samples of split {shards.split} are bad, data.max_bad_fraction "
        f"{config.max_bad_fraction} allows {allowed} (the last: {last.shard}: {last.name} {last.reason}): list them "
        f"with {_verify(shards)}, mend them, or raise the fraction"
    )


def _verify(shards: ShardSet) -> str:
    return f"data_tools/verify_shards.py --shards {shards.folder} --split {shards.split}"
