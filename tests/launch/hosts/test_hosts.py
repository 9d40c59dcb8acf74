"""The README's command across hosts that are really apart; each launch takes 15 seconds or more, so tests share them.

Those with the marker `stress` show on hosts what tests/cluster/test_arrival.py shows in one process.
"""

import json
import re
import shutil

import pytest

from hdscale.runs.checkpoint import require_checkpoint
from tests.conftest import write_shards
from tests.helpers.demo import SHARDED, STEPS, logged, losses
from tests.helpers.launcher import ROOT, until


def errors(done):
    """Return the messages of hdscale among what the launcher, pdsh and all hosts have said."""
    return [line for line in re.split(r"\n", done.stderr) if re.search(r"(^|: )error( \(rank|:)", line)]


@pytest.mark.parametrize("stage", ["zero2", "zero3"])
def test_two_hosts_train_what_one_host_trains(stage, launch, cluster, demo, losses_of_one_host):
    done = launch(f"two-{stage}", *SHARDED, hostfile=cluster.hostfile(2), ds_config=f"ds_configs/{stage}.json")
    assert done.returncode == 0, done.stderr
    found = losses(demo, f"two-{stage}")
    assert len(found) == STEPS
    assert found == pytest.approx(losses_of_one_host, rel=1e-5)
    folder = demo / "runs" / f"two-{stage}"
    assert (folder / "DONE").exists()
    assert len(list((folder / "tensorboard").iterdir())) == 1
    environment = json.loads((folder / "environment.json").read_text())
    assert (environment["world_size"], environment["host"]) == (2, "node1")


def has(done, *parts, code=2):
    """Check one launch's end: the exit code, and that rank 0 alone says all of it in one line."""
    found = errors(done)
    assert done.returncode == code, done.stderr
    assert len(found) == 1, done.stderr
    missing = [part for part in parts if part not in found[0]]
    assert not missing, found[0]
    return True


def test_a_host_that_is_down_is_named(launch, cluster):
    hostfile = cluster.folder / "one-of-two"
    hostfile.write_text("node1 slots=1\nnode3 slots=1\n")  # nobody else can come late
    cluster.stop("node3")
    try:
        done = launch("down", "run.rendezvous_seconds=1", hostfile=hostfile)
    finally:
        cluster.start("node3")
    # 255 is SSH's, which pdsh passes on as the highest; ranks end with 2.
    assert has(done, "node3 (rank 1) did not come within 1 s", "preflight.py", code=255)
    assert "node1: ssh exited with exit code 2" in done.stderr


def test_a_first_host_that_is_none_is_named_by_the_launcher(launch, cluster):
    hostfile = cluster.folder / "wrong-hosts"
    hostfile.write_text("nod1 slots=1\nnode2 slots=1\n")
    done = launch("none", hostfile=hostfile)
    assert done.returncode == 1
    assert "host=nod1 was not reachable via ssh" in done.stderr


def test_another_version_of_hdscale_is_refused_with_the_hosts_that_have_it(launch, cluster, other_on_node2):
    other_on_node2(ROOT / "hdscale/losses.py", lambda path: path.write_text(path.read_text() + "\n# patched\n"))
    done = launch("version", hostfile=cluster.hostfile(4))
    assert has(done, "node2 (rank 1): has another hdscale's source (sha256 ", "than node1 (rank 0)")


@pytest.mark.stress
def test_another_recipe_is_refused_with_the_field(launch, cluster, demo, other_on_node2):
    def change(path):
        path.write_text(path.read_text().replace("decoder_dim", "").replace("warmup_epochs: 2", "warmup_epochs: 1"))

    other_on_node2(demo / "recipe.yaml", change)
    done = launch("recipe", hostfile=cluster.hostfile(2))
    assert has(done, "node2 (rank 1): has another recipe schedule.warmup_epochs (1.0) than node1 (rank 0) (2.0)")


def test_other_data_is_refused(launch, cluster, demo, other_on_node2):
    def change(path):
        shutil.rmtree(path)
        write_shards(path.parent, seed=1)

    other_on_node2(demo / "shards", change)
    done = launch("data", hostfile=cluster.hostfile(2))
    assert has(done, "node2 (rank 1): has another data (sha256 ", "than node1 (rank 0)")


def test_a_mistake_of_one_host_ends_the_others_with_its_name(launch, cluster, demo, other_on_node2):
    other_on_node2(demo / "shards", lambda path: (path / "train.manifest.json").unlink())
    done = launch("missing", hostfile=cluster.hostfile(2))
    assert done.returncode == 2
    first, second = errors(done)
    assert first.startswith("node1: error: node2 (rank 1): ")
    assert second.startswith("node2: error (rank 1 on node2): ")
    assert all("train.manifest.json" in line for line in (first, second))


@pytest.mark.parametrize("victim", [pytest.param("node2", marks=pytest.mark.stress), "node1"])
def test_a_rank_that_is_killed_is_named_with_its_host(victim, launch, cluster, demo):
    """The survivors say it, whoever keeps the store."""
    name = f"killed-{victim}"
    command = launch.command(name, "schedule.epochs=2000", "optim.micro_batch_size=4", hostfile=cluster.hostfile(4))
    with cluster.popen(*command, cwd=ROOT) as process:
        metrics = demo / "runs" / name / "metrics.jsonl"
        until(
            lambda: process.poll() is not None or (metrics.exists() and metrics.read_text().count("\n") > 2),
            "three steps",
        )
        assert process.poll() is None, process.communicate()[1]
        cluster.run("pkill", "-KILL", "-f", "^[^ ]*python[^ ]* -u launch/train.py", host=victim, cwd=ROOT)
        _, err = process.communicate()
    found = [line for line in err.splitlines() if ": error" in line]
    assert process.returncode not in (0, 2), err
    assert len(found) == 1, err
    rank = {"node1": 0, "node2": 1}[victim]
    assert f"{victim} (rank {rank}) ended without a word" in found[0]
    assert found[0].startswith({"node1": "node2", "node2": "node1"}[victim])


def test_a_slow_network_is_named_as_the_limit(launch, cluster, demo):
    """50 Mbit/s between hosts; a student of 3 million parameters moves 19 MB per step, which takes 3 seconds."""
    wide = ["student.embed_dim=256", "schedule.epochs=2.7", "student.decoder=linear", "log.every_steps=5"]
    replicated = ["feature_teacher.sharding=replicate", "relation_teacher.sharding=replicate"]
    # Of all-reduces and all-gathers gloo sends what the ring algorithm says; of reduces, which are shipped, more.
    config = json.loads((ROOT / "ds_configs/zero2.json").read_text())
    config["zero_optimization"]["use_multi_rank_bucket_allreduce"] = True
    path = demo / "all_reduce.json"
    path.write_text(json.dumps(config))
    cluster.limit("50mbit")
    before = cluster.bytes_sent("node1")
    try:
        done = launch("slow", *wide, *replicated, hostfile=cluster.hostfile(2), ds_config=path)
    finally:
        cluster.limit(None)
    sent = cluster.bytes_sent("node1") - before
    assert done.returncode == 0, done.stderr
    lines = logged(demo, "slow")
    assert [line["step"] for line in lines] == [5, 10]
    assert all(line["communication"] > 0.5 for line in lines)
    assert re.search(r"10 of 10 steps.*communication is the limit \(\d+ % of the time", done.stderr.replace("%", " %"))
    # What is counted is what the wire has seen, but for the frames' headers and what is no step: rank 0 sends the
    # weights at the start, and for the checkpoint weights and both moments are summed among all ranks.
    weights = sum(tensor.nbytes for tensor in require_checkpoint(demo / "runs/slow").tensors("weight").values())
    counted = 5e9 * sum(line["sent_gb"] for line in lines)
    assert sent - 4 * weights == pytest.approx(counted, rel=0.1)
