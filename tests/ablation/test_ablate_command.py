"""launch/ablate.py: two rows of Table 8 under the real launcher, a few steps each, with teachers of random weights."""

import csv
import json
import re
import runpy
from pathlib import Path

import pytest

from hdscale.cli import exit_code
from hdscale.config.loading import load_recipe
from hdscale.student.build import STATE_PREFIX, build_student, student_arch
from hdscale.teachers.files import save_teacher_file

ROOT = Path(__file__).resolve().parents[2]
SHORT = ["schedule.epochs=0.2", "schedule.warmup_epochs=0.1", "evaluation.attention_images=8", "data.workers=0"]
main = runpy.run_path(str(ROOT / "launch/ablate.py"))["main"]


def write_teachers(output):
    recipe = load_recipe(ROOT / "launch/recipes/demo_teacher.yaml")
    arch = student_arch(recipe.student, recipe.data.img_size)
    for seed, name in enumerate(("mae", "supervised"), 1):
        student = build_student(recipe.student, recipe.data.img_size, seed=seed)
        state = {key.removeprefix(STATE_PREFIX): value for key, value in student.state_dict().items()}
        folder = output / "teachers" / name
        folder.mkdir(parents=True)
        save_teacher_file(folder / "encoder.safetensors", state, arch, (0.5,) * 3, (0.25,) * 3, kind=name)
        (folder / "DONE").write_text("")


def when_written(folder):
    names = ("DONE", "*.safetensors", "measures/*.json", "shards/*")
    return {path: path.stat().st_mtime_ns for name in names for path in folder.rglob(name)}


def test_a_table_is_trained_measured_written_and_continued(tmp_path, capsys):
    output = tmp_path / "out"
    write_teachers(output)
    command = ["8", "--output", str(output), "--ranks", "1", *SHORT]
    assert exit_code(main, [*command, "--rows", "none,progressive-70"]) == 0
    page = (output / "table-8.md").read_text()
    assert capsys.readouterr().out == f"{page}\n{output / 'table-8.md'}\n"
    assert "\n| No, 100 %                  |          50.0 |           43.9 | " in page
    assert "\n- Progressive, 34 % (70 %^3) against No, 100 %: k-NN " in page
    assert "; the paper: AP box -0.1, AP mask -0.1." in page
    assert re.search(r"`python launch/ablate\.py 8 --output .*`, commit [0-9a-f]{40}(-dirty)?, on \d+ cores of ", page)
    none, progressive = csv.DictReader((output / "table-8.csv").read_text().splitlines())
    for row in (none, progressive):
        assert 10 < float(row["knn"]) <= 100
        assert 10 < float(row["probe"]) <= 100
        assert len(row["nmi_by_layer"].split()) == 4
        assert [len(heads.split()) for heads in row["nmi_by_head"].split("; ")] == [4] * 4
        assert (output / "runs" / row["runs"] / "DONE").exists()
    # Of 64 tokens 20 are left, but both teachers see all.
    assert 0.3 < float(progressive["gflops_per_image"]) / float(none["gflops_per_image"]) < 0.8
    (measures,) = (output / "measures").glob("8-none-*.json")
    assert json.loads(measures.read_text())["knn"]["accuracy"] == pytest.approx(float(none["knn"]) / 100)

    # Again: nothing is made anew, and a row that cannot be trained is named beside the one that is there.
    before = when_written(output)
    assert exit_code(main, [*command, "--rows", "none"]) == 0
    assert when_written(output) == before
    assert (output / "table-8.md").read_text().replace("--rows none", "--rows none,progressive-70") == page
    capsys.readouterr()
    assert exit_code(main, [*command, "--rows", "none,random", "--dry-run"]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert len([line for line in listed if line.startswith("# done already: ")]) == 4
    assert [line.split()[0] for line in listed if not line.startswith("# ")] == ["deepspeed"]
    blocked = next(word for word in listed[-1].split() if word.startswith("run.name=")).partition("=")[2]
    (output / "runs" / blocked).write_text("a file where the run's folder should be")
    assert exit_code(main, [*command, "--rows", "none,random"]) == 1
    captured = capsys.readouterr()
    (line,) = [line for line in captured.err.splitlines() if line.startswith("failed: ")]
    assert line.startswith(f"failed: row random, seed 0: {blocked}: ")
    assert "\n## Failed\n\n- random, seed 0: " in captured.out
    assert "\n| Random, 35 %" in captured.out
    assert when_written(output) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["14"],
            "table must be one of 3, 4, 5, 6, 7, 8, 9, 11, 12, 13, fig1, fig2, fig3, fig5, fig6, fig7, fig8, fig9, "
            "got 14",
        ),
        (["8", "--rows", "none,all"], "--rows: table 8 has no row 'all'; its rows are none, random, direct, "),
        (["8", "--seeds", "0"], "--seeds must be at least 1, got 0"),
        (["8", "--ranks", "0"], "--ranks must be at least 1, got 0"),
        (["8", "--scale", "tiny"], "--scale must be one of demo, b-in1k, got tiny"),
        (["8", "--hostfile", "nowhere"], "--hostfile nowhere does not exist"),
        (["8", "optim.lrr=1"], "table 8, row none, scale demo: argument 'optim.lrr=1': unknown key optim.lrr"),
        (["8", "optim.lr"], "table 8, row none, scale demo: argument 'optim.lr' must be key=value"),
        (["8", "run.name=x"], "argument 'run.name=x': run.name is not for ablate.py: runs are named after"),
        (
            ["8", "run.root=x", "--dry-run"],
            "argument 'run.root=x': run.root is not for ablate.py: runs lie in --output",
        ),
        (["8", "mask.strategy=none"], "argument 'mask.strategy=none': rows of table 8 differ in mask.strategy, and"),
        (["8", "mask={strategy: none}"], "argument 'mask={strategy: none}': rows of table 8 differ in mask, and"),
        (["8", "run.seed=3"], "argument 'run.seed=3': run.seed is not for ablate.py: seeds count from 0; set --seeds"),
        (
            ["8", "--scale", "b-in1k", "mask.store=x"],
            "argument 'mask.store=x': mask.store is not for ablate.py: masks lie in --output",
        ),
        (["8", "--output", __file__, "--dry-run"], f"--output {__file__} is a file: choose another folder"),
        (["8", "--scale", "b-in1k", "data.shards=nowhere"], "nowhere holds no shards"),
        (["8", "--output", "/dev/null/out"], "--output /dev/null/out cannot be made"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(arguments, message, capsys):
    assert exit_code(main, arguments) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert line.startswith(f"error: {message}")


def test_overrides_are_not_asked_for_when_the_table_is_missing(capsys):
    with pytest.raises(SystemExit, match="2"):
        main([])
    assert capsys.readouterr().err.endswith("error: the following arguments are required: table\n")


def test_the_paper_s_scale_lists_masks_and_training_without_data_or_network(tmp_path, capsys):
    command = [
        "8",
        "--scale",
        "b-in1k",
        "--output",
        str(tmp_path),
        "--rows",
        "random,direct",
        "--seeds",
        "2",
        "--dry-run",
        *("data.views=4", "mask.source=store"),
    ]
    assert exit_code(main, command) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith("# ")] == [
        f"# {row}, seed {seed}: {name}, 35 %"
        for seed in (0, 1)
        for row, name in (("random", "Random"), ("direct", "Direct"))
    ]
    scripts = [line.split()[3].rpartition("/")[2] for line in lines if line.startswith("deepspeed --num_gpus 8 ")]
    assert scripts == 2 * ["train.py", "precompute_masks.py", "train.py"]
    assert list(tmp_path.iterdir()) == []
