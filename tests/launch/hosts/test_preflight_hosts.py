"""launch/preflight.py --hostfile across hosts that are really apart; asking takes seconds, measuring half a minute."""

import re
from importlib import metadata
from pathlib import Path

import pytest

from tests.helpers.launcher import ROOT


@pytest.fixture(scope="module")
def asked(cluster, world):
    """Run the command on node1; return how it ended."""

    def run(*words, hostfile):
        folders = ["--shards", world.folder / "shards", "--run-root", world.folder / "preflight/runs"]
        command = ["python", "launch/preflight.py", "--hostfile", hostfile, *folders, *words]
        return cluster.run(*command, cwd=ROOT, env={"PYTHONPATH": str(ROOT)})

    return run


def to_do(done):
    """Return what the command tells to mend."""
    lines = done.stdout.splitlines()
    return lines[lines.index("What to do:") + 1 :] if "What to do:" in lines else []


def test_hosts_that_are_fine_are_measured_between_and_within(asked, cluster):
    cluster.limit("200mbit")
    try:
        done = asked(hostfile=cluster.hostfile(2, slots=2))
    finally:
        cluster.limit(None)
    assert done.returncode == 0, done.stdout + done.stderr
    assert to_do(done) == []
    lines = done.stdout.splitlines()
    assert re.split(r" {2,}", lines[0].strip()) == ["node1 and 1 like it", "here"]
    rows = {line[: len("shared memory")].strip(): line for line in lines}
    assert "ok, over SSH" in rows["reachable"]
    assert "ok, no GPU" in rows["devices"]
    assert "ok, 60 samples" in rows["shards"]
    assert "ok" not in rows["attention"]
    measured = re.findall(r"all-reduce, (.*) \((\d) ranks\), (\d+) MB: .* bus bandwidth (\S+) GB/s", done.stdout)
    among = [(name, int(ranks)) for name, ranks, *_ in measured]
    assert among == [("all ranks", 4)] * 2 + [("one rank a machine", 2)] * 2 + [("node1", 2)] * 2 + [("node2", 2)] * 2
    rates = {name: float(rate) for name, _, _, rate in measured}  # the last is the largest message's
    # 200 Mbit/s are 0.025 GB/s, some of it frames' headers; the shaper lets a burst through. Where nothing is shaped
    # this machine's load decides, which may be anything.
    assert 0 < rates["one rank a machine"] < 0.03
    assert rates["one rank a machine"] < min(rates["node1"], rates["node2"])
    assert rates["all ranks"] < 0.06
    assert "ViT-L under ZeRO-2 in fp16 moves 1.21 GB" in done.stdout


def test_a_host_that_is_off_is_named_and_nothing_is_measured(asked, cluster):
    cluster.stop("node3")
    try:
        done = asked(hostfile=cluster.hostfile(4))
    finally:
        cluster.start("node3")
    assert done.returncode == 2
    (line,) = to_do(done)
    assert re.match(r"node3: reachable: ssh: connect to host node3 .*; switch it on, or mend `ssh node3 true`", line)
    assert "all-reduce" not in done.stdout


def test_everything_that_differs_on_one_host_is_named_at_once(asked, cluster, world, other_on_node2):
    def older(path):
        path.write_text(path.read_text().replace(f"\nVersion: {metadata.version('timm')}\n", "\nVersion: 0.9.1\n"))

    (world.folder / "preflight/runs").mkdir(parents=True, exist_ok=True)
    other_on_node2(Path(metadata.distribution("timm")._path) / "METADATA", older)
    other_on_node2(ROOT / "hdscale/losses.py", lambda path: path.write_text(path.read_text() + "\n# patched\n"))
    other_on_node2(world.folder / "preflight", lambda path: None)
    other_on_node2(world.folder / "shards", lambda path: (path / "train-000001.tar").unlink())
    hostfile = cluster.hostfile(4)
    hostfile.write_text(hostfile.read_text().replace("node4 slots=1", "node4 slots=99"))
    done = asked(hostfile=hostfile)
    assert done.returncode == 2
    found = [line.split(": ", 2)[:2] for line in to_do(done)]
    assert found == [
        ["node2", "packages"],
        ["node2", "hdscale"],
        ["node2", "shards"],
        ["node2", "run folders"],
        ["node4", "devices"],
    ]
    packages, source, shards, folders, devices = to_do(done)
    assert f"timm 0.9.1 (node1 has {metadata.version('timm')})" in packages
    assert "other code than on node1" in source
    assert "train-000001.tar is missing" in shards
    assert "preflight/runs is another one here; put run.root on a file system that all machines share" in folders
    assert "slots=99, but no GPU" in devices
