"""Where a step's time goes on one GPU, as one JSON line: the whole step, and its parts with the device waited for.

deepspeed --num_gpus 1 tests/gpu/step_profile.py [--stage zero2] [--micro-batch-size 128] [--recipe FILE]
"""

import argparse
import json
import time
from pathlib import Path

import torch

from hdscale.config.deepspeed import load_ds_config
from hdscale.config.loading import load_recipe
from hdscale.training.loop import run_loader, set_drop_path, to_device, train_step
from hdscale.training.smoke import generated_session

ROOT = Path(__file__).resolve().parents[2]
WARM_UP, STEPS = 4, 8


class Parts:
    """Milliseconds per step by part: until the device is done, and until the host is."""

    def __init__(self):
        self.device_ms = {}
        self.host_ms = {}

    def timed(self, name, call):
        """Call; add the time to the part."""
        torch.cuda.synchronize()
        start = time.perf_counter()
        result = call()
        host = time.perf_counter() - start
        torch.cuda.synchronize()
        whole = time.perf_counter() - start
        self.device_ms[name] = self.device_ms.get(name, 0.0) + whole / STEPS * 1e3
        self.host_ms[name] = self.host_ms.get(name, 0.0) + host / STEPS * 1e3
        return result


def profile_parts(session, batch):
    """Take steps part by part; the two teachers are run once more, each by itself."""
    parts = Parts()
    for _ in range(STEPS):
        with torch.no_grad():
            for role in ("feature", "relation"):
                teacher = session.teacher_engines[f"{role}_teacher"]
                parts.timed(role, lambda teacher=teacher: teacher(batch.images, batch.keep_indices))
        prepared = parts.timed("teachers", lambda: session.ask_teachers(batch))
        terms = parts.timed("forward", lambda prepared=prepared: session.engine(*prepared))
        parts.timed("backward", lambda terms=terms: session.engine.backward(terms.total))
        parts.timed("step", session.engine.step)
    return parts


def seconds_per_step(session, batch, steps):
    """Take whole steps, as training does."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(steps):
        train_step(session, batch)
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / steps


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipe", type=Path, default=Path(__file__).with_suffix(".yaml"))
    parser.add_argument("--stage", choices=("zero2", "zero3"), default="zero2")
    parser.add_argument("--micro-batch-size", type=int, default=128)
    parser.add_argument("--local_rank", help="from the launcher")
    parser.add_argument("overrides", nargs="*", metavar="FIELD=VALUE")
    given = parser.parse_args()
    recipe = load_recipe(given.recipe, given.overrides)
    student, teacher = (load_ds_config(ROOT / f"ds_configs/{name}.json") for name in (given.stage, "teacher_zero3"))
    start = time.perf_counter()
    with generated_session(recipe, 1, student, teacher, micro_batch_size=given.micro_batch_size) as session:
        started = time.perf_counter() - start
        loader = run_loader(session, 0, 1)
        batch = to_device(next(iter(loader)), session.ranks)
        set_drop_path(session, 0, 0)
        seconds_per_step(session, batch, WARM_UP)
        seconds = seconds_per_step(session, batch, STEPS)
        parts = profile_parts(session, batch)
        found = {
            "stage": given.stage,
            "B": given.micro_batch_size,
            "start_s": round(started, 1),
            "step_ms": round(seconds * 1e3, 1),
            "images_per_second": round(given.micro_batch_size / seconds, 1),
            "gpu_ms": {name: round(value, 1) for name, value in parts.device_ms.items()},
            "host_ms": {name: round(value, 1) for name, value in parts.host_ms.items()},
            "mem_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2),
        }
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
