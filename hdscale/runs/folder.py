"""The run folder: what was asked for, under which versions, and whether it is done."""

from __future__ import annotations

import json
import platform
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from hdscale.config.loading import (
    ENVIRONMENT_FILE,
    RECIPE_FILE,
    changed_fields,
    dump_recipe,
    is_allowed,
    load_run_recipe,
)
from hdscale.config.recipe import Recipe
from hdscale.errors import UserError
from hdscale.provenance import source_digest, versions


def run_folder_of(recipe: Recipe) -> Path:
    """Return the folder of the recipe's run."""
    return Path(recipe.run.root) / recipe.run.name


def check_recipe_unchanged(folder: Path, recipe: Recipe, allow_change: Sequence[str]) -> None:
    """Refuse to continue a run under a recipe that would change its result.

    Raises:
        UserError: naming the changed fields that `allow_change` does not list.
    """
    changes = changed_fields(load_run_recipe(folder), recipe)
    refused = [change for change in changes if not is_allowed(change[0], allow_change)]
    if refused:
        differences = ", ".join(f"{field}={old} (now {new})" for field, old, new in refused)
        flags = " ".join(f"--allow-change {field}" for field, *_ in refused)
        raise UserError(
            f"{folder / RECIPE_FILE}: the run was started with {differences}: "
            f"set it back, choose another run.name, or pass {flags}"
        )


def write_run_folder(folder: Path, recipe: Recipe, ds_config: Mapping[str, Any], world_size: int) -> None:
    """Write the resolved recipe, the DeepSpeed config and the environment.

    The recipe is the newest start's; fields in which a start before had another value stay named in the environment.
    """
    environment = _environment(world_size) | {"changed_on_the_way": _all_changes(folder, recipe)}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / RECIPE_FILE).write_text(dump_recipe(recipe))
        (folder / "ds_config.json").write_text(json.dumps(ds_config, indent=2) + "\n")
        (folder / ENVIRONMENT_FILE).write_text(json.dumps(environment, indent=2) + "\n")
    except OSError as error:
        raise _unwritable(folder, error) from error


def changed_on_the_way(folder: Path) -> list[str]:
    """Name the recipe's fields that --allow-change has let differ between a run's starts: no one recipe made it."""
    try:
        return json.loads((folder / ENVIRONMENT_FILE).read_text()).get("changed_on_the_way", [])
    except (OSError, ValueError):  # not started yet, or not to the end of this file
        return []


def mark_done(folder: Path, *, done: bool) -> None:
    """Write or remove the completion marker: exit code 0 alone proves nothing under the launcher."""
    if done:
        (folder / "DONE").write_text("")
    else:
        try:
            (folder / "DONE").unlink(missing_ok=True)
        except OSError as error:
            raise _unwritable(folder, error) from error


def _all_changes(folder: Path, recipe: Recipe) -> list[str]:
    now = []
    if (folder / RECIPE_FILE).is_file():
        now = [field for field, *_ in changed_fields(load_run_recipe(folder), recipe)]
    return sorted({*changed_on_the_way(folder), *now})


def _unwritable(folder: Path, error: OSError) -> UserError:
    return UserError(f"run folder {folder} cannot be written ({error.strerror}); set run.root and run.name")


def _environment(world_size: int) -> dict[str, Any]:
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    packages = versions()
    return {
        "python": packages.pop("python"),
        "packages": packages,
        "source": source_digest(),
        "cuda": torch.version.cuda,
        "git_revision": _git_revision(),
        "world_size": world_size,
        "host": platform.node(),
        "devices": devices or ["cpu"],
    }


def _git_revision() -> str | None:
    here = Path(__file__).parent
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        result = subprocess.run(command, cwd=here, capture_output=True, text=True, check=False)
    except OSError:  # no git on this machine
        return None
    return result.stdout.strip() or None
