"""The README's command across hosts that are really apart; each launch takes about 15 seconds, so tests share them."""

import json
import re
import shutil
import time
from pathlib import Path

import pytest

from tests.cluster import hosts_on_one_machine, why_not
from tests.conftest import NUM_SAMPLES, write_shards, write_teacher

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))
STEPS = 12


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with hosts_on_one_machine(tmp_path_factory.mktemp("hosts") / "cluster", 4) as cluster:
        yield cluster


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
        settings = {
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
        words = [f"{name}={value}" for name, value in settings.items()]
        recipe = ["--recipe", files / "recipe.yaml", "--ds_config", ds_config]
        return ["deepspeed", "--hostfile", hostfile, "launch/train.py", *recipe, *words, *overrides]

    def run(*args, **kwargs):
        return cluster.run(*command(*args, **kwargs), cwd=ROOT)

    run.command = command
    return run


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


@pytest.fixture
def other_on_node2(cluster, tmp_path):
    """Show node2 another file or folder than the other hosts."""
    bound = []

    def show(target, change):
        source = tmp_path / target.name
        (shutil.copytree if target.is_dir() else shutil.copy)(target, source)
        change(source)
        cluster.bind("node2", source, target)
        bound.append(target)

    yield show
    for target in bound:
        cluster.unbind("node2", target)


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
