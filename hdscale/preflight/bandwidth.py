"""How fast ranks add up their gradients: all-reduces between machines and within them, timed by a real launch."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist

from hdscale.cluster.launcher import deepspeed_command, free_port, launch_environment

# Machines that are asked for their facts import this module, and DeepSpeed may be what is broken there.
if TYPE_CHECKING:
    from hdscale.engine.ranks import Ranks

_SIZES = (10**6, 64 * 10**6)  # bytes
_SECONDS = 1.0  # of measuring, per size
_MOST_SECONDS = 10.0  # of a single all-reduce: the larger size shrinks until it fits
_MOST_REPEATS = 50
_MARK = "hdscale-rates "
_PATIENCE = 420  # seconds: importing, meeting and measuring
_VIT_L_PARAMETERS = 303_301_632
_FP16 = 2  # bytes


class Rate(NamedTuple):
    """An all-reduce of one size among some ranks."""

    among: str
    ranks: int
    num_bytes: int
    seconds: float

    @property
    def bus_bandwidth(self) -> float:
        """GB/s that each rank's link carries, whatever the number of ranks R: 2 (R - 1) / R x bytes / seconds.

        A ring all-reduce sends and receives every byte 2 (R - 1) / R times at each rank (NCCL's tests define it so).
        """
        return 2 * (self.ranks - 1) / self.ranks * self.num_bytes / self.seconds / 1e9


def measure_all_reduce(ranks: Ranks) -> list[Rate]:
    """Time all-reduces among all ranks, among one rank per machine, and within each machine.

    Every rank calls it and gets the same list.
    """
    machines = _machines(ranks)
    sets = {"all ranks": list(range(ranks.world_size))}
    if len(machines) > 1 and len(machines) < ranks.world_size:
        sets["one rank a machine"] = [machine[0] for machine in machines]
    if len(machines) > 1:
        names = [ranks.hosts[machine[0]] or f"machine {place}" for place, machine in enumerate(machines)]
        sets |= {name: machine for name, machine in zip(names, machines, strict=True) if len(machine) > 1}
    rates: list[Rate] = []
    for among, members in sets.items():
        group: Any = dist.new_group(members)  # every rank has to call this, members or not
        mine: list[Rate] = []
        if len(members) > 1 and ranks.rank in members:
            mine = _measure(among, members, group, ranks.device)
        everyone: list[Any] = [None] * ranks.world_size
        dist.all_gather_object(everyone, mine)
        rates += [Rate(*rate) for rate in everyone[members[0]]]
    return rates


def _machines(ranks: Ranks) -> list[list[int]]:
    """Return the ranks of each machine: the launchers number them machine by machine, from local rank 0."""
    local_ranks: list[Any] = [None] * ranks.world_size
    dist.all_gather_object(local_ranks, ranks.local_rank)
    machines: list[list[int]] = []
    for rank, local_rank in enumerate(local_ranks):
        if local_rank == 0:
            machines.append([])
        machines[-1].append(rank)
    return machines


def _measure(among: str, members: Sequence[int], group: Any, device: torch.device) -> list[Rate]:
    rates: list[Rate] = []
    for size in _SIZES:
        if rates:  # bounded by what the smaller size took
            size = min(size, max(_SIZES[0], int(_SIZES[0] * _MOST_SECONDS / rates[0].seconds)))
        tensor = torch.zeros(size // 4, device=device)  # sums of sums of anything else would overflow
        dist.all_reduce(tensor, group=group)  # connects
        first = _timed(tensor, 1, group)
        repeats = torch.tensor(max(1, min(_MOST_REPEATS, int(_SECONDS / first))), device=device)
        dist.broadcast(repeats, members[0], group=group)  # clocks differ, and every rank must do the same number
        seconds = torch.tensor(_timed(tensor, int(repeats), group), device=device)
        dist.all_reduce(seconds, op=dist.ReduceOp.MAX, group=group)
        rates.append(Rate(among, len(members), size, seconds.item()))
    return rates


def _timed(tensor: torch.Tensor, repeats: int, group: Any) -> float:
    """Return the seconds of one all-reduce, the mean of some."""
    dist.barrier(group=group)
    _wait(tensor.device)
    start = time.perf_counter()
    for _ in range(repeats):
        dist.all_reduce(tensor, group=group)
    _wait(tensor.device)
    return (time.perf_counter() - start) / repeats


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def rates_line(rates: Sequence[Rate]) -> str:
    """Return the line by which the first rank reports; the launcher's own lines, and a host's name, come around it."""
    return _MARK + json.dumps(rates)


def launch_all_reduce(script: Path, hostfile: Path | None, num_devices: int) -> tuple[list[Rate], str]:
    """Measure by the real launcher: on the hostfile's machines, or on this one's devices.

    Args:
        script: `launch/preflight.py`, which measures on the ranks that it is started on.
        hostfile: None: this machine alone.
        num_devices: ranks on this machine; a hostfile says it for its own machines.

    Returns:
        The rates and nothing, or no rates and what went wrong in the launch.

    Raises:
        UserError: DeepSpeed's launcher is not installed.
    """
    num_gpus = num_devices if hostfile is None else None
    arguments = ["--all-reduce"]
    # Not quiet: of a launch that fails, the launcher's own lines may be all there is.
    command = deepspeed_command(script, arguments, port=free_port(), num_gpus=num_gpus, hostfile=hostfile, quiet=False)
    with subprocess.Popen(
        command,
        env=launch_environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            out, err = process.communicate(timeout=_PATIENCE)
        except subprocess.TimeoutExpired:
            # The launcher's own way to end its ranks on all machines.
            os.killpg(process.pid, signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.communicate(timeout=30)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            return [], (
                f"no result within {_PATIENCE} seconds; see whether the machines reach each other at all ports, and "
                "name their network in .deepspeed_env (NCCL_SOCKET_IFNAME, on CPUs GLOO_SOCKET_IFNAME)"
            )
    lines = [line for line in out.splitlines() if _MARK in line]
    if lines:
        return [Rate(*rate) for rate in json.loads(lines[-1].partition(_MARK)[2])], ""
    errors = [line for line in err.splitlines() if "error" in line.lower()] or err.splitlines()[-1:]
    return [], errors[0] if errors else f"exit code {process.returncode}, no message"


def vit_l_seconds(rate: Rate) -> float:
    """Return what ViT-L's traffic under ZeRO-2 takes per step without accumulation, at a rate among all ranks.

    With `ds_configs/zero2.json` gradients are reduced to their owners and weights all-gathered, Psi (R - 1) / R per
    rank each, with Psi the bytes of the parameters in fp16.
    """
    return 2 * _VIT_L_PARAMETERS * _FP16 * (rate.ranks - 1) / rate.ranks / (rate.bus_bandwidth * 1e9)


def render_rates(rates: Sequence[Rate]) -> str:
    """Return one line per measurement, and what it means for a training step."""
    lines = [
        f"all-reduce, {rate.among} ({rate.ranks} ranks), {rate.num_bytes / 1e6:.0f} MB: {rate.seconds * 1e3:.1f} ms, "
        f"bus bandwidth {rate.bus_bandwidth:.3g} GB/s"
        for rate in rates
    ]
    whole = [rate for rate in rates if rate.among == "all ranks"]
    if whole:
        traffic = 2 * _VIT_L_PARAMETERS * _FP16 / 1e9
        lines.append(
            f"ViT-L under ZeRO-2 in fp16 moves {traffic:.2f} GB x (R - 1) / R a rank and step: "
            f"{vit_l_seconds(whole[-1]):.2f} s at that rate, as far as the backward pass does not hide it"
        )
    return "\n".join(lines)
