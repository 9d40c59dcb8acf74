"""From the loader's uint8 pixels to what one model wants to see."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


class Preprocess:
    """Resize to a model's input size and normalise with its mean and deviation, on the images' device.

    Not a module: as buffers, mean and deviation would be rounded by `.half()` and saved with every checkpoint.
    """

    def __init__(self, img_size: int, mean: Sequence[float], std: Sequence[float]) -> None:
        """Remember what the model expects.

        Args:
            img_size: side of the square the model is fed, in pixels.
            mean: per channel, of the image in [0, 1].
            std: per channel.
        """
        self.img_size = img_size
        self.mean = tuple(float(value) for value in mean)
        self.std = tuple(float(value) for value in std)
        self._constants: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def __call__(self, images: Tensor, dtype: torch.dtype) -> Tensor:
        """Normalise in float32 and round once, at the end.

        Args:
            images: (B, 3, H, W) uint8.
            dtype: of the result.

        Returns:
            (B, 3, img_size, img_size). Another size is reached by antialiased bicubic interpolation.
        """
        mean, std = self._on(images.device)
        # Channels outermost again, as models compute: another layout may choose another kernel, and other last digits.
        pixels = images.to(torch.float32, memory_format=torch.contiguous_format)
        if images.shape[-2:] != (self.img_size, self.img_size):
            size = (self.img_size, self.img_size)
            pixels = F.interpolate(pixels, size=size, mode="bicubic", antialias=True, align_corners=False)
            pixels = pixels.clamp(0, 255)  # bicubic overshoots at edges
        return ((pixels / 255 - mean) / std).to(dtype)

    def _on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Copy the constants to a device once: a copy in every step would wait for the device."""
        if device not in self._constants:
            mean = torch.tensor(self.mean, dtype=torch.float32, device=device).view(3, 1, 1)
            std = torch.tensor(self.std, dtype=torch.float32, device=device).view(3, 1, 1)
            self._constants[device] = (mean, std)
        return self._constants[device]
