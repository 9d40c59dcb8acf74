import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from hdscale.cluster.launcher import (
    check_hostfile,
    deepspeed_command,
    free_port,
    launch_environment,
    planned_world_size,
    started_by_launcher,
)
from hdscale.errors import UserError
from hdscale.provenance import ROOT

PYTHON, DEEPSPEED = "/usr/bin/python3", "/venv/bin/deepspeed"


@pytest.mark.parametrize(
    "command",
    [
        [PYTHON, DEEPSPEED, "--hostfile", "nowhere", "launch/train.py"],
        [PYTHON, DEEPSPEED, "--num_gpus", "2", "-H", "nowhere", "launch/train.py", "optim.lr=1e-3"],
        [DEEPSPEED, "--hostfile=nowhere", "launch/train.py"],
        [PYTHON, "-u", "/venv/bin/ds", "-H", "nowhere", "launch/train.py"],
    ],
)
def test_a_hostfile_that_is_not_there_is_refused_by_name(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="--hostfile nowhere does not exist"):
        check_hostfile([["bash"], command])
    (tmp_path / "nowhere").write_text("localhost slots=1\n")
    check_hostfile([["bash"], command])


@pytest.mark.parametrize(
    "command",
    [
        [PYTHON, DEEPSPEED, "--num_gpus", "2", "launch/train.py"],
        # The script's own arguments are not the launcher's.
        [PYTHON, DEEPSPEED, "launch/train.py", "--hostfile", "nowhere"],
        ["grep", "--hostfile", "nowhere"],
        [PYTHON, DEEPSPEED, "--hostfile"],
        [],
    ],
)
def test_other_command_lines_are_left_alone(command):
    check_hostfile([command])


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="needs /proc")
def test_the_ancestors_of_this_process_are_found():
    # Of a child: this process's own parent may be a container's first process, which does not count.
    script = "import json; from hdscale.cluster.launcher import *; print(json.dumps(ancestor_command_lines()))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    mine = Path("/proc/self/cmdline").read_bytes().decode().split("\0")[:-1]
    assert json.loads(done.stdout)[0] == mine
    check_hostfile()


def test_a_started_command_names_its_port_and_a_person_s_does_not():
    script, hosts = Path("launch/train.py"), Path("hosts")
    python, launcher, *words = deepspeed_command(script, ["run.name=a"], port=1234, num_gpus=8, hostfile=hosts)
    assert python == sys.executable
    assert Path(launcher).name == "deepspeed"
    where = ["--hostfile", "hosts", "--num_gpus", "8", "launch/train.py", "run.name=a"]
    assert words == ["--quiet", "--master_port", "1234", *where]
    assert deepspeed_command(script, ["run.name=a"], port=None, num_gpus=8, hostfile=hosts) == ["deepspeed", *where]


def test_a_hostfile_alone_decides_how_many_ranks_there_are():
    words = deepspeed_command(Path("script.py"), [], port=1234, hostfile=Path("hosts"), quiet=False)
    assert words[2:] == ["--master_port", "1234", "--hostfile", "hosts", "script.py"]


def test_a_launcher_that_is_not_installed_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="the command deepspeed is not installed: pip install"):
        deepspeed_command(Path("script.py"), [], port=1234)
    (tmp_path / "deepspeed").write_text("")
    assert deepspeed_command(Path("script.py"), [], port=1234)[1] == str(tmp_path / "deepspeed")


def test_a_free_port_is_nobody_s():
    with socket.socket() as server:
        server.bind(("127.0.0.1", free_port()))
        server.listen()
        assert free_port() != server.getsockname()[1]


def test_a_launch_gets_this_hdscale_and_forgets_which_rank_started_it(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("PYTHONPATH", "/mine")
    monkeypatch.setenv("PATH", "/tools")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    env = launch_environment()
    assert env["PYTHONPATH"] == f"{ROOT}:/mine"
    assert env["PATH"] == f"{Path(sys.executable).parent}:/tools"
    assert env["CUDA_VISIBLE_DEVICES"] == "3"
    assert not {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"} & set(env)
    assert launch_environment(on_cpu=True) == env | {
        "CUDA_VISIBLE_DEVICES": "",
        "DS_ACCELERATOR": "cpu",
        "PYTHONWARNINGS": "ignore::FutureWarning",
    }
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert launch_environment(on_cpu=True)["OMP_NUM_THREADS"] == "1"


def test_a_rank_knows_before_it_meets_the_others_how_many_were_started(monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert (started_by_launcher(), planned_world_size()) == (False, 1)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert (started_by_launcher(), planned_world_size()) == (True, 3)
