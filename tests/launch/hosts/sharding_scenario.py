"""Run under the DeepSpeed launcher on several hosts: teachers of every sharding, asked about the same batch; a run.

python tests/launch/hosts/sharding_scenario.py RECIPE OUTPUT
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from hdscale.config.deepspeed import load_ds_config
from hdscale.config.loading import load_recipe
from hdscale.engine.collectives import watch_collectives
from hdscale.engine.ranks import distributed
from hdscale.engine.zero_internals import held_elements
from hdscale.training.distill import distill
from hdscale.training.loop import run_loader, set_drop_path, train_step
from tests.helpers.sessions import started

ROOT = Path(__file__).resolve().parents[3]
SHARDINGS = ("node", "zero3", "replicate")


def main(recipe, output):
    found = {}
    with distributed() as ranks:
        config = load_ds_config(ROOT / "ds_configs/zero2.json")
        teacher_config = load_ds_config(ROOT / "ds_configs/teacher_zero3.json")
        teacher_config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        outputs = {}
        for sharding in SHARDINGS:
            names = ("feature_teacher", "relation_teacher")
            settings = [f"{name}.sharding={sharding}" for name in names] + [f"run.name={sharding}"]
            loaded = load_recipe(Path(recipe), settings)
            with started(loaded, config, teacher_config) as session:
                (batch,) = run_loader(session, 0, 1)
                watch_collectives().read()
                dist.barrier()
                before = _sent()
                _, targets = session.ask_teachers(batch)
                dist.barrier()
                sent, traffic = _sent() - before, watch_collectives().read()
                outputs[sharding] = [targets.features, targets.keep_indices, *targets.relations]
                set_drop_path(session, 0, 0)
                found[sharding] = {
                    "held": {name: held_elements(teacher) for name, teacher in session.teacher_engines.items()},
                    "gathered_bytes": traffic.total.received_bytes,
                    "wire_bytes": sent,
                    "loss": train_step(session, batch).total.item(),
                    "dp_world_size": session.engine.dp_world_size,
                }
                dist.barrier()
        for sharding in SHARDINGS:
            found[sharding]["equal"] = all(map(torch.equal, outputs[sharding], outputs["replicate"]))
        code = distill(load_recipe(Path(recipe), ["run.name=four"]), config, teacher_config)
        everyone = [None] * ranks.world_size
        dist.all_gather_object(everyone, {"hosts": ranks.hosts, "code": code, **found})
        if ranks.is_first:
            Path(output).write_text(json.dumps(everyone))


def _sent():
    """Return the bytes that this host has sent to others."""
    (line,) = [line for line in Path("/proc/net/dev").read_text().splitlines() if line.strip().startswith("eth0:")]
    return int(line.partition(":")[2].split()[8])


if __name__ == "__main__":
    main(*[argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")])
