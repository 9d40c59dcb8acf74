import pytest

from tests.helpers.demo import SHARDED, demo_overrides, losses
from tests.helpers.launcher import ROOT


@pytest.fixture(scope="session")
def launch(cluster, demo):
    """Run the README's command on node1; return how it ended."""

    def command(name, *overrides, hostfile, ds_config="ds_configs/zero2.json"):
        words = demo_overrides(demo, name)
        recipe = ["--recipe", demo / "recipe.yaml", "--ds_config", ds_config]
        return ["deepspeed", "--hostfile", hostfile, "launch/train.py", *recipe, *words, *overrides]

    def run(*args, **kwargs):
        return cluster.run(*command(*args, **kwargs), cwd=ROOT)

    run.command = command
    return run


@pytest.fixture(scope="session")
def losses_of_one_host(launch, cluster, demo):
    """What two ranks of one host log."""
    done = launch("one", *SHARDED, hostfile=cluster.hostfile(1, slots=2))
    assert done.returncode == 0, done.stderr
    return losses(demo, "one")
