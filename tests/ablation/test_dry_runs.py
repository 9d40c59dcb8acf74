"""launch/ablate.py --dry-run: every row of every table and figure, at the paper's scale and on the demo."""

import runpy
import shlex
from pathlib import Path

import pytest

from hdscale.cli import exit_code
from hdscale.config.loading import load_recipe
from tests.ablation.paper_rows import ROWS

ROOT = Path(__file__).resolve().parents[2]
main = runpy.run_path(str(ROOT / "launch/ablate.py"))["main"]


def listed(capsys, *arguments):
    """Return (row, its commands) of a dry run, each a list of words that begins with the script's name."""
    assert exit_code(main, [*arguments, "--dry-run"]) == 0
    rows = []
    for line in capsys.readouterr().out.splitlines():
        if line.startswith("# "):
            rows.append((line.removeprefix("# "), []))
        else:
            words = shlex.split(line)
            script = next(place for place, word in enumerate(words) if word.endswith(".py"))
            rows[-1][1].append([words[script].rpartition("/")[2], *words[script + 1 :]])
    return rows


def label(key, title, recipe):
    is_measured_only = list(recipe) == ["feature_teacher"]
    return f"{key}: {title}" if is_measured_only else f"{key}, seed 0: {title}"


@pytest.mark.parametrize("scale", ["b-in1k", "demo"])
@pytest.mark.parametrize("table", ROWS)
def test_a_dry_run_lists_every_row_and_the_commands_say_what_the_rows_are(table, scale, tmp_path, capsys):
    rows = listed(capsys, table, "--scale", scale, "--output", str(tmp_path))
    assert [row for row, _ in rows] == [label(key, title, recipe) for key, title, _, _, recipe in ROWS[table]]
    commands = [command for _, commands in rows for command in commands]
    assert {script for script, *_ in commands} <= {"make_shards.py", "pretrain_teacher.py", "train.py", "export.py"}
    trained = [words for script, *words in commands if script == "train.py"]
    assert trained
    for flag, path, *overrides in trained:
        assert flag == "--recipe"
        recipe = load_recipe(Path(path), overrides)
        assert recipe.data.views == ("fresh" if scale == "b-in1k" else 4)
        assert recipe.mask.source == "online"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("table", ROWS)
def test_fresh_views_with_masks_made_in_the_step_need_no_store(table, tmp_path, capsys):
    asked = ("data.views=4", "mask.source=store", "data.views=fresh", "mask.source=online")  # the last ones count
    rows = listed(capsys, table, "--scale", "b-in1k", "--output", str(tmp_path), *asked)
    assert "precompute_masks.py" not in [script for _, commands in rows for script, *_ in commands]


@pytest.mark.parametrize("table", [table for table, rows in ROWS.items() if "progressive" in str(rows)])
def test_masks_of_a_number_of_views_may_still_be_stored(table, tmp_path, capsys):
    asked = ("data.views=4", "mask.source=store")
    rows = listed(capsys, table, "--scale", "b-in1k", "--output", str(tmp_path), *asked)
    assert "precompute_masks.py" in [script for _, commands in rows for script, *_ in commands]
