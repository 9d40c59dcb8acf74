import json
import runpy
from pathlib import Path

import pytest

from hdscale.cli import exit_code

main = runpy.run_path(str(Path(__file__).resolve().parents[2] / "launch/benchmark.py"))["main"]


def test_the_data_benchmark_prints_a_table_and_writes_all_rounds(tmp_path, capsys):
    output = tmp_path / "figures.json"
    arguments = ["data", "--images", "64", "--rounds", "2", "--img-size", "32", "--output", str(output)]
    assert exit_code(main, arguments) == 0
    figures = json.loads(output.read_text())
    printed = capsys.readouterr().out
    assert all(name in printed for name in figures["rates"])
    assert all(len(rounds) == 2 and min(rounds) > 0 for rounds in figures["rates"].values())
    assert [reading["order"] for reading in figures["cold"]] == ["global", "windowed"]


def test_the_data_benchmark_takes_shards_of_the_users(world, capsys):
    assert exit_code(main, ["data", "--shards", str(world.folder / "shards"), "--images", "64", "--rounds", "1"]) == 0
    assert capsys.readouterr().out.startswith("60 samples of ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rounds", "0"], "error: --rounds must be at least 1, got 0"),
        (["--shards", "nowhere"], "error: nowhere holds no shards"),
        (["--images", "64", "--rounds", "1", "--output", "no/such/file"], "error: --output no/such/file cannot be"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(arguments, message, capsys):
    assert exit_code(main, ["data", *arguments]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(message)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--stages", "1"], "error: --stages must be among 0, 2 and 3, got 1"),
        (["--ranks", "2,0"], "error: --ranks must be at least 1, got 0"),
        (["--shrink", "0"], "error: --shrink must be at least 1, got 0"),
        (["--micro-batch-size", "0"], "error: --micro-batch-size must be at least 1, got 0"),
        (["student.dpeth=2"], "error: argument 'student.dpeth=2': unknown key student.dpeth"),
    ],
)
def test_a_mistake_in_the_memory_benchmark_is_found_before_a_launch(arguments, message, capsys):
    assert exit_code(main, ["memory", *arguments]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(message)
