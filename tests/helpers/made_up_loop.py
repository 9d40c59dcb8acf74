"""The training loop beside an engine, a clock and a loader that are made up: one process, no DeepSpeed launch."""

import functools
import math
from types import SimpleNamespace

import torch
from torch import nn

from hdscale.config.sections import (
    CheckpointConfig,
    LogConfig,
    OptimConfig,
    RunConfig,
    ScheduleConfig,
    StudentConfig,
)
from hdscale.engine.collectives import Operation, Traffic
from hdscale.engine.ranks import Ranks
from hdscale.errors import UserError
from hdscale.student.drop_path import SampleDropPath
from hdscale.training import loop as loop_module
from hdscale.training import meter
from hdscale.training.loop import train
from hdscale.training.run import Run, Session
from hdscale.training.schedule import Schedule
from hdscale.types import BadSample, Batch, LossTerms

MICRO_BATCH = 4


SHORT, LONG = Schedule(total_steps=5, warmup_steps=1, peak_lr=0.5, min_lr=0.25), Schedule(100, 0, 0.5, 0.25)


def short_run(
    *,
    schedule=SHORT,
    start_step=0,
    end_step=None,
    accumulation=2,
    seed=7,
    log=1,
    save=1000,
    keep=3,
):
    """Return a run of five steps, which logs and saves every so many; its folder is the loop's."""
    recipe = SimpleNamespace(
        run=RunConfig(seed=seed),
        optim=OptimConfig(global_batch_size=32, micro_batch_size=MICRO_BATCH),
        student=StudentConfig(),
        schedule=ScheduleConfig(stop_after=end_step),
        log=LogConfig(every_steps=log),
        checkpoint=CheckpointConfig(every_steps=save, keep=keep),
    )
    return Run(
        recipe,
        ds_config={},
        folder=None,
        shards=SimpleNamespace(num_samples=100),
        schedule=schedule,
        accumulation=accumulation,
        precision="fp32",
        fingerprints={"data": "digest", "view seed": 3},
        checkpoint=SimpleNamespace(step=start_step) if start_step else None,
        allow_change=(),
    )


long_run = functools.partial(short_run, schedule=LONG, accumulation=1)


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
        self.module.drop_path = SampleDropPath(0.5)
        self.state = {"step": torch.tensor(float(start_step))}
        self.optimizer = SimpleNamespace(
            param_groups=[{"lr": math.nan}, {"lr": math.nan}],
            loss_scale=1024.0,
            loss_scaler=SimpleNamespace(cur_scale=1024.0, cur_iter=40, last_overflow_iter=30, cur_hysteresis=1),
            optimizer=SimpleNamespace(state={"flat": self.state}),
        )
        self.skipped_steps, self.norm = 12, torch.tensor(1.5)
        self.diary, self.seeds, self.draws, self.rates, self.micro_steps = [], [], [], [], 0

    def __call__(self, images, targets):
        self.seeds.append(torch.initial_seed())
        self.draws.append(self.module.drop_path.factors)
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

    def train(self, run=None, *, ranks=(0, 1), is_writing=True, flops_per_image=2.0**30, peak_flops=2.0**40):
        run = (run or short_run())._replace(folder=self.folder)
        self.monkeypatch.setattr(meter, "time", self)
        self.monkeypatch.setattr(meter, "watch_collectives", lambda: self)
        self.monkeypatch.setattr(meter, "peak_flops", lambda *_: peak_flops)
        self.monkeypatch.setattr(loop_module, "_quarantine", lambda _: self)
        self.engine.accumulation = run.accumulation
        ranks = Ranks(*ranks, 0, torch.device("cpu"))
        session = Session(
            run,
            ranks,
            self.engine,
            lambda batch: (batch.images, "targets"),
            flops_per_image=flops_per_image,
            flops_over_one_teacher=0.75,
        )
        return train(session, self.batches(), self if is_writing else None, self.progress, self)

    def on_disk(self):
        folder = self.folder / "checkpoints"
        return sorted(int(path.name.removeprefix("step-")) for path in folder.glob("step-*"))
