"""The README's command across hosts that are really apart; each launch takes about 15 seconds, so tests share them."""

import json
import re
import shutil
import time
from pathlib import Path

import pytest

from hdscale.config.loading import dump_recipe, load_recipe
from tests.conftest import NUM_SAMPLES, write_shards, write_teacher

ROOT = Path(__file__).resolve().parents[2]
STEPS = 12


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """What the demo's recipe needs: pictures, and teachers of its sizes with random weights."""
    folder = tmp_path_factory.mktemp("demo")
    write_shards(folder)
    for seed, name in enumerate(("feature", "relation"), 1):
        write_teacher(folder / f"{name}.safetensors", seed, embed_dim=64, num_heads=4)
    shutil.copy(ROOT / "launch/recipes/demo_hybrid.yaml", folder / "recipe.yaml")
    return folder


@pytest.fixture(scope="module")
def launch(cluster, files):
    """Run the README's command on node1; return how it ended."""

    def command(name, *overrides, hostfile, ds_config="ds_configs/zero2.json"):
        words = [f"{name}={value}" for name, value in settings(files, name).items()]
        recipe = ["--recipe", files / "recipe.yaml", "--ds_config", ds_config]
        return ["deepspeed", "--hostfile", hostfile, "launch/train.py", *recipe, *words, *overrides]

    def run(*args, **kwargs):
        return cluster.run(*command(*args, **kwargs), cwd=ROOT)

    run.command = command
    return run


def settings(files, name):
    return {
        "run.name": name,
        "run.root": files / "runs",
        "data.shards": files / "shards",
        "feature_teacher.weights": files / "feature.safetensors",
        "relation_teacher.weights": files / "relation.safetensors",
        "mask.source": "online",
        "optim.global_batch_size": 16,
        "optim.micro_batch_size": 8,
        "schedule.epochs": (STEPS + 0.5) * 16 / NUM_SAMPLES,
        "log.every_steps": 1,
        "student.drop_path": 0,
    }


def losses(files, name):
    lines = [json.loads(line) for line in (files / "runs" / name / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [line["loss"] for line in lines]


def errors(done):
    """Return the messages of hdscale among what the launcher, pdsh and all hosts have said."""
    return [line for line in re.split(r"\n", done.stderr) if re.search(r"(^|: )error( \(rank|:)", line)]


@pytest.mark.parametrize("stage", ["zero2", "zero3"])
def test_two_hosts_train_what_one_host_trains(stage, launch, cluster, files):
    config = f"ds_configs/{stage}.json"
    sharded = ["feature_teacher.sharding=zero3", "relation_teacher.sharding=zero3"]
    two = launch(f"two-{stage}", *sharded, hostfile=cluster.hostfile(2), ds_config=config)
    one = launch(f"one-{stage}", *sharded, hostfile=cluster.hostfile(1, slots=2), ds_config=config)
    assert (two.returncode, one.returncode) == (0, 0), two.stderr + one.stderr
    found, wanted = losses(files, f"two-{stage}"), losses(files, f"one-{stage}")
    assert len(found) == STEPS
    assert found == pytest.approx(wanted, rel=1e-5)
    folder = files / "runs" / f"two-{stage}"
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
    cluster.stop("node3")
    try:
        done = launch("down", "run.rendezvous_seconds=20", hostfile=cluster.hostfile(4))
    finally:
        cluster.start("node3")
    # 255 is SSH's, which pdsh passes on as the highest; ranks end with 2.
    assert has(done, "node3 (rank 2) did not come within 20 s", "preflight.py", code=255)
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


def test_another_recipe_is_refused_with_the_field(launch, cluster, files, other_on_node2):
    def change(path):
        path.write_text(path.read_text().replace("decoder_dim", "").replace("warmup_epochs: 2", "warmup_epochs: 1"))

    other_on_node2(files / "recipe.yaml", change)
    done = launch("recipe", hostfile=cluster.hostfile(2))
    assert has(done, "node2 (rank 1): has another recipe schedule.warmup_epochs (1.0) than node1 (rank 0) (2.0)")


def test_other_data_is_refused(launch, cluster, files, other_on_node2):
    def change(path):
        shutil.rmtree(path)
        write_shards(path.parent, seed=1)

    other_on_node2(files / "shards", change)
    done = launch("data", hostfile=cluster.hostfile(2))
    assert has(done, "node2 (rank 1): has another data (sha256 ", "than node1 (rank 0)")


def test_a_mistake_of_one_host_ends_the_others_with_its_name(launch, cluster, files, other_on_node2):
    other_on_node2(files / "shards", lambda path: (path / "train.manifest.json").unlink())
    done = launch("missing", hostfile=cluster.hostfile(2))
    assert done.returncode == 2
    first, second = errors(done)
    assert first.startswith("node1: error: node2 (rank 1): ")
    assert second.startswith("node2: error (rank 1 on node2): ")
    assert all("train.manifest.json" in line for line in (first, second))


@pytest.mark.parametrize("victim", ["node2", "node1"])
def test_a_rank_that_is_killed_is_named_with_its_host(victim, launch, cluster, files):
    """The survivors say it, whoever keeps the store."""
    name = f"killed-{victim}"
    command = launch.command(name, "schedule.epochs=2000", "optim.micro_batch_size=4", hostfile=cluster.hostfile(4))
    with cluster.popen(*command, cwd=ROOT) as process:
        metrics = files / "runs" / name / "metrics.jsonl"
        wait_for(lambda: metrics.exists() and metrics.read_text().count("\n") > 2, process)
        cluster.run("pkill", "-KILL", "-f", "^[^ ]*python[^ ]* -u launch/train.py", host=victim, cwd=ROOT)
        _, err = process.communicate()
    found = [line for line in err.splitlines() if ": error" in line]
    assert process.returncode not in (0, 2), err
    assert len(found) == 1, err
    rank = {"node1": 0, "node2": 1}[victim]
    assert f"{victim} (rank {rank}) ended without a word" in found[0]
    assert found[0].startswith({"node1": "node2", "node2": "node1"}[victim])


def wait_for(condition, process):
    while not condition():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.2)


def test_a_slow_network_is_named_as_the_limit(launch, cluster, files):
    """100 Mbit/s between hosts; a student of 3 million parameters moves 19 MB a step."""
    wide = ["student.embed_dim=256", "schedule.epochs=5.4", "student.decoder=linear", "log.every_steps=5"]
    replicated = ["feature_teacher.sharding=replicate", "relation_teacher.sharding=replicate"]
    cluster.limit("100mbit")
    before = cluster.bytes_sent("node1")
    try:
        done = launch("slow", *wide, *replicated, hostfile=cluster.hostfile(2))
    finally:
        cluster.limit(None)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (files / "runs/slow/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [5, 10, 15, 20]
    assert all(line["communication"] > 0.5 for line in lines)
    assert re.search(r"20 of 20 steps.*communication is the limit \(\d+ % of the time", done.stderr.replace("%", " %"))
    # What is counted is what the wire has seen, but for frames' headers, the checkpoint and the start.
    counted = 20 * lines[-1]["sent_gb"] * 1e9
    print("counted", counted, "wire", cluster.bytes_sent("node1") - before, lines)


@pytest.fixture(scope="module")
def shardings(cluster, files):
    """What four ranks on two hosts have seen of teachers of every sharding."""
    recipe, output = files / "shardings.yaml", files / "shardings.json"
    values = [f"{name}={value}" for name, value in settings(files, "shardings").items()]
    resolved = load_recipe(files / "recipe.yaml", [*values, "optim.micro_batch_size=4"])
    recipe.write_text(dump_recipe(resolved))
    script = ["tests/launch/sharding_scenario.py", recipe, output]
    env = {"PYTHONPATH": str(ROOT)}
    done = cluster.run("deepspeed", "--hostfile", cluster.hostfile(2, slots=2), *script, cwd=ROOT, env=env)
    assert done.returncode == 0, done.stderr
    return json.loads(output.read_text())


def test_teachers_of_every_sharding_say_the_same_bit_by_bit(shardings):
    assert shardings[0]["hosts"] == ["node1", "node1", "node2", "node2"]
    assert all(found[sharding]["equal"] for found in shardings for sharding in ("node", "zero3"))


def test_a_rank_holds_its_share_among_all_or_among_its_host(shardings):
    for found in shardings:
        for name, whole in found["replicate"]["held"].items():
            held = {sharding: found[sharding]["held"][name] for sharding in ("node", "zero3")}
            # A parameter is padded to equal shares.
            assert held == pytest.approx({"node": whole / 2, "zero3": whole / 4}, rel=0.01)


def test_teachers_sharded_inside_a_host_send_nothing_to_others(shardings):
    for found in shardings:
        assert found["replicate"]["gathered_bytes"] == 0
        assert found["zero3"]["gathered_bytes"] > 1.4 * found["node"]["gathered_bytes"] > 0  # 3/4 and 1/2 of the same
        assert found["zero3"]["wire_bytes"] > 0.9 * found["zero3"]["gathered_bytes"]
        assert found["node"]["wire_bytes"] < 0.05 * found["node"]["gathered_bytes"]


def test_a_student_trains_on_all_ranks_whatever_its_teachers_groups(shardings):
    losses = {found[sharding]["loss"] for found in shardings for sharding in ("node", "zero3", "replicate")}
    assert len(losses) == 4  # one a rank: each has its own pictures
    assert all(found[sharding]["dp_world_size"] == 4 for found in shardings for sharding in ("node", "zero3"))
