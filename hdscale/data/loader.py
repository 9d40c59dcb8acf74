"""Loaders: positions of the endless stream in, micro-batches of uint8 images out."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from hdscale.config.sections import DataConfig
from hdscale.data.index import ShardSet
from hdscale.data.order import Order, positions_of, samples_at
from hdscale.data.samples import EVAL_VIEW, MaskLookup, load_batch, too_many_bad
from hdscale.data.views import view_number
from hdscale.errors import UserError
from hdscale.types import Batch

_logger = logging.getLogger(__name__)


def accumulation_steps(global_batch_size: int, micro_batch_size: int, world_size: int) -> int:
    """Return the micro-steps of an optimizer step.

    Raises:
        UserError: the sizes do not divide.
    """
    per_micro_step = micro_batch_size * world_size
    if global_batch_size % per_micro_step:
        raise UserError(
            f"optim.global_batch_size must be a multiple of optim.micro_batch_size x ranks = {micro_batch_size} x "
            f"{world_size} = {per_micro_step}, got {global_batch_size}: change one of the three"
        )
    return global_batch_size // per_micro_step


class RankShare(NamedTuple):
    """The part of every global batch that one rank serves."""

    rank: int
    world_size: int
    global_batch_size: int  # images per optimizer step, over all ranks
    micro_batch_size: int  # images that one rank forwards at once

    @property
    def accumulation(self) -> int:
        """Micro-steps per optimizer step.

        Raises:
            UserError: the sizes do not divide.
        """
        return accumulation_steps(self.global_batch_size, self.micro_batch_size, self.world_size)


class TrainLoader:
    """One rank's micro-batches, step after step.

    What a step contains depends on neither ranks, workers, nor where training started: to resume, start at that step.
    """

    def __init__(
        self,
        shards: ShardSet,
        order: Order,
        config: DataConfig,
        seed: int,
        share: RankShare,
        steps: range,
        look_up_masks: MaskLookup | None = None,
    ) -> None:
        """Plan optimizer steps.

        Args:
            shards: where samples are read.
            order: from `build_order`, over the index of `shards`.
            config: view and worker settings.
            seed: `run.seed`.
            share: which part of each global batch is served.
            steps: the optimizer steps that are served, counted from the start of the run.
            look_up_masks: fills `Batch.keep_indices`; runs in the workers, so it must be picklable where processes are
                spawned.

        Raises:
            UserError: the batch sizes of `share` do not divide.
        """
        dataset = _TrainDataset(shards, order, config, seed, look_up_masks)
        self.accumulation = share.accumulation
        self._loader = _data_loader(dataset, _TrainPositions(steps, share), config.workers)

    def __len__(self) -> int:
        """Return the number of micro-batches."""
        return len(self._loader)

    def __iter__(self) -> Iterator[Batch]:
        """Yield `accumulation` micro-batches per step.

        Raises:
            UserError: neither a sample nor its substitutes can be shown, or `look_up_masks` raised it.
        """
        return _unpack(self._loader)


class SequentialLoader:
    """Chosen samples in the order given, each in one view; the last batch may be smaller."""

    def __init__(
        self,
        shards: ShardSet,
        config: DataConfig,
        seed: int,
        *,
        sample_ids: Sequence[int] | np.ndarray,
        view: int | None,
        batch_size: int,
        workers: int | None = None,
    ) -> None:
        """Plan the batches.

        Args:
            shards: where samples are read.
            config: view settings; its `workers` unless `workers` is given.
            seed: `run.seed`, of augmented views.
            sample_ids: rows of the index.
            view: the augmented view as training shows it; None: the central square (`Batch.views` is then EVAL_VIEW).
            batch_size: images per batch.
            workers: loader processes.
        """
        self._shards, self._config = shards, config
        ids = np.asarray(sample_ids, dtype=np.int64)
        batches = [ids[start : start + batch_size] for start in range(0, len(ids), batch_size)]
        workers = config.workers if workers is None else workers
        self._loader = _data_loader(_SequentialDataset(shards, config, seed, view), batches, workers)

    def __len__(self) -> int:
        """Return the number of batches."""
        return len(self._loader)

    def __iter__(self) -> Iterator[Batch]:
        """Yield the batches; `Batch.epochs` is the view, or 0.

        Raises:
            UserError: more samples than `data.max_bad_fraction` of the split are bad.
        """
        bad: set[int] = set()
        for batch in _unpack(self._loader):
            bad.update(sample.sample_id for sample in batch.bad)
            error = too_many_bad(bad, batch.bad, self._shards, self._config)
            if error is not None:
                raise error
            yield batch
        if bad:
            _logger.warning("%s: %d samples were bad, others were shown in their place", self._shards.folder, len(bad))


class _TrainPositions:
    """The positions (B,) of every micro-step of one rank, computed when asked for."""

    def __init__(self, steps: range, share: RankShare) -> None:
        self._steps = steps
        self._share = (share.rank, share.world_size, share.micro_batch_size, share.accumulation)

    def __len__(self) -> int:
        return len(self._steps) * self._share[-1]

    def __iter__(self) -> Iterator[np.ndarray]:
        for step in self._steps:
            yield from positions_of(step, *self._share)


class _TrainDataset(Dataset):
    def __init__(
        self, shards: ShardSet, order: Order, config: DataConfig, seed: int, look_up_masks: MaskLookup | None
    ) -> None:
        self._shards, self._order, self._config, self._seed = shards, order, config, seed
        self._look_up_masks = look_up_masks

    def __getitem__(self, positions: np.ndarray) -> tuple[Any, ...] | UserError:
        sample_ids, epochs = samples_at(self._order, positions)
        views = view_number(self._config, epochs)
        return _pack(load_batch(self._shards, self._config, self._seed, sample_ids, views, epochs, self._look_up_masks))


class _SequentialDataset(Dataset):
    def __init__(self, shards: ShardSet, config: DataConfig, seed: int, view: int | None) -> None:
        self._shards, self._config, self._seed, self._view = shards, config, seed, view

    def __getitem__(self, sample_ids: np.ndarray) -> tuple[Any, ...] | UserError:
        views = np.full_like(sample_ids, EVAL_VIEW if self._view is None else self._view)
        return _pack(load_batch(self._shards, self._config, self._seed, sample_ids, views, np.maximum(views, 0)))


def _data_loader(dataset: Dataset, batches: Iterable[np.ndarray], workers: int) -> DataLoader:
    return DataLoader(
        dataset,
        batch_size=None,  # the dataset makes whole batches
        collate_fn=_as_it_is,
        sampler=batches,
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # torch draws a seed for its workers: not from the global generator
    )


def _as_it_is(packed: Any) -> Any:
    """Keep arrays arrays, which torch would turn into tensors."""
    return packed


def _pack(batch: Batch | UserError) -> tuple[Any, ...] | UserError:
    """Turn all tensors but the images into arrays: each tensor that leaves a worker costs half a millisecond."""
    if isinstance(batch, UserError):
        return batch
    images, *rest, bad = batch
    return images, *(value if value is None else value.numpy() for value in rest), bad


def _unpack(packed: Iterable[tuple[Any, ...] | UserError]) -> Iterator[Batch]:
    for batch in packed:
        if isinstance(batch, UserError):
            raise batch
        tensors = [torch.from_numpy(value) if isinstance(value, np.ndarray) else value for value in batch[:-1]]
        yield Batch(*tensors, bad=batch[-1])
