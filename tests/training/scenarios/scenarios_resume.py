"""Runs that stop and go on: on request, by a signal, on other ranks, in bf16, with the optimizer on the CPU."""

import os
import signal

from safetensors.torch import save_file

import hdscale.training.distill as distillation
from hdscale.config.deepspeed import load_ds_config
from hdscale.engine.zero_state import gather_shard
from hdscale.training.distill import distill
from hdscale.training.loop import run_loader, train_run
from tests.helpers.whole_runs import STEPS, STOP
from tests.training.scenarios.lab import DROP_PATH, REPLICATED, ROOT, watched_optimizers

TO_STOP = {2: [DROP_PATH, *REPLICATED], "3all": [DROP_PATH]}


def resume(lab):
    """Train in one go, and with a stop on the way."""
    found = {}
    for stage in (2, "3all"):
        whole, cut = f"whole-z{stage}", f"cut-z{stage}"
        codes = [lab.distill(whole, stage, *TO_STOP[stage])]
        codes.append(lab.distill(cut, stage, *TO_STOP[stage], f"schedule.stop_after={STOP}"))
        done_early = (lab.run_folder(cut) / "DONE").exists()
        codes.append(lab.distill(cut, stage, *TO_STOP[stage]))
        codes.append(lab.distill(cut, stage, *TO_STOP[stage]))
        found[str(stage)] = {"codes": codes, "done_early": done_early}
    return found


def interrupt(lab):
    """Send SIGTERM to the last rank in its fourth step, of a run that measures gradient norms, too."""
    batches = []
    overrides = [*TO_STOP[2], "log.gradient_norms_every=3"]

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
        code = lab.distill("interrupted", 2, *overrides)
    finally:
        distillation.start = original
    latest = (lab.run_folder("interrupted") / "checkpoints/latest").read_text().strip()
    return {"code": code, "latest": latest, "again": lab.distill("interrupted", 2, *overrides)}


def elastic_source(lab):
    """Leave checkpoints behind, of both stages."""
    stop = f"schedule.stop_after={STOP}"
    return [lab.distill(f"elastic-from-{stage}", stage, *TO_STOP[stage], stop) for stage in (2, "3all")]


def elastic(lab):
    """Load the checkpoints of two ranks under other stages, here and with one rank."""
    found = {}
    for source, stage in ((2, 2), (2, "3all"), ("3all", 2)):
        name = f"elastic-{source}-to-{stage}-of-{lab.ranks.world_size}"
        lab.copy_run(f"elastic-from-{source}", name)
        with lab.session(name, stage, *TO_STOP[stage]) as session:
            assert session.run.checkpoint.step == STOP
            shard = gather_shard(session.engine, lab.ranks.rank, lab.ranks.world_size)
            save_file(shard, lab.folder / f"{name}-{lab.ranks.rank}.safetensors")
            batches = list(run_loader(session, STOP, STEPS))
            ids = lab.everyone([batch.sample_ids.tolist() for batch in batches])
            found[name] = {"ids": ids, "code": train_run(session)}
    return found


def bf16(lab):
    found = {}
    four_steps = ["run.precision=bf16", "mask.source=online", DROP_PATH, "schedule.epochs=1.07"]
    for stage, low in ((2, [*four_steps, *REPLICATED, "student.drop_path_per=rank"]), (3, four_steps)):
        with lab.session(f"bf16-whole-z{stage}", stage, *low) as session:
            seen = []
            session.engine.module.register_forward_pre_hook(lambda _, given, seen=seen: seen.append(given))
            codes = [train_run(session)]
            dtypes = _dtypes(session, *seen[0])
        codes.append(lab.distill(f"bf16-cut-z{stage}", stage, *low, "schedule.stop_after=2"))
        codes.append(lab.distill(f"bf16-cut-z{stage}", stage, *low))
        found[str(stage)] = {"codes": codes, "dtypes": dtypes}
    return found


def _dtypes(session, images, targets):
    """Name what the module got through the engine."""
    weight = next(iter(session.engine.module.parameters())).dtype
    kinds = {
        "images": images.dtype,
        "weights": weight,
        "relations": targets.relations[0].dtype,
        "features": targets.features.dtype,
        "keep_indices": targets.keep_indices.dtype,
    }
    return {name: str(dtype).removeprefix("torch.") for name, dtype in kinds.items()}


def offloaded(lab):
    """Train with the optimizer on the CPU, in one go and with a stop."""
    config, found = load_ds_config(ROOT / "ds_configs/zero2_offload.json"), {}
    with watched_optimizers() as steps:
        for name, stops in (("whole", (STOP,)), ("cut", (2, STOP))):
            recipes = [lab.recipe(f"offload-{name}", *REPLICATED, f"schedule.stop_after={stop}") for stop in stops]
            found[name] = [distill(recipe, config, lab.teacher) for recipe in recipes]
    return found | {"optimizers": sorted({name for name, _ in steps})}
