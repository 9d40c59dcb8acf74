import shlex
import sys
from pathlib import Path

import pytest
from deepspeed.accelerator.cuda_accelerator import CUDA_Accelerator
from deepspeed.launcher import runner

from hdscale.cluster.device import Check
from hdscale.cluster.hostfile import Host, read_hostfile
from hdscale.errors import UserError
from hdscale.preflight import hosts
from hdscale.preflight.hosts import check_hosts, facts_line, judge, question_from_json, remote_command
from hdscale.preflight.machine import Facts, Question
from hdscale.preflight.table import render

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "launch/preflight.py"
VERSIONS = {"python": "3.11.7", "torch": "2.14.1", "deepspeed": "0.19.8", "timm": "1.0.30"}
V100 = "Tesla V100-SXM2-32GB"


def facts(versions=(), source="1" * 64, devices=(V100,) * 8, cpus=40, shards=None, checks=()):
    return Facts({**VERSIONS, **dict(versions)}, source, list(devices), cpus, shards, list(checks))


def failures(columns):
    return {host: [check for check in checks if check.ok is False] for host, checks in columns.items()}


def test_a_hostfile_is_read_as_deepspeed_reads_it(tmp_path):
    path = tmp_path / "hosts"
    path.write_text(
        "# the rack on the left\n\n  node1 slots=8\nuser@node-2.local\tslots=4 max_slots=8\n10.0.0.3 slots=1 # old\n"
    )
    assert read_hostfile(path) == [Host("node1", 8), Host("user@node-2.local", 4), Host("10.0.0.3", 1)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("node1 slots=8\nnode2\n", "hosts, line 2 must be `HOST slots=GPUS`, got 'node2'"),
        ("node1 slots=eight\n", "hosts, line 1 must be `HOST slots=GPUS`, got 'node1 slots=eight'"),
        ("node1 slots=8x\n", "hosts, line 1 must be `HOST slots=GPUS`"),
        ("\n\nnode1 slots=0\n", "hosts, line 3: slots must be at least 1, got 0"),
        ("node1 slots=8\n# again\nnode1 slots=8\n", "hosts, line 3: node1 must have one line only"),
        ("-oProxyCommand=x slots=8\n", "hosts, line 1: a host's name must not start with -"),
        ("# nobody\n", "hosts names no host: write one line"),
        (b"\xff\xfe", "hosts cannot be read (it is not text)"),
        (None, "hosts cannot be read (No such file or directory)"),
    ],
)
def test_a_mistake_in_a_hostfile_is_named_by_its_line(text, message, tmp_path):
    path = tmp_path / "hosts"
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError) as error:
        read_hostfile(path)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_hosts_that_are_alike_pass():
    columns = judge({Host(f"node{i}", 8): facts() for i in (1, 2, 3)})
    assert failures(columns) == {"node1": [], "node2": [], "node3": []}
    assert {check.name: check.found for check in columns["node1"]} == {
        "reachable": "over SSH",
        "python": "3.11.7",
        "packages": "torch 2.14.1, deepspeed 0.19.8",
        "hdscale": "1" * 12,
        "devices": f"8 x {V100}",
    }


@pytest.mark.parametrize(
    ("other", "name", "found"),
    [
        (facts({"timm": "1.0.20"}), "packages", "timm 1.0.20 (node1 has 1.0.30)"),
        (facts({"python": "3.12.1"}), "python", "3.12.1, node1 has 3.11.7"),
        (facts(source="2" * 64), "hdscale", "other code than on node1"),
        (facts(devices=["A100"] * 8), "devices", f"8 x A100, node1 has {V100}"),
        (facts(devices=()), "devices", f"no GPU, 40 CPU cores, node1 has {V100}"),
        (facts(devices=[V100] * 7), "devices", f"slots=8, but 7 x {V100}"),
        (facts(devices=(), cpus=2), "devices", "slots=8, but no GPU, 2 CPU cores"),
    ],
)
@pytest.mark.parametrize("place", [0, 1, 2])
def test_the_host_that_differs_from_most_is_the_one_named(other, name, found, place):
    answers = [facts(), facts()]
    answers.insert(place, other)
    names = ["node1", "node3"]
    names.insert(place, "odd")
    columns = judge({Host(name, 8): answer for name, answer in zip(names, answers, strict=True)})
    wrong = failures(columns)
    assert [(check.name, check.found) for check in wrong.pop("odd")] == [(name, found)]
    assert not any(wrong.values())


def test_of_two_hosts_that_differ_the_second_is_named():
    wrong = failures(judge({Host("node1", 8): facts({"torch": "2.13.0"}), Host("node2", 8): facts()}))
    assert wrong["node1"] == []
    assert [check.found for check in wrong["node2"]] == ["torch 2.14.1 (node1 has 2.13.0)"]


def test_shards_are_compared_by_their_index():
    checks = [Check("shards", True, "60 samples")]
    here, there = facts(shards="a" * 64, checks=checks), facts(shards="b" * 64, checks=checks)
    wrong = failures(judge({Host("node1", 8): here, Host("node2", 8): here, Host("node3", 8): there}))
    assert [check.found for check in wrong["node3"]] == ["other shards than on node1"]
    assert wrong["node1"] == wrong["node2"] == []
    # What cannot be opened is reported once, as what it is.
    broken = facts(shards=None, checks=[Check("shards", False, "shards is not there", "make them")])
    wrong = failures(judge({Host("node1", 8): here, Host("node2", 8): broken}))
    assert [check.found for check in wrong["node2"]] == ["shards is not there"]


def test_a_host_that_does_not_answer_leaves_the_others_comparable():
    dead = Check("reachable", False, "ssh: No route to host", "switch it on")
    columns = judge({Host("node1", 8): dead, Host("node2", 8): facts()})
    assert columns["node1"] == [dead]
    assert failures(columns)["node2"] == []
    assert judge({Host("node1", 8): dead}) == {"node1": [dead]}


def test_the_table_has_one_column_for_machines_that_are_alike():
    columns = judge(
        {Host(f"node{i}", 8): facts(checks=[Check("shared memory", True, f"{i}.0 GB free")]) for i in range(1, 5)}
        | {Host("node5", 8): facts({"timm": "1.0.20"})}
        | {Host("node6", 8): Check("reachable", False, "ssh: No route to host", "switch it on")}
    )
    lines = render(columns).splitlines()
    assert lines[0].split() == ["node1", "and", "3", "like", "it", "node5", "node6"]
    assert lines[1].split() == ["reachable", "ok,", "over", "SSH", "ok,", "over", "SSH", "FAILS"]
    assert "FAILS" in next(line for line in lines if line.startswith("packages"))
    start = lines.index("What to do:")
    assert lines[start + 1].startswith("node5: packages: timm 1.0.20 (node1 has 1.0.30); make its .venv")
    assert lines[start + 2 :] == ["node6: reachable: ssh: No route to host; switch it on"]
    assert "What to do" not in render(judge({Host("node1", 8): facts()}))


def test_the_question_and_the_answer_survive_the_journey(tmp_path):
    question = Question("fp16", Path("my shards/it's"), "train", tmp_path, "mark")
    environment = {"PYTHONPATH": "/a", "NCCL_DEBUG": "INFO", "UCX_TLS": "rc", "SECRET": "x", "HOME": str(tmp_path)}
    (tmp_path / ".deepspeed_env").write_text("GLOO_SOCKET_IFNAME=eth0\n\nA=b=c\n")
    command = remote_command(question, SCRIPT, environment)
    words = shlex.split(command)
    assert words[:5] == ["cd", str(Path.cwd()), "&&", "exec", "env"]
    exported = [f"PYTHONPATH={Path.cwd()}:/a", "NCCL_DEBUG=INFO", "UCX_TLS=rc"]
    assert words[5:10] == [*exported, "GLOO_SOCKET_IFNAME=eth0", "A=b=c"]
    assert words[10:13] == [sys.executable, str(SCRIPT), "--facts"]
    assert question_from_json(words[13]) == question
    assert question_from_json(shlex.split(remote_command(Question(), SCRIPT, {}))[-1]) == Question()


@pytest.fixture
def ssh(tmp_path, monkeypatch):
    """Put a stand-in for ssh on the PATH: what it does for each host, in shell."""

    def stand_in(**scripts):
        cases = "\n".join(f"{host}) {script};;" for host, script in scripts.items())
        path = tmp_path / "bin/ssh"
        path.parent.mkdir(exist_ok=True)
        # ssh -o BatchMode=yes -o ConnectTimeout=10 HOST COMMAND
        path.write_text(f'#!/bin/sh\necho "$1 $2 $3 $4" >>{tmp_path}/calls\ncd /\ncase $5 in\n{cases}\nesac\n')
        path.chmod(0o755)
        monkeypatch.setenv("PATH", f"{path.parent}:/usr/bin:/bin")
        monkeypatch.setenv("PYTHONPATH", str(ROOT))
        monkeypatch.chdir(ROOT)
        return [Host(host, 1) for host in scripts]

    return stand_in


def test_all_hosts_are_asked_and_each_silence_has_its_reason(ssh, tmp_path, monkeypatch):
    monkeypatch.setattr(hosts, "_PATIENCE", 600)  # `well` imports torch, on whatever machine this is
    machines = ssh(
        well='echo Welcome; echo "{" ; sh -c "$6"; echo bye',
        off='echo "ssh: connect to host off port 22: No route to host" >&2; exit 255',
        empty='echo "sh: 1: python: not found" >&2; exit 127',
        mute="exit 3",
    )
    question = Question(run_root=tmp_path / "runs")
    columns = check_hosts(machines, question, SCRIPT, {"PYTHONPATH": str(ROOT)})
    assert list(columns) == ["well", "off", "empty", "mute", "here"]
    wrong = failures(columns)
    assert wrong["well"] == []
    assert {check.name: check.ok for check in columns["well"]}["run folders"]
    (off,), (empty,), (mute,) = wrong["off"], wrong["empty"], wrong["mute"]
    assert off.found == "ssh: connect to host off port 22: No route to host"
    assert "`ssh off true`, which must work without a question" in off.what_to_do
    assert empty.found == "the check does not run there: sh: 1: python: not found"
    assert f"the same checkout at {ROOT} and the same {sys.executable}" in empty.what_to_do
    assert mute.found == "the check does not run there: exit code 3, no message"
    assert set((tmp_path / "calls").read_text().splitlines()) == {"-o BatchMode=yes -o ConnectTimeout=10"}


def test_a_host_is_told_what_the_launcher_tells_its_ranks(tmp_path):
    """MLFLOW and MV2 (MVAPICH), which DeepSpeed passes on as well, are nothing to a check."""
    passed_on = {*runner.EXPORT_ENVS, *CUDA_Accelerator.export_envs(None)} - {"MLFLOW", "MV2"}
    environment = {f"{name}_X": "1" for name in [*passed_on, "OTHER"]} | {"HOME": str(tmp_path)}
    words = shlex.split(remote_command(Question(), SCRIPT, environment))
    assert {word for word in words if word.endswith("_X=1")} == {f"{name}_X=1" for name in passed_on}


def test_a_host_that_hangs_is_given_up(ssh, monkeypatch):
    monkeypatch.setattr(hosts, "_PATIENCE", 0.2)
    (column, _) = check_hosts(ssh(stuck="exec sleep 3600"), Question(), SCRIPT, {}).values()
    assert [check.found for check in column] == ["no answer within 0.2 seconds"]


def test_the_tools_are_looked_for_here(ssh, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    columns = check_hosts([Host("node1", 1)], Question(run_root=Path("/proc/none")), SCRIPT, {})
    assert [check.found for check in failures(columns)["here"]] == [
        "no pdsh on the PATH",
        "no ssh on the PATH",
        "/proc cannot be written (No such file or directory)",
    ]


def test_a_line_of_facts_is_one_line():
    assert "\n" not in facts_line(facts())
