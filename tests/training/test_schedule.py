import math

import pytest

from hdscale.config.sections import OptimConfig, ScheduleConfig
from hdscale.errors import UserError
from hdscale.training.schedule import Schedule, build_schedule


def test_warm_up_rises_linearly_to_the_peak_and_never_starts_at_zero():
    schedule = Schedule(total_steps=100, warmup_steps=4, peak_lr=8.0, min_lr=1.0)
    assert [schedule.lr(step) for step in range(4)] == [2.0, 4.0, 6.0, 8.0]


def test_the_cosine_starts_at_the_peak_is_half_way_in_the_middle_and_ends_at_the_minimum():
    schedule = Schedule(total_steps=104, warmup_steps=4, peak_lr=8.0, min_lr=1.0)
    assert schedule.lr(4) == 8.0
    assert schedule.lr(54) == pytest.approx(4.5)
    assert schedule.lr(79) == pytest.approx(1 + 7 * (1 + math.cos(0.75 * math.pi)) / 2)
    assert schedule.lr(104) == pytest.approx(1.0)
    assert schedule.lr(1000) == pytest.approx(1.0)
    assert all(schedule.lr(step) > schedule.lr(step + 1) for step in range(4, 104))


def test_steps_are_whole_global_batches_of_all_epochs_together():
    optim = OptimConfig(global_batch_size=1024, micro_batch_size=32, lr=6e-4)
    schedule = build_schedule(ScheduleConfig(epochs=40, warmup_epochs=2, min_lr=1e-6), optim, 14_197_122)
    assert schedule == Schedule(14_197_122 * 40 // 1024, 14_197_122 * 2 // 1024, 6e-4, 1e-6)


def test_less_than_one_global_batch_is_refused():
    with pytest.raises(UserError, match=r"schedule\.epochs 1 of 60 samples.*optim\.global_batch_size 64"):
        build_schedule(ScheduleConfig(epochs=1, warmup_epochs=0), OptimConfig(global_batch_size=64), 60)


def test_a_run_of_one_step_has_no_warm_up():
    schedule = build_schedule(ScheduleConfig(epochs=1, warmup_epochs=0.9), OptimConfig(global_batch_size=10), 19)
    assert (schedule.total_steps, schedule.warmup_steps) == (1, 0)
