import json
import sys

import pytest
import torch.distributed as dist

from hdscale.config.loading import load_recipe
from hdscale.teachers.build import build_teacher
from hdscale.training import loop as loop_module
from tests.helpers.launcher import ROOT, deepspeed, run
from tests.helpers.made_up_loop import Loop

pytest.register_assert_rewrite("tests.helpers.whole_runs")

SCENARIOS = ROOT / "tests/training/scenarios/scenarios.py"


@pytest.fixture(scope="session")
def two_ranks(world):
    """What the two ranks of one DeepSpeed launch have found out, by scenario."""
    return run_scenarios(world, deepspeed(SCENARIOS, world.folder, "2", ranks=2), "2")


@pytest.fixture(scope="session")
def one_rank(world, two_ranks):
    """The same of a single process without launcher; it goes on with what two ranks have written."""
    return run_scenarios(world, [sys.executable, SCENARIOS, world.folder, "1"], "1")


def run_scenarios(world, command, ranks):
    done = run(command)
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-6000:]}"
    return json.loads((world.folder / f"results-{ranks}.json").read_text())


@pytest.fixture(scope="session")
def curve(world):
    """Return a run's logged losses by step; every step stands there exactly once."""

    def read(name, column="loss"):
        lines = [json.loads(line) for line in (world.folder / "runs" / name / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
        return [line[column] for line in lines]

    return read


@pytest.fixture(scope="session")
def recipe(world):
    return load_recipe(world.recipe)


@pytest.fixture(scope="session")
def teachers(recipe):
    """Feature and relation teacher, unpruned, with everything a test may ask for."""
    feature = build_teacher(recipe.feature_teacher, grid_size=8)
    relation = build_teacher(
        recipe.relation_teacher, grid_size=8, relation_layers=recipe.relation.layers, mask=recipe.mask
    )
    return feature, relation


@pytest.fixture
def new_loop(tmp_path, process_group, monkeypatch):
    return lambda name="run": Loop(tmp_path / name, monkeypatch)


@pytest.fixture
def loop(new_loop):
    return new_loop()


@pytest.fixture
def four_ranks(loop, monkeypatch):
    """A loop that takes itself for one of four ranks, which all do the same; it returns what it would have saved."""
    saved = []
    monkeypatch.setattr(dist, "all_reduce", lambda tensor, **_: tensor.mul_(4))
    monkeypatch.setattr(loop_module, "save_checkpoint", lambda *given, **settings: saved.append((*given[2:], settings)))
    return saved
