"""The run's list of bad samples: gathered over ranks, written down, and too many of them end the run on all ranks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from hdscale.config.sections import DataConfig
from hdscale.data.index import ShardSet
from hdscale.data.samples import too_many_bad
from hdscale.engine.ranks import Ranks
from hdscale.errors import UserError
from hdscale.runs.step_log import StepLog
from hdscale.types import BadSample

QUARANTINE_FILE = "quarantine.jsonl"


class Quarantine:
    """Samples that were bad; every rank holds the same list after each `gather`."""

    def __init__(
        self,
        run_folder: Path,
        shards: ShardSet,
        config: DataConfig,
        ranks: Ranks,
        *,
        known: Iterable[int],
        start_step: int,
    ) -> None:
        """Go on with the list of a checkpoint.

        Args:
            run_folder: where the first rank keeps `quarantine.jsonl`.
            shards: the split that is trained on.
            config: `max_bad_fraction` is used.
            ranks: this process.
            known: ids that the checkpoint lists.
            start_step: step of the checkpoint; 0 without one.
        """
        self._log = StepLog(run_folder / QUARANTINE_FILE, start_step) if ranks.is_first else None
        self._shards, self._config, self._ranks = shards, config, ranks
        self._known = set(known)
        self._pending: list[BadSample] = []

    @property
    def sample_ids(self) -> list[int]:
        """Ids of all bad samples that were gathered, ascending."""
        return sorted(self._known)

    def add(self, bad: Sequence[BadSample]) -> None:
        """Note what one of this rank's batches met."""
        self._pending += [sample for sample in bad if sample.sample_id not in self._known]

    def gather(self, step: int) -> UserError | None:
        """Share what the ranks have met since the last time, and write it down; called by all ranks together.

        Returns:
            What ends the run, when more samples than `data.max_bad_fraction` are bad; on all ranks.
        """
        count = torch.tensor(len(self._pending), device=self._ranks.device)
        dist.all_reduce(count)
        if not count:
            return None
        everyone: list[Any] = [None] * self._ranks.world_size
        dist.all_gather_object(everyone, self._pending)
        self._pending = []
        new = {sample.sample_id: sample for pending in everyone for sample in pending}
        self._known |= new.keys()
        if self._log is not None:
            for sample in new.values():
                self._log.append({"step": step, **sample._asdict()})
        return too_many_bad(self._known, list(new.values()), self._shards, self._config)
