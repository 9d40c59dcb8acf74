"""What each term of Eq. 1 asks of the student: the norm of its gradient, measured beside some of the steps."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hdscale.config.recipe import Recipe
from hdscale.engine.ranks import Ranks
from hdscale.engine.zero_internals import Engine
from hdscale.errors import UserError
from hdscale.types import LossTerms
from hdscale.vit.encoder import resolve_layers

_FIELD = "log.gradient_norms_every"


class GradientNorms:
    """Measures on the optimizer steps that `log.gradient_norms_every` names; on all others it does nothing.

    Each term is differentiated with respect to the tokens that enter the student's first relation block: behind that
    point the terms part. Losses, weights, their gradients and random states are those of a run that measures nothing.
    """

    def __init__(self, engine: Engine, recipe: Recipe, ranks: Ranks, *, accumulation: int) -> None:
        """Find the block.

        Args:
            engine: of a distiller where the recipe asks for norms, of anything otherwise.
            recipe: resolved, and accepted by `check_measurable`.
            ranks: this process.
            accumulation: micro-steps per optimizer step.

        Raises:
            UserError: `relation.layers` are not blocks of a student without relation teacher.
        """
        self._every = recipe.log.gradient_norms_every
        if self._every:
            blocks = engine.module.student.encoder.model.blocks
            self._block = blocks[min(resolve_layers(recipe.relation.layers, len(blocks), "relation.layers"))]
        self._engine = engine
        self._recipe = recipe
        self._ranks = ranks
        self._accumulation = accumulation
        self._sums = torch.zeros(2, device=ranks.device)  # of norms over micro-steps: feature and relation term
        self._count = 0  # micro-steps in the sums
        self._seconds = 0.0

    @contextlib.contextmanager
    def beside(self, step: int) -> Iterator[None]:
        """Measure in the forward pass inside the block, if this is the step for it.

        Args:
            step: optimizer steps done when this one is, as in the log.
        """
        if not self._every or step % self._every:
            yield
            return
        entering: list[Tensor] = []

        def take(_block: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            entering.append(inputs[0])

        def measure(_distiller: nn.Module, _inputs: Any, terms: LossTerms) -> None:
            self._measure(terms, entering[0])

        # A hook of the module runs before DeepSpeed gets its output: from then on, a term's gradient would pass for the
        # step's backward pass.
        hooks = (
            self._block.register_forward_pre_hook(take),
            self._engine.module.register_forward_hook(measure),
        )
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _measure(self, terms: LossTerms, tokens: Tensor) -> None:
        """Add the norms of a micro-step; unlike the rest of the step, this waits for the device, to time itself."""
        start = self._now()
        # As the backward pass scales them: float16 gradients neither vanish where training's do not, nor overflow.
        scale = float(self._engine.optimizer.loss_scale) / self._accumulation
        for place, (term, weight) in enumerate(((terms.feature, 1.0), (terms.relation, self._recipe.loss.alpha))):
            if term.requires_grad:
                seed = torch.full_like(term, scale * weight)
                (gradient,) = torch.autograd.grad(term, tokens, seed, retain_graph=True)
                self._sums[place] += torch.linalg.vector_norm(gradient, dtype=torch.float32) / scale
            else:  # no such teacher
                self._sums[place] = math.nan
        self._count += 1
        self._seconds += self._now() - start

    def _now(self) -> float:
        if self._ranks.device.type == "cuda":
            torch.cuda.synchronize(self._ranks.device)
        return time.perf_counter()

    def read(self) -> dict[str, float]:
        """Reduce over ranks what was measured since the last reading, and start anew; every rank has to call it.

        Returns:
            The log's fields: the mean norm of each term's gradient, NaN for a term that is not there, and the seconds
            that all this took, mean over ranks. Empty when nothing was measured.
        """
        if not self._count:
            return {}
        values = torch.cat([self._sums / self._count, self._sums.new_tensor([self._seconds])])
        dist.all_reduce(values)
        feature, relation, seconds = (values / self._ranks.world_size).tolist()
        self._sums.zero_()
        self._count = 0
        self._seconds = 0.0
        return {"gradient_norm_feature": feature, "gradient_norm_relation": relation, "gradient_norm_seconds": seconds}


def check_measurable(recipe: Recipe, ds_config: Mapping[str, Any]) -> None:
    """Refuse to measure where a forward pass allows for a single backward pass only.

    Args:
        recipe: resolved.
        ds_config: checked file of `ds_configs/`.

    Raises:
        UserError: the recipe asks for norms under ZeRO-3, or through DeepSpeed's activation checkpointing.
    """
    if not recipe.log.gradient_norms_every:
        return
    if ds_config["zero_optimization"]["stage"] == 3:
        raise UserError(
            f"{_FIELD} does not work under ZeRO-3, which gathers weights for one backward pass only: choose ZeRO-2, "
            f"such as --ds_config ds_configs/zero2.json, or set {_FIELD}=0"
        )
    if ds_config.get("activation_checkpointing") and recipe.student.checkpoint_every:
        raise UserError(
            f"{_FIELD} does not work with DeepSpeed's activation checkpointing, which refuses gradients of single "
            f"tensors: leave activation_checkpointing out of the DeepSpeed config, or set {_FIELD}=0"
        )
