"""Which process this is, on which device, in which arithmetic."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
from collections.abc import Iterator
from datetime import timedelta
from typing import NamedTuple

import deepspeed
import torch
import torch.distributed as dist

from hdscale.cluster.arrival import meeting
from hdscale.cluster.device import quick_check
from hdscale.cluster.launcher import add_own_tools_to_path
from hdscale.cluster.rendezvous import Rendezvous
from hdscale.engine.zero_internals import forget_communication_backend, quiet_deepspeed, unlink_shared_memory
from hdscale.errors import UserError

_PR_SET_PDEATHSIG = 1

_COLLECTIVE_TIMEOUT = timedelta(minutes=10)

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class Ranks(NamedTuple):
    """One process among all."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    hosts: tuple[str | None, ...] = ()  # the host of each rank

    @property
    def is_first(self) -> bool:
        """Whether this process writes what is written once."""
        return self.rank == 0


@contextlib.contextmanager
def distributed() -> Iterator[Ranks]:
    """Join the process group of all ranks that have met, or make one of this process alone; leave it at the end.

    Inside another such block, this is the same group, and the outer block leaves it. Workers end with their launcher.

    Raises:
        UserError: another rank has found a mistake of the user's; the message names its host.
        LostRankError: inside, a collective has failed because another rank is gone.
    """
    global _hosts
    if dist.is_initialized():
        yield _this_process()
        return
    with meeting() as place:
        if place.launched:
            _follow_the_launcher()
        add_own_tools_to_path()
        device = _take_device()
        quick_check(device, "auto")  # what the recipe asks of the precision is checked with the recipe
        place.wait_until_ready()
        _hosts = place.hosts
        _join(place, device)
        yield _this_process()
        # Not after an exception: the others may be waiting for this rank, and leaving would wait for them.
        dist.destroy_process_group()
        forget_communication_backend()


_hosts: tuple[str | None, ...] = ()


def _take_device() -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    return device


def _join(place: Rendezvous, device: torch.device) -> None:
    quiet_deepspeed()
    on_gpu = device.type == "cuda"
    backend = "nccl" if on_gpu else "gloo"
    dist.init_process_group(
        backend,
        store=place.group_store,
        rank=place.rank,
        world_size=place.world_size,
        timeout=_COLLECTIVE_TIMEOUT,
        # With a device, later groups are split from the first communicator, which a single rank never makes.
        device_id=device if on_gpu and place.world_size > 1 else None,
    )
    deepspeed.init_distributed(backend, timeout=_COLLECTIVE_TIMEOUT, verbose=False)
    dist.barrier()
    unlink_shared_memory(place.rank)


def _follow_the_launcher() -> None:
    """Get SIGTERM when the launcher dies: DeepSpeed's, killed, leaves its workers training."""
    with contextlib.suppress(OSError, AttributeError):  # Linux only
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _this_process() -> Ranks:
    local_rank = int(os.environ["LOCAL_RANK"])
    device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    return Ranks(dist.get_rank(), dist.get_world_size(), local_rank, device, _hosts)


def resolve_precision(wanted: str, device: torch.device) -> str:
    """Turn `auto` into what the device computes natively.

    Returns:
        fp32 on a CPU; on a GPU bf16 where the hardware has it (a V100 only emulates it), else fp16.

    Raises:
        UserError: fp16 on a CPU, where DeepSpeed refuses it, or bf16 on a GPU that only emulates it.
    """
    if device.type == "cpu":
        if wanted == "fp16":
            raise UserError("run.precision fp16 needs a GPU, and none is visible; use run.precision=fp32 or auto")
        return "fp32" if wanted == "auto" else wanted
    has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    if wanted == "bf16" and not has_bf16:
        raise UserError("run.precision bf16 is emulated on this GPU, and slow; use run.precision=fp16 or auto")
    if wanted == "auto":
        return "bf16" if has_bf16 else "fp16"
    return wanted
