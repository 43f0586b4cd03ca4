"""Reads prepared data sets; `layout.py` says what is in them."""

from __future__ import annotations

import glob
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import datasets
import huggingface_hub
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ..checks import check_integer
from ..configs import read_yaml
from ..files import check_name, read_json
from ..volumes.context import find_neighbours
from ..volumes.volume import check_voxels
from .layout import COLUMNS, PROCESSOR, RECIPE, SHARDS, SPLITS, SUBJECTS, SUBJECTS_SCHEMA
from .phantoms.sets import PHANTOMS, cached_phantom


# N slices, C modalities, A annotations, H x W pixels.

# Whose slices a method learns from: all, those not known to be anomalous, those of subjects with an annotation.
POPULATIONS = ("all", "healthy", "annotated")

# Types of the arrays of a batch, whatever is stored.
TYPES = {
    **{"image": np.float32, "mask": np.uint8, "brain": bool},
    **{"label": np.int64, "slice": np.int64, "annotations": np.int64},
}

_SETTINGS = f"{PROCESSOR}/processor_config.json"
_SIDE_FILES = (SUBJECTS, _SETTINGS, RECIPE)
# Subjects, and bytes that describe them: `subjects.parquet` of a larger set is none of ours.
_MOST_SUBJECTS, _MOST_BYTES = 10_000_000, 2**32


class _DescribedSplit:
    """Holds what the files beside the rows say of a split."""

    def __init__(self, folder: Path, split: str):
        settings = read_json(folder / _SETTINGS)
        if not isinstance(settings, dict) or not isinstance(settings.get("modalities"), list):
            raise ValueError(f"{folder / _SETTINGS} must hold the settings of a processor with its `modalities`.")
        self.processor_settings = {
            key: value for key, value in settings.items() if not key.startswith("_") and key != "context"
        }
        self.modalities = tuple(self.processor_settings["modalities"])
        for name in self.modalities:
            check_name(f"a modality in {folder / _SETTINGS}", name)
        self.recipe = read_yaml(folder / RECIPE)
        info = _read_subjects(folder)
        self.subject_info = {row["subject"]: row for row in info if row["split"] == split}


class PreparedSplit(_DescribedSplit):
    """
    Reads one split of a prepared data set; made by [`load_prepared`].

    Rows are slices. `split[5]` gives the arrays of one row; `split[[3, 1, 2]]` and `split[10:20]` give stacked arrays,
    copied straight from the memory-mapped file: 0.02 ms for a slice of 64 x 64, without Python objects on the way. As
    a map-style data set of torch it gives a batch per read, so that the loader needs no collation:
    `DataLoader(split, batch_size=32, collate_fn=lambda batch: batch)`.

    Arrays of a batch: `image (N, C, H, W)` float32 in the processor's value range, `mask (N, A, H, W)` uint8,
    `brain (N, H, W)` bool, `label (N,)` int64, `subject (N,)` str, `slice (N,)` int64.

    Attributes:
        subjects (`list[str]`): Names of the subjects with at least one row, in the order of the rows.
        labels, slices, annotations (`np.ndarray` of shape `(len(split),)`): int64, of every row. `annotations` is how
            many of its masks are there; the rest is zeros.
        subject_info (`dict[str, dict]`): Row of `subjects.parquet` of every subject of the split, by its name.
        processor_settings (`dict`): As `VolumeProcessor.settings()`.
        modalities (`tuple[str, ...]`): In channel order.
        recipe (`dict`): What the set was made by.
    """

    def __init__(self, dataset: datasets.Dataset, folder: Path, split: str):
        super().__init__(folder, split)
        self.dataset = dataset
        names = dataset.data.column("subject").combine_chunks().dictionary_encode()
        self._subject_of_row = names.indices.to_numpy()
        self.subjects = names.dictionary.to_pylist()
        self._names = np.array(self.subjects)
        starts = np.flatnonzero(np.diff(self._subject_of_row, prepend=-1))
        expected = {name: row["rows"] for name, row in self.subject_info.items() if row["rows"]}
        self._rows = dict(zip(self.subjects, map(range, starts, [*starts[1:], len(dataset)]), strict=False))
        if len(starts) != len(self.subjects) or {name: len(rows) for name, rows in self._rows.items()} != expected:
            raise ValueError(
                f"The rows of {folder}, split {split}, do not agree with its subjects.parquet: prepare it again."
            )
        counts = [self.subject_info[name]["annotations"] for name in self.subjects]
        self.annotations = np.array(counts, dtype=TYPES["annotations"])[self._subject_of_row]
        self.labels = dataset.data.column("label").to_numpy().astype(TYPES["label"])
        self.slices = dataset.data.column("slice").to_numpy().astype(TYPES["slice"])
        self._neighbours: np.ndarray | None = None
        self._map_columns()

    def __len__(self) -> int:
        return len(self.labels)

    def add_neighbours(self, context: int, population: str = "all") -> None:
        """Gives every `image` that is read from now on the channels of its neighbours, `context` on either side, of
        those that are rows of this split and of one of `POPULATIONS`, as [`~volumes.context.find_neighbours`] says."""
        rows = self.rows_of(population)
        own = np.arange(len(self))
        self._neighbours = np.repeat(own[:, None], 2 * context + 1, 1)
        self._neighbours[rows] = rows[find_neighbours(self._subject_of_row[rows], self.slices[rows], context)]

    def __getitem__(self, index) -> dict:
        if isinstance(index, (int, np.integer)):
            return {name: column[0] for name, column in self.read_rows([index]).items()}
        return self.read_rows(range(*index.indices(len(self))) if isinstance(index, slice) else index)

    def __getitems__(self, indices: Sequence[int]) -> dict:
        return self.read_rows(indices)

    def rows_of(self, population: str) -> np.ndarray:
        """Returns the numbers of the rows of one of `POPULATIONS`, int64, rising."""
        belongs = {"all": np.ones(len(self), bool), "healthy": self.labels != 1, "annotated": self.annotations > 0}
        return np.flatnonzero(belongs[population])

    def count_rows(self, population: str = "all") -> int:
        """Returns the number of slices of one of `POPULATIONS`."""
        return len(self.rows_of(population))

    def read_rows(self, indices: Sequence[int], columns: Sequence[str] = COLUMNS) -> dict:
        """Reads some `columns` (of `COLUMNS`, and `"annotations"`: how many of a row's masks are there) of the rows
        with these numbers, stacked. -1 is the last row; one that does not exist is an `IndexError`."""
        rows = np.asarray(indices, dtype=np.int64)
        if rows.size and (rows.min() < -len(self) or rows.max() >= len(self)):
            raise IndexError(f"An index is outside the {len(self)} rows: {rows.min()} to {rows.max()}.")
        rows = rows % max(len(self), 1)
        batch = {}
        for name in COLUMNS[:3]:
            if name not in columns:
                continue
            read = self._neighbours[rows] if name == "image" and self._neighbours is not None else rows[:, None]
            chunks = np.searchsorted(self._chunk_ends, read.ravel(), side="right")
            places = zip(chunks.tolist(), (read.ravel() - self._chunk_starts[chunks]).tolist(), strict=True)
            views, shape = self._views[name], self._views[name][0].shape[1:]
            batch[name] = np.empty((read.size, *shape), TYPES[name])
            for target, (chunk, place) in zip(batch[name], places, strict=True):
                target[...] = views[chunk][place]
            if name == "image":
                batch[name] = batch[name].reshape(len(rows), read.shape[1] * shape[0], *shape[1:])
        for name, values in (("label", self.labels), ("slice", self.slices), ("annotations", self.annotations)):
            if name in columns:
                batch[name] = values[rows]
        if "subject" in columns:
            batch["subject"] = self._names[self._subject_of_row[rows]]
        return batch

    def subject_rows(self, subject: str) -> range:
        """Returns the numbers of a subject's rows, in slice order."""
        if subject not in self._rows:
            names = ", ".join(self.subjects[:10])
            raise ValueError(
                f"`subject` must be one of the {len(self.subjects)} of this split ({names}, ...), got {subject!r}."
            )
        return self._rows[subject]

    def read_subject(self, subject: str) -> dict:
        """Reads all rows of a subject, stacked; `mask` has as many annotations as the subject, perhaps none."""
        batch = self.read_rows(self.subject_rows(subject), [name for name in COLUMNS if name != "subject"])
        return batch | {"mask": batch["mask"][:, : self.subject_info[subject]["annotations"]]}

    def _map_columns(self) -> None:
        # Arrow stores a chunk's pixels in one piece: a numpy view costs nothing and stays on disk until it is read.
        columns = {name: self.dataset.data.column(name) for name in COLUMNS[:3]}
        self._views = {name: [_pixels(chunk) for chunk in column.chunks] for name, column in columns.items()}
        self._chunk_ends = np.cumsum([len(view) for view in self._views["image"]])
        self._chunk_starts = np.concatenate([[0], self._chunk_ends[:-1]])

    def __getstate__(self) -> dict:
        # A worker process maps the file itself: pickled views would be copies of the data set.
        return {key: value for key, value in self.__dict__.items() if key != "_views"}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._map_columns()


class StreamedSplit(_DescribedSplit):
    """
    Reads one split of a prepared data set from start to end and stores nothing; made by [`load_prepared`] with
    `streaming`.

    Iterating gives the rows in their order, as dicts of arrays of one row. The length comes from `subjects.parquet`;
    `subjects`, `subject_info`, `processor_settings`, `modalities` and `recipe` are as of [`PreparedSplit`].
    """

    def __init__(self, shards: list[str], folder: Path, split: str):
        super().__init__(folder, split)
        self.subjects = [name for name, row in self.subject_info.items() if row["rows"]]
        self._length = sum(row["rows"] for row in self.subject_info.values())
        self._shards, self._split = shards, split

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[dict]:
        for row in _open(self._shards, self._split, streaming=True).with_format("numpy"):
            self._check_subjects([row["subject"]])
            yield row

    def _check_subjects(self, names: Sequence[str]) -> None:
        unknown = [name for name in names if name not in self.subject_info]
        if unknown:
            raise ValueError(
                f"{self._shards[0]} and the files beside it hold rows of {str(unknown[0])!r:.300}, whom subjects.parquet does"
                " not list: prepare them again."
            )

    def count_rows(self, population: str = "all") -> int:
        """Returns the number of slices of one of `POPULATIONS`."""
        subjects = self.subject_info.values()
        return {
            "all": len(self),
            "healthy": len(self) - sum(row["anomalous_rows"] for row in subjects),
            "annotated": sum(row["rows"] for row in subjects if row["annotations"]),
        }[population]

    def shuffled_rows(
        self, seed: Sequence[int], buffer_size: int, columns: Sequence[str] = ("image",), population: str = "all"
    ) -> Iterator[dict[str, np.ndarray]]:
        """
        Reads all slices once, in an order that `seed` (as of `numpy.random.default_rng`) decides. Yields the `columns`
        of one slice at a time (of `"image"`, `"mask"`, `"brain"`, `"label"`, `"annotations"`), read-only, of the
        stored type; others are not read. Slices outside of the population, one of `POPULATIONS`, are left out.

        `buffer_size` slices are in memory to shuffle among; they are read in groups of 128 neighbours, whose order is
        shuffled too.

        Raises:
            ConnectionError: The rows could not be read any further.
            ValueError: There are fewer rows than `subjects.parquet` says.
        """
        # One group after the other: reading several in turn is a thread for each, and 5 seconds of sleep in `datasets`
        # when a pass ends.
        count = 0
        try:
            # The number of annotations is a subject's, and not in the file.
            names = ["subject" if name == "annotations" else name for name in columns]
            decides = {"all": [], "healthy": ["label"], "annotated": ["subject"]}[population]
            names = list(dict.fromkeys([*names, *decides]))
            stream = _open(self._shards, self._split, names, streaming=True).reshard()  # row groups, not files
            stream = stream.shuffle(
                generator=np.random.default_rng(seed), buffer_size=buffer_size, max_buffer_input_shards=1
            )
            for table in stream.with_format("arrow").iter(batch_size=64):  # views; the size changes nothing
                arrays = {}
                for name in names:
                    array = table.column(name).combine_chunks()
                    pixels = isinstance(array, pa.ExtensionArray)
                    arrays[name] = _pixels(array) if pixels else array.to_numpy(zero_copy_only=False)
                if "subject" in names:
                    self._check_subjects(arrays["subject"])
                    counts = [self.subject_info[subject]["annotations"] for subject in arrays["subject"]]
                    arrays["annotations"] = np.array(counts, dtype=np.int64)
                belongs = np.ones(len(table), bool)
                if population == "healthy":
                    belongs = arrays["label"] != 1
                elif population == "annotated":
                    belongs = arrays["annotations"] > 0
                for place in np.flatnonzero(belongs):
                    yield {name: arrays[name][place] for name in columns}
                count += len(table)
        except (OSError, huggingface_hub.errors.HTTPError) as error:
            raise ConnectionError(f"A stream broke off: {type(error).__name__}: {error}") from error
        if count < len(self):
            raise ValueError(
                f"{self._shards[0]} and the files beside it hold {count} rows where subjects.parquet says"
                f" {len(self)}: prepare them again."
            )


def load_prepared(path: str | Path, split: str, *, streaming: bool = False) -> PreparedSplit | StreamedSplit:
    """
    Opens one split of a prepared data set. `datasets` keeps an Arrow copy in its own cache, which is mapped into
    memory; with `streaming` nothing is kept, and of a data set on the Hub only the other files are downloaded.

    Args:
        path: Folder, or id of a data set on the Hub. The name of a phantom (`"phantom-mini"`) makes it on first use,
            in the same cache.
        split: `"train"`, `"validation"` or `"test"`.

    Raises:
        FileNotFoundError: There is no such folder or Hub data set.
        ConnectionError: With `streaming`, the Hub cannot be reached.
        ValueError: It is no prepared data set, is incomplete, has no such split, or names a subject so that its
            results would be written somewhere else.
    """
    names = SHARDS.format(split=split)
    folder, remote = _find(path, [] if streaming else [names])
    available = _splits_in(folder)
    if split not in available:
        raise ValueError(f"{path} has no split {split!r}; it has {', '.join(available)}.")
    shards = sorted(map(str, folder.glob(names)))
    if streaming and remote:
        try:
            # The commit that the other files are of, whatever is pushed while the rows are read.
            found = huggingface_hub.HfFileSystem().glob(f"datasets/{path}@{folder.name}/{names}")
        except huggingface_hub.errors.HTTPError as error:
            raise ConnectionError(f"The rows of {path} cannot be streamed: {type(error).__name__}: {error}") from error
        shards = sorted(f"hf://{name}" for name in found)
    count = int(re.search(r"-of-(\d+)\.parquet$", shards[0])[1]) if shards else 1
    if len(shards) != count:
        problem = "is incomplete" if len(shards) < count else "holds files of several versions"
        raise ValueError(
            f"{path} {problem}: the split {split} has {len(shards)} files in data/ instead of {count}. Prepare or fetch"
            " it again; on the Hub, push it again."
        )
    if streaming:
        return StreamedSplit(shards, folder, split)
    _check_shards(shards, _DescribedSplit(folder, split))
    return PreparedSplit(_open(shards, split), folder, split)


def list_splits(path: str | Path) -> list[str]:
    """Returns the splits of a prepared data set, in the order of `SPLITS`; errors as of [`load_prepared`]."""
    return _splits_in(_find(path, [])[0])


def _find(path: str | Path, shards: list[str]) -> tuple[Path, bool]:
    """Returns the folder that holds the files beside the rows, and whether it is the Hub's cache, which gets the files
    that match `shards` too."""
    if path in PHANTOMS and not Path(path).is_dir():
        path = cached_phantom(path)
    folder = Path(path)
    remote = not folder.is_dir()
    if remote:
        patterns = [*_SIDE_FILES, *shards]
        try:
            folder = Path(huggingface_hub.snapshot_download(str(path), repo_type="dataset", allow_patterns=patterns))
        except (
            huggingface_hub.errors.HFValidationError,
            huggingface_hub.errors.RepositoryNotFoundError,
            huggingface_hub.errors.LocalEntryNotFoundError,  # no connection, and not in the cache
        ) as error:
            raise FileNotFoundError(
                f"There is neither a folder {path}, nor a phantom of this name ({', '.join(PHANTOMS)}), nor can it be"
                f" read from the Hub ({type(error).__name__})."
            ) from error
    missing = [name for name in _SIDE_FILES if not (folder / name).is_file()]
    if missing:
        there = ", ".join(sorted(file.name for file in folder.iterdir())[:10]) or "nothing"
        raise ValueError(
            f"{path} is no prepared data set: {', '.join(missing)} is missing, it holds {there}. See preprocess.py."
        )
    return folder, remote


def _read_subjects(folder: Path) -> list[dict]:
    """Reads the rows of `subjects.parquet`. Whoever made the set, its names become names of files: they are checked."""
    path = folder / SUBJECTS
    try:
        metadata = pq.read_metadata(path)
        size = sum(metadata.row_group(group).total_byte_size for group in range(metadata.num_row_groups))
    except (pa.ArrowException, OSError) as error:
        raise ValueError(
            f"{path} cannot be read, it may be truncated or damaged: prepare or fetch it again. ({error!s:.300})"
        ) from None
    if metadata.num_rows > _MOST_SUBJECTS or size > _MOST_BYTES:
        raise ValueError(
            f"{path} claims {metadata.num_rows} subjects in {size} bytes: it is none of ours. Prepare it again."
        )
    missing = [name for name in SUBJECTS_SCHEMA.names if name not in metadata.schema.to_arrow_schema().names]
    if missing:
        raise ValueError(f"{path} is of no prepared data set: column {', '.join(missing)} is missing.")
    try:
        rows = pq.read_table(path).to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise ValueError(
            f"{path} cannot be read, it may be truncated or damaged: prepare or fetch it again. ({error!s:.300})"
        ) from None
    for row in rows:
        check_name(f"a subject in {path}", row["subject"])
        if row["split"] not in SPLITS:
            raise ValueError(f"{path} must name the splits {', '.join(SPLITS)}, got {row['split']!r:.300}.")
        for column in ("rows", "anomalous_rows", "annotations"):
            check_integer(f"{column} of {row['subject']} in {path}", row[column], 0)
    if len({(row["split"], row["subject"]) for row in rows}) != len(rows):
        raise ValueError(f"{path} lists a subject twice: prepare it again.")
    return rows


def _check_shards(shards: list[str], described: _DescribedSplit) -> None:
    """Raises if files claim more, or larger, rows than there are subjects for, before any of it is unpacked."""
    expected = sum(row["rows"] for row in described.subject_info.values())
    try:
        metadata = [pq.read_metadata(shard) for shard in shards]
        features = datasets.Features.from_arrow_schema(metadata[0].schema.to_arrow_schema()) if shards else {}
    except (pa.ArrowException, OSError) as error:
        raise ValueError(
            f"{shards[0]} cannot be read, it may be truncated or damaged: prepare or fetch it again. ({error!s:.300})"
        ) from None
    rows = sum(file.num_rows for file in metadata)
    if rows != expected:
        raise ValueError(
            f"The rows of {shards[0]} and the files beside it ({rows}) do not agree with its subjects.parquet"
            f" ({expected}): prepare it again."
        )
    for name in ("image", "mask", "brain"):
        if name in features and isinstance(features[name], (datasets.Array2D, datasets.Array3D)):
            check_voxels(math.prod(features[name].shape), f"A row of `{name}` in {shards[0]}")


def _splits_in(folder: Path) -> list[str]:
    names = {row["split"] for row in _read_subjects(folder)}
    return [name for name in SPLITS if name in names]


def _open(
    shards: list[str], split: str, columns: list[str] | None = None, *, streaming: bool = False
) -> datasets.Dataset | datasets.IterableDataset:
    """Opens the rows of the shards, with all columns or those that are named."""
    dataset = datasets.load_dataset(
        "parquet",
        # Brackets in a folder's name are no pattern.
        data_files={split: [shard if "://" in shard else glob.escape(shard) for shard in shards]},
        split=split,
        columns=columns,
        streaming=streaming,
        # Bytes that every read takes too many; the default of 5 MB is more than a row group of small slices.
        storage_options={"hf": {"block_size": 2**16}} if streaming else None,
    )
    absent = [name for name in columns or COLUMNS if name not in dataset.features]
    if absent:
        raise ValueError(
            f"{shards[0]} is of no prepared data set: column {', '.join(absent)} is missing, it has"
            f" {', '.join(dataset.features)}."
        )
    return dataset


def _pixels(chunk: pa.ExtensionArray) -> np.ndarray:
    """Returns a view `(rows, ...)` of a chunk of an `Array2D` or `Array3D` column."""
    values = chunk.storage
    while pa.types.is_list(values.type):
        values = values.flatten()
    return values.to_numpy(zero_copy_only=True).reshape(len(chunk), *chunk.type.shape)
