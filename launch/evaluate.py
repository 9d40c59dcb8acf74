"""Measure what runs have learned, on held-out samples.

python launch/evaluate.py knn --run runs/NAME
python launch/evaluate.py probe --run runs/NAME
python launch/evaluate.py summary --run runs/A --run runs/B [--output summary.json]
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch

from hdscale.cli import EXIT_DONE, run
from hdscale.errors import UserError
from hdscale.evaluation.candidates import student_candidate, student_name, summary_candidates
from hdscale.evaluation.held_out import open_held_out
from hdscale.evaluation.knn import knn_accuracy
from hdscale.evaluation.linear_probe import linear_probe
from hdscale.evaluation.measure import held_out_features, measure
from hdscale.evaluation.summary import curve_scalars, render_knn, render_probe, render_summary, summary_json
from hdscale.runs.metrics import write_curves
from hdscale.runs.trained import TrainedRun, read_run


def main(argv: list[str]) -> int:
    """Run the command; return its exit code."""
    parser = argparse.ArgumentParser(prog="evaluate.py", description=str(__doc__).splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    knn = commands.add_parser("knn", help="k-NN accuracy of one run's student")
    probe = commands.add_parser("probe", help="accuracy of a linear classifier on one run's frozen student")
    for command in (knn, probe):
        command.add_argument("--run", type=Path, required=True, help="folder of a run")
    summary = commands.add_parser("summary", help="table of pixels, untrained student, teachers and students")
    summary.add_argument("--run", type=Path, required=True, action="append", help="folder of a run; may be repeated")
    summary.add_argument("--output", type=Path, help="JSON file to write, with the curves of all layers")
    for command in (knn, probe, summary):
        command.add_argument("--train-samples", type=int, help="learn from the first so many training samples only")
    options = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if options.command == "summary":
        print(_summary([read_run(folder) for folder in options.run], options.train_samples, options.output, device))
    else:
        print(_classify(read_run(options.run), options.command, options.train_samples, device))
    return EXIT_DONE


def _classify(trained: TrainedRun, how: str, train_samples: int | None, device: torch.device) -> str:
    evaluation = trained.recipe.evaluation
    held_out = open_held_out(trained.recipe.data, evaluation, train_samples=train_samples)
    features = held_out_features(student_candidate(trained), held_out, device, sys.stderr)
    if how == "knn":
        result = knn_accuracy(*features, evaluation.neighbors)
        text = render_knn(result, evaluation.neighbors, held_out.num_train)
    else:
        text = render_probe(linear_probe(*features), held_out.num_train)
    return f"{trained.folder} at step {trained.step}: {text}"


def _summary(runs: list[TrainedRun], train_samples: int | None, output: Path | None, device: torch.device) -> str:
    first = runs[0].recipe
    candidates = summary_candidates(runs)
    held_out = open_held_out(first.data, first.evaluation, train_samples=train_samples)
    rows = [measure(candidate, held_out, first.evaluation, device, sys.stderr) for candidate in candidates]
    for trained in runs:
        others = {student_name(run) for run in runs if run is not trained}
        write_curves(trained.folder, curve_scalars([row for row in rows if row.name not in others]))
    if output is not None:
        try:
            output.parent.mkdir(parents=True, exist_ok=True)
            output.write_text(json.dumps(summary_json(rows), indent=2) + "\n")
        except OSError as error:
            raise UserError(f"{output} cannot be written ({error.strerror}): choose another --output") from error
    return render_summary(rows, neighbors=first.evaluation.neighbors)


if __name__ == "__main__":
    run(main)
