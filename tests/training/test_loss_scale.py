"""The loss scale, logged and resumed: DeepSpeed refuses fp16 engines on a CPU, so its scaler stands here alone."""

from types import SimpleNamespace

import pytest
import torch
from deepspeed.runtime.fp16 import loss_scaler
from deepspeed.runtime.fp16.loss_scaler import CreateLossScaler
from deepspeed.runtime.precision_config import get_float16_config
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

from hdscale.config.sections import OptimConfig
from hdscale.engine.zero import student_ds_config
from hdscale.engine.zero_state import optimizer_state, restore
from hdscale.runs.checkpoint import open_checkpoint, save_checkpoint
from hdscale.training.meter import Reading, log_line
from hdscale.training.run import Session
from hdscale.types import LossTerms


def dynamic_scaler():
    """Build what DeepSpeed builds from our fp16 section."""
    asked = get_float16_config(student_ds_config({}, OptimConfig(), accumulation=1, precision="fp16"))
    scaler = CreateLossScaler(torch.float16, asked.loss_scale, asked.loss_scale == 0, asked.dynamic_loss_scale_args())
    assert scaler.dynamic
    return scaler


@pytest.fixture(params=[DeepSpeedZeroOptimizer, DeepSpeedZeroOptimizer_Stage3])
def optimizer(request, monkeypatch):
    """ZeRO's `loss_scale` over the scaler that our fp16 section asks for; nothing else of the optimizer."""
    monkeypatch.setattr(loss_scaler.dist, "get_rank", lambda: 1)
    config = student_ds_config({}, OptimConfig(), accumulation=1, precision="fp16")
    asked = get_float16_config(config)
    assert asked.enabled
    assert not asked.auto_cast  # it would round float32 relations to float16 on their way into the student
    properties = {"loss_scale": request.param.loss_scale, "cur_scale": request.param.cur_scale}
    stand_in = type("Optimizer", (), properties)()
    stand_in.loss_scaler, stand_in.custom_loss_scaler = dynamic_scaler(), False
    return stand_in


def log(optimizer):
    engine = SimpleNamespace(optimizer=optimizer, skipped_steps=2, get_global_grad_norm=lambda: torch.tensor(1.5))
    run = SimpleNamespace(
        recipe=SimpleNamespace(optim=OptimConfig(global_batch_size=16)),
        schedule=SimpleNamespace(lr=lambda step: 0.1),
        shards=SimpleNamespace(num_samples=160),
        accumulation=1,
        precision="fp16",
    )
    ranks = SimpleNamespace(device=torch.device("cpu"), world_size=1)
    reading = Reading(LossTerms(1.0, 0.5, 0.5), 100.0, 0.0, 0.0, 0.0)
    return log_line(Session(run, ranks, engine, None), reading, 3, 0)


def test_the_log_shows_the_scale_of_the_next_step_as_it_falls_and_rises(optimizer):
    assert log(optimizer)["loss_scale"] == 2.0**16
    optimizer.loss_scaler.update_scale(True)  # the first overflow uses up the hysteresis of 2
    assert log(optimizer)["loss_scale"] == 2.0**16
    optimizer.loss_scaler.update_scale(True)
    assert log(optimizer)["loss_scale"] == 2.0**15
    for _ in range(1002):
        optimizer.loss_scaler.update_scale(False)
    assert log(optimizer)["loss_scale"] == 2.0**16
    assert log(optimizer)["skipped_steps"] == 2


def test_a_scale_that_is_overridden_is_the_one_shown(optimizer):
    optimizer.custom_loss_scaler, optimizer.external_loss_scale = True, 8.0
    assert log(optimizer)["loss_scale"] == 8.0


def test_other_precisions_do_not_scale(optimizer):
    for dtype in (torch.float32, torch.bfloat16):
        optimizer.loss_scaler = CreateLossScaler(dtype, 1.0, False, None)
        assert log(optimizer)["loss_scale"] == 1.0


def engine_of(scaler, **steps):
    """An engine without parameters: what restoring sets apart from tensors."""
    state = {name: {"step": step} for name, step in steps.items()}
    optimizer = SimpleNamespace(loss_scaler=scaler, optimizer=SimpleNamespace(state=state))
    return SimpleNamespace(module=torch.nn.Module(), optimizer=optimizer, global_steps=0)


def saved(engine, folder):
    state = {"step": 7, **optimizer_state(engine)}
    return open_checkpoint(save_checkpoint(folder, {}, state, rank=0, world_size=1, keep=3))


def test_a_resumed_run_goes_on_with_the_scale_it_had(tmp_path, process_group, monkeypatch):
    monkeypatch.setattr(loss_scaler.dist, "get_rank", lambda: 1)
    before = dynamic_scaler()
    for has_overflow in (False, True, True, False, True):
        before.update_scale(has_overflow)
    fields = {"cur_scale": 2.0**14, "cur_iter": 5, "last_overflow_iter": 4, "cur_hysteresis": 1}
    assert {name: getattr(before, name) for name in fields} == fields
    after = engine_of(dynamic_scaler(), decayed=torch.tensor(0.0), plain=0)
    restore(after, saved(engine_of(before, decayed=torch.tensor(5.0), plain=torch.tensor(5.0)), tmp_path))
    assert vars(after.optimizer.loss_scaler) == vars(before)
    # AdamW counts in tensors, DeepSpeed's CPU Adam in integers; steps that were skipped are not among them.
    decayed, plain = (after.optimizer.optimizer.state[name]["step"] for name in ("decayed", "plain"))
    assert torch.equal(decayed, torch.tensor(5.0))
    assert isinstance(plain, int)
    assert plain == 5
    assert after.global_steps == 7


@pytest.mark.parametrize(("was_dynamic", "scale"), [(True, 1.0), (False, 2.0**16)])
def test_a_run_that_goes_on_in_another_precision_starts_with_its_own_scale(
    was_dynamic, scale, tmp_path, process_group, monkeypatch
):
    monkeypatch.setattr(loss_scaler.dist, "get_rank", lambda: 1)
    static = CreateLossScaler(torch.bfloat16, 1.0, False, None)
    before, after = (dynamic_scaler(), static) if was_dynamic else (static, dynamic_scaler())
    resumed = engine_of(after, all=torch.tensor(0.0))
    restore(resumed, saved(engine_of(before, all=torch.tensor(3.0)), tmp_path))
    assert resumed.optimizer.loss_scaler.cur_scale == scale
