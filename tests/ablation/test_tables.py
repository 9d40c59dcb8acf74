import re
from pathlib import Path

import pytest

from hdscale.ablation.jobs import JobBuilder, Settings
from hdscale.ablation.paper_tables import TABLES, find_table
from hdscale.ablation.scales import SCALES
from hdscale.config.loading import changed_fields, load_recipe
from hdscale.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


def recipe_of(table, row, scale, tmp_path):
    builder = JobBuilder(Settings(TABLES[table], SCALES[scale], tmp_path))
    return builder.build_row(TABLES[table].row(row), 0).recipe


def test_every_row_has_a_name_of_its_own_that_a_folder_may_have_and_is_compared_with_a_row_of_its_table():
    for table in TABLES.values():
        keys = [row.key for row in table.rows]
        assert len(set(keys)) == len(keys)
        assert all(re.fullmatch(r"[a-z0-9+.-]+", key) for key in keys)
        assert {table.compared_with(row) for row in table.rows} <= set(keys)
        # A row without the paper's figures in a table is a step on the way to one with them.
        unnamed = [row.key for row in table.rows if row.paper is None]
        assert table.is_figure or all(key.endswith("stage-1") for key in unnamed)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("table", TABLES)
def test_every_row_resolves_to_a_valid_recipe(table, scale, tmp_path):
    all_jobs = JobBuilder(Settings(TABLES[table], SCALES[scale], tmp_path)).build(TABLES[table].rows, 2)
    trained = [row_jobs for row_jobs in all_jobs if row_jobs.folder is not None]
    assert [row_jobs.row for row_jobs in all_jobs if row_jobs.seed == 0] == list(TABLES[table].rows)
    assert {row_jobs.recipe.run.seed for row_jobs in trained} == {0, 1}
    for row_jobs in trained:
        # The command says the same as the recipe: what is trained is what was checked.
        _, path, *overrides = row_jobs.jobs[-1].arguments
        assert load_recipe(Path(path), overrides) == row_jobs.recipe
        assert row_jobs.folder == tmp_path / "runs" / row_jobs.recipe.run.name


@pytest.mark.parametrize(
    ("row", "name"),
    [
        ("9-distill-deit", "distill_deit_b"),
        ("9-distill-mae", "distill_mae_b"),
        ("9-distill-clip", "distill_clip_b"),
        ("9-fd-deit", "fd_deit_b"),
        ("9-fd-mae", "fd_mae_b"),
        ("9-fd-clip", "fd_clip_b"),
        ("9-dbot-deit-stage-1", "dbot_deit_b"),
        ("9-dbot-deit", "dbot_deit_b_stage2"),
        ("9-hybrid-deit", "hybrid_deit_b"),
        ("9-hybrid-clip", "vit_b_in1k"),
        ("11-hybrid", "hybrid_dino_b"),
        ("fig2-reconstruction", "reconstruct_deit_b"),
    ],
)
def test_rows_are_the_recipes_of_the_same_name(row, name, tmp_path):
    table, _, key = row.partition("-")
    ours = recipe_of(table, key, "b-in1k", tmp_path)
    theirs = load_recipe(ROOT / f"launch/recipes/{name}.yaml")
    differences = [field for field, *_ in changed_fields(ours, theirs)]
    if not theirs.mask.chosen_by_teacher:  # nobody forwards images for masks
        differences = [field for field in differences if field != "mask.images_per_forward"]
    assert differences == []


def test_an_unknown_table_or_row_is_named():
    with pytest.raises(UserError, match=r"table must be one of 3, 4, .*fig9, got 10"):
        find_table("10")
    with pytest.raises(UserError, match=r"--rows: table 8 has no row 'all'; its rows are none, random, "):
        TABLES["8"].select(["none", "all"])
