"""Scikit-learn's scanned digits: real pictures without a download."""

from __future__ import annotations

import numpy as np
from PIL import Image

from hdscale.shards.sources.base import Listing
from hdscale.shards.sources.stored_picture import Picture, png_bytes


class Digits:
    """The 1,797 scanned digits of 8 x 8 pixels that scikit-learn carries; needs no network."""

    name = "digits"

    def __init__(self) -> None:
        self._images: np.ndarray | None = None  # (n, 8, 8) uint8

    def listing(self) -> Listing:
        """Name the digits by their row."""
        labels = _load_digits()[1].astype(np.int32)
        names = [f"digit-{row:04d}" for row in range(len(labels))]
        return Listing(tuple(str(digit) for digit in range(10)), names, labels, [])

    def read(self, name: str, place: None = None) -> Picture:
        """Return a digit as an 8-bit grey PNG; its 17 levels are spread over 0 .. 255."""
        del place
        if self._images is None:
            self._images = np.round(_load_digits()[0] * (255 / 16)).astype(np.uint8)
        image = Image.fromarray(self._images[int(name.removeprefix("digit-"))])
        return Picture(png_bytes(image), "png", *image.size)


def _load_digits() -> tuple[np.ndarray, np.ndarray]:
    """Return images (n, 8, 8) float64 with levels 0 .. 16, and labels (n,)."""
    from sklearn.datasets import load_digits  # takes a second to import, and only the demo needs it

    digits = load_digits()
    return digits.images, digits.target  # pyright: ignore[reportAttributeAccessIssue]
