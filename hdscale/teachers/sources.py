"""Where a teacher's model and weights come from: timm, open_clip, or a file of hdscale's."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from hdscale.errors import UserError
from hdscale.teachers.files import load_teacher_file
from hdscale.teachers.weights import fit_state, read_state
from hdscale.vit.beit import from_beit, is_beit
from hdscale.vit.build import create_teacher_vit

if TYPE_CHECKING:
    from hdscale.config.recipe import TeacherConfig
    from hdscale.vit.build import ViT

_RANDOM_SEED = 0  # `weights: random` gives the same teacher on every rank and in every launch

# open_clip's tower settings, and those that change neither tokens nor their layout.
_TOWER_SETTINGS = {"layers", "width", "head_width", "mlp_ratio", "patch_size", "image_size", "ls_init_value"}
_POOLING_SETTINGS = {"patch_dropout", "pool_type", "final_ln_after_pool", "output_tokens"}


class Source(NamedTuple):
    """A model at its native input size, and the normalisation it was trained with."""

    model: ViT
    mean: tuple[float, ...]
    std: tuple[float, ...]


def load_source(config: TeacherConfig, field: str) -> Source:
    """Build the model a teacher's section names, with its weights, in float32 on the CPU.

    Args:
        config: the recipe's section.
        field: the section's name, for messages.

    Raises:
        UserError: an unknown name, weights that are not there or do not fit, no projection to give.
    """
    load = {"timm": _from_timm, "open_clip": _from_open_clip, "file": _from_file}[config.source]
    return load(config, field)


def _from_timm(config: TeacherConfig, field: str) -> Source:
    arch: dict[str, Any] = {"model_name": config.name}
    if config.target != "projected":
        arch["num_classes"] = 0
    elif "clip" not in config.name:
        raise UserError(f"{field}.target projected needs a CLIP model, got {config.name}; set it to norm")
    pretrained = config.weights == "pretrained"
    model = create_teacher_vit(f"{field}.name", arch, pretrained=pretrained, seed=_RANDOM_SEED)
    if config.weights not in ("pretrained", "random"):
        where = f"{field}.weights"
        fit_state(model, read_state(config.weights, where), source=f"{where}: {config.weights}")
    about: Any = model.pretrained_cfg
    return Source(model, tuple(about["mean"]), tuple(about["std"]))


def _from_open_clip(config: TeacherConfig, field: str) -> Source:
    import open_clip  # takes seconds; most runs of the tests and of the demo do without

    tower = _tower_config(config.name, field)
    about: Any = open_clip.pretrained.get_pretrained_cfg(config.name, config.weights)
    default: Any = open_clip.constants
    path = None if config.weights == "random" else _open_clip_path(config, field, about)
    arch = _tower_arch(tower, projected=config.target == "projected", quick_gelu=about.get("quick_gelu", False))
    model = create_teacher_vit(f"{field}.name", arch, seed=_RANDOM_SEED)
    if path is not None:
        fit_state(model, read_state(path, f"{field}.weights"), source=f"{field}.weights: {path}")
    mean = about.get("mean", default.OPENAI_DATASET_MEAN)
    return Source(model, tuple(mean), tuple(about.get("std", default.OPENAI_DATASET_STD)))


def _from_file(config: TeacherConfig, field: str) -> Source:
    if config.target == "projected":
        raise UserError(f"{field}.target projected needs a CLIP model, got a file of hdscale's; set it to norm")
    file = load_teacher_file(config.weights, f"{field}.weights")
    arch, state = from_beit(file.arch, file.state) if is_beit(file.arch) else (file.arch, file.state)
    model = create_teacher_vit(f"{field}.weights: {config.weights}", arch)
    fit_state(model, state, source=f"{field}.weights: {config.weights}")
    return Source(model, file.mean, file.std)


def _tower_config(name: str, field: str) -> dict[str, Any]:
    """Return open_clip's configuration of a model whose vision tower timm's ViT can stand for."""
    import open_clip

    config = open_clip.get_model_config(name) if name in open_clip.list_models() else None
    if config is None:
        close = difflib.get_close_matches(name, open_clip.list_models(), n=3)
        hint = f"did you mean {', '.join(close)}?" if close else "open_clip.list_models() names them"
        raise UserError(f"{field}.name must be an open_clip model, got {name}; {hint}")
    vision = config["vision_cfg"]
    if "timm_model_name" in vision:
        raise UserError(
            f"{field}.name: the vision tower of {name} is timm's own {vision['timm_model_name']}; set source to timm"
        )
    strange = sorted(vision.keys() - _TOWER_SETTINGS - _POOLING_SETTINGS)
    if strange or not isinstance(vision["layers"], int):
        what = f"uses {', '.join(strange)}" if strange else "is no transformer"
        raise UserError(
            f"{field}.name: the vision tower of {name} {what}, which hdscale cannot run; choose a plain ViT"
        )
    return config


def _tower_arch(config: dict[str, Any], *, projected: bool, quick_gelu: bool) -> dict[str, Any]:
    """Describe open_clip's vision tower as a timm model: CLIP's ViT with the tower's sizes."""
    vision = config["vision_cfg"]
    arch: dict[str, Any] = {
        "model_name": "vit_base_patch16_clip_224",
        "img_size": vision["image_size"],
        "patch_size": vision["patch_size"],
        "embed_dim": vision["width"],
        "depth": vision["layers"],
        "num_heads": vision["width"] // vision.get("head_width", 64),
        "mlp_ratio": vision.get("mlp_ratio", 4.0),
        "num_classes": config["embed_dim"] if projected else 0,
    }
    if quick_gelu or config.get("quick_gelu", False):
        arch["act_layer"] = "quick_gelu"
    if vision.get("ls_init_value"):
        arch["init_values"] = vision["ls_init_value"]
    return arch


def _open_clip_path(config: TeacherConfig, field: str, about: dict[str, Any]) -> str:
    """Return the file of weights, downloaded by open_clip where `weights` is a tag of the model."""
    import open_clip

    if not about:
        if not Path(config.weights).is_file():
            tags = ", ".join(open_clip.list_pretrained_tags_by_model(config.name)) or "it has none"
            raise UserError(
                f"{field}.weights must be random, a file, or a tag of open_clip's {config.name} ({tags}), "
                f"got {config.weights}"
            )
        return config.weights
    try:
        return open_clip.pretrained.download_pretrained(about)
    except OSError as error:
        reason = " ".join(str(error).split())[:120]
        raise UserError(f"{field}.weights: cannot download {config.name} {config.weights}: {reason}") from error
