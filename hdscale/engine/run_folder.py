"""The run folder: what was asked for, under which versions, and whether it is done."""

from __future__ import annotations

import json
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from hdscale.config.loading import RECIPE_FILE, changed_fields, dump_recipe, load_run_recipe
from hdscale.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from hdscale.config.recipe import Recipe

_PACKAGES = ("torch", "torchvision", "deepspeed", "timm", "webdataset", "open_clip_torch", "numpy", "safetensors")


def run_folder_of(recipe: Recipe) -> Path:
    """Return the folder of the recipe's run."""
    return Path(recipe.run.root) / recipe.run.name


def check_recipe_unchanged(folder: Path, recipe: Recipe, allow_change: Sequence[str]) -> None:
    """Refuse to continue a run under a recipe that would change its result.

    Raises:
        UserError: naming the first changed field that `allow_change` does not list.
    """
    changes = changed_fields(load_run_recipe(folder), recipe)
    for field, old, new in changes:
        if field not in allow_change:
            raise UserError(
                f"{folder / RECIPE_FILE}: the run was started with {field}={old}, now it is {new}: "
                f"set it back, choose another run.name, or pass --allow-change {field}"
            )


def write_run_folder(folder: Path, recipe: Recipe, ds_config: Mapping[str, Any], world_size: int) -> None:
    """Write the resolved recipe, the DeepSpeed config and the environment."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / RECIPE_FILE).write_text(dump_recipe(recipe))
        (folder / "ds_config.json").write_text(json.dumps(ds_config, indent=2) + "\n")
        (folder / "environment.json").write_text(json.dumps(_environment(world_size), indent=2) + "\n")
    except OSError as error:
        raise UserError(
            f"run folder {folder} cannot be written ({error.strerror}); set run.root and run.name"
        ) from error


def mark_done(folder: Path) -> None:
    """Write the completion marker: exit code 0 alone proves nothing under the launcher."""
    (folder / "DONE").write_text("")


def _environment(world_size: int) -> dict[str, Any]:
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "python": platform.python_version(),
        "packages": {name: metadata.version(name) for name in _PACKAGES},
        "cuda": torch.version.cuda,
        "git_revision": _git_revision(),
        "world_size": world_size,
        "host": platform.node(),
        "devices": devices or ["cpu"],
    }


def _git_revision() -> str | None:
    here = Path(__file__).parent
    result = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=40"], cwd=here, capture_output=True, text=True, check=False
    )
    return result.stdout.strip() or None
