import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from hdscale.cli import exit_code
from hdscale.config.loading import dump_recipe
from hdscale.config.recipe import Recipe
from hdscale.distiller import build_distiller
from hdscale.pretraining import SupervisedClassifier
from hdscale.runs.checkpoint import save_checkpoint
from hdscale.student.build import build_student
from hdscale.teachers.files import load_teacher_file
from hdscale.types import TeacherShapes

ROOT = Path(__file__).resolve().parents[2]
STUDENT = {
    "model": "vit_tiny_patch16_224",
    "patch_size": 8,
    "embed_dim": 32,
    "depth": 3,
    "num_heads": 4,
    "mlp_ratio": 2.0,
    "drop_path": 0.0,
}


def command(name):
    """Return the `main` of a script, which is no module of the package."""
    return runpy.run_path(str(ROOT / name))["main"]


@pytest.fixture(scope="module")
def main():
    return command("launch/evaluate.py")


@pytest.fixture(scope="module")
def process_group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def write_run(folder, recipe, module, state=None):
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text(dump_recipe(recipe))
    shard = {f"weight/{name}": tensor.detach().clone() for name, tensor in module.named_parameters()}
    shard |= {f"buffer/{name}": tensor.clone() for name, tensor in module.named_buffers()}
    for step in (10, 20):
        save_checkpoint(
            folder, shard, {"step": step, "fingerprints": {}, **(state or {})}, rank=0, world_size=1, keep=3
        )
    lines = [{"step": step, "images_per_second": rate} for step, rate in ((5, 100.0), (10, 900.0), (15, 300.0))]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture(scope="module")
def world(tmp_path_factory, process_group):
    """Shards of digits, two teacher files, a feature-only run, a hybrid run and a pretraining run."""
    root = tmp_path_factory.mktemp("world")
    make_shards = command("data_tools/make_shards.py")
    arguments = ["--source", "digits", "--output", str(root / "shards"), "--val-fraction", "0.2", "--workers", "1"]
    assert make_shards(arguments) == 0

    def recipe(**sections):
        data = {"shards": str(root / "shards"), "img_size": 32, "workers": 0}
        evaluation = {"attention_images": 8}
        return Recipe.model_validate({"data": data, "student": STUDENT, "evaluation": evaluation, **sections})

    export = command("launch/export.py")
    alone = recipe(feature_teacher=None, relation_teacher=None, mask={"strategy": "none"})
    for method, seed in (("mae", 1), ("supervised", 2)):
        encoder = build_student(alone.student, 32, seed=seed)
        module = SupervisedClassifier(encoder, 10, alone.pretrain, seed=seed)
        write_run(root / "runs" / method, alone, module, {"fingerprints": {"method": method}})
        output = root / f"{method}.safetensors"
        assert export(["--run", str(root / "runs" / method), "--output", str(output)]) == 0
    teachers = {
        field: {"source": "file", "weights": str(root / f"{method}.safetensors"), "sharding": sharding}
        for field, method, sharding in (
            ("feature_teacher", "supervised", "zero3"),
            ("relation_teacher", "mae", "replicate"),
        )
    }
    for name, given in (
        ("feature_only", {**teachers, "relation_teacher": None, "mask": {"strategy": "none"}}),
        ("hybrid", teachers),
    ):
        made = recipe(**given)
        distiller = build_distiller(
            made.student,
            made.relation,
            made.loss,
            img_size=32,
            seed=3,
            teachers=TeacherShapes(
                feature_dim=32, relation_heads=None if name == "feature_only" else 4, relation_has_cls=True
            ),
        )
        # As of now, and as of an older run, whose checkpoints do not say.
        state = {"cls_in_loss": True} if name == "hybrid" else None
        write_run(root / "runs" / name, made, distiller, state)
    return root


def test_knn_prints_the_accuracy_of_the_newest_checkpoint(main, world, capsys):
    assert main(["knn", "--run", str(world / "runs/hybrid"), "--train-samples", "200"]) == 0
    line = capsys.readouterr().out.strip()
    assert line.startswith(f"{world / 'runs/hybrid'} at step 20: k-NN accuracy ")
    assert line.endswith("200 training samples)")


def test_probe_prints_the_accuracy_of_a_linear_classifier(main, world, capsys):
    assert main(["probe", "--run", str(world / "runs/hybrid"), "--train-samples", "200"]) == 0
    line = capsys.readouterr().out.strip()
    assert line.startswith(f"{world / 'runs/hybrid'} at step 20: linear probe accuracy ")
    assert line.endswith("200 training samples)")


def test_the_summary_has_a_row_for_everything_and_curves_in_tensorboard(main, world, capsys):
    runs = [str(world / "runs" / name) for name in ("feature_only", "hybrid")]
    output = world / "new" / "summary.json"
    assert main(["summary", "--run", runs[0], "--run", runs[1], "--output", str(output)]) == 0
    text = capsys.readouterr().out
    content = json.loads(output.read_text())
    assert [row["name"] for row in content["rows"]] == [
        "raw pixels",
        "random student",
        "supervised teacher",
        "MAE teacher",
        "student feature_only",
        "student hybrid",
    ]
    assert all(row["name"] in text for row in content["rows"])
    assert content["rows"][0]["knn"]["accuracy"] > 0.95  # what k-NN reaches on the pixels of these digits
    assert [row["images_per_second"] for row in content["rows"]] == [None, None, None, None, 300.0, 300.0]
    # Both students have the same random weights here.
    assert content["rows"][4]["knn"] == content["rows"][5]["knn"]
    assert text.strip().endswith(
        "student hybrid against student feature_only: +0.0 points, standard error "
        f"{100 * content['differences'][0]['standard_error']:.1f}: no difference"
    )
    events = EventAccumulator(str(Path(runs[1]) / "tensorboard"))
    events.Reload()
    tags = {tag.partition("/")[2] for tag in events.Tags()["scalars"]}
    assert tags == {"random_student", "supervised_teacher", "MAE_teacher", "student_hybrid"}
    scalars = events.Scalars("head_distance_by_layer/student_hybrid")
    assert [scalar.step for scalar in scalars] == [0, 1, 2]
    assert [scalar.value for scalar in scalars] == pytest.approx(content["rows"][5]["head_distance"])
    heads = np.array(content["rows"][5]["head_distance_by_head"])
    assert heads.shape == (3, 4)
    assert heads.mean(axis=1) == pytest.approx(content["rows"][5]["head_distance"])
    scalars = events.Scalars("head_distance_sd_over_heads_by_layer/student_hybrid")
    assert [scalar.value for scalar in scalars] == pytest.approx(heads.std(axis=1), rel=1e-5)


def test_export_prints_code_that_timm_runs(world, capsys):
    output = world / "student.safetensors"
    assert (
        command("launch/export.py")(["--run", str(world / "runs/hybrid"), "--output", str(output), "--step", "10"]) == 0
    )
    text = capsys.readouterr().out
    assert text.splitlines()[0] == f"{output}: student of {world / 'runs/hybrid'} at step 10"
    names = {}
    exec(text.partition("\n\n")[2], names)
    assert isinstance(names["model"], timm.models.VisionTransformer)
    assert torch.equal(names["model"].cls_token, load_file(output)["cls_token"])
    class_token, patch_mean = names["features"](torch.zeros(2, 3, 32, 32))
    assert class_token.shape == patch_mean.shape == (2, 32)


@pytest.mark.parametrize(("name", "marked"), [("hybrid", False), ("feature_only", True), ("mae", True)])
def test_export_marks_a_class_token_that_the_checkpoint_does_not_say_was_in_a_loss(name, marked, world, capsys):
    output = world / f"{name}-marked.safetensors"
    assert command("launch/export.py")(["--run", str(world / "runs" / name), "--output", str(output)]) == 0
    assert ("class_token = tokens[:, 0]  # (B, 32); not trained to be read" in capsys.readouterr().out) == marked
    assert load_teacher_file(output, "").cls_in_loss == (not marked)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["export", "--step", "15", "--output", "x.safetensors"],
            r"--step 15: there is no such checkpoint; .*has the steps 10, 20",
        ),
        (["export", "--output", "x.bin"], r"x\.bin must end in \.safetensors"),
        (["knn", "evaluation.split=test"], r"test\.manifest\.json is missing.*--val-fraction"),
        (["knn", "evaluation.split=train"], r"evaluation\.split must be another split than data\.split, got train"),
        (["probe", "--train-samples", "0"], "--train-samples must be at least 1, got 0: leave it out for all"),
        (["summary", "--output", "/dev/null/summary.json"], r"/dev/null/summary\.json cannot be written"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, message, world, tmp_path, capsys):
    run = world / "runs/hybrid"
    name, *rest = arguments
    if "=" in rest[-1]:
        field = rest.pop()
        changed = tmp_path / "hybrid"
        changed.mkdir()
        (changed / "checkpoints").symlink_to(run / "checkpoints")
        value = field.partition("=")[2]
        (changed / "recipe.yaml").write_text((run / "recipe.yaml").read_text().replace("split: val", f"split: {value}"))
        run = changed
    script = "launch/export.py" if name == "export" else "launch/evaluate.py"
    head = [] if name == "export" else [name]
    assert exit_code(command(script), [*head, "--run", str(run), *rest]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert re.search(message, line), line


def test_runs_that_cannot_share_a_table_are_refused(main, world, tmp_path, capsys):
    run = world / "runs/hybrid"
    other = tmp_path / "other"
    other.mkdir()
    (other / "checkpoints").symlink_to(run / "checkpoints")
    (other / "recipe.yaml").write_text((run / "recipe.yaml").read_text().replace("neighbors: 5", "neighbors: 7"))
    assert exit_code(main, ["summary", "--run", str(run), "--run", str(other)]) == 2
    assert "evaluation.neighbors is 7, but 5 in" in capsys.readouterr().err
    assert exit_code(main, ["summary", "--run", str(run), "--run", str(run)]) == 2
    assert "--run: hybrid is there 2 times" in capsys.readouterr().err


def test_the_commands_start_without_deepspeed():
    code = (
        "import runpy, sys; runpy.run_path('launch/evaluate.py'); runpy.run_path('launch/export.py'); "
        "sys.exit('deepspeed' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
