"""The training loop beside an engine, a clock and a loader that are made up: one process, no DeepSpeed launch."""

import math

import pytest
import torch
import torch.distributed as dist

from hdscale.config.sections import StudentConfig
from hdscale.engine.ranks import Ranks
from hdscale.errors import UserError
from hdscale.runs.checkpoint import newest_checkpoint, open_checkpoint
from hdscale.training.loop import to_device
from hdscale.types import Batch
from tests.helpers.made_up_loop import long_run, short_run

GOLDEN_SEEDS = [1583996074815021703, 159805973055381846]


def test_a_step_is_forward_backward_of_the_total_and_step_for_every_micro_batch(loop):
    assert loop.train(short_run(end_step=1)) == 1
    kinds = [entry[0] for entry in loop.engine.diary]
    assert kinds == ["forward", "backward", "step"] * 2
    (_, images, targets), (_, total), *_ = loop.engine.diary
    assert (images.unique().tolist(), targets, total) == ([0], "targets", 1.0)
    assert loop.engine.diary[3][1].unique().tolist() == [1]
    assert loop.engine.diary[4] == ("backward", 2.0)
    assert loop.bad == [0, 1]
    assert loop.counts[0] == 1


def test_checkpoints_are_there_while_the_run_goes_on_and_only_the_newest_stay(loop):
    seen = []
    loop.before_forward = lambda: seen.append(loop.on_disk())
    assert loop.train(long_run(end_step=10, save=3, keep=2)) == 10
    # What each step finds when it starts.
    assert seen == [[], [], [], [3], [3], [3], [3, 6], [3, 6], [3, 6], [6, 9]]
    assert loop.on_disk() == [9, 10]
    for step in (9, 10):
        checkpoint = open_checkpoint(loop.folder / f"checkpoints/step-{step:09d}")
        weight = torch.full((3,), float(step))
        for kind, offset in (("weight", 0.0), ("exp_avg", 0.25), ("exp_avg_sq", 0.5)):
            assert torch.equal(checkpoint.tensors(kind)["weight"], weight + offset)


def test_a_checkpoint_says_where_the_run_was(loop):
    loop.train(short_run(end_step=3))
    assert newest_checkpoint(loop.folder).state == {
        "step": 3,
        "cursor": 96,
        "optimizer_step": 3,
        "scaler": {"cur_scale": 1024.0, "cur_iter": 40, "last_overflow_iter": 30, "cur_hysteresis": 1},
        "quarantine": [5, 9],
        "cls_in_loss": False,
        "fingerprints": {"data": "digest", "view seed": 3},
    }


def test_steps_that_were_skipped_are_no_steps_of_the_optimizer(loop):
    loop.engine.overflows = {2, 3}
    loop.train(long_run(end_step=5))
    state = newest_checkpoint(loop.folder).state
    assert (state["step"], state["optimizer_step"]) == (5, 3)
    assert [line["skipped_steps"] for line in loop.lines] == [12, 13, 14, 14, 14]


def test_every_rank_saves_its_own_share(four_ranks, loop):
    loop.train(short_run(start_step=3, keep=7), ranks=(2, 4))
    ((state, settings),) = four_ranks
    assert settings == {"rank": 2, "world_size": 4, "keep": 7}
    assert (state["step"], state["cursor"]) == (5, 160)


def test_a_stop_ends_the_run_after_the_step_with_a_line_and_a_checkpoint(loop):
    loop.stop_after = 3
    assert loop.train(short_run(log=100, save=2)) == 3
    assert loop.asked == 3
    assert loop.on_disk() == [2, 3]
    assert [line["step"] for line in loop.lines] == [3]


def test_too_many_bad_samples_end_the_run_with_a_checkpoint_of_the_step_that_met_them(loop):
    loop.bad_from = 4
    with pytest.raises(UserError, match="too many by step 4"):
        loop.train(long_run(log=2, save=5))
    assert loop.on_disk() == [4]
    assert loop.gathered == [2, 4]


def test_ranks_share_bad_samples_where_they_log_or_save_and_nowhere_else(loop):
    loop.train(long_run(end_step=10, log=4, save=3))
    assert loop.gathered == [3, 4, 6, 8, 9, 10]
    assert [line["step"] for line in loop.lines] == [4, 8, 10]
    assert loop.counts.count(1) == 10


def test_the_weights_of_every_step_move_at_its_rate(loop):
    loop.train()
    quarter, three_quarters = (0.25 + 0.125 * (1 + math.cos(math.pi * part)) for part in (0.25, 0.75))
    wanted = [0.5, 0.5, quarter, 0.375, three_quarters]  # one step of warm-up, then half a cosine
    for number, group in enumerate(zip(*loop.engine.rates, strict=True)):
        assert group == pytest.approx([rate for rate in wanted for _ in range(2)], rel=1e-12), number
    assert [line["lr"] for line in loop.lines] == pytest.approx(wanted, rel=1e-12)


def test_a_resumed_run_takes_the_rates_of_its_steps(new_loop):
    whole, resumed = new_loop("whole"), new_loop("resumed")
    whole.train()
    resumed.train(short_run(start_step=3))
    assert resumed.engine.rates == whole.engine.rates[6:]
    assert [line["samples_seen"] for line in resumed.lines] == [128, 160]


def seeds(loop, rank=0, **settings):
    run = short_run(**settings)
    run.recipe.student = StudentConfig(drop_path_per="rank")
    loop.train(run, ranks=(rank, 4))
    return loop.engine.seeds


@pytest.mark.usefixtures("four_ranks")
def test_by_rank_no_two_micro_steps_or_ranks_or_runs_draw_alike_and_a_resumed_run_draws_as_before(new_loop):
    first, last = seeds(new_loop()), seeds(new_loop(), rank=3)
    other = seeds(new_loop(), seed=8)
    assert len({*first, *last, *other}) == 30
    assert seeds(new_loop(), rank=3, start_step=2) == last[4:]


def test_ranks_that_write_nothing_reduce_as_often_as_the_one_that_writes(new_loop, monkeypatch):
    calls = []
    monkeypatch.setattr(dist, "all_reduce", lambda tensor, **_: calls.append(tensor.shape))
    loop = new_loop("first")
    loop.train(short_run(log=2))
    wanted = calls.copy()
    silent = new_loop("other")
    silent.train(short_run(log=2), is_writing=False)
    assert calls == 2 * wanted
    assert len(wanted) == 3
    assert silent.notes == silent.lines == []


def test_thirty_skipped_steps_in_a_row_are_survived_and_a_good_one_starts_the_count_anew(loop):
    loop.engine.overflows = {*range(1, 31), *range(32, 62)}
    assert loop.train(long_run(end_step=62)) == 62
    assert loop.engine.skipped_steps == 12 + 60


def test_the_thirty_first_skipped_step_in_a_row_ends_the_run(loop):
    loop.engine.overflows = {2, *range(4, 100)}
    with pytest.raises(FloatingPointError, match=r"31 steps in a row .*lower optim\.lr.*last checkpoint"):
        loop.train(long_run())
    assert loop.engine.micro_steps == 34
    assert loop.on_disk() == []


@pytest.mark.parametrize("keep_indices", [None, torch.zeros(2, 3)])
def test_the_device_gets_what_it_computes_on_and_the_cpu_keeps_the_rest(keep_indices):
    batch = Batch(*(torch.zeros(2) for _ in range(5)), keep_indices)
    assert to_device(batch, Ranks(0, 1, 0, torch.device("cpu"))) is batch
    moved = to_device(batch, Ranks(0, 1, 0, torch.device("meta")))
    on_device = {"images", "labels", "keep_indices"} - ({"keep_indices"} if keep_indices is None else set())
    assert {name for name, value in moved._asdict().items() if getattr(value, "is_meta", False)} == on_device
    assert (moved.keep_indices is None) == (keep_indices is None)


@pytest.mark.usefixtures("four_ranks")
def test_draws_by_rank_are_those_of_earlier_versions(loop):
    """Runs that were started with them go on."""
    assert seeds(loop, end_step=1) == GOLDEN_SEEDS
    assert loop.engine.draws == [None, None]


def draws(loop, ranks=(0, 1), **settings):
    """Train and return what each micro-step was to drop."""
    state = torch.get_rng_state()
    loop.train(short_run(**settings), ranks=ranks)
    assert torch.equal(torch.get_rng_state(), state)
    return loop.engine.draws


@pytest.mark.usefixtures("four_ranks")
def test_by_sample_four_ranks_together_draw_what_one_does_and_a_resumed_run_what_is_left(new_loop):
    alone = torch.cat(draws(new_loop(), accumulation=8))
    by_rank = [torch.stack(draws(new_loop(), ranks=(rank, 4))) for rank in range(4)]  # (micro-steps, B) each
    assert torch.equal(torch.stack(by_rank, dim=1).flatten(), alone)
    assert not torch.equal(alone[:32], alone[32:64])
    resumed = draws(new_loop(), start_step=2, accumulation=8)
    assert torch.equal(torch.cat(resumed), alone[2 * 32 :])
    assert not torch.equal(torch.cat(draws(new_loop(), seed=8, accumulation=8)), alone)
