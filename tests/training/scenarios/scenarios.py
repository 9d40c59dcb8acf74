"""Run under the DeepSpeed launcher, or alone: many short runs in one process group, since a launch takes 12 seconds.

python tests/training/scenarios/scenarios.py WORLD_FOLDER RANKS

Run folders and `results-RANKS.json` are what the tests look at.
"""

import json
import sys
import time
from pathlib import Path

import torch.distributed as dist

from hdscale.engine.ranks import distributed
from tests.training.scenarios.lab import Lab
from tests.training.scenarios.scenarios_bad_samples import damaged
from tests.training.scenarios.scenarios_commands import masks, pretraining, smoke_run
from tests.training.scenarios.scenarios_curves import checkpointing, curves_of_one, curves_of_two, foreign, others
from tests.training.scenarios.scenarios_resume import bf16, elastic, elastic_source, interrupt, offloaded, resume
from tests.training.scenarios.scenarios_teachers import spoiled_teacher, teachers

# Later ones use what earlier ones leave: masks of all samples, run folders to compare with or to go on from.
BY_RANKS = {
    "2": (
        masks,
        curves_of_two,
        others,
        checkpointing,
        offloaded,
        resume,
        interrupt,
        elastic_source,
        elastic,
        teachers,
        bf16,
        damaged,
        smoke_run,
    ),
    "1": (curves_of_one, others, foreign, elastic, spoiled_teacher, pretraining),
}


def main(folder, ranks):
    found = {}
    with distributed() as this:
        assert this.world_size == int(ranks)
        lab = Lab(Path(folder), this)
        for scenario in BY_RANKS[ranks]:
            start = time.perf_counter()
            found[scenario.__name__] = scenario(lab)
            dist.barrier()
            if this.is_first:
                print(f"{scenario.__name__}: {time.perf_counter() - start:.1f} s", flush=True)
        if this.is_first:
            (lab.folder / f"results-{ranks}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(*[argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")])
