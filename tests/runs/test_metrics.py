import math

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer import event_file_writer

from hdscale.runs.metrics import MetricsWriter, read_metrics, write_curves


def write(folder, start, steps):
    writer = MetricsWriter(folder, start)
    for step in steps:
        writer.write({"step": step, "loss": float(step), "mfu": None})
    writer.close()


def test_a_resumed_run_writes_each_step_once(tmp_path):
    write(tmp_path, 0, [1, 2, 3, 4, 5])
    write(tmp_path, 3, [4, 5, 6])  # its last checkpoint was of step 3
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3, 4, 5, 6]


def test_half_a_line_of_a_killed_run_is_dropped(tmp_path):
    write(tmp_path, 0, [1, 2])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2]
    write(tmp_path, 2, [3])
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3]


def test_tensorboard_shows_the_same_numbers_and_leaves_out_unknown_ones(tmp_path, monkeypatch):
    # Files of one second are read in the order of their process's counter, as text: 10 before 9.
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(0))
    write(tmp_path, 0, [1, 2, 3])
    write(tmp_path, 2, [3])
    write_curves(tmp_path, [{"analysis/nmi": 0.5}, {"analysis/nmi": 0.25}])
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert set(events.Tags()["scalars"]) == {"train/loss", "analysis/nmi"}
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(1, 1.0), (2, 2.0), (3, 3.0)]
    assert [(event.step, event.value) for event in events.Scalars("analysis/nmi")] == [(0, 0.5), (1, 0.25)]


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, None])
def test_a_figure_that_is_not_finite_is_null_in_the_file_and_absent_from_tensorboard(value, tmp_path):
    writer = MetricsWriter(tmp_path, 0)
    writer.write({"step": 1, "loss": value, "grad_norm": 0.0})
    writer.close()
    # No `NaN`, which is not JSON: other readers stop at it.
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "loss": null, "grad_norm": 0.0}\n'
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert events.Tags()["scalars"] == ["train/grad_norm"]


def test_a_new_run_has_no_metrics(tmp_path):
    assert read_metrics(tmp_path) == []
