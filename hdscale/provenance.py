"""Which code runs here: versions of the packages, and a digest of hdscale's own source."""

from __future__ import annotations

import hashlib
import platform
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
"""The checkout that this process imports hdscale from."""

PACKAGES = ("torch", "torchvision", "deepspeed", "timm", "webdataset", "open_clip_torch", "numpy", "safetensors")
"""What a run's result may depend on."""

_NOT_INSTALLED = "not installed"


def versions() -> dict[str, str]:
    """Return the versions of Python and of `PACKAGES`, read from their metadata: nothing is imported."""
    return {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}}


def source_digest(root: Path = ROOT) -> str:
    """Return the sha256 of the code of `hdscale/` and `launch/`: of names and contents, not of times or order."""
    files = [*root.glob("hdscale/**/*.py"), *root.glob("launch/*.py")]
    digest = hashlib.sha256()
    for name, path in sorted((path.relative_to(root).as_posix(), path) for path in files):
        # Each part with its length or a hash of fixed length, so that no two sets of files look alike.
        digest.update(f"{len(name)} {name} ".encode() + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return _NOT_INSTALLED
