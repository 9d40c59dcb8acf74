"""Move a DeepSpeed engine's state to and from tensors by parameter name, whatever the ZeRO stage and world size."""

from __future__ import annotations

from typing import Any

import torch
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import Tensor

from hdscale.engine.zero_internals import (
    Engine,
    elements_of,
    is_sharded,
    moments_by_partition,
    own_share,
    read_loss_scaler,
    write_loss_scaler,
)
from hdscale.runs.checkpoint import BUFFER, MOMENTS, WEIGHT, Checkpoint


def gather_shard(engine: Engine, rank: int, world_size: int) -> dict[str, Tensor]:
    """Collect this rank's share of all parameters and moments; every rank has to call it.

    Returns:
        `KIND/NAME` to float32 on the CPU: each parameter belongs to exactly one rank, balanced by size.
    """
    parameters = dict(engine.module.named_parameters())
    owners = _owners({name: elements_of(parameter) for name, parameter in parameters.items()}, world_size)
    shard: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        for kind in (WEIGHT, *MOMENTS):
            # One parameter at a time, so that no rank ever holds the whole model twice.
            full = _full(parameter, kind)
            if owners[name] == rank:
                shard[f"{kind}/{name}"] = full.detach().to("cpu", torch.float32, copy=True).contiguous()
    if rank == 0:
        persistent = engine.module.state_dict().keys() - parameters.keys()
        for name, buffer in engine.module.named_buffers():
            if name in persistent:
                shard[f"{BUFFER}/{name}"] = buffer.detach().to("cpu", torch.float32, copy=True).contiguous()
    return shard


def optimizer_state(engine: Engine) -> dict[str, Any]:
    """Return the optimizer's step count and the loss scaler, as JSON."""
    step = moments_by_partition(engine)[0]["step"]
    return {"optimizer_step": int(step), "scaler": read_loss_scaler(engine)}


def restore(engine: Engine, checkpoint: Checkpoint) -> None:
    """Load weights, moments, step counts and the loss scale into an engine.

    The module must have been given `checkpoint.module_state()` before the engine was built: that fills buffers and the
    low-precision copies, which DeepSpeed's setters leave alone; the float32 weights are set here.
    """
    for kind in (WEIGHT, *MOMENTS):
        values = checkpoint.tensors(kind)
        for name, parameter in engine.module.named_parameters():
            _set(parameter, kind, values[name].to(engine.device))
    step = checkpoint.state["optimizer_step"]
    for moments in moments_by_partition(engine):
        moments["step"] = torch.tensor(float(step)) if torch.is_tensor(moments["step"]) else step
    write_loss_scaler(engine, checkpoint.state["scaler"])
    engine.global_steps = checkpoint.step


def _full(parameter: Any, kind: str) -> Tensor:
    full = safe_get_full_fp32_param(parameter) if kind == WEIGHT else safe_get_full_optimizer_state(parameter, kind)
    assert full is not None, "not a ZeRO-2 or ZeRO-3 parameter"
    return full


def _set(parameter: Any, kind: str, value: Tensor) -> None:
    if is_sharded(parameter):
        local = own_share(parameter, value)
        if kind == WEIGHT:
            safe_set_local_fp32_param(parameter, local)
        else:
            safe_set_local_optimizer_state(parameter, local, kind)
    elif kind == WEIGHT:
        safe_set_full_fp32_param(parameter, value)
    else:
        safe_set_full_optimizer_state(parameter, value, kind)


def _owners(sizes: dict[str, int], world_size: int) -> dict[str, int]:
    """Give each parameter to the rank with the least so far, largest first."""
    load = [0] * world_size
    owners: dict[str, int] = {}
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        rank = load.index(min(load))
        owners[name] = rank
        load[rank] += sizes[name]
    return owners
