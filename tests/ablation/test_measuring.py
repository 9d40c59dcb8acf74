"""Measures that are kept in files."""

import json

import pytest
import torch

from hdscale.ablation import measuring
from hdscale.ablation.jobs import RowJobs
from hdscale.ablation.measuring import Measures, measure_row
from hdscale.ablation.table import Row
from hdscale.analysis.curves import AttentionCurves
from hdscale.config.recipe import Recipe
from hdscale.evaluation.accuracy import accuracy_of

MEASURES = Measures(
    knn=accuracy_of(90, 100),
    probe=accuracy_of(80, 100),
    curves=AttentionCurves(((26.0, 111.0), (75.0, 105.5)), ((0.1, 0.2), (0.3, 0.4))),
    decoder_curves=AttentionCurves(((1.0, 2.0, 3.0),), ((0.5, 0.6, 0.7),)),
    gflops=0.5,
    images_per_second=200.0,
    environment={"git_revision": "abc"},
)


@pytest.fixture
def measured(monkeypatch):
    """Names of the rows that are really measured, in turn."""
    names = []

    def measure(row_jobs, *_):
        names.append(row_jobs.row.key)
        return MEASURES

    monkeypatch.setattr(measuring, "_measure", measure)
    return names


def measure_again(folder):
    recipe = Recipe.model_validate(
        {"feature_teacher": {"source": "file", "weights": "teacher.safetensors"}, "data": {"shards": "shards"}}
    )
    row_jobs = RowJobs(Row("mae", "MAE", model="@mae"), 0, recipe, (), None)
    return measure_row(row_jobs, folder, train_samples=None, device=torch.device("cpu"), stream=None)


def test_measures_are_read_from_their_file_with_all_layers_and_heads(measured, tmp_path):
    assert measure_again(tmp_path) == MEASURES
    assert measure_again(tmp_path) == MEASURES
    assert measured == ["mae"]
    content = json.loads((tmp_path / "teacher-mae.json").read_text())
    assert content["curves"]["head_distance"] == [[26.0, 111.0], [75.0, 105.5]]
    assert content["decoder_curves"]["nmi"] == [[0.5, 0.6, 0.7]]


def of_an_older_format(content):
    content["of"]["format"] = 2


def with_means_over_heads(content):
    content["curves"] = {"head_distance": [68.5, 90.25], "nmi": [0.15, 0.35]}


@pytest.mark.parametrize("change", [of_an_older_format, with_means_over_heads])
def test_measures_of_before_heads_were_kept_are_made_again(change, measured, tmp_path):
    measure_again(tmp_path)
    file = tmp_path / "teacher-mae.json"
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))
    assert measure_again(tmp_path) == MEASURES
    assert measured == ["mae", "mae"]
    assert measure_again(tmp_path) == MEASURES
    assert measured == ["mae", "mae"]
