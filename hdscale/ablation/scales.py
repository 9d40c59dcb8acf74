"""At which size a table is trained: base recipe, teachers, lengths, and what has to be there first."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from hdscale.errors import UserError
from hdscale.provenance import ROOT

OUTPUT = "{output}"
"""Stands for the ablation's folder in the strings below."""


class Training(NamedTuple):
    """How launch/pretrain_teacher.py makes a teacher."""

    method: str
    recipe: Path
    overrides: tuple[str, ...]
    found_at: Path | None = None  # a run of an earlier `make demo` that is taken instead when it is the same


class Scale(NamedTuple):
    """Everything that a table leaves to the machine."""

    name: str
    recipe: Path
    overrides: tuple[str, ...]  # of all rows
    teachers: Mapping[str, str]  # `deit` to the recipe's section, in YAML
    trained: Mapping[str, Training]  # `OUTPUT/teachers/NAME`, where a section's `weights` lie
    epochs: Mapping[str, str]
    ranks: int
    on_cpu: bool
    stores_masks: bool  # in the ablation's folder, where rows have `mask.source: store`
    shards: tuple[str, ...] = ()  # arguments of data_tools/make_shards.py; empty: they are the user's
    train_samples: int | None = None  # that k-NN and probe learn from
    notes: tuple[str, ...] = ()
    stand_ins: Mapping[str, str] = {}  # teachers that are not what their name says

    @property
    def is_demo(self) -> bool:
        """Whether rows have their own overrides here, for a student of 4 layers."""
        return self.name == "demo"


def _file(name: str) -> str:
    return f"{{source: file, weights: {OUTPUT}/teachers/{name}/encoder.safetensors, sharding: replicate}}"


_RECIPES = ROOT / "launch/recipes"
_DEMO_TEACHER = _RECIPES / "demo_teacher.yaml"
_DEMO_SHARDS = f"data.shards={OUTPUT}/shards"
_SUPERVISED = "the supervised teacher trained on the digits"

_DEMO = Scale(
    name="demo",
    recipe=_RECIPES / "demo_hybrid.yaml",
    # Masks in the step: the relation teacher runs anyway, and a launch of precompute_masks.py takes longer.
    overrides=(_DEMO_SHARDS, "mask.source=online"),
    teachers={
        "mae": _file("mae"),
        "mae_weak": _file("mae_weak"),
        **dict.fromkeys(("deit", "clip", "dino"), _file("supervised")),
    },
    trained={
        "mae": Training("mae", _DEMO_TEACHER, (_DEMO_SHARDS,), Path("demo/runs/mae")),
        "supervised": Training("supervised", _DEMO_TEACHER, (_DEMO_SHARDS,), Path("demo/runs/supervised")),
        "mae_weak": Training("mae", _DEMO_TEACHER, (_DEMO_SHARDS, "schedule.epochs=5", "schedule.warmup_epochs=1")),
    },
    epochs={"ablation": "18", "main": "18", "stage": "18", "long": "54"},
    ranks=2,
    on_cpu=True,
    stores_masks=False,
    shards=("--source", "digits", "--val-fraction", "0.2", "--samples-per-shard", "256"),
    notes=(
        "1,797 scanned digits, students and teachers of 4 layers, 64 wide; 18 epochs unless the command "
        "says otherwise. Not the paper's setting.",
    ),
    stand_ins={
        "deit": f"For DeiT stands {_SUPERVISED}.",
        "clip": f"For CLIP stands {_SUPERVISED}: there is no text here, rows differ from DeiT's in name only.",
        "dino": f"For DINO stands {_SUPERVISED}: rows differ from DeiT's in name only.",
    },
)

_VIT_B = _RECIPES / "vit_b_in1k.yaml"

_B_IN1K = Scale(
    name="b-in1k",
    recipe=_VIT_B,
    overrides=(),
    teachers={
        "mae": "{source: timm, name: vit_base_patch16_224.mae, sharding: replicate}",
        "deit": "{source: timm, name: deit_base_patch16_224.fb_in1k, sharding: replicate}",
        "clip": "{source: open_clip, name: ViT-B-16, weights: openai, sharding: replicate}",
        "dino": "{source: timm, name: vit_base_patch16_224.dino, sharding: replicate}",
        "mae_weak": _file("mae_in100"),
    },
    trained={
        "mae_in100": Training(
            "mae",
            _VIT_B,
            (
                "data.shards=shards/imagenet100",
                "data.views=fresh",
                "student.init=mae",
                "student.drop_path=0",
                "feature_teacher=null",
                "relation_teacher=null",
                "mask.strategy=none",
                # MAE's: 1.5e-4 per 256 images, and gradients as they are.
                "optim.lr=6.0e-4",
                "optim.clip=0",
                "schedule.epochs=100",
                "schedule.warmup_epochs=40",
            ),
        )
    },
    epochs={"ablation": "100", "main": "300", "stage": "150", "long": "300"},
    ranks=8,
    on_cpu=False,
    stores_masks=True,
    train_samples=200_000,
    notes=("k-NN and linear probe learn from the first 200,000 training samples.",),
)

SCALES = {scale.name: scale for scale in (_DEMO, _B_IN1K)}


def find_scale(name: str) -> Scale:
    """Return a scale.

    Raises:
        UserError: there is none of this name.
    """
    if name not in SCALES:
        raise UserError(f"--scale must be one of {', '.join(SCALES)}, got {name}")
    return SCALES[name]
