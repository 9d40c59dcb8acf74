"""Does this machine run what training asks of it? Each check says what was found and, where it fails, the way out.

`quick_check` is the part that every start of training runs; `machine_facts` is all of it, which `launch/preflight.py`
prints, of this machine or, over SSH, of every machine (hdscale.engine.hosts).
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from hdscale.data.index import open_shards
from hdscale.errors import UserError
from hdscale.provenance import source_digest, versions

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

_NO_GPU = "no GPU here"
_LAST_WHEELS = {(5, 0): "12.6", (6, 0): "12.6", (6, 1): "12.6", (7, 0): "12.6"}
"""CUDA version of PyTorch's last wheel line with kernels for an architecture that the default wheels have dropped."""

_ATTENTION = (2, 16, 67, 64)  # images, heads, 66 kept tokens and the class token, width: a ViT-L student's
_ATTENTION_TOLERANCE = 0.03
"""Of the largest entry: bfloat16 keeps 8 bits, and the gradients sum over 67 tokens."""

_FREE_MEMORY = 0.9  # of the device's
_SHARED_MEMORY_A_DEVICE = 256e6
_FUSED = "memory-efficient attention"


class Check(NamedTuple):
    """One thing that was looked at."""

    name: str
    ok: bool | None
    """None: nothing to judge here, such as what a GPU can do on a machine without one."""
    found: str
    what_to_do: str = ""
    ends_training: bool = True
    """A failure that training does not survive; others make it slow."""


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


def quick_check(device: torch.device, precision: str) -> None:
    """Refuse to train on a device that would not; on a CPU there is nothing to check.

    Args:
        device: this process's own; no other is touched.
        precision: of the run, resolved or as the recipe has it.

    Raises:
        UserError: what was found and the way out.
    """
    for check in device_checks(device, precision):
        if check.ok is False and check.ends_training:
            raise UserError(f"{device}: {check.name}: {check.found}; {check.what_to_do}")


def device_checks(device: torch.device, precision: str) -> Iterator[Check]:
    """Yield what has to be true of one device, cheapest first."""
    if device.type == "cpu":
        yield from (Check(name, None, _NO_GPU) for name in ("architecture", "precision", "attention"))
        return
    with torch.cuda.device(device):
        yield check_architecture(device)
        yield check_precision(precision)
        yield check_attention(device, _dtype(precision))


def _dtype(precision: str) -> torch.dtype:
    """Return what a run computes in on the current device."""
    if precision == "fp32":
        return torch.float32
    native = torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if precision == "bf16" or (precision == "auto" and native) else torch.float16


def check_architecture(device: torch.device) -> Check:
    """Look for the device's architecture among those that this torch was built for."""
    if torch.version.hip is not None:
        return Check("architecture", None, "a ROCm build")
    capability = torch.cuda.get_device_capability(device)
    carried = torch.cuda.get_arch_list()
    wanted = f"sm_{capability[0]}{capability[1]}"
    if any(_runs_on(arch, capability) for arch in carried):
        return Check("architecture", True, wanted)
    line = _LAST_WHEELS.get(capability)
    wheels = f"CUDA {line}, the last that carry it" if line else f"a CUDA that knows {wanted}"
    return Check(
        "architecture",
        False,
        f"{torch.cuda.get_device_name(device)} is {wanted}, torch {torch.__version__} (CUDA {torch.version.cuda}) has "
        f"kernels for {' '.join(carried) or 'no GPU'}",
        f"install torch's wheels for {wheels} (README, On a cluster of V100s)",
    )


def _runs_on(arch: str, capability: tuple[int, int]) -> bool:
    """Tell whether code for an architecture runs on a device: binaries within its major version, PTX on later ones."""
    match = re.fullmatch(r"(sm|compute)_(\d+)(\d)([af]?)", arch)
    if match is None:
        return False
    built = int(match[2]), int(match[3])
    if match[4] == "a":  # of this very device
        return built == capability
    if match[1] == "sm" or match[4]:
        return built[0] == capability[0] and built[1] <= capability[1]
    return built <= capability


def check_precision(precision: str) -> Check:
    """Look whether the current device computes bfloat16 itself: a V100 says yes, and emulates it."""
    native = torch.cuda.is_bf16_supported(including_emulation=False)
    found = "bf16" if native else "fp16; bf16 only emulated"
    if precision == "bf16" and not native:
        return Check(
            "precision", False, "run.precision is bf16, which this GPU only emulates, slowly", _OTHER_PRECISION
        )
    return Check("precision", True, found)


_OTHER_PRECISION = "set run.precision to fp16 or auto"


def check_attention(
    device: torch.device, dtype: torch.dtype, backend: SDPBackend = SDPBackend.EFFICIENT_ATTENTION
) -> Check:
    """Run memory-efficient attention forward and backward, and compare it with plain attention in float32."""
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(_ATTENTION, generator=generator) for _ in range(4)]
    try:
        results = _attention(inputs, device, dtype, backend)
    except RuntimeError as error:  # torch's word for a kernel that is not there, and for whatever CUDA says
        reason = str(error).splitlines()[0]
        return Check("attention", False, f"{_FUSED} does not run: {reason}", _ATTENTION_ADVICE, False)
    references = _attention(inputs, device, torch.float32, SDPBackend.MATH)
    names = ("output", "gradient of Q", "gradient of K", "gradient of V")
    for name, result, reference in zip(names, results, references, strict=True):
        error = ((result - reference).abs().max() / reference.abs().max()).item()
        if not error <= _ATTENTION_TOLERANCE:  # NaN, too
            found = f"{_FUSED} in {dtype} gives a wrong {name} ({error:.2g} of the largest entry)"
            return Check("attention", False, found, _ATTENTION_ADVICE)
    return Check("attention", True, "forward and backward")


_ATTENTION_ADVICE = "install another torch (README, On a cluster of V100s), then run launch/preflight.py again"


def _attention(
    inputs: Sequence[torch.Tensor], device: torch.device, dtype: torch.dtype, backend: SDPBackend
) -> list[torch.Tensor]:
    """Return the output and the gradients of Q, K and V, in float32."""
    query, key, value = (x.to(device, dtype).requires_grad_() for x in inputs[:3])
    with sdpa_kernel(backend):
        output = F.scaled_dot_product_attention(query, key, value)
        output.backward(inputs[3].to(device, dtype))
    return [x.detach().float() for x in (output, query.grad, key.grad, value.grad) if x is not None]


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
    way_out = "install g++; ninja is in .venv/bin, put that on the PATH of a command over ssh"
    return Check("compiler", False, found, way_out)


def check_shared_memory(devices: int, folder: Path = Path("/dev/shm")) -> Check:
    """Look whether the loader's workers can hand over their batches; containers often come with 64 MB."""
    if not folder.is_dir():
        return Check("shared memory", None, f"no {folder}")
    free, needed = shutil.disk_usage(folder).free, devices * _SHARED_MEMORY_A_DEVICE
    found = f"{free / 1e9:.1f} GB free in {folder}"
    if free < needed:
        way_out = f"give it {needed / 1e9:.1f} GB (docker run --shm-size), or set data.workers=0"
        return Check("shared memory", False, found, way_out)
    return Check("shared memory", True, found)


def machine_facts(question: Question) -> Facts:
    """Ask this machine everything."""
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
