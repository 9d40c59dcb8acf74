"""What a view of a sample looks like: a pure function of (seed, view, sample id), so that masks can be made ahead."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from hdscale.config.sections import DataConfig
from hdscale.hashing import extend_hash, hash_int, uniform_int

_VIEW_KEY = 0x76696577  # "view": separates this use of the seed from the others
_TRIES = 10
_DRAWS_PER_TRY = 4
VIEW_ALGORITHM = 1
"""Version of `view_parameters`: raise it whenever the same arguments give another box."""


class ViewParameters(NamedTuple):
    """A crop box in pixels of the stored picture, and whether the crop is then flipped left to right."""

    left: int
    top: int
    width: int
    height: int
    flip: bool


def view_parameters(
    seed: int,
    view: int,
    sample_id: int,
    width: int,
    height: int,
    *,
    scale: tuple[float, float] = (0.2, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    hflip: float = 0.5,
) -> ViewParameters:
    """Choose the crop and the flip of one view, with the semantics of torchvision's RandomResizedCrop.

    Args:
        seed: `run.seed`.
        view: number of the augmented view.
        sample_id: row of the index.
        width: of the stored picture, in pixels, at least 1.
        height: of the stored picture, in pixels, at least 1.
        scale: smallest and largest share of the picture's area.
        ratio: smallest and largest width over height.
        hflip: probability of a flip.
    """
    state = hash_int(seed, _VIEW_KEY, view, sample_id)

    def draw(number: int) -> float:
        return uniform_int(extend_hash(state, number))

    flip = draw(_TRIES * _DRAWS_PER_TRY) < hflip
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for start in range(0, _TRIES * _DRAWS_PER_TRY, _DRAWS_PER_TRY):
        area_draw, ratio_draw, top_draw, left_draw = map(draw, range(start, start + _DRAWS_PER_TRY))
        area = width * height * (scale[0] + (scale[1] - scale[0]) * area_draw)
        aspect = math.exp(low + (high - low) * ratio_draw)
        crop_width, crop_height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            left = int(left_draw * (width - crop_width + 1))
            top = int(top_draw * (height - crop_height + 1))
            return ViewParameters(left, top, crop_width, crop_height, flip)
    crop_width, crop_height = _central_size(width, height, ratio)
    return ViewParameters((width - crop_width) // 2, (height - crop_height) // 2, crop_width, crop_height, flip)


def central_square(width: int, height: int) -> ViewParameters:
    """Return the view of held-out samples; cropping before resizing bounds the memory of a long, thin picture."""
    side = min(width, height)
    return ViewParameters((width - side) // 2, (height - side) // 2, side, side, flip=False)


def _central_size(width: int, height: int, ratio: tuple[float, float]) -> tuple[int, int]:
    """Return the largest box whose shape is allowed: what a long, thin picture gets."""
    if width / height < ratio[0]:
        return width, min(height, max(1, round(width / ratio[0])))
    if width / height > ratio[1]:
        return min(width, max(1, round(height * ratio[1]))), height
    return width, height


def view_number(config: DataConfig, epochs: np.ndarray) -> np.ndarray:
    """Return the view that each epoch shows: e mod `views`, or a new one every epoch when `views` is fresh."""
    return epochs.copy() if config.views == "fresh" else epochs % config.views
