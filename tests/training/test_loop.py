"""The training loop beside an engine, a clock and a loader that are made up: one process, no DeepSpeed launch."""

import math
import resource
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import nn

from hdscale.config.sections import CheckpointConfig, LogConfig, OptimConfig, RunConfig, ScheduleConfig
from hdscale.engine.collectives import Operation, Traffic
from hdscale.engine.ranks import Ranks
from hdscale.errors import UserError
from hdscale.runs.checkpoint import newest_checkpoint, open_checkpoint
from hdscale.training import loop as module
from hdscale.training import meter
from hdscale.training.loop import to_device, train
from hdscale.training.meter import peak_memory_gb
from hdscale.training.run import Run, Session
from hdscale.training.schedule import Schedule
from hdscale.types import BadSample, Batch, LossTerms

MICRO_BATCH = 4


class Plan(NamedTuple):
    """What the loop is to do, and the figures that its log takes from elsewhere."""

    schedule: Schedule
    start_step: int
    end_step: int
    accumulation: int
    global_batch_size: int
    num_samples: int
    seed: int
    flops_per_image: float | None
    peak_flops: float | None


PLAN = Plan(
    schedule=Schedule(total_steps=5, warmup_steps=1, peak_lr=0.5, min_lr=0.25),
    start_step=0,
    end_step=5,
    accumulation=2,
    global_batch_size=32,
    num_samples=100,
    seed=7,
    flops_per_image=2.0**30,
    peak_flops=2.0**40,
)
LONG = PLAN._replace(schedule=Schedule(100, 0, 0.5, 0.25), end_step=100, accumulation=1)


class Weight(nn.Parameter):
    """A parameter as ZeRO leaves it, with the getter through which DeepSpeed reads float32 state."""

    _hp_mapping = "there is one"

    def get_full_hp_param(self, optim_state_key=None):
        self.loop.now += 50.0
        self.loop.traffic += Operation(1, 10**9, 10**9, 10**9, 50.0)
        return self.detach() + {None: 0.0, "exp_avg": 0.25, "exp_avg_sq": 0.5}[optim_state_key]


class Engine:
    """What the loop touches of an engine; the one weight is the number of steps that were not skipped."""

    def __init__(self, loop, start_step):
        self.loop, self.accumulation, self.overflows = loop, 1, set()
        self.module = nn.Module()
        self.module.weight = Weight(torch.full((3,), float(start_step)))
        self.module.weight.loop = loop
        self.state = {"step": torch.tensor(float(start_step))}
        self.optimizer = SimpleNamespace(
            param_groups=[{"lr": math.nan}, {"lr": math.nan}],
            loss_scale=1024.0,
            loss_scaler=SimpleNamespace(cur_scale=1024.0, cur_iter=40, last_overflow_iter=30, cur_hysteresis=1),
            optimizer=SimpleNamespace(state={"flat": self.state}),
        )
        self.skipped_steps, self.norm = 12, torch.tensor(1.5)
        self.diary, self.seeds, self.rates, self.micro_steps = [], [], [], 0

    def __call__(self, images, targets):
        self.seeds.append(torch.initial_seed())
        self.diary.append(("forward", images, targets))
        self.loop.before_forward()
        self.loop.now += self.loop.computing
        self.loop.traffic += Operation(1, 10**6, 1_500_000, 2_500_000, self.loop.communicating)
        number = torch.tensor(len(self.seeds) + 0.0, requires_grad=True)
        return LossTerms(number, 10 * number, 100 * number)

    def backward(self, total):
        self.diary.append(("backward", total.item()))

    def step(self):
        self.diary.append(("step",))
        self.rates.append([group["lr"] for group in self.optimizer.param_groups])
        self.micro_steps += 1
        if self.micro_steps % self.accumulation:
            return
        if self.micro_steps // self.accumulation in self.overflows:
            self.skipped_steps += 1
        else:
            self.module.weight.data += 1
            self.state["step"] += 1

    def get_global_grad_norm(self):
        return self.norm


def _ask_teachers(batch):
    return batch.images, "targets"


class Loop:
    """One run of the loop: what it is given, and what it has done."""

    waiting, computing, communicating = 0.125, 0.375, 0.0625  # seconds of a micro-step; communication within computing

    def __init__(self, folder, monkeypatch):
        self.folder, self.monkeypatch = folder, monkeypatch
        self.now, self.traffic = 0.0, Operation()
        self.engine = Engine(self, 0)
        self.lines, self.counts, self.notes = [], [], []
        self.bad, self.gathered, self.bad_from = [], [], math.inf
        self.asked, self.stop_after = 0, math.inf
        self.before_forward = lambda: None

    def perf_counter(self):
        return self.now

    def read(self):
        """As the counters of the collectives."""
        traffic, self.traffic = Traffic({"all_reduce": self.traffic}), Operation()
        return traffic

    def batches(self):
        for number in range(10**6):
            self.now += self.waiting
            bad = (BadSample(number, number + 1, "shard", "name", "reason"),)
            ids = torch.arange(MICRO_BATCH)
            yield Batch(torch.full((MICRO_BATCH, 3, 2, 2), number % 256).byte(), ids, ids, ids, ids, None, bad)

    def write(self, line):
        self.lines.append(line)

    def progress(self, count, note=""):
        self.counts.append(count)
        self.notes += [note] * bool(note)

    def add(self, bad):
        self.bad += [sample.sample_id for sample in bad]

    sample_ids = (5, 9)

    def gather(self, step):
        self.gathered.append(step)
        return UserError(f"too many by step {step}") if step >= self.bad_from else None

    def any_rank(self):
        self.asked += 1
        return self.asked == self.stop_after

    def train(self, plan=PLAN, *, ranks=(0, 1), log=1, save=1000, keep=3, is_writing=True):
        self.monkeypatch.setattr(meter, "time", self)
        self.monkeypatch.setattr(meter, "watch_collectives", lambda: self)
        self.monkeypatch.setattr(meter, "peak_flops", lambda *_: plan.peak_flops)
        self.monkeypatch.setattr(module, "_quarantine", lambda _: self)
        self.engine.accumulation = plan.accumulation
        recipe = SimpleNamespace(
            run=RunConfig(seed=plan.seed),
            optim=OptimConfig(global_batch_size=plan.global_batch_size),
            schedule=ScheduleConfig(stop_after=plan.end_step),
            log=LogConfig(every_steps=log),
            checkpoint=CheckpointConfig(every_steps=save, keep=keep),
        )
        run = Run(
            recipe,
            ds_config={},
            folder=self.folder,
            shards=SimpleNamespace(num_samples=plan.num_samples),
            schedule=plan.schedule,
            accumulation=plan.accumulation,
            precision="fp32",
            fingerprints={"data": "digest", "view seed": 3},
            checkpoint=SimpleNamespace(step=plan.start_step) if plan.start_step else None,
            allow_change=(),
        )
        ranks = Ranks(*ranks, 0, torch.device("cpu"))
        session = Session(
            run, ranks, self.engine, lambda batch: (batch.images, "targets"), flops_per_image=plan.flops_per_image
        )
        return train(session, self.batches(), self if is_writing else None, self.progress, self)

    def on_disk(self):
        folder = self.folder / "checkpoints"
        return sorted(int(path.name.removeprefix("step-")) for path in folder.glob("step-*"))


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
    monkeypatch.setattr(module, "save_checkpoint", lambda *given, **settings: saved.append((*given[2:], settings)))
    return saved


def test_a_step_is_forward_backward_of_the_total_and_step_for_every_micro_batch(loop):
    assert loop.train(PLAN._replace(end_step=1)) == 1
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
    assert loop.train(LONG._replace(end_step=10), save=3, keep=2) == 10
    # What each step finds when it starts.
    assert seen == [[], [], [], [3], [3], [3], [3, 6], [3, 6], [3, 6], [6, 9]]
    assert loop.on_disk() == [9, 10]
    for step in (9, 10):
        checkpoint = open_checkpoint(loop.folder / f"checkpoints/step-{step:09d}")
        weight = torch.full((3,), float(step))
        for kind, offset in (("weight", 0.0), ("exp_avg", 0.25), ("exp_avg_sq", 0.5)):
            assert torch.equal(checkpoint.tensors(kind)["weight"], weight + offset)


def test_a_checkpoint_says_where_the_run_was(loop):
    loop.train(PLAN._replace(end_step=3))
    assert newest_checkpoint(loop.folder).state == {
        "step": 3,
        "cursor": 96,
        "optimizer_step": 3,
        "scaler": {"cur_scale": 1024.0, "cur_iter": 40, "last_overflow_iter": 30, "cur_hysteresis": 1},
        "quarantine": [5, 9],
        "fingerprints": {"data": "digest", "view seed": 3},
    }


def test_steps_that_were_skipped_are_no_steps_of_the_optimizer(loop):
    loop.engine.overflows = {2, 3}
    loop.train(LONG._replace(end_step=5))
    state = newest_checkpoint(loop.folder).state
    assert (state["step"], state["optimizer_step"]) == (5, 3)
    assert [line["skipped_steps"] for line in loop.lines] == [12, 13, 14, 14, 14]


def test_every_rank_saves_its_own_share(four_ranks, loop):
    loop.train(PLAN._replace(start_step=3), ranks=(2, 4), keep=7)
    ((state, settings),) = four_ranks
    assert settings == {"rank": 2, "world_size": 4, "keep": 7}
    assert (state["step"], state["cursor"]) == (5, 160)


def test_a_stop_ends_the_run_after_the_step_with_a_line_and_a_checkpoint(loop):
    loop.stop_after = 3
    assert loop.train(log=100, save=2) == 3
    assert loop.asked == 3
    assert loop.on_disk() == [2, 3]
    assert [line["step"] for line in loop.lines] == [3]


def test_too_many_bad_samples_end_the_run_with_a_checkpoint_of_the_step_that_met_them(loop):
    loop.bad_from = 4
    with pytest.raises(UserError, match="too many by step 4"):
        loop.train(LONG, log=2, save=5)
    assert loop.on_disk() == [4]
    assert loop.gathered == [2, 4]


def test_ranks_share_bad_samples_where_they_log_or_save_and_nowhere_else(loop):
    loop.train(LONG._replace(end_step=10), log=4, save=3)
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
    resumed.train(PLAN._replace(start_step=3))
    assert resumed.engine.rates == whole.engine.rates[6:]
    assert [line["samples_seen"] for line in resumed.lines] == [128, 160]


def seeds(loop, plan=PLAN, rank=0):
    loop.train(plan, ranks=(rank, 4))
    return loop.engine.seeds


@pytest.mark.usefixtures("four_ranks")
def test_no_two_micro_steps_or_ranks_or_runs_draw_alike_and_a_resumed_run_draws_as_before(new_loop):
    first, last = seeds(new_loop()), seeds(new_loop(), rank=3)
    other = seeds(new_loop(), PLAN._replace(seed=8))
    assert len({*first, *last, *other}) == 30
    assert seeds(new_loop(), PLAN._replace(start_step=2), rank=3) == last[4:]


def test_a_line_of_the_log_has_these_figures(four_ranks, loop, monkeypatch):
    def getrusage(who):
        assert who == resource.RUSAGE_SELF
        return SimpleNamespace(ru_maxrss=2_000_000)  # KiB

    monkeypatch.setattr(meter.resource, "getrusage", getrusage)
    assert loop.train(ranks=(0, 4), log=4) == 5
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
        "memory_gb": 2.048,
    }
    new = {"step": 5, "epoch": 1.6, "samples_seen": 160, "loss": 9.5, "loss_feature": 95.0, "loss_relation": 950.0}
    assert last == first | new | {"lr": pytest.approx(0.2866116523516816, rel=1e-12)}
    assert loop.notes == ["loss 4.5000, 32.0 images/s", "loss 9.5000, 32.0 images/s"]


@pytest.mark.parametrize("unknown", ["flops_per_image", "peak_flops"])
def test_utilisation_is_unknown_where_one_of_its_parts_is(unknown, loop):
    loop.engine.norm = None
    loop.train(PLAN._replace(end_step=1, **{unknown: None}))
    (line,) = loop.lines
    assert (line["mfu"], line["grad_norm"]) == (None, None)


def test_a_checkpoint_takes_no_part_in_the_figures_of_the_next_line(loop):
    # Saved before step 4 is logged, and along with it; saving moves gigabytes and takes minutes.
    loop.train(LONG._replace(end_step=8), log=4, save=3)
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
    loop.train(PLAN._replace(end_step=1))
    assert loop.notes == [f"loss 1.5000, 4.0 images/s{limit}"]


def test_ranks_that_write_nothing_reduce_as_often_as_the_one_that_writes(new_loop, monkeypatch):
    calls = []
    monkeypatch.setattr(dist, "all_reduce", lambda tensor, **_: calls.append(tensor.shape))
    loop = new_loop("first")
    loop.train(log=2)
    wanted = calls.copy()
    silent = new_loop("other")
    silent.train(log=2, is_writing=False)
    assert calls == 2 * wanted
    assert len(wanted) == 3
    assert silent.notes == silent.lines == []


def test_thirty_skipped_steps_in_a_row_are_survived_and_a_good_one_starts_the_count_anew(loop):
    loop.engine.overflows = {*range(1, 31), *range(32, 62)}
    assert loop.train(LONG._replace(end_step=62)) == 62
    assert loop.engine.skipped_steps == 12 + 60


def test_the_thirty_first_skipped_step_in_a_row_ends_the_run(loop):
    loop.engine.overflows = {2, *range(4, 100)}
    with pytest.raises(FloatingPointError, match=r"31 steps in a row .*lower optim\.lr.*last checkpoint"):
        loop.train(LONG)
    assert loop.engine.micro_steps == 34
    assert loop.on_disk() == []


def test_the_peak_of_a_gpu_is_what_was_allocated_on_it(monkeypatch):
    allocated = {torch.device("cuda", 1): 3_000_000_000}
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", allocated.__getitem__)
    assert peak_memory_gb(Ranks(5, 8, 1, torch.device("cuda", 1))) == 3.0


@pytest.mark.parametrize("keep_indices", [None, torch.zeros(2, 3)])
def test_the_device_gets_what_it_computes_on_and_the_cpu_keeps_the_rest(keep_indices):
    batch = Batch(*(torch.zeros(2) for _ in range(5)), keep_indices)
    assert to_device(batch, Ranks(0, 1, 0, torch.device("cpu"))) is batch
    moved = to_device(batch, Ranks(0, 1, 0, torch.device("meta")))
    on_device = {"images", "labels", "keep_indices"} - ({"keep_indices"} if keep_indices is None else set())
    assert {name for name, value in moved._asdict().items() if getattr(value, "is_meta", False)} == on_device
    assert (moved.keep_indices is None) == (keep_indices is None)
