"""What the other commands do: masks ahead of training, a teacher's pretraining, a smoke run."""

import hashlib
import io

import torch.distributed as dist

from hdscale.training.masks import precompute_masks
from hdscale.training.pretrain import pretrain
from hdscale.training.smoke import smoke


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


def pretraining(lab):
    small = ["optim.micro_batch_size=16", "schedule.epochs=0.54", "schedule.warmup_epochs=0"]
    small += ["pretrain.decoder_dim=32", "pretrain.decoder_depth=1", "pretrain.decoder_heads=4"]
    return {
        method: pretrain(lab.recipe(f"pretrained-{method}", *small), method, lab.configs[2])
        for method in ("mae", "supervised")
    }


def smoke_run(lab):
    texts = {}
    for stage in (2, 3):
        out = io.StringIO()
        code = smoke(lab.recipe("smoke"), 2, lab.configs[stage], lab.teacher, stream=out)
        texts[str(stage)] = lab.everyone([code, out.getvalue()])
    return texts
