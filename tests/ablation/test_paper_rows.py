"""Rows resolve to the recipes that the paper describes, at its scale and on the demo."""

import re

import pytest

from hdscale.ablation.jobs import JobBuilder, Settings
from hdscale.ablation.paper_tables import TABLES
from hdscale.ablation.scales import SCALES
from hdscale.ablation.table import Paper
from hdscale.config.loading import flat_fields, load_recipe
from tests.ablation.paper_rows import COMMON, HEADINGS, NOT_ON_THE_DEMO, ON_THE_DEMO, ROWS

# Section 4.1, and dBOT where that says no more; FD's settings and dBOT's stages are in their rows.
PAPER_TRAINING = {
    "data.img_size": 224,
    "data.views": "fresh",
    "data.crop_scale": (0.2, 1.0),
    "student.model": "vit_base_patch16_224",
    "student.drop_path": 0.2,
    "optim.global_batch_size": 1024,
    "optim.lr": 6e-4,
    "optim.betas": (0.9, 0.95),
    "optim.weight_decay": 0.05,
    "schedule.warmup_epochs": 40,
    "schedule.min_lr": 0.0,
    "mask.images_per_forward": 128,
}
DEMO_TRAINING = {"data.views": 4, "schedule.warmup_epochs": 2, "mask.images_per_forward": 16}
TEACHERS = {
    "mae": ("timm", "vit_base_patch16_224.mae", "pretrained"),
    "deit": ("timm", "deit_base_patch16_224.fb_in1k", "pretrained"),
    "clip": ("open_clip", "ViT-B-16", "openai"),
    "dino": ("timm", "vit_base_patch16_224.dino", "pretrained"),
    "mae_in100": ("file", "", "OUT/teachers/mae_in100/encoder.safetensors"),
}
DEMO_TEACHERS = {
    "mae": ("file", "", "OUT/teachers/mae/encoder.safetensors"),
    **dict.fromkeys(("deit", "clip", "dino"), ("file", "", "OUT/teachers/supervised/encoder.safetensors")),
    "mae_in100": ("file", "", "OUT/teachers/mae_weak/encoder.safetensors"),
}
STUDENTS = {
    f"student:{row}": ("file", "", f"OUT/runs/9-{row}/student.safetensors")
    for row in ("dbot-deit-stage-1", "dbot-mae-stage-1")
}
CASES = [pytest.param(table, *row, id=f"{table}-{row[0]}") for table, rows in ROWS.items() for row in rows]


def jobs_of(table, row, scale, output):
    return JobBuilder(Settings(TABLES[table], SCALES[scale], output)).build_row(TABLES[table].row(row), 0)


def fields(recipe, output):
    """Flatten a recipe; a teacher is (source, name, weights), where it lies is written without this test's folders."""
    values = recipe.model_dump(exclude={"run": True, "mask": {"store"}})
    teachers = {role: values.pop(role) for role in ("feature_teacher", "relation_teacher")}
    flat = flat_fields(values)
    for role, teacher in teachers.items():
        if teacher is not None:
            weights = re.sub(r"-[0-9a-f]{8}-seed0", "", teacher["weights"].replace(str(output), "OUT"))
            flat[role] = (teacher["source"], teacher["name"], weights)
            flat |= {f"{role}.{name}": teacher[name] for name in ("img_size", "target", "sharding")}
        else:
            flat[role] = None
    return flat


def expected(scale, teachers, row, output):
    """Put what is typed over the scale's own recipe."""
    base = fields(load_recipe(SCALES[scale].recipe), output) | COMMON | row
    for role in ("feature_teacher", "relation_teacher"):
        if base[role] is None:
            base = {name: value for name, value in base.items() if not name.startswith(f"{role}.")}
        else:
            base |= {role: (teachers | STUDENTS)[base[role]], f"{role}.img_size": None, f"{role}.sharding": "replicate"}
    return base


@pytest.mark.parametrize(("table", "key", "label", "figures", "reference", "recipe"), CASES)
def test_a_row_is_the_paper_s(table, key, label, figures, reference, recipe, tmp_path):
    row = TABLES[table].row(key)
    assert row.name == label
    assert row.paper == (None if figures is None else Paper(*figures))
    assert TABLES[table].compared_with(row) == reference
    row_jobs = jobs_of(table, key, "b-in1k", tmp_path)
    assert fields(row_jobs.recipe, tmp_path) == expected("b-in1k", TEACHERS, PAPER_TRAINING | recipe, tmp_path)
    assert (row_jobs.folder is None) == (list(recipe) == ["feature_teacher"])


@pytest.mark.parametrize(("table", "key", "label", "figures", "reference", "recipe"), CASES)
def test_a_row_on_the_demo_is_the_paper_s_scaled_down(table, key, label, figures, reference, recipe, tmp_path):
    del label, figures, reference
    scaled = {name: value for name, value in recipe.items() if name not in NOT_ON_THE_DEMO}
    scaled["schedule.epochs"] = 54 if (table, recipe.get("schedule.epochs")) == ("13", 300) else 18
    scaled |= ON_THE_DEMO.get((table, key), {})
    row_jobs = jobs_of(table, key, "demo", tmp_path)
    assert fields(row_jobs.recipe, tmp_path) == expected("demo", DEMO_TEACHERS, DEMO_TRAINING | scaled, tmp_path) | {
        "data.shards": str(tmp_path / "shards")
    }


def test_tables_and_figures_have_the_paper_s_captions_and_rows_in_its_order():
    assert {key: table.heading for key, table in TABLES.items()} == HEADINGS
    assert {key: [row.key for row in table.rows] for key, table in TABLES.items()} == {
        key: [row[0] for row in rows] for key, rows in ROWS.items()
    }
