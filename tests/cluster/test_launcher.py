import json
import subprocess
import sys
from pathlib import Path

import pytest

from hdscale.cluster.launcher import check_hostfile
from hdscale.errors import UserError

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
