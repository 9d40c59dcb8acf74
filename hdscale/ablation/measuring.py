"""What a trained row, or a teacher, has learned; measured once and kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import torch

from hdscale.ablation.jobs import RowJobs
from hdscale.analysis.curves import AttentionCurves
from hdscale.config.loading import ENVIRONMENT_FILE
from hdscale.evaluation.accuracy import Accuracy
from hdscale.evaluation.candidates import Candidate, student_candidate, teacher_candidate
from hdscale.evaluation.held_out import open_held_out
from hdscale.evaluation.knn import knn_accuracy
from hdscale.evaluation.linear_probe import linear_probe
from hdscale.evaluation.measure import held_out_features, measure_attention, measure_decoder_attention
from hdscale.runs.metrics import read_metrics
from hdscale.runs.trained import read_run
from hdscale.staging import staged
from hdscale.student.build import Student, student_grid_size
from hdscale.student.load import load_decoder

_FORMAT = 3
_PARTS = ("knn", "probe", "curves", "decoder_curves")


class Measures(NamedTuple):
    """Everything the table shows of one run, or of one teacher."""

    knn: Accuracy
    probe: Accuracy
    curves: AttentionCurves  # of every layer and head of the student, without decoder
    decoder_curves: AttentionCurves | None  # of every layer and head of its decoder
    gflops: float | None  # of a training step per image, teachers included; None: nothing was trained
    images_per_second: float | None  # of training, over all ranks: median of the logged steps
    environment: dict[str, Any] | None  # what the run wrote down
    over_one_teacher: float | None = None  # FLOPs of a step of two teachers, over those of the feature teacher's alone


def measure_row(
    row_jobs: RowJobs, kept: Path, *, train_samples: int | None, device: torch.device, stream: TextIO | None
) -> Measures:
    """Measure a row whose jobs are done, or read what was measured before.

    Args:
        row_jobs: the row under one seed.
        kept: folder of measures.
        train_samples: that k-NN and probe learn from; None: all.
        device: where models run.
        stream: where to show progress; None: nowhere.

    Raises:
        UserError: no held-out split, a teacher that cannot be built, and the like.
    """
    evaluation = row_jobs.recipe.evaluation.model_dump(mode="json")
    of: dict[str, Any] = {"format": _FORMAT, "train_samples": train_samples, "evaluation": evaluation}
    if row_jobs.folder is None:
        assert row_jobs.recipe.feature_teacher is not None, "a row without run measures a teacher"
        of["teacher"] = row_jobs.recipe.feature_teacher.model_dump(mode="json")
        file = kept / f"teacher-{row_jobs.row.model.removeprefix('@')}.json"
    else:
        of["done"] = (row_jobs.folder / "DONE").stat().st_mtime_ns  # another training, another measurement
        file = kept / f"{row_jobs.folder.name}.json"
    if (found := _read(file, of)) is not None:
        return found
    measures = _measure(row_jobs, train_samples, device, stream)
    kept.mkdir(parents=True, exist_ok=True)
    with staged(file) as temporary:
        temporary.write_text(json.dumps({"of": of, **_values(measures)}, indent=2) + "\n")
    return measures


def _measure(row_jobs: RowJobs, train_samples: int | None, device: torch.device, stream: TextIO | None) -> Measures:
    gflops = over_one_teacher = environment = decoder = None
    if row_jobs.folder is None:
        candidate = _teacher(row_jobs)
    else:
        trained = read_run(row_jobs.folder)
        candidate = student_candidate(trained)
        assert isinstance(candidate.model, Student)
        decoder = load_decoder(trained.recipe.student, candidate.model, trained.weights)
        steps = [line for line in read_metrics(row_jobs.folder) if line.get("flops_per_image")]
        gflops = steps[-1]["flops_per_image"] / 1e9 if steps else None
        over_one_teacher = steps[-1].get("flops_over_one_teacher") if steps else None
        environment = json.loads((row_jobs.folder / ENVIRONMENT_FILE).read_text())
    recipe = row_jobs.recipe
    held_out = open_held_out(recipe.data, recipe.evaluation, train_samples=train_samples)
    features = held_out_features(candidate, held_out, device, stream)
    curves = measure_attention(candidate, held_out, recipe.evaluation.attention_images, device)
    assert curves is not None, "a model has attention"
    decoder_curves = None
    if decoder is not None:
        assert isinstance(candidate.model, Student)
        images = recipe.evaluation.attention_images
        decoder_curves = measure_decoder_attention(candidate.model, decoder, held_out, images, device)
    knn, probe = knn_accuracy(*features, recipe.evaluation.neighbors), linear_probe(*features)
    rate = candidate.images_per_second
    return Measures(knn, probe, curves, decoder_curves, gflops, rate, environment, over_one_teacher)


def _teacher(row_jobs: RowJobs) -> Candidate:
    recipe = row_jobs.recipe
    assert recipe.feature_teacher is not None
    return teacher_candidate(
        recipe.feature_teacher, student_grid_size(recipe.student, recipe.data.img_size), f"row {row_jobs.row.key}"
    )


def _values(measures: Measures) -> dict[str, Any]:
    parts = {name: part._asdict() for name in _PARTS if (part := getattr(measures, name)) is not None}
    return measures._asdict() | parts


def _read(file: Path, of: dict[str, Any]) -> Measures | None:
    """Return kept measures, unless they are of something else or cannot be read."""
    try:
        content = json.loads(file.read_text())
        if content.pop("of") != of:
            return None
        content["knn"], content["probe"] = (Accuracy(**content[name]) for name in ("knn", "probe"))
        for name in ("curves", "decoder_curves"):
            if content[name] is not None:
                layers = [content[name][part] for part in AttentionCurves._fields]
                content[name] = AttentionCurves(*(tuple(map(tuple, by_head)) for by_head in layers))
        return Measures(**content)
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None
