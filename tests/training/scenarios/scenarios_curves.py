"""Runs whose losses and rates are compared with plain PyTorch's, or with each other's."""

import webdataset

from data_tools.index_shards import main as index_shards
from hdscale.data.index import open_shards
from hdscale.training.distill import distill
from tests.training.scenarios.lab import DROP_PATH, REPLICATED, watched_optimizers

ONLINE = ["mask.source=online", "student.checkpoint_every=1"]
ALONE = [*REPLICATED, *ONLINE, "optim.micro_batch_size=16"]


def curves_of_two(lab):
    """Train with every stage, the plain way and with all that must not change losses; note what steps."""
    found = {}
    for stage in (2, 3):
        for how, overrides in (
            ("store-0", ["mask.source=store", "student.checkpoint_every=0"]),
            ("online-1-accumulated", [*ONLINE, "optim.micro_batch_size=4"]),
        ):
            name = f"two-z{stage}-{how}"
            with watched_optimizers() as steps:
                found[name] = {"code": lab.distill(name, stage, *overrides), "steps": steps}
    return found


def curves_of_one(lab):
    codes = {}
    for name, stage, overrides in (
        ("one-z2-online-1", 2, ALONE),
        ("one-z3-accumulated", 3, ["optim.micro_batch_size=8"]),
    ):
        codes[name] = lab.distill(name, stage, *overrides)
    return codes


OTHERS = {
    "attention": ["relation.target=attention"],
    "features": ["relation.target=features", "relation.layers=[0, -1]", "student.embed_dim=36"],
    "dropping": ["mask.source=online", "mask.in_teacher=drop"],
    "dbot": [
        "mask.strategy=random",
        "mask.keep_ratio=0.25",
        "student.decoder=transformer",
        "student.decoder_depth=2",
        "student.mask_tokens=decoder",
        "loss.features_on=hidden",
    ],
    "mask_tokens": ["student.mask_tokens=encoder", "loss.features_on=all"],
    "fd": ["mask.strategy=none", "relation_teacher=null", "student.rel_pos_bias=true", "student.layer_scale=0.1"],
    "eva": ["feature_teacher=timm:eva02_tiny_patch14_224/random"],
}


def others(lab):
    """Take a few steps with each of the paper's other targets, masks and baselines."""
    count = lab.ranks.world_size
    small = [f"optim.micro_batch_size={16 // count}", "schedule.stop_after=3", DROP_PATH]
    stage, sharding = ("3all", []) if count > 1 else (2, REPLICATED)
    return {name: lab.distill(f"{name}-of-{count}", stage, *small, *sharding, *OTHERS[name]) for name in OTHERS}


def foreign(lab):
    """Train on the same pictures in tars that plain webdataset wrote."""
    folder = lab.folder / "foreign"
    folder.mkdir()
    shards = open_shards(lab.folder / "shards", "train")
    with webdataset.ShardWriter(str(folder / "%06d.tar"), maxcount=17, verbose=0) as writer:
        for row in range(shards.num_samples):
            writer.write({"__key__": f"s{row:05d}", "png": shards.read(row), "json": {"label": row % 3}})
    assert index_shards(["--input", str(folder), "--workers", "1"]) == 0
    return lab.distill("foreign", 2, *ALONE, f"data.shards={folder}", "schedule.stop_after=5")


CHECKPOINTING = {"none": None, "torch": None, "partitioned": {"partition_activations": True}}
# Tokens that are targets and a bias that all blocks share are used outside the blocks that are recomputed.
USED_ELSEWHERE = ["relation.target=features", "relation.layers=[0, 1]", "student.rel_pos_bias=true"]


def checkpointing(lab):
    """Take a few steps with every kind of activation checkpointing that a CPU has, and with none."""
    codes = {}
    for kind, section in CHECKPOINTING.items():
        every = 0 if kind == "none" else 1
        small = [DROP_PATH, "schedule.stop_after=3", f"student.checkpoint_every={every}"]
        for stage, overrides in ((2, [*REPLICATED, *USED_ELSEWHERE]), ("3all", [])):
            if (kind, stage) == ("none", "3all"):
                continue  # whole-z3all of `resume` begins so
            name = f"checkpointing-{kind}-z{stage}"
            config = lab.configs[stage] | ({"activation_checkpointing": section} if section else {})
            codes[name] = distill(lab.recipe(name, *small, *overrides), config, lab.teacher)
    return codes
