import shlex

import pytest

from hdscale.ablation.jobs import JobBuilder, Settings
from hdscale.ablation.paper_tables import TABLES
from hdscale.ablation.running import Launcher, listing
from hdscale.ablation.scales import SCALES
from hdscale.ablation.table import Row, Table
from hdscale.errors import UserError

DEMO, REAL = SCALES["demo"], SCALES["b-in1k"]


def jobs_of(table, scale, output, rows=(), seeds=1, overrides=()):
    settings = Settings(table, scale, output, tuple(overrides))
    return JobBuilder(settings).build(table.select(rows), seeds)


def test_tables_share_the_run_of_equal_recipes(tmp_path):
    (three,) = jobs_of(TABLES["3"], DEMO, tmp_path, ["tc+tm"])
    assert three.folder.name.startswith("3-tc+tm-")
    (eight,) = jobs_of(TABLES["8"], DEMO, tmp_path, ["none"])
    assert eight.folder.name != three.folder.name  # nothing has been trained yet: each has its own name
    three.folder.mkdir(parents=True)
    for table, row in (("8", "none"), ("7", "10-11"), ("12", "a-1.0"), ("12", "b-1.0"), ("13", "deit-100")):
        (row_jobs,) = jobs_of(TABLES[table], DEMO, tmp_path, [row])
        assert row_jobs.folder == three.folder, (table, row)
    # What changes the result is another run.
    for rows, overrides in ((["random"], []), (["none"], ["optim.lr=1e-3"]), (["none"], ["data.views=2"])):
        (row_jobs,) = jobs_of(TABLES["8"], DEMO, tmp_path, rows, overrides=overrides)
        assert row_jobs.folder != three.folder


@pytest.mark.parametrize("scale", [DEMO, REAL], ids=["demo", "b-in1k"])
def test_figure_6_shows_the_runs_of_table_11(scale, tmp_path):
    folders = {}
    for row_jobs in jobs_of(TABLES["11"], scale, tmp_path):
        folders[row_jobs.row.key] = row_jobs.folder
        if row_jobs.folder is not None:
            row_jobs.folder.mkdir(parents=True)
    assert {row_jobs.row.key: row_jobs.folder for row_jobs in jobs_of(TABLES["fig6"], scale, tmp_path)} == folders


def test_equal_rows_of_one_table_are_one_run_for_each_seed(tmp_path):
    all_jobs = jobs_of(TABLES["7"], DEMO, tmp_path, ["1-11", "9-11"], seeds=2)
    assert [row_jobs.seed for row_jobs in all_jobs] == [0, 0, 1, 1]
    assert all_jobs[0].folder == all_jobs[1].folder != all_jobs[2].folder == all_jobs[3].folder


def test_the_order_is_a_whole_table_under_the_first_seed_and_teachers_once(tmp_path):
    all_jobs = jobs_of(TABLES["11"], DEMO, tmp_path, seeds=2)
    assert [(row_jobs.seed, row_jobs.row.key) for row_jobs in all_jobs] == [
        (0, "mae"),
        (0, "dino"),
        (0, "distill-dino"),
        (0, "distill-mae"),
        (0, "hybrid"),
        (1, "distill-dino"),
        (1, "distill-mae"),
        (1, "hybrid"),
    ]


def test_teachers_and_shards_are_made_once_for_all_rows(tmp_path):
    all_jobs = jobs_of(TABLES["3"], DEMO, tmp_path)
    assert [job.name for job in all_jobs[0].jobs[:-1]] == ["shards", "supervised"]
    assert [job.name for job in all_jobs[-1].jobs[:-1]] == ["shards", "supervised", "mae"]
    assert len({job.marker for row_jobs in all_jobs for job in row_jobs.jobs}) == 3 + len(all_jobs)


def test_masks_are_stored_once_for_rows_that_share_them(tmp_path):
    stored = ("data.views=4", "mask.source=store")
    jobs = {row_jobs.row.key: row_jobs.jobs for row_jobs in jobs_of(TABLES["13"], REAL, tmp_path, overrides=stored)}
    assert [job.script for job in jobs["deit-100"]] == ["launch/train.py"]
    short, long, clip = (jobs[key][0] for key in ("deit-100-masked", "deit-300-masked", "clip-100-masked"))
    assert short.script == "launch/precompute_masks.py"
    assert short.marker == long.marker == clip.marker
    assert f"mask.store={short.marker.with_suffix('')}" in jobs["clip-100-masked"][1].arguments
    (other,) = jobs_of(TABLES["8"], REAL, tmp_path, ["progressive-50"], overrides=stored)
    assert other.jobs[0].marker != short.marker


def test_a_row_may_be_taught_by_another_row_s_student(tmp_path):
    rows = (
        Row("first", "First", ("feature_teacher=@deit",)),
        Row("second", "Second", ("feature_teacher=@student:first",)),
    )
    table = Table("x", "two stages", "first", rows, ("relation_teacher=null", "mask.strategy=none"))
    first, second = jobs_of(table, DEMO, tmp_path)
    assert [job.script.rpartition("/")[2] for job in second.jobs] == [
        "make_shards.py",
        "pretrain_teacher.py",
        "train.py",
        "export.py",
        "train.py",
    ]
    assert second.jobs[2] == first.jobs[-1]
    assert second.recipe.feature_teacher.weights == str(first.folder / "student.safetensors")
    # Selected alone, it still has its teacher made, under its own seed.
    alone = jobs_of(table, DEMO, tmp_path, ["second"], seeds=2)
    assert [row_jobs.jobs[2].arguments[-2] for row_jobs in alone] == ["run.seed=0", "run.seed=1"]


def test_a_row_with_an_invalid_recipe_is_named(tmp_path):
    table = Table("x", "wrong", "a", (Row("a", "A", ("mask.keep_ratio=2",)),))
    with pytest.raises(UserError, match=r"table x, row a, scale demo: argument 'mask\.keep_ratio=2'"):
        jobs_of(table, DEMO, tmp_path)


def test_the_listing_shows_each_command_once_and_what_is_done(tmp_path):
    all_jobs = jobs_of(TABLES["8"], DEMO, tmp_path, ["none", "direct"], seeds=2)
    (tmp_path / "shards.done").write_text("")
    lines = listing(all_jobs, Launcher(DEMO, 2, None, tmp_path / "logs")).splitlines()
    assert [line for line in lines if line.startswith("# ") and "done" not in line] == [
        "# none, seed 0: No, 100 %",
        "# direct, seed 0: Direct, 35 %",
        "# none, seed 1: No, 100 %",
        "# direct, seed 1: Direct, 35 %",
    ]
    done = [line for line in lines if line.startswith("# done already: python ")]
    assert len(done) == 1
    commands = [shlex.split(line) for line in lines if line.startswith("deepspeed --num_gpus 2 ")]
    assert [command[3].rpartition("/")[2] for command in commands] == ["pretrain_teacher.py"] * 2 + ["train.py"] * 4
    assert len(lines) == 4 + 1 + 6
