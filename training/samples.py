"""Samples by number: which slices a training step sees, in which order, and what is random about them."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
import torch.utils.data

from ..data.prepared import PreparedSplit, StreamedSplit


class SampleStream(torch.utils.data.Dataset):
    """Samples by number: the slices of an endless sequence of permutations of a split, with the columns that are asked for; only
    those of the `population` (`data.prepared.POPULATIONS`)."""

    def __init__(self, split: PreparedSplit, seed: int, columns: Sequence[str] = ("image",), population: str = "all"):
        self.split = split
        self.seed = seed
        self.columns = columns
        self.rows = split.rows_of(population)
        self._epoch, self._order = -1, None

    def __getitems__(self, positions: list[int]) -> dict:
        rows = [self._row(position) for position in positions]
        return {**self.split.read_rows(rows, self.columns), "position": np.array(positions)}

    def _row(self, position: int) -> int:
        epoch, index = divmod(position, len(self.rows))
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = np.random.default_rng([self.seed, epoch]).permutation(len(self.rows))
        return int(self.rows[self._order[index]])


class StreamedSamples(torch.utils.data.IterableDataset):
    """
    Samples by number of a split that is read as it comes: the slices of an endless sequence of shuffled passes over it.

    Slices that are not in `batches` are passed over: those of other processes, and those of the begun pass before the first batch.
    Whole passes before it are not read.

    Args:
        split ([`StreamedSplit`]): The slices.
        seed (`int`): Decides, with the number of the pass, its order.
        buffer_size (`int`): Slices in memory to shuffle among. Another size is another order.
        batches (`Iterable[list[int]]`): Numbers of the samples of each batch, rising.
        columns (`Sequence[str]`): What is read of a slice.
        population (`str`): Of `data.prepared.POPULATIONS`; other slices are passed over.

    Yields:
        `dict`: A whole batch: the columns, `image (N, C, H, W)` in float32, and `position (N,)` int64.

    Raises:
        ConnectionError: The split could not be read any further.
    """

    def __init__(
        self,
        split: StreamedSplit,
        seed: int,
        buffer_size: int,
        batches: Iterable[list[int]],
        columns: Sequence[str] = ("image",),
        population: str = "all",
    ):
        self.split = split
        self.seed = seed
        self.buffer_size = buffer_size
        self.batches = batches
        self.columns = columns
        self.population = population

    def __iter__(self) -> Iterator[dict]:
        current, rows, done = -1, iter(()), 0
        length = self.split.count_rows(self.population)
        for positions in self.batches:
            batch = []
            for position in positions:
                epoch, index = divmod(position, length)
                if epoch != current:
                    current, done = epoch, 0
                    rows = self.split.shuffled_rows(
                        [self.seed, epoch], self.buffer_size, self.columns, self.population
                    )
                try:
                    batch.append(next(itertools.islice(rows, index - done, None)))
                except ConnectionError as error:
                    raise ConnectionError(
                        f"{error}. The last checkpoint is unharmed: go on with `--train.resume latest`."
                    ) from error
                done = index + 1
            stacked = {name: np.stack([row[name] for row in batch]) for name in self.columns}
            yield {**stacked, "image": stacked["image"].astype(np.float32), "position": np.array(positions)}


class PositionBatches:
    """Sample numbers of each forward pass of one process, from optimizer step `first_step` on. With `updates_per_batch` u the samples of
    steps s u ... s u + u - 1 are the same."""

    def __init__(
        self,
        first_step: int,
        last_step: int,
        batch_size: int,
        accumulation: int,
        processes: int,
        process: int,
        updates_per_batch: int = 1,
    ):
        self.steps = range(first_step, last_step)
        self.batch_size = batch_size
        self.accumulation = accumulation
        self.processes = processes
        self.process = process
        self.updates_per_batch = updates_per_batch

    def __len__(self) -> int:
        return len(self.steps) * self.accumulation

    def __iter__(self):
        for step in self.steps:
            number = step // self.updates_per_batch
            for micro in range(self.accumulation):
                start = ((number * self.accumulation + micro) * self.processes + self.process) * self.batch_size
                yield list(range(start, start + self.batch_size))


def sample_generators(seed: int, stream: int, positions, device: torch.device) -> list[torch.Generator]:
    """One generator per sample; `stream` 0 is training, 1 validation."""
    keys = [np.random.SeedSequence([seed, stream, int(p)]).generate_state(1, np.uint64)[0] for p in positions]
    return [torch.Generator(device).manual_seed(int(key)) for key in keys]


def repeated_generators(generators: list[torch.Generator], update: int) -> list[torch.Generator]:
    """Generators for the draws that differ between the updates on one batch, from those of its samples: themselves for update 0."""
    if not update:
        return generators
    keys = [np.random.SeedSequence([g.initial_seed(), update]).generate_state(1, np.uint64)[0] for g in generators]
    return [torch.Generator(g.device).manual_seed(int(key)) for g, key in zip(generators, keys, strict=True)]
