"""Run under the DeepSpeed launcher, or alone: many short runs in one process group, since a launch takes 12 seconds.

python tests/training/scenarios.py WORLD_FOLDER RANKS

Run folders and `results-RANKS.json` are what the tests look at.
"""

import contextlib
import hashlib
import io
import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
import webdataset
from safetensors.torch import save_file
from torch.optim.optimizer import register_optimizer_step_pre_hook

import hdscale.training.distill as distillation
from data_tools.index_shards import main as index_shards
from hdscale.config.deepspeed import load_ds_config
from hdscale.config.loading import load_recipe
from hdscale.data.index import open_shards
from hdscale.engine.ranks import distributed
from hdscale.engine.zero_internals import held_elements
from hdscale.engine.zero_state import gather_shard
from hdscale.errors import UserError
from hdscale.teachers.build import build_teachers
from hdscale.teachers.targets import TeacherPair
from hdscale.training.distill import build_teacher_engines, distill, teacher_digests
from hdscale.training.loop import run_loader, train_step
from hdscale.training.masks import precompute_masks
from hdscale.training.pretrain import pretrain
from hdscale.training.smoke import smoke
from tests.helpers.sessions import started

ROOT = Path(__file__).resolve().parents[2]
BAD, MORE_BAD = [3, 30], [10, 44, 59]
ONLINE = ["optim.micro_batch_size=16", "mask.source=online", "student.checkpoint_every=1"]
STOP, SHORT = 4, ["student.drop_path=0.3", "schedule.epochs=2.67"]  # after step 4 of 10


class Lab:
    """Recipes, configs and shorthands."""

    def __init__(self, folder, ranks):
        self.folder, self.ranks = folder, ranks
        self.teacher = load_ds_config(ROOT / "ds_configs/teacher_zero3.json")
        self.teacher_all = load_ds_config(folder / "teacher_all.json")
        self.configs = {
            2: load_ds_config(ROOT / "ds_configs/zero2.json"),
            3: load_ds_config(ROOT / "ds_configs/zero3.json"),
            "3all": load_ds_config(folder / "zero3_all.json"),
        }

    def recipe(self, name, *overrides):
        return load_recipe(self.folder / "recipe.yaml", [f"run.name={name}", *overrides])

    def distill(self, name, stage, *overrides):
        return distill(self.recipe(name, *overrides), self.configs[stage], self.teacher)

    def session(self, name, stage, *overrides):
        return started(self.recipe(name, *overrides), self.configs[stage], self.teacher_all)

    def run_folder(self, name):
        return self.folder / "runs" / name

    def everyone(self, value):
        values = [None] * self.ranks.world_size
        dist.all_gather_object(values, value)
        return values

    def copy_run(self, name, copy):
        if self.ranks.is_first:
            shutil.copytree(self.run_folder(name), self.run_folder(copy))
        dist.barrier()


def masks(lab):
    """Fill the store; then lose a part, and start again."""
    store = lab.folder / "masks"
    codes = [precompute_masks(lab.recipe("masks"), lab.teacher)]
    before = {path.name: _identity(path) for path in sorted(store.glob("view-*/*"))}, _hashes(store)
    dist.barrier()
    if lab.ranks.is_first:
        (store / "view-0001/part-00000.npy").unlink()
    dist.barrier()
    untouched = _identity(store / "view-0000/part-00000.npy")
    codes.append(precompute_masks(lab.recipe("masks"), lab.teacher))
    same = _identity(store / "view-0000/part-00000.npy") == untouched
    return {"codes": codes, "before": before[1], "after": _hashes(store), "other_part_untouched": same}


def _identity(path):
    return path.stat().st_ino, path.stat().st_mtime_ns


def _hashes(store):
    return {
        str(path.relative_to(store)): hashlib.sha256(path.read_bytes()).hexdigest() for path in store.rglob("*.npy")
    }


@contextlib.contextmanager
def watched_optimizers():
    """Yield a list of the optimizers' names and rates, one entry per call of `step`: what moved the weights."""
    steps = []
    hook = register_optimizer_step_pre_hook(
        lambda optimizer, *_: steps.append(
            [type(optimizer).__name__, [group["lr"] for group in optimizer.param_groups]]
        )
    )
    try:
        yield steps
    finally:
        hook.remove()


def curves_of_two(lab):
    """Train with every stage, source of masks and accumulation; note what steps."""
    found = {}
    for stage in (2, 3):
        for how, overrides in (
            ("store-0", ["mask.source=store", "student.checkpoint_every=0"]),
            ("online-1", ["mask.source=online", "student.checkpoint_every=1"]),
            ("accumulated", ["optim.micro_batch_size=4"]),
        ):
            name = f"two-z{stage}-{how}"
            with watched_optimizers() as steps:
                found[name] = {"code": lab.distill(name, stage, *overrides), "steps": steps}
    return found


def curves_of_one(lab):
    codes = {}
    for name, stage, overrides in (
        ("one-z2-accumulated", 2, ["optim.micro_batch_size=4"]),
        ("one-z2-online-1", 2, ONLINE),
        ("one-z3-store-0", 3, ["optim.micro_batch_size=16"]),
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
    small = [f"optim.micro_batch_size={16 // count}", "schedule.stop_after=4"]
    return {
        name: lab.distill(f"{name}-of-{count}", "3all" if count > 1 else 2, *OTHERS[name], *small) for name in OTHERS
    }


def resume(lab):
    """Train in one go, and with a stop on the way."""
    found = {}
    for stage in (2, "3all"):
        whole, cut = f"whole-z{stage}", f"cut-z{stage}"
        codes = [lab.distill(whole, stage, *SHORT)]
        codes.append(lab.distill(cut, stage, *SHORT, f"schedule.stop_after={STOP}"))
        done_early = (lab.run_folder(cut) / "DONE").exists()
        codes.append(lab.distill(cut, stage, *SHORT))
        codes.append(lab.distill(cut, stage, *SHORT))
        found[str(stage)] = {"codes": codes, "done_early": done_early}
    return found


CHECKPOINTING = {"none": None, "torch": None, "partitioned": {"partition_activations": True}}
# Tokens that are targets and a bias that all blocks share are used outside the blocks that are recomputed.
USED_ELSEWHERE = ["relation.target=features", "relation.layers=[0, 1]", "student.rel_pos_bias=true"]


def checkpointing(lab):
    """Take a few steps with every kind of activation checkpointing that a CPU has, and with none."""
    codes = {}
    for kind, section in CHECKPOINTING.items():
        every = 0 if kind == "none" else 1
        small = ["student.drop_path=0.3", "schedule.stop_after=4", f"student.checkpoint_every={every}"]
        for stage, overrides in ((2, USED_ELSEWHERE), ("3all", [])):
            name = f"checkpointing-{kind}-z{stage}"
            config = lab.configs[stage] | ({"activation_checkpointing": section} if section else {})
            codes[name] = distill(lab.recipe(name, *small, *overrides), config, lab.teacher)
    return codes


def offloaded(lab):
    """Train with the optimizer on the CPU, in one go and with a stop, beside one where it is with the rest."""
    config = load_ds_config(ROOT / "ds_configs/zero2_offload.json")
    few = ["schedule.stop_after=6"]
    found = {"none": [lab.distill("offload-none", 2, *few)]}
    with watched_optimizers() as steps:
        found["whole"] = [distill(lab.recipe("offload-whole", *few), config, lab.teacher)]
        found["cut"] = [
            distill(lab.recipe("offload-cut", f"schedule.stop_after={stop}"), config, lab.teacher) for stop in (STOP, 6)
        ]
    return found | {"optimizers": sorted({name for name, _ in steps})}


def interrupt(lab):
    """Send SIGTERM to the last rank in its fourth step."""
    batches = []

    def start(*what):
        session = original(*what)

        def ask_teachers(batch):
            batches.append(batch)
            if len(batches) == STOP and lab.ranks.rank == lab.ranks.world_size - 1:
                os.kill(os.getpid(), signal.SIGTERM)
            return session.ask_teachers(batch)

        return session._replace(ask_teachers=ask_teachers)

    original, distillation.start = distillation.start, start
    try:
        code = lab.distill("interrupted", 2, *SHORT)
    finally:
        distillation.start = original
    latest = (lab.run_folder("interrupted") / "checkpoints/latest").read_text().strip()
    return {"code": code, "latest": latest, "again": lab.distill("interrupted", 2, *SHORT)}


def elastic_source(lab):
    """Leave checkpoints behind, of both stages."""
    return [lab.distill(f"elastic-from-{stage}", stage, f"schedule.stop_after={STOP}") for stage in (2, "3all")]


def elastic(lab):
    """Load the checkpoints of two ranks under other stages, here and with one rank."""
    found = {}
    for source, stage in ((2, 2), (2, "3all"), ("3all", 2)):
        name = f"elastic-{source}-to-{stage}-of-{lab.ranks.world_size}"
        lab.copy_run(f"elastic-from-{source}", name)
        with lab.session(name, stage) as session:
            assert session.run.checkpoint.step == STOP
            shard = gather_shard(session.engine, lab.ranks.rank, lab.ranks.world_size)
            save_file(shard, lab.folder / f"{name}-{lab.ranks.rank}.safetensors")
            batches = list(run_loader(session, STOP, STOP + 3))
            ids = lab.everyone([batch.sample_ids.tolist() for batch in batches])
        found[name] = {"ids": ids, "code": lab.distill(name, stage, f"schedule.stop_after={STOP + 3}")}
    return found


def teachers(lab):
    """Train two steps beside sharded teachers and look at them."""
    found = {}
    with lab.session("teachers", 3, "schedule.stop_after=2") as session:
        before = teacher_digests(session.teacher_engines)
        held = {name: [held_elements(teacher)] for name, teacher in session.teacher_engines.items()}
        for batch in run_loader(session, 0, 2):
            train_step(session, batch)
            for name, teacher in session.teacher_engines.items():
                held[name].append(held_elements(teacher))
        recipe = lab.recipe("whole", "feature_teacher.sharding=replicate", "relation_teacher.sharding=replicate")
        fresh = build_teachers(recipe, 8)
        whole = build_teacher_engines(fresh, recipe, lab.teacher, "fp32", lab.ranks)
        pair = TeacherPair(
            whole["feature_teacher"],
            whole["relation_teacher"],
            relation_config=recipe.relation,
            mask_config=recipe.mask,
            seed=recipe.run.seed,
            num_patches=64,
            cls_in_relation=True,
        )
        (_, sharded), replicated = session.ask_teachers(batch), pair(batch)
        found["equal"] = lab.everyone(
            torch.equal(sharded.features, replicated.features)
            and len(sharded.relations) == 2
            and all(map(torch.equal, sharded.relations, replicated.relations))
        )
        found["totals"] = {name: sum(p.numel() for p in teacher.parameters()) for name, teacher in whole.items()}
        found["held"] = lab.everyone(held)
        found["digests"] = lab.everyone([before, teacher_digests(session.teacher_engines)])
    return found


def spoiled_teacher(lab):
    """Change a teacher during training."""

    def spoil(session, _):
        with torch.no_grad():
            next(iter(session.teacher_engines["relation_teacher"].parameters())).add_(1e-3)
        return 0

    original, distillation.train_run = distillation.train_run, spoil
    try:
        lab.distill("spoiled", 2, "relation_teacher.sharding=replicate", "optim.micro_batch_size=16")
    except RuntimeError as error:
        return {"error": str(error)}
    finally:
        distillation.train_run = original
    return {"error": None}


def bf16(lab):
    found = {}
    low = ["run.precision=bf16", "mask.source=online", "student.drop_path=0.3", "schedule.epochs=1.07"]  # 4 steps
    for stage in (2, 3):
        codes = [lab.distill(f"bf16-whole-z{stage}", stage, *low)]
        codes.append(lab.distill(f"bf16-cut-z{stage}", stage, *low, "schedule.stop_after=2"))
        codes.append(lab.distill(f"bf16-cut-z{stage}", stage, *low))
        with lab.session(f"bf16-look-z{stage}", stage, *low) as session:
            found[str(stage)] = {"codes": codes, "dtypes": _dtypes(session, lab)}
    return found


def _dtypes(session, lab):
    """Look at what the module gets through the engine."""
    seen = []
    session.engine.module.register_forward_pre_hook(lambda _, given: seen.append(given))
    train_step(session, next(iter(run_loader(session, 0, 1))))
    ((images, targets),) = seen
    weight = next(iter(session.engine.module.parameters())).dtype
    kinds = {
        "images": images.dtype,
        "weights": weight,
        "relations": targets.relations[0].dtype,
        "features": targets.features.dtype,
        "keep_indices": targets.keep_indices.dtype,
    }
    return {name: str(dtype).removeprefix("torch.") for name, dtype in kinds.items()}


def pretraining(lab):
    small = ["optim.micro_batch_size=16", "schedule.epochs=0.54", "schedule.warmup_epochs=0"]
    small += ["pretrain.decoder_dim=32", "pretrain.decoder_depth=1", "pretrain.decoder_heads=4"]
    return {
        method: pretrain(lab.recipe(f"pretrained-{method}", *small), method, lab.configs[2])
        for method in ("mae", "supervised")
    }


def damaged(lab):
    """Train on shards with spoiled samples: few enough, with and without a stop, and too many."""
    errors = {}
    for name, ids in (("few", BAD), ("many", [*BAD, *MORE_BAD])):
        if lab.ranks.is_first:
            shutil.copytree(lab.folder / "shards", lab.folder / name)
            _spoil(open_shards(lab.folder / name, "train"), ids)
        dist.barrier()
    every = [*SHORT, "mask.source=online", "data.max_bad_fraction=0.05"]  # 3 of 60
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


def _spoil(shards, ids):
    for sample_id in ids:
        record = shards.index[sample_id]
        with (shards.folder / shards.manifest.shards[record["shard"]].name).open("r+b") as file:
            file.seek(int(record["offset"]) + 40)
            file.write(b"damage")


def foreign(lab):
    """Train on the same pictures in tars that plain webdataset wrote."""
    folder = lab.folder / "foreign"
    folder.mkdir()
    shards = open_shards(lab.folder / "shards", "train")
    with webdataset.ShardWriter(str(folder / "%06d.tar"), maxcount=17, verbose=0) as writer:
        for row in range(shards.num_samples):
            writer.write({"__key__": f"s{row:05d}", "png": shards.read(row), "json": {"label": row % 3}})
    assert index_shards(["--input", str(folder), "--workers", "1"]) == 0
    return lab.distill("foreign", 2, *ONLINE, f"data.shards={folder}", "schedule.stop_after=5")


def smoke_run(lab):
    texts = {}
    for stage in (2, 3):
        out = io.StringIO()
        code = smoke(lab.recipe("smoke"), 2, lab.configs[stage], lab.teacher, stream=out)
        texts[str(stage)] = lab.everyone([code, out.getvalue()])
    return texts


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
