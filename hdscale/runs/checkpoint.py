"""Checkpoint files: safetensors by parameter name, a sha256 manifest, staged and renamed. No pickle, no DeepSpeed.

`checkpoints/step-000001000/` holds `student-RRRRR-of-NNNNN.safetensors` (keys `weight/NAME`, `exp_avg/NAME`,
`exp_avg_sq/NAME` and, from the first rank, `buffer/NAME`; float32), `state.json` and `manifest.json`. The name tells
nothing about ZeRO: any stage and any number of ranks loads it.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from hdscale.errors import UserError
from hdscale.hashing import file_digest
from hdscale.staging import flush, staged

CHECKPOINT_FOLDER = "checkpoints"
WEIGHT, BUFFER, MOMENTS = "weight", "buffer", ("exp_avg", "exp_avg_sq")
_STATE, _MANIFEST, _LATEST = "state.json", "manifest.json", "latest"
_NAME = re.compile(r"step-(\d{9})$")
_FORMAT = 1


class CorruptCheckpointError(Exception):
    """A file is missing, short, or differs from its digest."""


class Checkpoint(NamedTuple):
    """A verified checkpoint on disk."""

    path: Path
    state: dict[str, Any]

    @property
    def step(self) -> int:
        """Optimizer steps done when it was written."""
        return self.state["step"]

    def tensors(self, kind: str) -> dict[str, Tensor]:
        """Read all tensors of one kind (`weight`, `exp_avg`, ...), by parameter name, float32 on the CPU."""
        found: dict[str, Tensor] = {}
        for file in sorted(self.path.glob("*.safetensors")):
            with safe_open(file, "pt") as reader:
                for key in reader.keys():  # noqa: SIM118 - safe_open is no mapping
                    if key.startswith(kind + "/"):
                        found[key.partition("/")[2]] = reader.get_tensor(key)
        return found

    def names(self, kind: str) -> set[str]:
        """List the tensors of one kind by parameter name, from the files' headers."""
        found: set[str] = set()
        for file in self.path.glob("*.safetensors"):
            with safe_open(file, "pt") as reader:
                found |= {key.partition("/")[2] for key in reader.keys() if key.startswith(kind + "/")}  # noqa: SIM118
        return found

    def module_state(self) -> dict[str, Tensor]:
        """Return weights and buffers as `load_state_dict` takes them."""
        return self.tensors(WEIGHT) | self.tensors(BUFFER)


def save_checkpoint(
    run_folder: Path, shard: Mapping[str, Tensor], state: Mapping[str, Any], *, rank: int, world_size: int, keep: int
) -> Path:
    """Write one checkpoint from all ranks; nobody sees it before it is whole.

    Args:
        run_folder: the run's folder, shared by all ranks.
        shard: this rank's tensors, `KIND/NAME` to float32 on the CPU.
        state: JSON-able, the same on all ranks; holds `step`.
        rank: this process's; the first one writes state and manifest, and removes old checkpoints.
        world_size: how many ranks write a share each.
        keep: how many of the newest checkpoints stay.

    Returns:
        The checkpoint's folder.
    """
    root = run_folder / CHECKPOINT_FOLDER
    final = root / f"step-{state['step']:09d}"
    staging = root / f".staging-{final.name}"
    if rank == 0:
        _remove_abandoned(root, state["step"])
        staging.mkdir(parents=True)
    dist.barrier()
    name = f"student-{rank:05d}-of-{world_size:05d}.safetensors"
    save_file(dict(shard), staging / name)
    flush(staging / name)
    digests: list[Any] = [None] * world_size
    dist.all_gather_object(digests, (name, file_digest(staging / name)))
    if rank == 0:
        (staging / _STATE).write_text(json.dumps(state, indent=2) + "\n")
        files = dict(digests) | {_STATE: file_digest(staging / _STATE)}
        (staging / _MANIFEST).write_text(json.dumps({"format": _FORMAT, "files": files}, indent=2) + "\n")
        _publish(staging, final)
        _remove_old(root, keep)
    dist.barrier()
    return final


def newest_checkpoint(run_folder: Path) -> Checkpoint | None:
    """Return the newest checkpoint whose files match their digests; None when the run has none at all.

    Raises:
        UserError: there are checkpoints, and not one of them is whole.
    """
    problems: list[str] = []
    for _, path in sorted(_list(run_folder / CHECKPOINT_FOLDER), reverse=True):
        try:
            return open_checkpoint(path)
        except CorruptCheckpointError as error:
            problems.append(str(error))
    if problems:
        raise UserError(
            f"no checkpoint of {run_folder} is whole: {'; '.join(problems)}; restore one or choose another run.name"
        )
    return None


def open_checkpoint(path: Path) -> Checkpoint:
    """Verify every file of one checkpoint against the manifest.

    Raises:
        CorruptCheckpointError: naming the file.
    """
    try:
        manifest = json.loads((path / _MANIFEST).read_text())
        for name, digest in manifest["files"].items():
            if file_digest(path / name) != digest:
                raise CorruptCheckpointError(f"{path / name} differs from its digest")
        state = json.loads((path / _STATE).read_text())
    except (OSError, ValueError, KeyError) as error:
        raise CorruptCheckpointError(f"{path} is incomplete ({error})") from error
    if manifest.get("format") != _FORMAT:
        raise UserError(f"{path} has checkpoint format {manifest.get('format')}, this hdscale reads {_FORMAT}")
    return Checkpoint(path, state)


def require_checkpoint(run_folder: Path) -> Checkpoint:
    """Return the newest checkpoint of a run that is supposed to have one.

    Raises:
        UserError: it has none.
    """
    checkpoint = newest_checkpoint(run_folder)
    if checkpoint is None:
        raise UserError(f"{run_folder / CHECKPOINT_FOLDER} holds no checkpoint yet; train the run first")
    return checkpoint


def _publish(staging: Path, final: Path) -> None:
    for file in staging.iterdir():
        flush(file)
    flush(staging)
    if final.exists():  # a resumed run comes by the same step again: same content
        shutil.rmtree(final)
    staging.rename(final)
    flush(final.parent)
    with staged(final.parent / _LATEST) as latest:
        latest.write_text(final.name + "\n")


def _remove_abandoned(root: Path, step: int) -> None:
    """Remove what killed saves have left, and steps after this one: a run that came by here again started before them.

    They would otherwise count as the newest when old ones are removed, whole or damaged.
    """
    for staging in root.glob(".staging-*"):
        shutil.rmtree(staging)
    for other, path in _list(root):
        if other > step:
            shutil.rmtree(path)


def _remove_old(root: Path, keep: int) -> None:
    for _, path in sorted(_list(root))[:-keep]:
        shutil.rmtree(path)


def _list(root: Path) -> list[tuple[int, Path]]:
    if not root.is_dir():
        return []
    return [(int(match[1]), path) for path in root.iterdir() if (match := _NAME.fullmatch(path.name))]
