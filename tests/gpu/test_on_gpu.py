"""What only a GPU can show: its kernels, its precisions, and DeepSpeed's loss scale."""

import math

import pytest
import torch

from hdscale.cluster.device import check_attention, quick_check
from hdscale.config.deepspeed import load_ds_config
from hdscale.config.loading import load_recipe
from hdscale.engine.ranks import resolve_precision
from hdscale.training.loop import run_loader, to_device, train_step
from tests.conftest import ROOT
from tests.helpers.sessions import started

pytestmark = pytest.mark.gpu
STEPS = 20


@pytest.fixture
def device():
    return torch.device("cuda", 0)


@pytest.mark.parametrize("precision", ["auto", "fp16"])
def test_a_gpu_passes_its_own_check(precision, device):
    quick_check(device, precision)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_memory_efficient_attention_is_plain_attention(dtype, device):
    check = check_attention(device, dtype)
    assert check.ok, check.found


def test_precision_auto_is_what_the_gpu_computes_natively(device):
    native = torch.cuda.is_bf16_supported(including_emulation=False)
    assert resolve_precision("auto", device) == ("bf16" if native else "fp16")


def test_fp16_steps_under_the_loss_scale_learn(world, tmp_path):
    overrides = ["run.precision=fp16", f"run.root={tmp_path}", "mask.source=online", "schedule.warmup_epochs=0"]
    recipe = load_recipe(world.recipe, overrides)
    zero2, teacher = (load_ds_config(ROOT / f"ds_configs/{name}.json") for name in ("zero2", "teacher_zero3"))
    with started(recipe, zero2, teacher) as session:
        batch = to_device(next(iter(run_loader(session, 0, 1))), session.ranks)
        losses = [train_step(session, batch).total.item() for _ in range(STEPS)]
        assert session.engine.optimizer.loss_scale >= 1
        assert session.engine.skipped_steps < STEPS / 2
    assert all(map(math.isfinite, losses))
    assert losses[-1] < losses[0]
