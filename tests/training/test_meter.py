"""Log lines, rates, progress text and peak memory of a loop whose engine, clock and loader are made up."""

import resource
from types import SimpleNamespace

import pytest
import torch

from hdscale.engine.ranks import Ranks
from hdscale.training import meter
from hdscale.training.meter import peak_memory_gb
from tests.helpers.made_up_loop import long_run, short_run


def test_a_line_of_the_log_has_these_figures(four_ranks, loop, monkeypatch):
    def getrusage(who):
        assert who == resource.RUSAGE_SELF
        return SimpleNamespace(ru_maxrss=2_000_000)  # KiB

    monkeypatch.setattr(meter.resource, "getrusage", getrusage)
    assert loop.train(short_run(log=4), ranks=(0, 4)) == 5
    first, last = loop.lines
    # Eight micro-steps of half a second, a quarter of it waiting and an eighth in collectives, 4 pictures on each of
    # 4 ranks: 128 in 4 seconds.
    assert first == {
        "step": 4,
        "epoch": 1.28,
        "samples_seen": 128,
        "loss": 4.5,
        "loss_feature": 45.0,
        "loss_relation": 450.0,
        "lr": 0.375,
        "grad_norm": 1.5,
        "loss_scale": 1024.0,
        "skipped_steps": 12,
        "images_per_second": 32.0,
        "data_wait": 0.25,
        "communication": 0.125,
        "sent_gb": 0.003,
        "bad_samples": 2,
        "mfu": 2.0**-7,  # 32 x 2**30 of 4 x 2**40 operations a second
        "flops_per_image": 2.0**30,
        "flops_over_one_teacher": 0.75,
        "memory_gb": 2.048,
    }
    new = {"step": 5, "epoch": 1.6, "samples_seen": 160, "loss": 9.5, "loss_feature": 95.0, "loss_relation": 950.0}
    assert last == first | new | {"lr": pytest.approx(0.2866116523516816, rel=1e-12)}
    assert loop.notes == ["loss 4.5000, 32.0 images/s", "loss 9.5000, 32.0 images/s"]


@pytest.mark.parametrize("unknown", ["flops_per_image", "peak_flops"])
def test_utilisation_is_unknown_where_one_of_its_parts_is(unknown, loop):
    loop.engine.norm = None
    loop.train(short_run(end_step=1), **{unknown: None})
    (line,) = loop.lines
    assert (line["mfu"], line["grad_norm"]) == (None, None)


def test_a_checkpoint_takes_no_part_in_the_figures_of_the_next_line(loop):
    # Saved before step 4 is logged, and along with it; saving moves gigabytes and takes minutes.
    loop.train(long_run(end_step=8, log=4, save=3))
    for line in loop.lines:
        assert (line["images_per_second"], line["data_wait"], line["communication"]) == (8.0, 0.25, 0.125)
        assert line["sent_gb"] == 0.0015
    assert [line["loss"] for line in loop.lines] == [2.5, 6.5]  # of all steps


@pytest.mark.parametrize(
    ("waiting", "computing", "communicating", "limit"),
    [
        (0.5, 0.5, 0.5, ""),
        (0.625, 0.375, 0.0, ", data is the limit (62% of the time waiting for it)"),
        (0.25, 0.75, 0.625, ", communication is the limit (62% of the time in collectives)"),
        # Some ranks wait for others' data in a collective.
        (0.75, 0.25, 0.625, ", communication is the limit (62% of the time in collectives)"),
    ],
)
def test_the_progress_says_what_takes_more_than_half_of_the_time(waiting, computing, communicating, limit, loop):
    loop.waiting, loop.computing, loop.communicating = waiting, computing, communicating
    loop.train(short_run(end_step=1))
    assert loop.notes == [f"loss 1.5000, 4.0 images/s{limit}"]


def test_the_peak_of_a_gpu_is_what_was_allocated_on_it(monkeypatch):
    allocated = {torch.device("cuda", 1): 3_000_000_000}
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", allocated.__getitem__)
    assert peak_memory_gb(Ranks(5, 8, 1, torch.device("cuda", 1))) == 3.0
