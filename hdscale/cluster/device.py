"""Does this device train? Each check says what was found and, where it fails, the way out.

`quick_check` is for every start of training; `launch/preflight.py` adds the checks of `hdscale.preflight`: of the
machine, of all machines, and of the links between them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from hdscale.errors import UserError

_NO_GPU = "no GPU here"
_LAST_WHEELS = {(5, 0): "12.6", (6, 0): "12.6", (6, 1): "12.6", (7, 0): "12.6"}
"""CUDA version of PyTorch's last wheel line with kernels for an architecture that the default wheels have dropped."""

_ATTENTION = (2, 16, 67, 64)  # images, heads, 66 kept tokens and the class token, width: a ViT-L student's
_ATTENTION_TOLERANCE = 0.03
"""Of a token's norm: bfloat16 keeps 8 bits, and the gradients sum over 67 tokens; it is off by 0.011 on a CPU."""

_FUSED = "memory-efficient attention"
_ATTENTION_ADVICE = "install another torch (README, On a cluster of V100s), then run launch/preflight.py again"
_OTHER_PRECISION = "set run.precision to fp16 or auto"


class Check(NamedTuple):
    """One thing that was looked at."""

    name: str
    ok: bool | None
    """None: nothing to judge here, such as what a GPU can do on a machine without one."""
    found: str
    what_to_do: str = ""
    ends_training: bool = True
    """A failure that training does not survive; others make it slow."""


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
        # Token by token: beside the largest entry of all, a token that is 10 % off looks like rounding.
        error = ((result - reference).norm(dim=-1) / reference.norm(dim=-1)).max().item()
        if not error <= _ATTENTION_TOLERANCE:  # NaN, too
            found = f"{_FUSED} in {dtype} gives a wrong {name} (a token is off by {error:.2g})"
            return Check("attention", False, found, _ATTENTION_ADVICE)
    return Check("attention", True, "forward and backward")


def _attention(
    inputs: Sequence[torch.Tensor], device: torch.device, dtype: torch.dtype, backend: SDPBackend
) -> list[torch.Tensor]:
    """Return the output and the gradients of Q, K and V, in float32."""
    # Copies: gradients must gather in neither the caller's tensors nor another backend's.
    query, key, value = (x.to(device, dtype, copy=True).requires_grad_() for x in inputs[:3])
    with sdpa_kernel(backend):
        output = F.scaled_dot_product_attention(query, key, value)
        output.backward(inputs[3].to(device, dtype))
    return [x.detach().float() for x in (output, query.grad, key.grad, value.grad) if x is not None]
