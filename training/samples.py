"""Samples by number: which slices a training step sees, and in which order."""

from __future__ import annotations

import contextlib
import itertools
import queue
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.utils.data
from accelerate import Accelerator

from ..checks import check_integer
from ..data.phantoms.drawn_heads import DRAWN, DrawnHeads
from ..data.phantoms.label_maps import find_label_maps, split_maps
from ..data.phantoms.sets import PHANTOMS, locate_label_maps
from ..data.prepared import TYPES, PreparedSplit, StreamedSplit, load_prepared
from ..schedulers.devices import send
from ..schedulers.draws import make_keys
from ..volumes.processor import VolumeProcessor
from .keys import TRAINING
from .objective import Batch, Objective
from .options import TrainOptions


# Heads of a map that whole volumes are validated on.
_HEADS_OF_A_MAP = 8


class SampleStream(torch.utils.data.Dataset):
    """Gives samples by number: the slices of a `population` (`data.prepared.POPULATIONS`) in an endless sequence of
    permutations."""

    def __init__(self, split: PreparedSplit, seed: int, columns: Sequence[str] = ("image",), population: str = "all"):
        self.split = split
        self.seed = seed
        self.columns = columns
        self.rows = split.rows_of(population)
        self._epoch, self._order = -1, None

    def __getitems__(self, positions: list[int]) -> dict:
        rows = []
        for position in positions:
            epoch, index = divmod(position, len(self.rows))
            if epoch != self._epoch:
                self._epoch = epoch
                self._order = np.random.default_rng([self.seed, epoch]).permutation(self.rows)
            rows.append(int(self._order[index]))
        return {**self.split.read_rows(rows, self.columns), "position": np.array(positions)}


class MapSplit:
    """Stands for heads that are drawn from label maps as a training goes: a row names the map of a head, column
    `map`. Parts of it are as of [`PreparedSplit`].

    Args:
        names (`list[str]`): Of all maps.
        rows (`np.ndarray` of shape `(N,)`): Number of the map of every row.
    """

    def __init__(self, names: list[str], rows: np.ndarray):
        self.rows = rows
        self.processor_settings: dict = {}
        self.recipe = {"source": "heads drawn from label maps", "maps": len(names)}
        counts = np.bincount(rows, minlength=len(names)).tolist()
        numbers = {name: count for name, count in zip(names, counts, strict=True) if count}
        self.subjects = list(numbers)
        self.subject_info = {
            name: {"rows": count, "anomalous_rows": 0, "annotations": 0} for name, count in numbers.items()
        }

    def rows_of(self, population: str) -> np.ndarray:
        """Returns the numbers of all rows: heads belong to every population."""
        return np.arange(len(self.rows))

    def count_rows(self, population: str = "all") -> int:
        """Returns the number of rows."""
        return len(self.rows)

    def read_rows(self, indices: Sequence[int], columns: Sequence[str] = ("map",)) -> dict:
        """Returns the maps of the rows with these numbers."""
        return {"map": self.rows[np.asarray(indices)]}


@dataclass(eq=False)
class StreamedSamples(torch.utils.data.IterableDataset):
    """Yields whole `batches`, lists of rising sample numbers, of a split that is read as it comes, with columns and
    population as of [`SampleStream`]: the slices of an endless sequence of passes over it, shuffled among
    `buffer_size` slices in memory, which has a part in the order. Slices of the first pass that are in no batch are
    passed over; whole passes before it are not read."""

    split: StreamedSplit
    seed: int
    buffer_size: int
    batches: Iterable[list[int]]
    columns: Sequence[str] = ("image",)
    population: str = "all"

    def __iter__(self) -> Iterator[dict]:
        current, rows, done = -1, iter(()), 0
        length = self.split.count_rows(self.population)
        for positions in self.batches:
            batch = []
            for position in positions:
                epoch, index = divmod(position, length)
                if epoch != current:
                    current, done = epoch, 0
                    order = [self.seed, epoch], self.buffer_size
                    rows = self.split.shuffled_rows(*order, self.columns, self.population)
                try:
                    batch.append(next(itertools.islice(rows, index - done, None)))
                except ConnectionError as error:
                    text = " ".join(str(error).split()).rstrip(".")
                    raise ConnectionError(
                        f"{text}. Checkpoints are unharmed: `--train.resume latest` goes on from the last one, if"
                        " there is one."
                    ) from error
                done = index + 1
            stacked = {name: np.stack([row[name] for row in batch]).astype(TYPES[name]) for name in self.columns}
            yield {**stacked, "position": np.array(positions)}


# Heads whose slices are made at once on a GPU: starting the work takes as long for 64 as for 512, which is spread over
# the batches. 1024 take 2 GB.
_DRAWN_AT_ONCE = 1024


@dataclass(eq=False)
class DrawnSamples(torch.utils.data.Dataset):
    """Gives samples by number that are drawn as they are asked for: sample p is slice p of `heads`."""

    heads: DrawnHeads
    columns: Sequence[str] = ("image",)

    def __getitems__(self, positions: list[int]) -> Batch:
        return {**self.heads.draw(positions, self.columns), "position": torch.tensor(positions)}


def draw_batches(heads: DrawnHeads, batches: Iterable[list[int]], columns: Sequence[str]) -> Iterator[Batch]:
    """Gives the samples of [`DrawnSamples`] for lists of sample numbers, on the device that they are made on; several
    lists are made at once on a GPU."""
    batches = iter(batches)
    at_once = 1 if heads.device.type == "cpu" else _DRAWN_AT_ONCE
    while first := next(batches, None):
        group = [first, *itertools.islice(batches, max(at_once // len(first) - 1, 0))]
        made = DrawnSamples(heads, columns).__getitems__(list(itertools.chain(*group)))
        parts = zip(*(values.split([len(batch) for batch in group]) for values in made.values()), strict=True)
        yield from (dict(zip(made, part, strict=True)) for part in parts)


@dataclass
class PositionBatches:
    """Gives the sample numbers of each forward pass of one process, from optimizer step `first_step` to `last_step` -
    1. With `updates_per_batch` u the samples of steps s u ... s u + u - 1 are the same."""

    first_step: int
    last_step: int
    batch_size: int
    accumulation: int
    processes: int
    process: int
    updates_per_batch: int = 1

    def __len__(self) -> int:
        return (self.last_step - self.first_step) * self.accumulation

    def __iter__(self):
        for step in range(self.first_step, self.last_step):
            number = step // self.updates_per_batch
            for micro in range(self.accumulation):
                start = ((number * self.accumulation + micro) * self.processes + self.process) * self.batch_size
                yield list(range(start, start + self.batch_size))


def load_splits(
    accelerator: Accelerator, options: TrainOptions, objective_class: type[Objective]
) -> tuple[PreparedSplit | StreamedSplit | DrawnHeads, PreparedSplit | DrawnHeads | None]:
    """Opens the training split and, if the run validates, the validation split."""
    data, validates = options.data, options.train.validate_every > 0
    if objective_class.draws_volumes:
        names = [path.name for path in find_label_maps(label_maps_folder(data.path))]
        maps = {part: np.array(numbers) for part, numbers in split_maps(len(names)).items()}
        validation = MapSplit(names, np.tile(maps["validation"], _HEADS_OF_A_MAP))
        return MapSplit(names, maps["train"]), validation if validates else None
    if data.path.startswith(DRAWN):
        return _draw_heads(accelerator, options, objective_class)
    if data.streaming and data.path in PHANTOMS and not Path(data.path).is_dir():
        raise ValueError(
            f"`data.streaming` is for a folder or a data set on the Hub, got the phantom {data.path!r}, which is made"
            " on this machine: leave `data.streaming` out, or name other data with `--data`."
        )
    # The first process makes a phantom or fills a cache, the others then find it.
    with accelerator.main_process_first():
        train_split = load_prepared(data.path, data.train_split, streaming=data.streaming)
        if not train_split.count_rows(objective_class.trains_on):
            raise ValueError(
                f"The split `{data.train_split}` of {data.path} holds no {objective_class.trains_on} slice, which"
                " this method learns from: name another with `--data.train_split`, or prepare other data."
            )
        _check_subjects(train_split, data.train_split, objective_class.trains_on, objective_class)
        context = options.processor.get("context", 0)
        check_integer("processor.context", context, 0)
        if context:
            train_split.add_neighbours(context, objective_class.trains_on)
        if not validates:
            return train_split, None
        validation_split = load_prepared(data.path, data.validation_split)
        if context:
            labelled = objective_class.validates_on == "labelled"
            validation_split.add_neighbours(context, "all" if labelled else objective_class.validates_on)
    _check_subjects(validation_split, data.validation_split, objective_class.validates_on, objective_class)
    if not validation_rows(validation_split, objective_class).size:
        raise ValueError(
            f"The split `{data.validation_split}` holds no {objective_class.validates_on} slice to validate on: name"
            " another with `--data.validation_split`, or switch validation off with `--train.validate_every 0`."
        )
    return train_split, validation_split


def _check_subjects(
    split: PreparedSplit | StreamedSplit, name: str, population: str, objective_class: type[Objective]
) -> None:
    """Raises a `ValueError` if a method would meet a slice, perhaps after hours, that lacks what it learns from."""
    read = {subject: row for subject, row in split.subject_info.items() if row["rows"]}
    if population == "labelled":
        read = {subject: row for subject, row in read.items() if row["label"] != -1}
    listed = [subject for subject, row in read.items() if objective_class.lacks(row)]
    if listed:
        more = f", and {len(listed) - 10} more" if len(listed) > 10 else ""
        raise ValueError(
            f"This method learns from {objective_class.learns_from}, and {len(listed)} of the {len(read)} subjects in"
            f" the split `{name}` have none: {', '.join(listed[:10])}{more}. Prepare the data with them, or without"
            " these subjects."
        )


def _draw_heads(
    accelerator: Accelerator, options: TrainOptions, objective_class: type[Objective]
) -> tuple[DrawnHeads, DrawnHeads | None]:
    """The splits of `heads:FOLDER`. Without workers heads are made where the network is."""
    data, loop = options.data, options.train
    if data.streaming:
        raise ValueError(
            "`data.streaming` is for data sets that are read, not for heads that are drawn: leave it out."
        )
    if objective_class.trains_on == "annotated" or objective_class.validates_on == "labelled":
        raise ValueError(
            f"`data.path` {data.path} draws healthy heads, and this method learns from labels or masks: make a data"
            " set with `preprocess.py --heads`."
        )
    processor, folder = VolumeProcessor.from_dict(options.processor), label_maps_folder(data.path)
    device = "cpu" if data.num_workers else accelerator.device
    train = DrawnHeads(folder, processor, data.train_split, seed=loop.seed, device=device)
    if not loop.validate_every:
        return train, None
    # The same slices for every seed, so that runs can be compared.
    count = loop.validation_slices
    return train, DrawnHeads(folder, processor, data.validation_split, count=count, device=accelerator.device)


def label_maps_folder(path: str) -> Path:
    """Returns the folder of label maps of a `data.path` such as `heads:FOLDER` or `heads:builtin`."""
    kind, colon, folder = path.partition(":")
    if kind + colon != DRAWN or not folder:
        raise ValueError(f"`data.path` must be {DRAWN}FOLDER, a folder of label maps, for this method, got {path!r}.")
    return locate_label_maps(folder)


def validation_rows(split: PreparedSplit | DrawnHeads, objective: Objective | type[Objective]) -> np.ndarray:
    """Returns the rows that an objective is validated on: those of a population, or those with a known label."""
    labelled = objective.validates_on == "labelled"
    return np.flatnonzero(split.labels >= 0) if labelled else split.rows_of(objective.validates_on)


def make_loader(
    split: PreparedSplit | StreamedSplit | DrawnHeads,
    objective: Objective,
    options: TrainOptions,
    accelerator: Accelerator,
    first_step: int,
) -> Iterable[Batch]:
    """Makes the loader of this process' batches from optimizer step `first_step` on: the columns of the objective and
    `position (N,)`, tensors on the CPU; heads that are drawn without workers are on the device."""
    loop, data, wanted = options.train, options.data, (objective.columns, objective.trains_on)
    sizes = loop.batch_size, loop.gradient_accumulation_steps, accelerator.num_processes, accelerator.process_index
    batches = PositionBatches(first_step, loop.max_steps, *sizes, objective.updates_per_batch)
    if isinstance(split, DrawnHeads) and not data.num_workers:
        return draw_batches(split, batches, wanted[0])
    if isinstance(split, DrawnHeads):
        source = {"dataset": DrawnSamples(split, wanted[0]), "batch_sampler": batches}
    elif data.streaming:
        samples = StreamedSamples(split, loop.seed, data.shuffle_buffer, batches, *wanted)
        source = {"dataset": samples, "batch_size": None}  # it makes whole batches
    else:
        source = {"dataset": SampleStream(split, loop.seed, *wanted), "batch_sampler": batches}
    return torch.utils.data.DataLoader(
        **source,
        collate_fn=as_tensors,
        # A generator of its own: starting a loader draws from the global one, which dropout draws from too.
        generator=torch.Generator(),
        num_workers=data.num_workers,
        pin_memory=accelerator.device.type == "cuda",
        persistent_workers=data.num_workers > 0,
    )


def read_batches(loader: Iterable[Batch]) -> Iterator[Batch]:
    """Gives the batches of a loader. A connection that breaks in one of its processes is the same error as without
    them, not one with that process' traceback in its message."""
    try:
        yield from loader
    except ConnectionError as error:
        name, _, text = str(error).rstrip().splitlines()[-1].partition(": ")
        if name != ConnectionError.__name__:
            raise
        raise ConnectionError(text) from None


def read_ahead(batches: Iterable[Batch]) -> Iterator[Batch]:
    """Gives the batches; a thread makes the next one while the last one is used. An error of it comes in its turn."""
    asked, made, iterator = queue.SimpleQueue(), queue.SimpleQueue(), iter(batches)

    def make() -> None:
        error = None
        while error is None and asked.get():
            try:
                made.put((next(iterator), None))
            except BaseException as raised:
                error = raised
                made.put((None, error))

    # A daemon: the end of a run need not wait until a batch has been read.
    threading.Thread(target=make, daemon=True).start()
    try:
        asked.put(True)
        while True:
            batch, error = made.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            asked.put(True)
            yield batch
    finally:
        asked.put(False)


def move_batches(batches: Iterable[Batch], seed: int, device: torch.device) -> Iterator[tuple[Batch, torch.Tensor]]:
    """Gives batches on the device, and the keys `(N, 2)` of their samples, `position`. For a GPU they are read and copied
    beside the work that it has not done yet, and nothing waits for either."""
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def add_keys() -> Iterator[Batch]:
        # A thread has a current device of its own.
        with contextlib.nullcontext() if stream is None else torch.cuda.device(device):
            for batch in batches:
                yield {**batch, "keys": make_keys(seed, batch["position"], TRAINING)}

    for values in add_keys() if stream is None else read_ahead(add_keys()):
        del values["position"]
        if stream is None:
            moved = {name: send(each, device) for name, each in values.items()}
        else:
            with torch.cuda.stream(stream):
                moved = {name: send(each, device) for name, each in values.items()}
            current = torch.cuda.current_stream(device)
            current.wait_stream(stream)
            for each in moved.values():
                each.record_stream(current)
        keys = moved.pop("keys")
        yield moved, keys


def as_tensors(batch: dict[str, np.ndarray | torch.Tensor]) -> Batch:
    return {
        name: values if isinstance(values, torch.Tensor) else torch.from_numpy(np.ascontiguousarray(values))
        for name, values in batch.items()
    }
