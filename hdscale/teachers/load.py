"""Where a teacher's model and weights come from: timm, open_clip, or a file of hdscale's."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any, NamedTuple

from timm.layers.activations import QuickGELU
from timm.models import get_arch_pretrained_cfgs

from hdscale.config.recipe import TeacherConfig
from hdscale.errors import UserError
from hdscale.teachers.files import load_teacher_file, stored_normalisation
from hdscale.teachers.layouts import is_openai
from hdscale.teachers.weights import fit_state, read_state
from hdscale.vit.beit import from_beit, is_beit
from hdscale.vit.build import ViT, create_teacher_vit

_RANDOM_SEED = 0  # `weights: random` gives the same teacher on every rank and in every launch

# open_clip's tower settings, and those that change neither tokens nor their layout.
_TOWER_SETTINGS = {"layers", "width", "head_width", "mlp_ratio", "patch_size", "image_size", "ls_init_value"}
_POOLING_SETTINGS = {"patch_dropout", "pool_type", "final_ln_after_pool", "output_tokens"}


class LoadedModel(NamedTuple):
    """A model at its native input size, and the normalisation it was trained with."""

    model: ViT
    mean: tuple[float, ...]
    std: tuple[float, ...]


def load_source(config: TeacherConfig, field: str) -> LoadedModel:
    """Build the model a teacher's section names, with its weights, in float32 on the CPU.

    Args:
        config: the recipe's section.
        field: the section's name, for messages.

    Raises:
        UserError: an unknown name, weights that are not there or do not fit, no projection to give.
    """
    load = {"timm": _from_timm, "open_clip": _from_open_clip, "file": _from_file}[config.source]
    return load(config, field)


def _from_timm(config: TeacherConfig, field: str) -> LoadedModel:
    arch: dict[str, Any] = {"model_name": config.name}
    if config.target != "projected":
        arch["num_classes"] = 0
    elif "clip" not in config.name:
        raise UserError(f"{field}.target projected needs a CLIP model, got {config.name}; set it to norm")
    pretrained = config.weights == "pretrained"
    model = create_teacher_vit(f"{field}.name", arch, pretrained=pretrained, seed=_RANDOM_SEED)
    openai = pretrained and config.name.endswith(".openai")
    about: Any = model.pretrained_cfg
    mean, std = tuple(about["mean"]), tuple(about["std"])
    if config.weights not in ("pretrained", "random"):
        where = f"{field}.weights"
        state = read_state(config.weights, where)
        said = stored_normalisation(config.weights)
        if said is None:
            _check_tag(config.name, field)
        else:
            mean, std = said
        fit_state(model, state, source=f"{where}: {config.weights}")
        openai = is_openai(state)
    block: Any = model.blocks[0]
    if openai and not isinstance(block.mlp.act, QuickGELU):
        raise UserError(
            f"{field}.name: OpenAI trained CLIP with quick-GELU, {config.name} has another activation; "
            "choose vit_*_clip_quickgelu_*, or source open_clip"
        )
    return LoadedModel(model, mean, std)


def _check_tag(name: str, field: str) -> None:
    """Refuse a name without a tag where it does not say how the images of a file's model were normalised."""
    known = get_arch_pretrained_cfgs(name)
    if "." not in name and len({(about.mean, about.std) for about in known.values()}) > 1:
        tags = ", ".join(full.partition(".")[2] for full in known)
        raise UserError(
            f"{field}.name must have a tag, since timm normalises images for some weights of {name} otherwise than for "
            f"others: add that of the weights which the file is or was made like, such as {list(known)[-1]} ({tags}), "
            f"got {name}"
        )


def _from_open_clip(config: TeacherConfig, field: str) -> LoadedModel:
    import open_clip  # takes seconds; most runs of the tests and of the demo do without

    tower = _tower_config(config.name, field)
    about: Any = open_clip.pretrained.get_pretrained_cfg(config.name, config.weights)
    path = None if config.weights == "random" else _open_clip_path(config, field, about)
    state = None if path is None else read_state(path, f"{field}.weights")
    projected = config.target == "projected"
    if "timm_model_name" in tower["vision_cfg"]:
        arch = _timm_tower_arch(tower, config, field)
    else:
        quick_gelu = about.get("quick_gelu", False) or (state is not None and is_openai(state))
        arch = _tower_arch(tower, projected=projected, quick_gelu=quick_gelu)
    model = create_teacher_vit(f"{field}.name", arch, seed=_RANDOM_SEED)
    if state is not None:
        fit_state(model, state, source=f"{field}.weights: {path}")
    default: Any = model.pretrained_cfg  # CLIP's, and of other towers their own
    return LoadedModel(model, tuple(about.get("mean", default["mean"])), tuple(about.get("std", default["std"])))


def _from_file(config: TeacherConfig, field: str) -> LoadedModel:
    if config.target == "projected":
        raise UserError(f"{field}.target projected needs a CLIP model, got a file of hdscale's; set it to norm")
    file = load_teacher_file(config.weights, f"{field}.weights")
    arch, state = from_beit(file.arch, file.state) if is_beit(file.arch) else (file.arch, file.state)
    model = create_teacher_vit(f"{field}.weights: {config.weights}", arch)
    fit_state(model, state, source=f"{field}.weights: {config.weights}")
    return LoadedModel(model, file.mean, file.std)


def _tower_config(name: str, field: str) -> dict[str, Any]:
    """Return open_clip's configuration of a model whose vision tower is a timm model or one can stand for it."""
    import open_clip

    config = open_clip.get_model_config(name) if name in open_clip.list_models() else None
    if config is None:
        close = difflib.get_close_matches(name, open_clip.list_models(), n=3)
        hint = f"did you mean {', '.join(close)}?" if close else "open_clip.list_models() names them"
        raise UserError(f"{field}.name must be an open_clip model, got {name}; {hint}")
    vision = config["vision_cfg"]
    if "timm_model_name" in vision:
        return config
    strange = sorted(vision.keys() - _TOWER_SETTINGS - _POOLING_SETTINGS)
    if strange or not isinstance(vision["layers"], int):
        what = f"uses {', '.join(strange)}" if strange else "is no transformer"
        raise UserError(
            f"{field}.name: the vision tower of {name} {what}, which hdscale cannot run; choose a plain ViT"
        )
    return config


def _timm_tower_arch(tower: dict[str, Any], config: TeacherConfig, field: str) -> dict[str, Any]:
    """Describe a tower that is timm's own; open_clip leaves its input size to timm, too."""
    vision = tower["vision_cfg"]
    arch: dict[str, Any] = {"model_name": vision["timm_model_name"], "num_classes": 0}
    projection, pool = vision.get("timm_proj", "linear"), vision.get("timm_pool", "avg")
    if projection is None and pool in ("token", "avg"):
        arch["global_pool"] = pool  # decides where the final norm stands
    if config.target == "projected":
        if projection not in (None, "linear") or pool == "map":
            raise UserError(
                f"{field}.target projected needs a linear projection of each token, {config.name} projects otherwise; "
                "set it to norm"
            )
        arch["num_classes"] = tower["embed_dim"]
    return arch


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
