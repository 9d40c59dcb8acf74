"""The demo's hybrid run, after `make demo`, across two hosts: run by `make demo-hosts`, not among the tests.

Everything is the demo's own: recipe, digits, trained teachers, stored masks. Only the hosts and the ZeRO stage differ.
"""

import json
import shutil

import pytest

from tests.helpers.launcher import ROOT

RUNS = ROOT / "demo/runs"
STEPS = 60


def losses(name):
    lines = [json.loads(line) for line in (RUNS / name / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if line["step"] <= STEPS}


@pytest.mark.parametrize("stage", ["zero2", "zero3"])
def test_two_hosts_train_the_demo_as_one_host_did(stage, cluster):
    name = f"hybrid-on-hosts-{stage}"
    shutil.rmtree(RUNS / name, ignore_errors=True)
    recipe = ["--recipe", "launch/recipes/demo_hybrid.yaml", f"run.name={name}", f"schedule.stop_after={STEPS}"]
    command = ["deepspeed", "--hostfile", cluster.hostfile(2), "launch/train.py"]
    done = cluster.run(*command, "--ds_config", f"ds_configs/{stage}.json", *recipe, cwd=ROOT)
    assert done.returncode == 75, done.stderr  # stopped on request, with a checkpoint
    found, wanted = losses(name), losses("hybrid")
    assert len(found) >= 3
    assert found == pytest.approx(wanted, rel=1e-5)
    worst = max(abs(found[step] / wanted[step] - 1) for step in wanted)
    print(f"\n{stage} on two hosts: {len(found)} logged losses of {STEPS} steps, at most {worst:.1e} from one host's")
