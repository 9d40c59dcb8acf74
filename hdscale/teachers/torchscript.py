"""Tensors of a TorchScript archive, which OpenAI's CLIP files are, read without running or compiling its code.

torch itself reads such an archive only together with its code. The tensors are in a pickle whose classes are the
archive's own modules: here they become plain objects, and every other global that is not on a short list is refused.
"""

from __future__ import annotations

import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hdscale.errors import UserError

_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


def is_torchscript(path: Path) -> bool:
    """Tell whether a file is a TorchScript archive: only those keep constants beside their data."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def read_torchscript(path: Path, field: str) -> dict[str, Tensor]:
    """Return the parameters and buffers of an archive by their dotted names.

    Args:
        path: the file.
        field: the recipe's field that named it, for messages.

    Raises:
        UserError: something in it is no module, tensor or plain value.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            (data,) = (name for name in archive.namelist() if name.endswith("/data.pkl") and name.count("/") == 1)
            with archive.open(data) as file:
                root = _Unpickler(file, archive, data.removesuffix("data.pkl")).load()
    except (pickle.UnpicklingError, zipfile.BadZipFile, RuntimeError, *_OF_A_BROKEN_PICKLE) as error:
        reason = " ".join(str(error).split())[:120]
        raise UserError(
            f"{field}: {path} is a TorchScript archive that cannot be read without running its code ({reason}); if you "
            "trust it, convert it: torch.save(torch.jit.load(PATH, 'cpu').state_dict(), 'converted.pth')"
        ) from error
    return dict(_tensors(root, ""))


_OF_A_BROKEN_PICKLE = (AttributeError, EOFError, ImportError, IndexError, KeyError, TypeError, ValueError)


class _Unpickler(pickle.Unpickler):
    """Gives a file nothing to call but what builds tensors, dictionaries and empty objects."""

    def __init__(self, file: Any, archive: zipfile.ZipFile, folder: str) -> None:
        super().__init__(file)
        self.archive = archive
        self.folder = folder
        self.module = type("Module", (), {})  # its own, in case the file changes it
        self.storages: dict[str, Tensor] = {}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _rebuild_tensor
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch.jit._pickle":  # typed lists and dictionaries
            return _first
        if module.partition(".")[0] == "__torch__":
            return self.module
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")

    def persistent_load(self, pid: Any) -> Tensor:
        _, dtype, key, *_ = pid
        if key not in self.storages:
            content = bytearray(self.archive.read(f"{self.folder}data/{key}"))
            self.storages[key] = torch.frombuffer(content, dtype=dtype) if content else torch.empty(0, dtype=dtype)
        return self.storages[key]


def _rebuild_tensor(storage: Tensor, offset: int, size: Sequence[int], stride: Sequence[int], *_: Any) -> Tensor:
    return storage.as_strided(tuple(size), tuple(stride), offset)


def _first(value: Any, *_: Any) -> Any:
    return value


def _tensors(module: Any, prefix: str) -> Iterator[tuple[str, Tensor]]:
    for name, value in vars(module).items():
        if isinstance(value, Tensor):
            yield prefix + name, value
        elif type(value) is type(module):
            yield from _tensors(value, f"{prefix}{name}.")
