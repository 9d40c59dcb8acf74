"""Drop-path (stochastic depth) whose draws belong to the samples: the same on any number of ranks."""

from __future__ import annotations

import numpy as np
import torch
from timm.layers.drop import DropPath
from torch import Tensor, nn

from hdscale.hashing import hash64, uniform

_DROP_PATH_KEY = 0x64726F70  # "drop": separates this use of the seed from the others


class SampleDropPath(nn.Module):
    """timm's DropPath without a random state: `draw_drop_path` says before each forward which samples lose the branch.

    The draws stay until the next ones: a block that runs again in the backward pass drops what it has dropped.
    """

    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        self.drop_prob = drop_prob
        self.factors: Tensor | None = None  # (B,): 0, or 1 / (1 - drop_prob), in the dtype of the tokens

    def forward(self, x: Tensor) -> Tensor:
        """Scale a branch (B, S, D) sample by sample; outside of training it stays as it is."""
        if not self.training:
            return x
        assert self.factors is not None, "draw_drop_path comes before each forward"
        assert len(self.factors) == len(x), "draws of another micro-batch"
        return x * self.factors[:, None, None]


def use_sample_drop_path(module: nn.Module) -> None:
    """Put a `SampleDropPath` in the place of each of timm's DropPaths, which have no weights either."""
    for parent in module.modules():
        for name, child in list(parent.named_children()):
            if isinstance(child, DropPath):
                setattr(parent, name, SampleDropPath(child.drop_prob))


def draw_drop_path(module: nn.Module, seed: int, positions: np.ndarray, device: torch.device) -> None:
    """Draw for every `SampleDropPath` in a module which samples of a micro-batch lose its branch.

    A draw is a hash of the run's seed, the sample's position in the run and the number of the drop-path, of which a
    block has two. A substitute of a bad sample has the position, and so the draws, of the sample it stands for.

    Args:
        module: what trains, in one dtype.
        seed: `run.seed`.
        positions: (B,) positions of the endless stream, see `hdscale.data.order`.
        device: of the tokens, which is not waited for.
    """
    drop_paths = [part for part in module.modules() if isinstance(part, SampleDropPath)]
    rates = np.array([drop_path.drop_prob for drop_path in drop_paths])[:, None]
    draws = uniform(hash64(seed, _DROP_PATH_KEY, positions, np.arange(len(drop_paths))[:, None]))  # (drop-paths, B)
    factors = torch.from_numpy((draws >= rates) / (1 - rates)).to(next(module.parameters()).dtype)
    if device.type != "cpu":
        factors = factors.pin_memory().to(device, non_blocking=True)
    for drop_path, row in zip(drop_paths, factors, strict=True):
        drop_path.factors = row
