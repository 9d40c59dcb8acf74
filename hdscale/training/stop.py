"""Stop on request: a signal on any rank ends the run on all ranks after the same step, with a checkpoint."""

from __future__ import annotations

import signal
from typing import Any

import torch
import torch.distributed as dist


class StopFlag:
    """Set by SIGTERM, SIGINT or SIGUSR1; shared between ranks through the CPU, so that the GPU is never waited for."""

    def __init__(self) -> None:
        self._requested = False
        self._group: Any = dist.new_group(backend="gloo") if dist.get_backend() != "gloo" else None
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, self._request)

    def _request(self, *_: Any) -> None:
        self._requested = True

    def any_rank(self) -> bool:
        """Return whether a rank was asked to stop; every rank calls this after the same step."""
        flag = torch.tensor(int(self._requested))
        dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self._group)
        return bool(flag.item())
