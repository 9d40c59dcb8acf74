"""Run under a launcher that is killed: each rank joins the others, says what it sees of itself, and waits.

python tests/engine/ranks_scenario.py FOLDER
"""

import ctypes
import json
import os
import signal
import sys
from pathlib import Path

import torch.distributed as dist

from hdscale.engine.ranks import distributed

PR_GET_PDEATHSIG = 2


def signal_of_a_dead_parent():
    """Return the signal that this process gets when the one that started it dies; 0: none."""
    number = ctypes.c_int()
    assert ctypes.CDLL(None).prctl(PR_GET_PDEATHSIG, ctypes.byref(number)) == 0
    return number.value


def main(folder):
    with distributed() as ranks:
        dist.barrier()  # all have taken their buffers' names back
        meeting_point = f"{os.environ['MASTER_ADDR']}_{os.environ['MASTER_PORT']}"
        backend = dist.distributed_c10d._get_default_group()._get_backend(ranks.device)
        found = {
            "pid": os.getpid(),
            "launcher": os.getppid(),
            "when_it_dies": signal_of_a_dead_parent(),
            "timeout": backend.options._timeout.total_seconds(),
            "mapped": "/dev/shm/deepspeed_" in Path("/proc/self/maps").read_text(),
            "named": [path.name for path in Path("/dev/shm").glob(f"deepspeed_*{meeting_point}*")],
        }
        part = folder / f"{ranks.rank}.part"
        part.write_text(json.dumps(found))
        part.rename(folder / f"{ranks.rank}.json")
        signal.pause()


if __name__ == "__main__":
    main(Path(next(argument for argument in sys.argv[1:] if not argument.startswith("--local_rank"))))
