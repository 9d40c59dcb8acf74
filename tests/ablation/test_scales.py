"""What each --scale stands for, typed out."""

from pathlib import Path

import pytest

from hdscale.ablation.jobs import JobBuilder, Settings
from hdscale.ablation.paper_tables import TABLES
from hdscale.ablation.scales import SCALES, Scale, find_scale
from hdscale.config.loading import flat_fields, load_recipe
from hdscale.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
DEMO, REAL = SCALES["demo"], SCALES["b-in1k"]


def test_the_demo_is_two_ranks_on_the_cpu_with_digits_and_masks_made_in_the_step():
    assert DEMO._replace(teachers={}, trained={}, notes=(), stand_ins={}) == Scale(
        name="demo",
        recipe=ROOT / "launch/recipes/demo_hybrid.yaml",
        overrides=("data.shards={output}/shards", "mask.source=online"),
        teachers={},
        trained={},
        epochs={"ablation": "18", "main": "18", "stage": "18", "long": "54"},
        ranks=2,
        on_cpu=True,
        stores_masks=False,
        shards=("--source", "digits", "--val-fraction", "0.2", "--samples-per-shard", "256"),
        train_samples=None,
        notes=(),
        stand_ins={},
    )
    assert DEMO.is_demo
    assert DEMO.notes == (
        "1,797 scanned digits, students and teachers of 4 layers, 64 wide; 18 epochs unless the command says "
        "otherwise. Not the paper's setting.",
    )
    assert {name: note.split(" the supervised")[0] for name, note in DEMO.stand_ins.items()} == {
        "deit": "For DeiT stands",
        "clip": "For CLIP stands",
        "dino": "For DINO stands",
    }


def test_the_paper_s_scale_is_vit_b_for_300_epochs_and_100_in_ablations_on_8_gpus():
    assert REAL._replace(teachers={}, trained={}, notes=()) == Scale(
        name="b-in1k",
        recipe=ROOT / "launch/recipes/vit_b_in1k.yaml",
        overrides=(),
        teachers={},
        trained={},
        epochs={"ablation": "100", "main": "300", "stage": "150", "long": "300"},
        ranks=8,
        on_cpu=False,
        stores_masks=True,
        shards=(),
        train_samples=200_000,
        notes=(),
        stand_ins={},
    )
    assert not REAL.is_demo
    assert REAL.notes == ("k-NN and linear probe learn from the first 200,000 training samples.",)


def pretraining(scale, table, row, output):
    """Return name, method and recipe of the teachers that a row has trained, and where a finished one is looked for."""
    jobs = JobBuilder(Settings(TABLES[table], SCALES[scale], output)).build_row(TABLES[table].row(row), 0).jobs
    found = []
    for job in (job for job in jobs if job.script == "launch/pretrain_teacher.py"):
        method_flag, method, recipe_flag, recipe, *overrides = job.arguments
        assert (method_flag, recipe_flag) == ("--method", "--recipe")
        resolved = load_recipe(Path(recipe), overrides)
        folder = Path(resolved.run.root) / resolved.run.name
        assert job.marker == folder / "DONE"
        base = flat_fields(load_recipe(Path(recipe)).model_dump(exclude={"run"}))
        changed = flat_fields(resolved.model_dump(exclude={"run"})).items() - base.items()
        found.append((str(folder.relative_to(output)), method, Path(recipe), dict(changed)))
    return found


@pytest.mark.parametrize(
    ("row", "names"), [("tc", ["supervised"]), ("tm", ["mae"]), ("tc+tm", ["supervised", "mae"]), ("tc+tc", None)]
)
def test_the_demo_trains_an_mae_and_a_supervised_teacher(row, names, tmp_path):
    shards = {"data.shards": str(tmp_path / "shards")}
    recipe = ROOT / "launch/recipes/demo_teacher.yaml"
    assert pretraining("demo", "3", row, tmp_path) == [
        (f"teachers/{name}", name, recipe, shards) for name in names or ["supervised"]
    ]
    assert {name: training.found_at for name, training in DEMO.trained.items()} == {
        "mae": Path("demo/runs/mae"),
        "supervised": Path("demo/runs/supervised"),
        "mae_weak": None,
    }


def test_the_demo_s_weak_mae_is_trained_for_5_epochs(tmp_path):
    recipe = ROOT / "launch/recipes/demo_teacher.yaml"
    weak = {"data.shards": str(tmp_path / "shards"), "schedule.epochs": 5.0, "schedule.warmup_epochs": 1.0}
    assert pretraining("demo", "4", "tc+weak", tmp_path) == [
        ("teachers/supervised", "supervised", recipe, {"data.shards": str(tmp_path / "shards")}),
        ("teachers/mae_weak", "mae", recipe, weak),
    ]


def test_table_4_s_weak_mae_is_trained_on_imagenet_100_for_100_epochs(tmp_path):
    (weak,) = pretraining("b-in1k", "4", "tc+weak", tmp_path)
    assert weak == (
        "teachers/mae_in100",
        "mae",
        ROOT / "launch/recipes/vit_b_in1k.yaml",
        {
            "data.shards": "shards/imagenet100",
            "student.drop_path": 0.0,
            "feature_teacher": None,
            "relation_teacher": None,
            "mask.strategy": "none",
            "optim.clip": 0.0,  # MAE's
            "schedule.epochs": 100.0,
        },
    )
    assert REAL.trained["mae_in100"].found_at is None
    assert pretraining("b-in1k", "4", "tc+tm", tmp_path) == []  # public weights are downloaded


def test_a_scale_that_is_not_there_is_named():
    assert find_scale("demo") is DEMO
    assert find_scale("b-in1k") is REAL
    with pytest.raises(UserError, match="--scale must be one of demo, b-in1k, got l-in21k"):
        find_scale("l-in21k")
