"""Teachers while a student trains beside them."""

import torch

import hdscale.training.distill as distillation
from hdscale.engine.zero_internals import held_elements
from hdscale.teachers.build import build_teachers
from hdscale.teachers.targets import TeacherPair
from hdscale.training.distill import build_teacher_engines, teacher_digests
from hdscale.training.loop import run_loader, train_step
from hdscale.types import ComparedTokens
from tests.helpers.sessions import started
from tests.training.scenarios.lab import REPLICATED


def teachers(lab):
    """Train two steps beside sharded teachers and look at them."""
    found = {}
    with started(lab.recipe("teachers"), lab.configs[3], lab.teacher_all) as session:
        before = teacher_digests(session.teacher_engines)
        held = {name: [held_elements(teacher)] for name, teacher in session.teacher_engines.items()}
        for batch in run_loader(session, 0, 2):
            train_step(session, batch)
            for name, teacher in session.teacher_engines.items():
                held[name].append(held_elements(teacher))
        recipe = lab.recipe("whole", *REPLICATED)
        fresh = build_teachers(recipe, 8)
        whole = build_teacher_engines(fresh, recipe, lab.teacher, "fp32", lab.ranks)
        pair = TeacherPair(
            whole["feature_teacher"],
            whole["relation_teacher"],
            relation_config=recipe.relation,
            mask_config=recipe.mask,
            seed=recipe.run.seed,
            num_patches=64,
            compared=ComparedTokens(cls_in_relation=True, cls_in_features=True),
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
