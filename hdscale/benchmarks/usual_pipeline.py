"""What hdscale's loader is measured against: the usual pipeline, and other libraries' decoders.

Decoders that no requirement installs take part where they are installed.
"""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torchvision
from PIL import Image
from torch import Tensor
from torchvision import transforms
from torchvision.io import ImageReadMode, decode_image
from webdataset.compat import WebDataset
from webdataset.handlers import ignore_and_continue

from hdscale.data.decode import resize_and_flip
from hdscale.data.index import ShardSet
from hdscale.data.views import ViewParameters
from hdscale.errors import UserError

Decoder = Callable[[bytes], Tensor]
ViewMaker = Callable[[bytes, ViewParameters, int], Any]

_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, which such pipelines apply to every image


def usual_pipeline(shards: ShardSet, num_images: int, img_size: int, batch_size: int) -> int:
    """Load images as people write it: webdataset, Pillow, torchvision's transforms, float32 batches.

    What it cannot read, decode or pair is passed over.

    Returns:
        The number of images, at least `num_images`.

    Raises:
        UserError: it finds no picture at all.
    """
    crop = transforms.RandomResizedCrop(img_size, (0.2, 1.0), interpolation=transforms.InterpolationMode.BICUBIC)
    flip, to_float = transforms.RandomHorizontalFlip(), transforms.ToTensor()
    transform = transforms.Compose([crop, flip, to_float, transforms.Normalize(_MEAN, _STD)])
    tars = [str(shards.folder / entry.name) for entry in shards.manifest.shards]
    samples: Any = WebDataset(tars, shardshuffle=False, empty_check=False, handler=ignore_and_continue)
    samples = samples.decode("pil", handler=ignore_and_continue).map(_picture_of).map_tuple(transform)
    count = 0
    while count < num_images:
        before = count
        for (images,) in samples.batched(batch_size):
            count += len(images)
            if count >= num_images:
                break
        if count == before:
            raise UserError(
                f"{shards.folder}: webdataset and Pillow find no picture in split {shards.split}, so that there is "
                "nothing to compare with: benchmark other shards"
            )
    return count


def _picture_of(sample: dict[str, Any]) -> tuple[Image.Image] | None:
    """Return the picture among the decoded members of a sample, whatever its extension; None drops the sample."""
    return next(((value,) for value in sample.values() if isinstance(value, Image.Image)), None)


def jpeg_decoders() -> dict[str, Decoder]:
    """Return functions from a whole JPEG's bytes to its pixels (3, H, W) uint8, by library."""
    decoders: dict[str, Decoder] = {f"torchvision {torchvision.__version__}": _by_torchvision}
    if importlib.util.find_spec("simplejpeg"):
        import simplejpeg  # pyright: ignore[reportMissingImports]

        decoders[f"simplejpeg {simplejpeg.__version__}"] = lambda data: _channels_first(simplejpeg.decode_jpeg(data))
    decoders[f"Pillow {Image.__version__}"] = lambda data: _channels_first(np.array(_open(data)))
    return decoders


def view_makers() -> dict[str, ViewMaker]:
    """Return functions from a JPEG's bytes, a box and a side to the view's pixels, by library."""
    makers: dict[str, ViewMaker] = {name: _view_maker(decode) for name, decode in jpeg_decoders().items()}
    makers[f"Pillow {Image.__version__}, resize(box=)"] = _view_by_pillow
    return makers


def _view_maker(decode: Decoder) -> ViewMaker:
    def view(data: bytes, box: ViewParameters, img_size: int) -> Tensor:
        crop = decode(data)[:, box.top : box.top + box.height, box.left : box.left + box.width]
        return resize_and_flip(crop, box.flip, img_size)

    return view


def _view_by_pillow(data: bytes, box: ViewParameters, img_size: int) -> np.ndarray:
    corners = (box.left, box.top, box.left + box.width, box.top + box.height)
    view = _open(data).resize((img_size, img_size), Image.Resampling.BICUBIC, box=corners)
    return np.array(view.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if box.flip else view)


def _open(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data)).convert("RGB")


def _by_torchvision(data: bytes) -> Tensor:
    return decode_image(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode=ImageReadMode.RGB)


def _channels_first(pixels: np.ndarray) -> Tensor:
    return torch.from_numpy(pixels).permute(2, 0, 1)  # (3, H, W)
