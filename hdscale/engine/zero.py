"""DeepSpeed engines: ZeRO-2 or ZeRO-3 for what trains, ZeRO-3 without an optimizer for what does not."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.ops.adam import DeepSpeedCPUAdam
from pydantic import ValidationError
from torch import Tensor, nn

from hdscale.config.sections import OptimConfig
from hdscale.engine.ranks import DTYPES, Ranks
from hdscale.engine.zero_internals import (
    Engine,
    create_moments,
    forget_mesh,
    inner_module,
    is_sharded,
    parse_zero_section,
    release_gathered_weights,
)
from hdscale.errors import UserError

_TOKEN_PARAMETERS = ("cls_token", "reg_token", "mask_token", "pos_embed")


def check_zero_section(path: Path, ds_config: Mapping[str, Any]) -> None:
    """Refuse keys and values of `zero_optimization` that DeepSpeed would refuse, in one line."""
    for section in ("offload_optimizer", "offload_param"):
        if (ds_config["zero_optimization"].get(section) or {}).get("device") == "nvme":
            raise UserError(
                f"{path}: zero_optimization.{section}.device must be cpu or none, got nvme: checkpoints "
                "do not read state from NVMe"
            )
    try:
        parse_zero_section(ds_config["zero_optimization"])
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(str(part) for part in first["loc"])
        raise UserError(f"{path}: zero_optimization.{field}: {first['msg']}, got {first['input']!r}") from error


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Split trainable parameters: no decay on norms, biases and tokens (paper, Section 4.1, after dBOT).

    Call it before the engine is built: ZeRO-3 replaces shapes by (0,).
    """
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            token = name.rpartition(".")[2] in _TOKEN_PARAMETERS
            (plain if parameter.ndim <= 1 or token else decayed).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]


def student_ds_config(
    ds_config: Mapping[str, Any], optim: OptimConfig, *, accumulation: int, precision: str
) -> dict[str, Any]:
    """Complete a checked `ds_configs/` file with the numbers that the recipe decides."""
    return {
        "steps_per_print": 2**31 - 1,  # our own log says more
        **ds_config,
        "train_micro_batch_size_per_gpu": optim.micro_batch_size,
        "gradient_accumulation_steps": accumulation,
        # Left out, it means 1.0; 0 is DeepSpeed's "no clipping".
        "gradient_clipping": optim.clip,
        "zero_force_ds_cpu_optimizer": False,
        **_precision_section(precision),
    }


def build_student_engine(module: nn.Module, ds_config: dict[str, Any], optim: OptimConfig) -> Engine:
    """Wrap the one trainable module; AdamW, or DeepSpeed's CPU AdamW where the config offloads the optimizer."""
    groups = parameter_groups(module, optim.weight_decay)
    settings = {"lr": optim.lr, "betas": optim.betas, "eps": optim.eps}
    offload = ds_config["zero_optimization"].get("offload_optimizer") or {}
    if offload.get("device") == "cpu":
        optimizer: torch.optim.Optimizer = DeepSpeedCPUAdam(groups, adamw_mode=True, **settings)
    else:
        optimizer = torch.optim.AdamW(groups, **settings)
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=ds_config)
    # A teacher's process groups must never become the student's: it would silently train on fewer ranks.
    assert engine.dp_world_size == torch.distributed.get_world_size()
    create_moments(engine)
    if engine.zero_optimization_stage() == 3:
        release_gathered_weights(module)
    return engine


def build_teacher_engine(
    teacher: nn.Module, ds_config: Mapping[str, Any], *, sharding: str, precision: str, ranks: Ranks
) -> nn.Module:
    """Place a frozen teacher; every rank has to call it, after the student's engine is built.

    Args:
        teacher: on the CPU.
        ds_config: checked ZeRO-3 config.
        sharding: `replicate`: whole on every rank; `zero3`: split over all ranks; `node`: over the ranks of each host,
            so that gathers never leave it.
        precision: of the run.
        ranks: this process.
    """
    teacher = teacher.to(DTYPES[precision])
    if sharding == "replicate":
        return teacher.to(ranks.device)
    config = {
        "steps_per_print": 2**31 - 1,
        **ds_config,
        "train_micro_batch_size_per_gpu": 1,
        **_precision_section(precision),
    }
    engine, *_ = deepspeed.initialize(
        model=teacher, config=config, mpu=_HostMesh(ranks) if sharding == "node" else None
    )
    forget_mesh()
    engine.eval()  # returns None, unlike a module's
    return engine


class _HostMesh:
    """The ranks of one host as DeepSpeed's data-parallel group.

    `zero_hpz_partition_size`, its own way to shard within a node, needs an optimizer and fails without one.
    """

    def __init__(self, ranks: Ranks) -> None:
        by_host: dict[str | None, list[int]] = {}
        for rank, host in enumerate(ranks.hosts):
            by_host.setdefault(host, []).append(rank)
        for members in by_host.values():  # all ranks make all groups, in the same order
            group = deepspeed.comm.new_group(members)
            if ranks.rank in members:
                self._group, self._members, self._rank = group, members, members.index(ranks.rank)

    def get_data_parallel_group(self) -> Any:
        return self._group

    def get_data_parallel_group_ranks(self) -> list[int]:
        return self._members

    def get_data_parallel_world_size(self) -> int:
        return len(self._members)

    def get_data_parallel_rank(self) -> int:
        return self._rank

    def get_model_parallel_world_size(self) -> int:
        return 1

    def get_model_parallel_rank(self) -> int:
        return 0

    def get_model_parallel_group(self) -> None:
        return None


def full_state(module: nn.Module) -> dict[str, Tensor]:
    """Gather a possibly sharded module's parameters and buffers on the CPU; every rank has to call it."""
    inner = inner_module(module)
    state: dict[str, Tensor] = {name: buffer.detach().cpu() for name, buffer in inner.named_buffers()}
    for name, parameter in inner.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], enabled=is_sharded(parameter)):
            state[name] = parameter.detach().cpu().clone()
    return state


def checkpoint_function(ds_config: Mapping[str, Any]) -> Callable[..., Any] | None:
    """Return DeepSpeed's activation checkpointing when the config has such a section, else None (torch's own).

    Raises:
        UserError: activations are to go to the CPU, and are there.
    """
    section = ds_config.get("activation_checkpointing")
    if not section:
        return None
    if section.get("cpu_checkpointing") and not torch.cuda.is_available():
        raise UserError(
            "activation_checkpointing.cpu_checkpointing moves activations from a GPU to the CPU, and no GPU is "
            "visible: leave it out of the DeepSpeed config"
        )

    def checkpoint(function: Callable[..., Any], *tensors: Tensor) -> Any:
        # It empties what it is given, to keep a part or a copy elsewhere. Others use these tensors as well: relation
        # layers, or all blocks a common bias.
        return deepspeed.checkpointing.checkpoint(function, *(tensor.view_as(tensor) for tensor in tensors))

    return checkpoint


def configure_checkpointing(ds_config: Mapping[str, Any], world_size: int) -> None:
    """Tell DeepSpeed's activation checkpointing its settings; the ranks must have met."""
    if section := ds_config.get("activation_checkpointing"):
        config = {"train_batch_size": world_size, "activation_checkpointing": section}
        deepspeed.checkpointing.configure(None, deepspeed_config=config)


def _precision_section(precision: str) -> dict[str, Any]:
    if precision == "fp16":
        return {"fp16": {"enabled": True, "initial_scale_power": 16, "loss_scale_window": 1000, "hysteresis": 2}}
    if precision == "bf16":
        return {"bf16": {"enabled": True}}
    return {}
