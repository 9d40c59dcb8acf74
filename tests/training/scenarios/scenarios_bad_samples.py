"""Runs on shards with spoiled samples."""

import shutil

import torch.distributed as dist

from hdscale.data.index import open_shards
from hdscale.errors import UserError
from tests.helpers.shards import spoil
from tests.helpers.whole_runs import BAD, STOP
from tests.training.scenarios.lab import DROP_PATH, REPLICATED

MORE_BAD = [10, 44, 59]


def damaged(lab):
    """Train on shards with spoiled samples: few enough, with and without a stop, and too many."""
    errors = {}
    for name, ids in (("few", BAD), ("many", [*BAD, *MORE_BAD])):
        if lab.ranks.is_first:
            shutil.copytree(lab.folder / "shards", lab.folder / name)
            spoil(open_shards(lab.folder / name, "train"), ids)
        dist.barrier()
    every = [*REPLICATED, DROP_PATH, "mask.source=online", "data.max_bad_fraction=0.05"]  # 3 of 60
    few, many = (f"data.shards={lab.folder / name}" for name in ("few", "many"))
    codes = [lab.distill("damaged-whole", 2, *every, few)]
    codes.append(lab.distill("damaged-cut", 2, *every, few, f"schedule.stop_after={STOP}"))
    codes.append(lab.distill("damaged-cut", 2, *every, few))
    try:
        lab.distill("damaged-many", 2, *every, many)
    except UserError as error:
        errors = lab.everyone(str(error))
    latest = (lab.run_folder("damaged-many") / "checkpoints/latest").read_text().strip()
    dist.barrier()
    if lab.ranks.is_first:
        shutil.copytree(lab.folder / "shards", lab.folder / "many", dirs_exist_ok=True)
    dist.barrier()
    codes.append(lab.distill("damaged-many", 2, *every, many))
    return {"codes": codes, "errors": errors, "latest": latest}
