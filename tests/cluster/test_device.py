"""What a GPU would say is made up here: no test machine has one."""

import contextlib
import os
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend

from hdscale.cluster import device as preflight
from hdscale.cluster.device import Check, check_architecture, check_attention, device_checks, quick_check
from hdscale.cluster.launcher import add_own_tools_to_path
from hdscale.errors import UserError
from hdscale.preflight import machine
from hdscale.preflight.machine import (
    Question,
    check_compiler,
    check_memory,
    check_run_root,
    check_shared_memory,
    machine_facts,
    marked,
)

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
CUDA_12_6 = ["sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90"]
CUDA_13 = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120"]


@pytest.fixture
def gpu(monkeypatch):
    """Return a function that makes torch believe in GPUs; attention is computed on the CPU instead."""

    def pretend(capability, archs, *, native_bf16, count=1, free=15e9, hip=None):
        def is_bf16_supported(including_emulation=True):
            return native_bf16 or including_emulation

        monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla V100-SXM2-16GB")
        monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: archs)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_bf16_supported)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 16e9))
        monkeypatch.setattr(torch.version, "hip", hip)
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setattr(
            preflight,
            "check_attention",
            lambda device, dtype: check_attention(CPU, dtype, SDPBackend.FLASH_ATTENTION),
        )

    return pretend


def test_a_cpu_has_nothing_to_check_and_does_not_say_that_it_is_fine():
    found = list(device_checks(CPU, "fp32"))
    assert [(check.name, check.ok, check.found) for check in found] == [
        (name, None, "no GPU here") for name in ("architecture", "precision", "attention")
    ]
    quick_check(CPU, "fp32")


def test_a_v100_under_torch_for_cuda_12_6_trains_in_fp16(gpu):
    gpu((7, 0), CUDA_12_6, native_bf16=False)
    found = {check.name: check for check in device_checks(GPU, "auto")}
    assert [check.ok for check in found.values()] == [True] * 3
    assert found["architecture"].found == "sm_70"
    assert found["precision"].found == "fp16; bf16 only emulated"
    quick_check(GPU, "fp16")


def test_a_v100_under_the_default_wheels_is_refused_in_one_line(gpu):
    gpu((7, 0), CUDA_13, native_bf16=False)
    with pytest.raises(UserError) as error:
        quick_check(GPU, "fp16")
    message = str(error.value)
    assert message.startswith("cuda:0: architecture: Tesla V100-SXM2-16GB is sm_70, torch ")
    assert "(CUDA 13.0) has kernels for sm_75 sm_80" in message
    assert message.endswith(
        "install torch's wheels for CUDA 12.6, the last that carry it (README, On a cluster of V100s)"
    )


@pytest.mark.parametrize(
    ("capability", "archs", "runs"),
    [
        ((7, 0), ["sm_70"], True),
        ((7, 5), ["sm_70"], True),  # a binary of the same major version
        ((7, 0), ["sm_75"], False),
        ((8, 0), ["sm_70"], False),
        ((8, 0), ["compute_70"], True),  # PTX is compiled for any later device
        ((7, 0), ["compute_75"], False),
        ((12, 0), ["sm_100"], False),
        ((12, 1), ["sm_50", "sm_120"], True),
        ((9, 0), ["sm_90a"], True),
        ((10, 3), ["sm_100a"], False),  # of that very device only
        ((10, 3), ["sm_100f"], True),  # of its family
        ((12, 0), ["compute_100f"], False),
        ((7, 0), [], False),
        ((7, 0), ["gfx90a", "nonsense"], False),
    ],
)
def test_which_code_runs_on_which_device(capability, archs, runs, gpu):
    gpu(capability, archs, native_bf16=True)
    assert check_architecture(GPU).ok is runs


def test_a_rocm_build_is_not_judged_by_nvidia_s_names(gpu):
    gpu((9, 0), ["gfx90a"], native_bf16=True, hip="6.4")
    assert check_architecture(GPU) == Check("architecture", None, "a ROCm build")


def test_emulated_bf16_is_refused_and_auto_avoids_it(gpu):
    gpu((7, 0), CUDA_12_6, native_bf16=False)
    with pytest.raises(
        UserError, match=r"run.precision is bf16, which this GPU only emulates.*set run.precision to fp16"
    ):
        quick_check(GPU, "bf16")
    gpu((8, 0), CUDA_12_6, native_bf16=True)
    quick_check(GPU, "bf16")


@pytest.mark.parametrize(
    ("native", "precision", "dtype"),
    [(False, "auto", torch.float16), (True, "auto", torch.bfloat16), (True, "fp32", torch.float32)],
)
def test_attention_is_tried_in_the_precision_of_the_run(native, precision, dtype, gpu, monkeypatch):
    gpu((8, 0), CUDA_12_6, native_bf16=native)
    tried = []
    monkeypatch.setattr(
        preflight, "check_attention", lambda device, dtype: tried.append(dtype) or Check("attention", True, "")
    )
    quick_check(GPU, precision)
    assert tried == [dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_attention_that_agrees_with_the_plain_one_passes(dtype):
    assert check_attention(CPU, dtype, SDPBackend.FLASH_ATTENTION) == Check("attention", True, "forward and backward")


def test_attention_that_is_missing_makes_training_slow_and_does_not_end_it(gpu, monkeypatch):
    missing = check_attention(CPU, torch.float16)  # a CPU has no memory-efficient attention
    assert missing.ok is False
    assert missing.found.startswith("memory-efficient attention does not run: No viable backend")
    gpu((7, 0), CUDA_12_6, native_bf16=False)
    monkeypatch.setattr(preflight, "check_attention", lambda device, dtype: missing)
    quick_check(GPU, "fp16")


def one_entry(value):
    def spoil(result):
        result[1, 2, 3, 4] += value

    return spoil


def one_token_too_large(result):
    result[0, 5, -1] *= 1.1


def all_too_large(result):
    result *= 1.1


@pytest.mark.parametrize("place", [0, 1, 2, 3])
@pytest.mark.parametrize(
    "spoil",
    [one_entry(float("nan")), one_entry(float("inf")), one_entry(100.0), one_token_too_large, all_too_large],
    ids=["nan", "inf", "100", "one token 10 % off", "10 % off"],
)
def test_attention_that_computes_something_else_ends_training(place, spoil, gpu, monkeypatch):
    gpu((7, 0), CUDA_12_6, native_bf16=False)
    real = preflight._attention

    def wrong(inputs, device, dtype, backend):
        results = real(inputs, device, dtype, backend)
        if backend != SDPBackend.MATH:
            spoil(results[place])
        return results

    monkeypatch.setattr(preflight, "_attention", wrong)
    name = ("output", "gradient of Q", "gradient of K", "gradient of V")[place]
    with pytest.raises(UserError, match=f"attention: memory-efficient attention in torch.float16 gives a wrong {name}"):
        quick_check(GPU, "fp16")


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_attention_with_another_scale_of_the_logits_ends_training(precision, gpu, monkeypatch):
    """A kernel that is 10 % off inside: its output and all gradients are those of another softmax."""
    gpu((8, 0), CUDA_12_6, native_bf16=True)
    real = preflight.F.scaled_dot_product_attention

    def wrong(query, key, value):
        is_reference = torch.backends.cuda.math_sdp_enabled()
        return real(query if is_reference else query * 1.1, key, value)

    monkeypatch.setattr(preflight.F, "scaled_dot_product_attention", wrong)
    with pytest.raises(UserError, match="gives a wrong output"):
        quick_check(GPU, precision)


def test_each_backend_s_gradients_are_its_own():
    inputs = [torch.randn(preflight._ATTENTION) for _ in range(4)]
    first = preflight._attention(inputs, CPU, torch.float32, SDPBackend.MATH)
    kept = [result.clone() for result in first]
    preflight._attention(inputs, CPU, torch.float32, SDPBackend.MATH)
    assert all(map(torch.equal, first, kept))
    assert not any(x.requires_grad for x in inputs)


def test_the_first_device_that_fails_stands_for_the_machine(gpu, monkeypatch):
    gpu((7, 0), CUDA_12_6, native_bf16=False, count=3)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (15e9 if device.index < 2 else 3e9, 16e9))
    facts = machine_facts(Question())
    assert facts.devices == ["Tesla V100-SXM2-16GB"] * 3
    found = {check.name: check for check in facts.checks}
    assert found["GPU memory"].found == "cuda:2: 3.0 of 16.0 GB free"
    assert found["architecture"] == Check("architecture", True, "sm_70")


def test_memory_that_another_process_holds_is_seen(gpu):
    gpu((7, 0), CUDA_12_6, native_bf16=False, free=3e9)
    check = check_memory(GPU)
    assert (check.ok, check.found) == (False, "3.0 of 16.0 GB free")
    assert "nvidia-smi" in check.what_to_do


def test_a_compiler_is_needed_by_cpu_ranks_only(monkeypatch, tmp_path):
    assert check_compiler(gpu=False).ok
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    missing = check_compiler(gpu=False)
    assert (missing.ok, missing.found) == (False, "no c++ and no ninja on the PATH")
    assert check_compiler(gpu=True).ok is None


def test_this_python_s_folder_comes_first_and_once(monkeypatch):
    folder = str(Path(sys.executable).parent)
    monkeypatch.setenv("PATH", "/usr/bin:/bin")  # what sshd gives
    add_own_tools_to_path()
    add_own_tools_to_path()
    assert os.environ["PATH"] == f"{folder}:/usr/bin:/bin"
    monkeypatch.setenv("PATH", f"/usr/bin:{folder}")  # whoever has put it there has chosen the order
    add_own_tools_to_path()
    assert os.environ["PATH"] == f"/usr/bin:{folder}"
    monkeypatch.delenv("PATH")
    add_own_tools_to_path()
    assert os.environ["PATH"].startswith(f"{folder}:")


def test_a_container_s_shared_memory_is_too_small(monkeypatch, tmp_path):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda folder: usage(64e6, 0, 64e6))
    check = check_shared_memory(8, tmp_path)
    assert check.ok is False
    assert "give it 2.0 GB (docker run --shm-size), or set data.workers=0" in check.what_to_do
    assert check_shared_memory(8, tmp_path / "none").ok is None


def test_run_folders_must_be_writable_and_the_asker_s(tmp_path):
    root = tmp_path / "not/yet/there"
    with marked(root) as mark:
        assert check_run_root(root, mark) == Check("run folders", True, str(tmp_path))
        elsewhere = tmp_path / "elsewhere"
        elsewhere.mkdir()
        assert check_run_root(elsewhere, mark).found == f"{elsewhere} is another one here"
        elsewhere.rmdir()
    assert list(tmp_path.iterdir()) == []  # neither the mark nor the root stays
    check = check_run_root(tmp_path / "x", "a mark of long ago")
    assert check.ok is False
    # A folder in which nobody may make files, root included.
    assert check_run_root(Path("/proc/none")).found == "/proc cannot be written (No such file or directory)"
    with marked(Path("/proc/none")) as mark:
        assert mark is None


def test_shards_are_opened_as_training_does(own_world):
    folder = own_world.folder / "shards"
    facts = machine_facts(Question(shards=folder))
    assert facts.checks[-1] == Check("shards", True, "60 samples")
    assert len(facts.shards) == 64
    (folder / "train-000000.tar").unlink()
    facts = machine_facts(Question(shards=folder))
    assert facts.shards is None
    assert facts.checks[-1].ok is False
    assert "train-000000.tar is missing" in facts.checks[-1].found
    assert "make_shards.py" in facts.checks[-1].what_to_do
