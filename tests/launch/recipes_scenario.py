"""Take optimizer steps of every recipe in launch/recipes/ in its small form, all in one process.

python tests/launch/recipes_scenario.py WORLD_FOLDER

`WORLD_FOLDER/stepped.json` says, by recipe, what the tests look at.
"""

import json
import sys
from pathlib import Path

import torch

from hdscale.config.deepspeed import load_ds_config
from hdscale.config.loading import load_recipe
from hdscale.engine.ranks import distributed
from hdscale.engine.zero import full_state
from hdscale.flops import count_flops
from hdscale.runs.checkpoint import require_checkpoint
from hdscale.runs.folder import run_folder_of
from hdscale.student.load import load_student
from hdscale.training.distill import distill
from hdscale.training.loop import run_loader, set_drop_path, train_step
from hdscale.training.pretrain import pretrain
from launch.export import main as export
from tests.helpers.sessions import started

ROOT = Path(__file__).resolve().parents[2]
BATCH = 4
ZERO3 = ("dbot_deit_b", "fd_clip_b", "hybrid_deit_b", "reconstruct_deit_b")  # one of each kind of student
TEACHERS = ("feature_teacher", "relation_teacher")


def small(path, folder, *more):
    """Shrink a recipe's sizes; everything else stays as the file has it."""
    whole = load_recipe(path)
    overrides = [
        f"run.root={folder / 'stepped'}",
        "run.precision=fp32",
        f"data.shards={folder / 'shards'}",
        "data.img_size=32",
        "data.workers=0",
        "student.patch_size=4",
        "student.embed_dim=48",
        "student.depth=4",
        "student.num_heads=3",
        "mask.source=online",
        f"mask.images_per_forward={BATCH}",
        f"optim.global_batch_size={BATCH}",
        f"optim.micro_batch_size={BATCH}",
        "schedule.epochs=1",
        "schedule.warmup_epochs=0",
        "log.every_steps=1",
    ]
    if whole.student.decoder == "transformer":
        overrides += ["student.decoder_depth=2", "student.decoder_dim=24", "student.decoder_heads=3"]
    for section in TEACHERS:
        if getattr(whole, section) is not None:
            weights = folder / f"{section.removesuffix('_teacher')}.safetensors"
            overrides += [f"{section}.source=file", f"{section}.name=''", f"{section}.weights={weights}"]
    return load_recipe(path, [*overrides, *more])


def step(recipe, ds_config):
    """Train two steps; return the losses, parameters that did not move, and the first step's FLOPs, both ways."""
    teacher = load_ds_config(ROOT / "ds_configs/teacher_zero3.json")
    with started(recipe, ds_config, teacher) as session:
        before = full_state(session.engine)
        batches = iter(run_loader(session, 0, 2))
        losses = []
        counted = count_flops(lambda: losses.append(one_step(session, batches)))
        after = full_state(session.engine)
        losses.append(one_step(session, batches))
        names = [name for name, _ in session.engine.module.named_parameters()]
        return {
            "losses": losses,
            "still": [name for name in names if torch.equal(before[name], after[name])],
            "counted": counted,
            "computed": BATCH * session.flops_per_image,
        }


def one_step(session, batches):
    set_drop_path(session, 0, 0)
    return train_step(session, next(batches)).total.item()


def pretraining_step(recipe, method):
    """The same of a recipe for launch/pretrain_teacher.py."""
    named = recipe.run.model_copy(update={"name": method})
    recipe = recipe.model_copy(update={"run": named, "schedule": recipe.schedule.model_copy(update={"stop_after": 1})})
    pretrain(recipe, method, load_ds_config(ROOT / "ds_configs/zero2.json"))
    checkpoint = require_checkpoint(run_folder_of(recipe))
    assert checkpoint.step == 1
    moments = checkpoint.tensors("exp_avg")
    metrics = (run_folder_of(recipe) / "metrics.jsonl").read_text().splitlines()
    return {
        "losses": [json.loads(metrics[-1])["loss"]],
        "still": [n for n, value in moments.items() if not value.any()],
    }


def next_stage(folder, name):
    """Train a recipe's student, export it, and let it teach dBOT's second stage; return what it teaches."""
    path = ROOT / f"launch/recipes/{name}.yaml"
    zero2, teacher = (load_ds_config(ROOT / f"ds_configs/{config}.json") for config in ("zero2", "teacher_zero3"))
    first = small(path, folder, f"run.name={name}-first", "schedule.stop_after=2")
    distill(first, zero2, teacher)
    run, exported = run_folder_of(first), folder / f"{name}.safetensors"
    assert export(["--run", str(run), "--output", str(exported)]) == 0
    student = load_student(first.student, first.data.img_size, require_checkpoint(run).module_state())
    outputs = student.encoder.outputs._replace(final="pre_norm")  # what the recipe takes from its teacher
    student.encoder.outputs = outputs
    second = small(
        ROOT / "launch/recipes/dbot_deit_b_stage2.yaml",
        folder,
        f"run.name={name}-second",
        f"feature_teacher.weights={exported}",
    )
    with started(second, zero2, teacher) as session:
        batches = list(run_loader(session, 0, 2))
        _, targets = session.ask_teachers(batches[0])
        with torch.no_grad():
            output = student(batches[0].images)
        everything = torch.cat([output.prefix_tokens, output.patch_tokens], dim=1)  # the class token is row 0
        hidden = [
            [0, *(1 + patch for patch in range(everything.shape[1] - 1) if patch not in kept)]
            for kept in targets.keep_indices.tolist()
        ]
        wanted = torch.stack([tokens[rows] for tokens, rows in zip(everything, hidden, strict=True)])
        losses = [one_step(session, iter(batches[:1])), one_step(session, iter(batches[1:]))]
        error = (targets.features - wanted).abs().max() / wanted.abs().max()
        return {"shape": list(targets.features.shape), "error": error.item(), "losses": losses}


def main(folder):
    found = {}
    zero2, zero3 = load_ds_config(ROOT / "ds_configs/zero2.json"), load_ds_config(folder / "zero3_all.json")
    with distributed():
        for path in sorted((ROOT / "launch/recipes").glob("*.yaml")):
            recipe = small(path, folder)
            if recipe.feature_teacher is None and recipe.relation_teacher is None:
                found |= {f"{path.stem} {method}": pretraining_step(recipe, method) for method in ("mae", "supervised")}
            else:
                found[path.stem] = step(recipe, zero2)
            if path.stem in ZERO3:
                recipe = small(path, folder, f"run.name={path.stem}-zero3", "student.checkpoint_every=1")
                found[path.stem]["zero3"] = step(recipe, zero3)["losses"]
        stages = {name: next_stage(folder, name) for name in ("dbot_deit_b", "fd_clip_b")}
    (folder / "stages.json").write_text(json.dumps(stages))
    (folder / "stepped.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
