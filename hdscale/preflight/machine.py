"""What a machine says of itself before training: its devices, its tools, its disks."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from hdscale.cluster.device import Check, device_checks
from hdscale.cluster.launcher import add_own_tools_to_path
from hdscale.data.index import open_shards
from hdscale.errors import UserError
from hdscale.provenance import source_digest, versions

_FREE_MEMORY = 0.9  # of the device's own
_SHARED_MEMORY_PER_DEVICE = 256e6  # bytes


class Question(NamedTuple):
    """What a run will ask of a machine."""

    precision: str = "auto"
    shards: Path | None = None
    split: str = "train"
    run_root: Path | None = None
    mark: str | None = None
    """Name of a file that the asking machine has put beside the run folders."""


class Facts(NamedTuple):
    """What a machine says of itself; it travels as JSON."""

    versions: dict[str, str]
    source: str
    devices: list[str]
    cpus: int
    shards: str | None
    """Digest of the split's index; None where it was not asked for or cannot be opened."""
    checks: list[Check]


def machine_facts(question: Question) -> Facts:
    """Ask this machine everything."""
    add_own_tools_to_path()
    devices = [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    each = [[*device_checks(device, question.precision), check_memory(device)] for device in devices] or [
        list(device_checks(torch.device("cpu"), question.precision))
    ]
    digest, checks = None, _of_all_devices(each)
    checks += [check_compiler(gpu=bool(devices)), check_shared_memory(max(1, len(devices)))]
    if question.shards is not None:
        digest, check = _check_shards(question.shards, question.split)
        checks.append(check)
    if question.run_root is not None:
        checks.append(check_run_root(question.run_root, question.mark))
    names = [torch.cuda.get_device_name(device) for device in devices]
    return Facts(versions(), source_digest(), names, _cpus(), digest, checks)


def check_memory(device: torch.device) -> Check:
    """Look whether another process holds the device's memory, as workers do that outlived their launcher."""
    free, total = torch.cuda.mem_get_info(device)
    found = f"{free / 1e9:.1f} of {total / 1e9:.1f} GB free"
    if free < _FREE_MEMORY * total:
        return Check("GPU memory", False, found, "see nvidia-smi for the process that holds it, and end it", False)
    return Check("GPU memory", True, found)


def check_compiler(*, gpu: bool) -> Check:
    """Look for what DeepSpeed compiles its ops with: collectives of CPU ranks, and Adam on the CPU."""
    missing = [tool for tool in (os.environ.get("CXX", "c++"), "ninja") if shutil.which(tool) is None]
    if not missing:
        return Check("compiler", True, "a compiler and ninja")
    found = f"no {' and no '.join(missing)} on the PATH"
    if gpu:
        return Check("compiler", None, f"{found}: only an optimizer on the CPU needs them")
    return Check("compiler", False, found, "install g++, and the packages of requirements.txt")


def check_shared_memory(devices: int, folder: Path = Path("/dev/shm")) -> Check:
    """Look whether the loader's workers can hand over their batches; containers often come with 64 MB."""
    if not folder.is_dir():
        return Check("shared memory", None, f"no {folder}")
    free, needed = shutil.disk_usage(folder).free, devices * _SHARED_MEMORY_PER_DEVICE
    found = f"{free / 1e9:.1f} GB free in {folder}"
    if free < needed:
        way_out = f"give it {needed / 1e9:.1f} GB (docker run --shm-size), or set data.workers=0"
        return Check("shared memory", False, found, way_out)
    return Check("shared memory", True, found)


def _cpus() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _of_all_devices(each: Sequence[Sequence[Check]]) -> list[Check]:
    """Return one check of each kind: the first device that fails, or the first one."""
    merged = []
    for kind in zip(*each, strict=True):
        place = next((i for i, check in enumerate(kind) if check.ok is False), None)
        check = kind[place or 0]
        merged.append(check if place is None else check._replace(found=f"cuda:{place}: {check.found}"))
    return merged


def _check_shards(folder: Path, split: str) -> tuple[str | None, Check]:
    try:
        shards = open_shards(folder, split)
    except UserError as error:
        message, _, way_out = str(error).rpartition(": ")
        return None, Check("shards", False, message, way_out)
    return shards.digest, Check("shards", True, f"{shards.num_samples} samples")


def check_run_root(root: Path, mark: str | None = None) -> Check:
    """Look whether run folders can be written, and, with the name of a mark, whether they are on the asker's disk."""
    folder = _existing(root)
    try:
        with tempfile.TemporaryFile(dir=folder):  # root may do everything, says os.access, also on a read-only disk
            pass
    except OSError as error:
        return Check("run folders", False, f"{folder} cannot be written ({error.strerror})", "set run.root")
    if mark is not None and not (folder / mark).is_file():
        found = f"{folder} is another one here"
        return Check("run folders", False, found, "put run.root on a file system that all machines share")
    return Check("run folders", True, str(folder))


@contextlib.contextmanager
def marked(root: Path) -> Iterator[str | None]:
    """Put a file beside the run folders for as long as others look for it; yield its name, None where it cannot be."""
    path = _existing(root) / f".hdscale-preflight-{secrets.token_hex(8)}"
    try:
        path.touch()
    except OSError:  # this machine's own check says so
        yield None
        return
    try:
        yield path.name
    finally:
        path.unlink()


def _existing(folder: Path) -> Path:
    """Return the folder, or the nearest of its parents that is there: the rest is made at the start."""
    folder = folder.absolute()
    return next(path for path in (folder, *folder.parents) if path.is_dir())
