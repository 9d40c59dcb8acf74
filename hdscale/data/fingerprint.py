"""What a stored mask or a resumed run may rely on: everything that decides a view's pixels."""

from __future__ import annotations

from hdscale.config.sections import DataConfig
from hdscale.data.decode import INTERPOLATION, decoder_version
from hdscale.data.views import VIEW_ALGORITHM


def view_fingerprint(config: DataConfig, seed: int) -> dict[str, object]:
    """Name everything that decides a view's pixels, for stores that were made from views.

    The number of views is left out: view 0 of two is view 0 of four.
    """
    return {
        "seed": seed,
        "img_size": config.img_size,
        "crop_scale": list(config.crop_scale),
        "crop_ratio": list(config.crop_ratio),
        "hflip": config.hflip,
        "interpolation": INTERPOLATION,
        "view_algorithm": VIEW_ALGORITHM,
        "decoder": decoder_version(),
    }
