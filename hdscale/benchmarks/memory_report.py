"""The memory and traffic tables: which trials, one launch per number of ranks, and the tables themselves."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from hdscale.cluster.launcher import deepspeed_command, free_port, launch_environment
from hdscale.config.deepspeed import load_ds_config
from hdscale.config.loading import load_recipe
from hdscale.config.recipe import Recipe
from hdscale.errors import UserError
from hdscale.grid import markdown_grid

if TYPE_CHECKING:  # DeepSpeed takes seconds to import, and `benchmark.py data` does without
    from hdscale.benchmarks.memory import TrialResult
    from hdscale.benchmarks.resident_memory import Resident

SMALL = (
    "student.model=vit_tiny_patch16_224",
    "feature_teacher=timm:vit_tiny_patch16_224.augreg_in21k",
    "relation_teacher=timm:vit_tiny_patch16_224.augreg_in21k",
)
"""What makes the default recipe small enough for all tables in minutes; with the same 67 of 197 tokens."""

_SCALED = (
    "reduce_bucket_size",
    "allgather_bucket_size",
    "sub_group_size",
    "stage3_prefetch_bucket_size",
    "stage3_max_live_parameters",
)
_THRESHOLD = "stage3_param_persistence_threshold"
_SMALLER = 28
"""The block of a ViT-L has 28 times the elements of a ViT-Ti's."""

_RESIDENT_STEPS = 3
"""The moments are not there before the first, and ZeRO-3 knows what to prefetch only in the third."""


def scaled(ds_config: Mapping[str, Any], times: int) -> dict[str, Any]:
    """Divide the sizes in a DeepSpeed config, so that they are to a small model what they were to a ViT-L."""
    values = dict(ds_config["zero_optimization"])
    if times > 1:
        values |= {name: values[name] // times // 2 * 2 for name in _SCALED if name in values}
        if _THRESHOLD in values:
            values[_THRESHOLD] = 1000  # norms, biases and tokens, as in a ViT-L
    return {**ds_config, "zero_optimization": values}


def table_trials(stages: Sequence[int], *, variants: bool) -> list[Any]:
    """Return what to measure: each stage as it comes, with accumulation and with checkpointing; and settings of it."""
    from hdscale.benchmarks.memory import Trial

    whole, reuse = {"use_multi_rank_bucket_allreduce": True}, {"stage3_max_reuse_distance": 10**9}
    trials = []
    for stage in stages:
        sharding = "zero3" if stage == 3 else "replicate"
        trials += [
            Trial(f"ZeRO-{stage}", stage, sharding=sharding),
            Trial(f"ZeRO-{stage}, blocks checkpointed", stage, 1, 1, sharding),
            Trial(f"ZeRO-{stage}, 2 micro-steps", stage, 2, sharding=sharding),
        ]
    if variants and 2 in stages:
        for name, zero in (
            ("buckets all-reduced", whole),
            ("gradients round robin", {"round_robin_gradients": True}),
            ("no reduce_scatter", {"reduce_scatter": False}),
            ("no overlap_comm", {"overlap_comm": False}),
        ):
            trials += [Trial(f"ZeRO-2, {name}, {n} micro-steps", 2, n, 0, "replicate", zero) for n in (1, 2)]
    if variants and 3 in stages:
        trials += [
            Trial("ZeRO-3, default reuse distance", 3, 1, 0, "zero3", reuse, reuse),
            Trial("ZeRO-3, default reuse distance, blocks checkpointed", 3, 1, 1, "zero3", reuse, reuse),
            Trial("ZeRO-3, teachers replicated", 3, 1, 0, "replicate"),
        ]
    return trials


def launch(script: Path, arguments: Sequence[str], ranks: int) -> list[dict[str, Any]]:
    """Run a script under the DeepSpeed launcher and return what its first rank wrote to `--output`.

    Raises:
        UserError: the ranks failed, and have said why; or DeepSpeed is not installed.
    """
    with tempfile.TemporaryDirectory(prefix="hdscale-memory-") as folder:
        output = Path(folder) / "figures.json"
        words = [*arguments, "--output", str(output)]
        command = deepspeed_command(script, words, port=free_port(), num_gpus=ranks)
        done = subprocess.run(command, env=launch_environment(), check=False, stdout=sys.stderr)
        if done.returncode or not output.exists():
            raise UserError(f"{ranks} ranks ended with exit code {done.returncode}: see above")
        return json.loads(output.read_text())


class MemoryOptions(NamedTuple):
    """What `launch/benchmark.py memory` was asked for."""

    recipe: Path | None  # None: the default one with `SMALL` sizes
    overrides: list[str]
    ranks: list[int]
    stages: list[int]
    shrink: int | None  # what the sizes in ds_configs/ are divided by; None: 1, or 28 without a recipe
    micro_batch_size: int
    variants: bool
    resident: bool

    def words(self) -> list[str]:
        """Return them as arguments again, without the ranks."""
        words = ["--stages", ",".join(map(str, self.stages)), "--micro-batch-size", str(self.micro_batch_size)]
        words += [] if self.shrink is None else ["--shrink", str(self.shrink)]
        words += [f"--{name}" for name in ("variants", "resident") if getattr(self, name)]
        return [*words, *([] if self.recipe is None else ["--recipe", str(self.recipe)]), *self.overrides]


def load_recipes(options: MemoryOptions, root: Path) -> tuple[Recipe, Recipe]:
    """Return the default recipe made small, and the one to measure.

    Raises:
        UserError: an option or a recipe that is wrong.
    """
    for stage in options.stages:
        if stage not in (0, 2, 3):
            raise UserError(f"--stages must be among 0, 2 and 3, got {stage}")
    if min(options.ranks) < 1:
        raise UserError(f"--ranks must be at least 1, got {min(options.ranks)}")
    for name in ("micro_batch_size", "shrink"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    small = load_recipe(root / "launch/recipes/vit_l_in21k.yaml", [*SMALL, *options.overrides])
    return small, small if options.recipe is None else load_recipe(options.recipe, options.overrides)


def measure_here(options: MemoryOptions, root: Path) -> list[dict[str, Any]] | None:
    """Measure what the options say on this launcher's ranks; the first rank gets the figures, the others None."""
    small, recipe = load_recipes(options, root)
    times = options.shrink or (_SMALLER if options.recipe is None else 1)
    # Nobody trains with ZeRO-0, which is only ever measured: it has no file of its own.
    files = {stage: root / f"ds_configs/zero{stage or 2}.json" for stage in options.stages}
    configs = {stage: scaled(load_ds_config(path), times) for stage, path in files.items()}
    teacher = scaled(load_ds_config(root / "ds_configs/teacher_zero3.json", stages=(3,)), times)
    warm_up = small if options.resident else None
    return measure_on_ranks(
        recipe, configs, teacher, options.micro_batch_size, variants=options.variants, warm_up=warm_up
    )


def measure_on_ranks(
    recipe: Recipe,
    ds_configs: Mapping[int, Mapping[str, Any]],
    teacher_ds_config: Mapping[str, Any],
    micro_batch_size: int,
    *,
    variants: bool = False,
    warm_up: Recipe | None = None,
) -> list[dict[str, Any]] | None:
    """Measure on the ranks there are; the first rank gets the figures, the others None.

    Args:
        recipe: what to train.
        ds_configs: of the student, by the ZeRO stages to measure.
        teacher_ds_config: of sharded teachers.
        micro_batch_size: images per rank and micro-step.
        variants: measure other settings of ZeRO-2 and 3 as well.
        warm_up: the recipe that `hdscale.benchmarks.resident_memory.measure_resident` trains first, to measure resident
            memory of the last stage; None: measure tensors and traffic.
    """
    from hdscale.benchmarks.memory import measure
    from hdscale.benchmarks.resident_memory import measure_resident
    from hdscale.engine.ranks import distributed

    with distributed() as ranks:
        if warm_up is None:
            trials = table_trials(list(ds_configs), variants=variants)
            results = measure(trials, recipe, ds_configs, teacher_ds_config, micro_batch_size)
            found = [as_json(result) for result in results]
        else:
            ds_config = list(ds_configs.values())[-1]
            resident = measure_resident(
                recipe, warm_up, ds_config, teacher_ds_config, micro_batch_size, _RESIDENT_STEPS
            )
            found = [resident_json(resident, ranks.world_size)]
        return found if ranks.is_first else None


def as_json(result: TrialResult) -> dict[str, Any]:
    """Turn a trial's outcome into what JSON can hold."""
    return {
        **result._asdict(),
        "memory": [one._asdict() for one in result.memory],
        "traffic": [one._asdict() for one in result.traffic],
        "operations": {
            who: {name: operation._asdict() for name, operation in operations.items()}
            for who, operations in result.operations.items()
        },
    }


def memory_report(trials: Sequence[Mapping[str, Any]]) -> str:
    """Return the tables in Markdown, one per ZeRO stage: bytes measured, by formula, and their ratio.

    What a trial has in common with its stage's first one, on as many ranks, is left out.
    """
    header = ("trial", "what", "ranks", "measured", "formula", "ratio")
    lines = []
    for stage in sorted({trial["stage"] for trial in trials}):
        chosen = [trial for trial in trials if trial["stage"] == stage]
        for kind, title in (("memory", "bytes a rank holds"), ("traffic", "bytes a rank sends in an optimizer step")):
            lines += [f"### ZeRO-{stage}: {title}", "", *markdown_grid(header, _rows(chosen, kind), padded=False), ""]
    return "\n".join(lines)


def _rows(trials: Sequence[Mapping[str, Any]], kind: str) -> list[tuple[str, ...]]:
    cells = []
    for name in dict.fromkeys(trial["trial"] for trial in trials):
        rows = []
        for trial in trials:
            first = next(one for one in trials if one["ranks"] == trial["ranks"])
            known = first[kind] if trial is not first else []
            rows += [
                (trial["ranks"], figure) for figure in trial[kind] if trial["trial"] == name and figure not in known
            ]
        names = list(dict.fromkeys(figure["what"] for _, figure in rows))
        for ranks, figure in sorted(rows, key=lambda row: (names.index(row[1]["what"]), row[0])):
            measured, formula = figure["measured"], figure["formula"]
            if measured or formula:
                said = "-" if formula is None else f"{formula:,}"
                cells.append((name, figure["what"], f"{ranks}", f"{measured:,}", said, _ratio(measured, formula)))
    return cells


def _ratio(measured: int, formula: int | None) -> str:
    return f"{measured / formula:.3f}" if formula else "-"


def resident_json(resident: Resident, ranks: int) -> dict[str, Any]:
    """Turn a measurement of resident memory into what JSON can hold."""
    return {"ranks": ranks, **resident._asdict(), "predicted": resident.predicted}


def resident_report(resident: Mapping[str, Any]) -> str:
    """Return a measurement of resident memory in lines."""
    lines = [f"{name:>28}: {value / 1e9:6.3f} GB" for name, value in resident["parts"].items()]
    most = max(resident["moments"].values())
    for name, value in resident["moments"].items():
        lines.append(f"{name:>28}: {value / 1e9:6.3f} GB{'' if value == most else ', less than another moment'}")
    ratio = resident["steps"] / resident["predicted"]
    lines += [
        f"{'predicted':>28}: {resident['predicted'] / 1e9:6.3f} GB",
        f"{'measured, in the steps':>28}: {resident['steps'] / 1e9:6.3f} GB, ratio {ratio:.3f}",
        f"{'measured, in the start-up':>28}: {resident['start_up'] / 1e9:6.3f} GB",
    ]
    return f"peak resident memory of a rank of {resident['ranks']}:\n" + "\n".join(lines)
