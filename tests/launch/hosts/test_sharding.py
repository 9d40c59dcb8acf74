"""Teachers of every sharding on two hosts with two ranks each."""

import json

import pytest

from hdscale.config.loading import dump_recipe, load_recipe
from tests.helpers.demo import demo_overrides, losses
from tests.helpers.launcher import ROOT


@pytest.fixture(scope="module")
def shardings(cluster, demo):
    """What four ranks on two hosts have seen of teachers of every sharding."""
    recipe, output = demo / "shardings.yaml", demo / "shardings.json"
    resolved = load_recipe(demo / "recipe.yaml", [*demo_overrides(demo, "shardings"), "optim.micro_batch_size=4"])
    recipe.write_text(dump_recipe(resolved))
    script = ["tests/launch/hosts/sharding_scenario.py", recipe, output]
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
    assert len(losses) == 4  # one per rank: each has its own pictures
    assert all(found[sharding]["dp_world_size"] == 4 for found in shardings for sharding in ("node", "zero3"))


def test_four_ranks_on_two_hosts_train_with_drop_path_as_two_on_one_do(shardings, demo, losses_of_one_host):
    assert {found["code"] for found in shardings} == {0}
    assert losses(demo, "four") == pytest.approx(losses_of_one_host, rel=1e-5)
