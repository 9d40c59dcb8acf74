"""The files in `ds_configs/`: read and checked without importing DeepSpeed.

DeepSpeed accepts a misspelt top-level key in silence, so its keys are checked here against the ones that belong in such
a file; numbers that the recipe decides are refused, so that each has one home.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hdscale.errors import UserError

_ALLOWED_KEYS = (
    "zero_optimization",
    "activation_checkpointing",
    "communication_data_type",
    "prescale_gradients",
    "gradient_predivide_factor",
    "comms_logger",
    "wall_clock_breakdown",
    "memory_breakdown",
    "dump_state",
    "steps_per_print",
)

_CHECKPOINTING_KEYS = {
    "partition_activations": bool,
    "cpu_checkpointing": bool,
    "contiguous_memory_optimization": bool,
    "number_checkpoints": int,
    "synchronize_checkpoint_boundary": bool,
    "profile": bool,
}
"""Of `activation_checkpointing`, which DeepSpeed does not check either."""

_RECIPE_KEYS = {
    "train_batch_size": "optim.global_batch_size",
    "train_micro_batch_size_per_gpu": "optim.micro_batch_size",
    "gradient_accumulation_steps": "optim.global_batch_size and optim.micro_batch_size",
    "gradient_clipping": "optim.clip",
    "optimizer": "optim",
    "scheduler": "schedule",
    "fp16": "run.precision",
    "bf16": "run.precision",
    "torch_autocast": "run.precision",
    "data_types": "run.precision",
    "tensorboard": "log",
    "checkpoint": "checkpoint",
}


def load_ds_config(path: Path, *, stages: tuple[int, ...] = (2, 3)) -> dict[str, Any]:
    """Read a DeepSpeed configuration file.

    Args:
        path: JSON file.
        stages: ZeRO stages that make sense where it is used.

    Raises:
        UserError: no such file, not JSON, an unknown key, a key that the recipe decides, or another ZeRO stage.
    """
    try:
        values = json.loads(path.read_text())
    except OSError as error:
        raise UserError(
            f"DeepSpeed config {path} cannot be read ({error.strerror}); ds_configs/ has examples"
        ) from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"DeepSpeed config {path} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"DeepSpeed config {path} must be a JSON object, got a {type(values).__name__}")
    for key in values:
        _check_key(path, key)
    _check_activation_checkpointing(path, values.get("activation_checkpointing", {}))
    zero = values.get("zero_optimization")
    stage = zero.get("stage") if isinstance(zero, dict) else None
    if stage not in stages:
        allowed = " or ".join(str(stage) for stage in stages)
        raise UserError(f"{path}: zero_optimization.stage must be {allowed}, got {stage!r}")
    return values


def with_zero(ds_config: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Replace values of a DeepSpeed config's `zero_optimization`."""
    return {**ds_config, "zero_optimization": {**ds_config["zero_optimization"], **values}}


def _check_key(path: Path, key: str) -> None:
    if key in _RECIPE_KEYS:
        raise UserError(f"{path}: {key} belongs in the recipe: remove it here and set {_RECIPE_KEYS[key]}")
    if key not in _ALLOWED_KEYS:
        close = difflib.get_close_matches(key, [*_ALLOWED_KEYS, *_RECIPE_KEYS], n=1)
        if close and close[0] in _RECIPE_KEYS:
            hint = f"; {close[0]} belongs in the recipe as {_RECIPE_KEYS[close[0]]}"
        else:
            hint = f"; did you mean {close[0]}?" if close else f"; known here: {', '.join(_ALLOWED_KEYS)}"
        raise UserError(f"{path}: unknown key {key}{hint}")


def _check_activation_checkpointing(path: Path, section: Any) -> None:
    where = f"{path}: activation_checkpointing"
    if not isinstance(section, dict):
        raise UserError(f"{where} must be an object, got {section!r}; leave it out for PyTorch's own recomputation")
    for key, value in section.items():
        if key not in _CHECKPOINTING_KEYS:
            close = difflib.get_close_matches(key, _CHECKPOINTING_KEYS, n=1)
            hint = f"did you mean {close[0]}?" if close else f"known here: {', '.join(_CHECKPOINTING_KEYS)}"
            raise UserError(f"{where}: unknown key {key}; {hint}")
        if type(value) is not _CHECKPOINTING_KEYS[key]:
            raise UserError(f"{where}.{key} must be {_CHECKPOINTING_KEYS[key].__name__}, got {value!r}")
    if section.get("contiguous_memory_optimization"):
        for key in ("partition_activations", "number_checkpoints"):
            if not section.get(key):
                raise UserError(f"{where}.contiguous_memory_optimization needs {key}, got {section.get(key)!r}")
