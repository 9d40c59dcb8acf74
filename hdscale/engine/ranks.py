"""Which process this is, on which device, in which arithmetic. Only `engine/` knows the rank."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
from datetime import timedelta
from typing import TYPE_CHECKING, NamedTuple

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils.logging import set_log_level_from_string

from hdscale.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Iterator

_PR_SET_PDEATHSIG = 1

_RENDEZVOUS_TIMEOUT = timedelta(minutes=10)

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class Ranks(NamedTuple):
    """One process among all."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        """Whether this process writes what is written once."""
        return self.rank == 0


@contextlib.contextmanager
def distributed() -> Iterator[Ranks]:
    """Join the process group that the launcher described, or make one of this process alone; leave it at the end.

    Inside another such block, this is the same group, and the outer block leaves it. Workers end with their launcher.
    """
    if dist.is_initialized():
        yield _this_process()
        return
    if "RANK" in os.environ:
        _follow_the_launcher()
    else:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    set_log_level_from_string("warning")  # a run has its own log; DeepSpeed's repeats its configuration on every rank
    deepspeed.init_distributed("nccl" if cuda else "gloo", timeout=_RENDEZVOUS_TIMEOUT, verbose=False)
    yield _this_process()
    # Not after an exception: the others may be waiting for this rank, and leaving would wait for them.
    dist.destroy_process_group()


def _follow_the_launcher() -> None:
    """Get SIGTERM when the launcher dies: DeepSpeed's, killed, leaves its workers training."""
    with contextlib.suppress(OSError, AttributeError):  # Linux only
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _this_process() -> Ranks:
    local_rank = int(os.environ["LOCAL_RANK"])
    device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    return Ranks(dist.get_rank(), dist.get_world_size(), local_rank, device)


def resolve_precision(wanted: str, device: torch.device) -> str:
    """Turn `auto` into what the device computes natively.

    Returns:
        fp32 on a CPU; on a GPU bf16 where the hardware has it (a V100 only emulates it), else fp16.

    Raises:
        UserError: fp16 on a CPU, where DeepSpeed refuses it.
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
