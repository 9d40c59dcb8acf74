import re
from pathlib import Path

import pytest

from hdscale.ablation.plan import Planner, Settings
from hdscale.ablation.rows import Paper
from hdscale.ablation.scales import SCALES
from hdscale.ablation.tables import TABLES, find_table
from hdscale.config.loading import changed_fields, load_recipe
from hdscale.errors import UserError

ROOT = Path(__file__).resolve().parents[2]

# A few rows of each table, typed from the paper.
FIGURES = {
    ("3", "tc"): (47.5, 41.8),
    ("3", "tm+tm"): (48.9, 43.2),
    ("3", "tc+tm"): (50.0, 43.9),
    ("4", "tc+tc"): (49.1, 43.2),
    ("4", "tc+weak"): (49.5, 43.5),
    ("5", "last"): (47.7, 42.1),
    ("5", "attention"): (49.8, 43.7),
    ("6", "features"): (49.9, 44.0),
    ("6", "relation"): (50.4, 44.1),
    ("7", "1-11"): (48.8, 43.0),
    ("7", "5-7"): (48.3, 42.7),
    ("7", "11"): (49.2, 43.3),
    ("8", "none"): (50.0, 43.9),
    ("8", "random"): (49.2, 43.3),
    ("8", "progressive-50"): (48.4, 42.8),
    ("8", "progressive-90"): (49.9, 43.8),
    ("9", "fd-mae"): (48.1, 42.6, 47.0),
    ("9", "dbot-deit"): (47.5, 41.9, 47.9),
    ("9", "hybrid-clip"): (50.6, 44.4, 51.5),
    ("11", "dino"): (46.8, 41.5),
    ("11", "hybrid"): (49.6, 43.5),
    ("12", "a-0.1"): (48.2, 42.6),
    ("12", "a-1.0"): (50.0, 43.9),
    ("12", "b-0.3"): (49.8, 43.8),
    ("13", "deit-300-masked"): (50.3, 44.2),
    ("13", "clip-100-masked"): (50.2, 43.9),
}
NUM_ROWS = {"3": 5, "4": 5, "5": 4, "6": 3, "7": 6, "8": 6, "9": 12, "11": 5, "12": 12, "13": 8}


def recipe_of(table, row, scale, tmp_path):
    planner = Planner(Settings(TABLES[table], SCALES[scale], tmp_path))
    return planner.row(TABLES[table].row(row), 0).recipe


@pytest.mark.parametrize(("place", "figures"), FIGURES.items(), ids=lambda value: "-".join(map(str, value)))
def test_figures_are_the_paper_s(place, figures):
    table, row = place
    assert TABLES[table].row(row).paper == Paper(*figures)


def test_every_table_has_the_paper_s_rows_and_compares_them_with_rows_it_has():
    assert {key: len(TABLES[key].rows) for key in NUM_ROWS} == NUM_ROWS
    assert [key for key in TABLES if key.startswith("fig")] == ["fig1", "fig2", "fig3", "fig5", "fig7", "fig8", "fig9"]
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
    plans = Planner(Settings(TABLES[table], SCALES[scale], tmp_path)).plan(TABLES[table].rows, 2)
    trained = [plan for plan in plans if plan.folder is not None]
    assert [plan.row for plan in plans if plan.seed == 0] == list(TABLES[table].rows)
    assert {plan.recipe.run.seed for plan in trained} == {0, 1}
    for plan in trained:
        # The command says the same as the recipe: what is trained is what was checked.
        _, path, *overrides = plan.jobs[-1].arguments
        assert load_recipe(Path(path), overrides) == plan.recipe
        assert plan.folder == tmp_path / "runs" / plan.recipe.run.name


def test_table_3_takes_the_teachers_that_it_names(tmp_path):
    def sections(row):
        recipe = recipe_of("3", row, "b-in1k", tmp_path)
        assert recipe.mask.strategy == "none"
        assert recipe.schedule.epochs == 100
        teachers = (recipe.feature_teacher, recipe.relation_teacher)
        return tuple(None if teacher is None else teacher.name for teacher in teachers)

    deit, mae = "deit_base_patch16_224.fb_in1k", "vit_base_patch16_224.mae"
    assert sections("tc") == (deit, None)
    assert sections("tm") == (mae, None)
    assert sections("tc+tc") == (deit, deit)
    assert sections("tm+tm") == (mae, mae)
    assert sections("tc+tm") == (deit, mae)


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
    assert changed_fields(ours, theirs) == []


def test_table_7_counts_layers_from_1_and_the_recipe_from_0(tmp_path):
    assert recipe_of("7", "1-11", "b-in1k", tmp_path).relation.layers == tuple(range(11))
    assert recipe_of("7", "9-11", "b-in1k", tmp_path).relation.layers == (8, 9, 10)
    assert recipe_of("7", "10-11", "b-in1k", tmp_path).relation.layers == (-3, -2)
    assert recipe_of("7", "11", "b-in1k", tmp_path).relation.layers == (10,)
    assert recipe_of("7", "11", "demo", tmp_path).relation.layers == (2,)


def test_table_8_keeps_the_paper_s_shares(tmp_path):
    masks = {row.key: recipe_of("8", row.key, "demo", tmp_path).mask for row in TABLES["8"].rows}
    assert {key: mask.strategy for key, mask in masks.items()} == {
        "none": "none",
        "random": "random",
        "direct": "direct",
        "progressive-50": "progressive",
        "progressive-70": "progressive",
        "progressive-90": "progressive",
    }
    assert [masks[key].keep_ratio for key in ("random", "direct")] == [0.35, 0.35]
    assert [masks[f"progressive-{stage}"].stage_keep_ratio for stage in (50, 70, 90)] == [0.5, 0.7, 0.9]


def test_table_13_compares_masked_runs_with_unmasked_ones_of_the_same_length(tmp_path):
    table = TABLES["13"]
    assert table.compared_with(table.row("clip-300-masked")) == "clip-300"
    assert table.compared_with(table.row("clip-300")) == "clip-100"
    assert recipe_of("13", "deit-300-masked", "b-in1k", tmp_path).schedule.epochs == 300
    assert recipe_of("13", "deit-300", "demo", tmp_path).schedule.epochs == 54


def test_an_unknown_table_or_row_is_named():
    with pytest.raises(UserError, match=r"table must be one of 3, 4, .*fig9, got 10"):
        find_table("10")
    with pytest.raises(UserError, match=r"--rows: table 8 has no row 'all'; its rows are none, random, "):
        TABLES["8"].select(["none", "all"])
