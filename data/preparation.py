"""Makes prepared data sets: a reader's subjects, through the processor, by a recipe's rules, into Parquet.

The layout and the columns are those that `prepared.py` reads.
"""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import itertools
import os
import random
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from datasets.features.features import numpy_to_pyarrow_listarray
from tqdm.auto import tqdm

from .geometry import Geometry, plane_orientation
from .phantom import PHANTOM_SETS, SET_SEED, write_phantom
from .processor import ProcessedVolume, VolumeProcessor
from .raters import RATER_SETS, RaterRule, write_rater_phantom
from .readers import (
    SPLITS,
    Subject,
    read_annotated_folders,
    read_image_folders,
    read_split_tables,
    read_volume_folders,
)
from .volume import read_volume


# N slices, C modalities, A annotations, H x W pixels.

DTYPES = ("float32", "float16")
TRAIN_RULES = ("all", "healthy_by_mask", "healthy_by_label")
MASK_RULES = ("nearest", "linear")
SPLIT_ORDERS = ("hash", "shuffle")
READERS = {
    "volume_folders": read_volume_folders,
    "image_folders": read_image_folders,
    "annotated_folders": read_annotated_folders,
    "split_tables": read_split_tables,
}
RECIPE_KEYS = ("source", "license", "reader", "reader_options", "processor", "slices", "raters", "split", "dtype")
# Every set that is made and not read; those with several annotations are pictures.
PHANTOMS = (*PHANTOM_SETS, *RATER_SETS)

_PHANTOM_SOURCES = ("anodiff.data.phantom", "anodiff.data.raters")
_ROW_GROUP = 128  # rows that streaming reads at a time


@dataclass(frozen=True)
class SliceRule:
    """Which slices of a volume are kept, and what counts as lesion in them. A slice without any brain is never kept.

    Args:
        min_brain (`float`, defaults to 0.0): Smallest fraction of the slice's pixels that must be brain, 0 to 1.
        first, last (`int`, *optional*): First and last slice, counted on the network's grid from 0, both included.
        step (`int`, defaults to 1): Take every `step`-th slice from `first` on.
        min_sum (`float`, defaults to 0.0):
            Take the slices from the first to the last whose intensities sum to more than this: mean over modalities, each in units
            of the processor's `quantile` of its voxels > 0, summed over the slice's pixels on the input's grid. 0 for no limits;
            AnoFPDM 0.5.
        masks (`str`, defaults to `"nearest"`):
            How a mask comes to the network's grid: `"nearest"` voxel, or `"linear"` interpolation above 1/2, as the images are
            interpolated (AnoFPDM; a lesion smaller than about a network pixel may vanish, and its slice is healthy then).
        train (`str`, defaults to `"all"`):
            What is kept of the training split. `"healthy_by_mask"`: slices that no lesion touches, at the mask's own resolution
            (a lesion smaller than a network pixel counts). `"healthy_by_label"`: slices of subjects with label 0. `"all"`.
    """

    min_brain: float = 0.0
    first: int | None = None
    last: int | None = None
    step: int = 1
    min_sum: float = 0.0
    masks: str = "nearest"
    train: str = "all"

    def __post_init__(self):
        for name, allowed in (("train", TRAIN_RULES), ("masks", MASK_RULES)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"`slices.{name}` must be one of {', '.join(allowed)}, got {getattr(self, name)!r}.")
        if self.min_sum < 0:
            raise ValueError(f"`slices.min_sum` must not be negative, got {self.min_sum}.")
        if not 0 <= self.min_brain <= 1:
            raise ValueError(f"`slices.min_brain` must be between 0 and 1, got {self.min_brain}.")
        if self.step < 1:
            raise ValueError(f"`slices.step` must be at least 1, got {self.step}.")
        if (self.first or 0) < 0 or (self.last is not None and self.last < (self.first or 0)):
            raise ValueError(f"`slices` must have 0 <= first <= last, got first {self.first}, last {self.last}.")


@dataclass(frozen=True)
class SplitRule:
    """How subjects are divided: as the data set says, or by fractions of the groups.

    Args:
        fractions (`dict[str, float]`, *optional*):
            Split to its share of the groups; they sum to 1. Neither the file system nor the order of the subjects matters.
        seed (`int`, defaults to 0): Of the fractions.
        order (`str`, defaults to `"hash"`):
            Order that the groups are dealt in: `"hash"`, that of their hashes with the seed, which adding a group does not change;
            `"shuffle"`, AnoFPDM's: the sorted names shuffled by Python's `random`, each share rounded down and the last split
            taking the rest.
    """

    fractions: dict[str, float] | None = None
    seed: int = 0
    order: str = "hash"

    def __post_init__(self):
        if self.order not in SPLIT_ORDERS:
            raise ValueError(f"`split.order` must be one of {', '.join(SPLIT_ORDERS)}, got {self.order!r}.")
        if self.fractions is None:
            return
        unknown = [name for name in self.fractions if name not in SPLITS]
        if unknown:
            raise ValueError(f"`split.fractions` must name {', '.join(SPLITS)}, got {', '.join(unknown)}.")
        if min(self.fractions.values(), default=0) < 0 or abs(sum(self.fractions.values()) - 1) > 1e-6:
            raise ValueError(f"`split.fractions` must be numbers >= 0 that sum to 1, got {self.fractions}.")

    def assign(self, subjects: Sequence[Subject]) -> dict[str, str]:
        """Subject name to split; a group is in one split only.

        Raises:
            ValueError: A group is divided, a subject has no split, or a split would get no group.
        """
        if self.fractions is None:
            split_of_group: dict[str, str] = {}
            for subject in subjects:
                if subject.split is None:
                    raise ValueError(
                        f"Subject {subject.name} has no split: give `split.fractions`, or let the reader find the splits."
                    )
                if split_of_group.setdefault(subject.group, subject.split) != subject.split:
                    raise ValueError(
                        f"Group {subject.group} is in two splits, {split_of_group[subject.group]} and {subject.split} (subject"
                        f" {subject.name}): what is learnt from it would be tested on it."
                    )
            return {subject.name: subject.split for subject in subjects}
        given = [subject.name for subject in subjects if subject.split is not None]
        if given:
            raise ValueError(
                f"`split.fractions` is given, but the data set has splits (subject {given[0]}). Drop one."
            )
        groups = sorted({subject.group for subject in subjects})
        shares = np.array(list(self.fractions.values()))
        if self.order == "shuffle":
            random.Random(self.seed).shuffle(groups)
            ends = np.cumsum([*(int(share * len(groups)) for share in shares[:-1]), len(groups)])
            ends = np.minimum(ends, len(groups))
        else:
            groups.sort(key=self._hash)
            ends = np.rint(np.cumsum(shares) * len(groups)).astype(int)
        split_of_group = {}
        for name, start, end in zip(self.fractions, [0, *ends], ends, strict=False):
            if self.fractions[name] > 0 and start == end:
                raise ValueError(f"`split.fractions` leaves no group for {name}: there are {len(groups)} groups.")
            split_of_group |= dict.fromkeys(groups[start:end], name)
        return {subject.name: split_of_group[subject.group] for subject in subjects}

    def _hash(self, group: str) -> bytes:
        return hashlib.sha256(f"{self.seed}:{group}".encode()).digest()


def prepare(
    subjects: Sequence[Subject],
    processor: VolumeProcessor,
    out: str | Path,
    *,
    recipe: dict,
    slices: SliceRule | None = None,
    raters: RaterRule | None = None,
    split: SplitRule | None = None,
    dtype: str = "float32",
    root: str | Path | None = None,
    shard_rows: int = 1024,
    progress: bool = True,
) -> dict[str, str]:
    """
    Writes a prepared data set. Memory holds one subject and one shard.

    Labels of slices: 1 if one of the subject's masks has a pixel in the slice, else 0; without mask the subject's label. The label of a
    subject is the given one, or whether all its masks are empty.

    Args:
        subjects (`list[Subject]`): What a reader found.
        processor ([`VolumeProcessor`]): Makes the slices, which must all have one size.
        out (`str` or `Path`): Folder to write; must not exist. An interrupted run leaves none.
        recipe (`dict`): Written to `recipe.yaml`; `license` and `source` go into the card.
        slices ([`SliceRule`], *optional*): Which slices are kept.
        raters ([`RaterRule`], *optional*): Make several annotations of the one that subjects have.
        split ([`SplitRule`], *optional*): How subjects are divided; as the subjects say by default.
        dtype (`str`): `"float32"` or `"float16"` of `image`.
        root (`str` or `Path`, *optional*): What file names are written relative to; the common folder of all files by default.
        shard_rows (`int`): Slices per file.
        progress (`bool`): Show a progress bar.

    Returns:
        `dict[str, str]`: Subjects that could not be read and why. The others were written.

    Raises:
        FileExistsError: `out` exists.
        ValueError: Rules and subjects do not fit together, no subject can be read, or a split keeps no slice.
    """
    out, slices, split = Path(out), slices or SliceRule(), split or SplitRule()
    if out.exists():
        raise FileExistsError(f"`out` {out} exists: choose another folder or delete it first.")
    if dtype not in DTYPES:
        raise ValueError(f"`dtype` must be one of {', '.join(DTYPES)}, got {dtype!r}.")
    if shard_rows < 1:
        raise ValueError(f"`shard_rows` must be at least 1, got {shard_rows}.")
    _check_subjects(subjects, raters)
    annotations = max(1, *(len(subject.masks) for subject in subjects)) if raters is None else raters.number
    split_of = split.assign(subjects)
    _check_train_rule(slices.train, [subject for subject in subjects if split_of[subject.name] == "train"])
    if root is None:
        root = os.path.commonpath([file.parent.absolute() for subject in subjects for file in _files(subject)])

    failures: dict[str, str] = {}
    rows: list[dict] = []
    sizes: dict[str, tuple] = {}
    ordered = sorted(subjects, key=lambda subject: (SPLITS.index(split_of[subject.name]), subject.name))
    bar = tqdm(total=len(ordered), desc="prepare", unit="subject", disable=not progress)

    def tables(name: str) -> Iterator[pa.Table]:
        for subject in ordered:
            if split_of[subject.name] != name:
                continue
            try:
                arrays, row = _slices_of(subject, processor, slices, raters, name == "train", annotations)
            except (ValueError, OSError) as error:
                failures[subject.name] = str(error)
            else:
                size = arrays["image"].shape[1:]
                if size != sizes.setdefault("first", size):
                    raise ValueError(
                        f"Subject {subject.name} has slices {size}, those before it {sizes['first']}: set `size` of the processor."
                    )
                rows.append({"subject": subject.name, "split": name, **row, **_sources(subject, Path(root))})
                yield _table(arrays, subject.name, dtype)
            bar.update()

    out.parent.mkdir(parents=True, exist_ok=True)
    # A folder of a temporary folder: it has ordinary permissions, and the renaming stays on one disk.
    with bar, tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as temporary:
        unfinished = Path(temporary) / out.name
        (unfinished / "data").mkdir(parents=True)
        for name in SPLITS:
            _write_shards(tables(name), unfinished / "data", name, shard_rows)
        if not rows:
            raise ValueError(
                "No subject can be read:\n" + "\n".join(f"{k}: {v}" for k, v in list(failures.items())[:10])
            )
        for name in {row["split"] for row in rows}:
            if not any(row["rows"] for row in rows if row["split"] == name):
                raise ValueError(f"`slices` keeps no slice of the split {name}: {slices}.")
        pq.write_table(pa.Table.from_pylist(rows, schema=_SUBJECTS_SCHEMA), unfinished / "subjects.parquet")
        processor.save_pretrained(unfinished / "processor")
        (unfinished / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True))
        (unfinished / "README.md").write_text(_card(out.name, processor, recipe, rows, failures))
        unfinished.rename(out)
    return failures


def read_recipe(name: str | Path) -> dict:
    """
    Reads a recipe: a YAML file, or one that comes with the package by its bare name, such as `tcga_lgg_flair`.

    Raises:
        FileNotFoundError: There is none.
        ValueError: It is no mapping, or has an unknown key.
    """
    packaged = Path(__file__).parent.parent / "configs" / "recipes"
    path = Path(name)
    if not path.is_file() and path.parent.name == "":
        path = packaged / f"{path.name.removesuffix('.yaml')}.yaml"
    if not path.is_file():
        available = ", ".join(sorted(file.stem for file in packaged.glob("*.yaml")))
        raise FileNotFoundError(f"There is no recipe {name}. The package comes with {available}.")
    recipe = yaml.safe_load(path.read_text())
    if not isinstance(recipe, dict):
        raise ValueError(f"{path} must hold `key: value` pairs.")
    _check_keys("recipe", recipe, RECIPE_KEYS, required=("reader", "reader_options", "processor"))
    return recipe


def prepare_recipe(recipe: dict, root: str | Path, out: str | Path, *, progress: bool = True) -> dict[str, str]:
    """
    Reads the raw data set in `root` as a recipe says and writes the prepared one; see [`prepare`] for what it returns.

    Args:
        recipe (`dict`):
            `reader` (a key of `READERS`), `reader_options`, `processor` (settings of [`VolumeProcessor`]), and optionally
            `slices` ([`SliceRule`]), `raters` ([`~data.raters.RaterRule`]), `split` ([`SplitRule`]), `dtype`, `license` (identifier of the
            Hub) and `source` (one line of the card). Paths in it are relative to `root`.
        root, out, progress: As in [`prepare`].

    Raises:
        ValueError: An unknown or missing key, and as [`prepare`].
    """
    _check_keys("recipe", recipe, RECIPE_KEYS, required=("reader", "reader_options", "processor"))
    if recipe["reader"] not in READERS:
        raise ValueError(f"`reader` must be one of {', '.join(READERS)}, got {recipe['reader']!r}.")
    reader, options = READERS[recipe["reader"]], recipe["reader_options"]
    parameters = {key: value for key, value in inspect.signature(reader).parameters.items() if key != "root"}
    required = [key for key, value in parameters.items() if value.default is inspect.Parameter.empty]
    _check_keys("reader_options", options, parameters, required)
    absolute = [str(value) for value in options.values() if isinstance(value, str) and Path(value).is_absolute()]
    if absolute:
        raise ValueError(f"`reader_options` must hold paths relative to the root, got {', '.join(absolute)}.")
    rules = {}
    for key, rule in (("slices", SliceRule), ("split", SplitRule)):
        _check_keys(key, recipe.get(key, {}), [field.name for field in dataclasses.fields(rule)])
        rules[key] = rule(**recipe.get(key, {}))
    if "raters" in recipe:
        _check_keys("raters", recipe["raters"], [field.name for field in dataclasses.fields(RaterRule)])
        rules["raters"] = RaterRule(**recipe["raters"])
    return prepare(
        reader(root, **options),
        VolumeProcessor.from_dict(recipe["processor"]),
        out,
        recipe=recipe,
        dtype=recipe.get("dtype", "float32"),
        root=root,
        progress=progress,
        **rules,
    )


def prepare_phantom(
    name: str,
    out: str | Path,
    *,
    recipe: dict | None = None,
    anatomy: str = "mni152",
    seed: int = SET_SEED,
    raw: str | Path | None = None,
    progress: bool = True,
) -> dict[str, str]:
    """
    Makes a phantom and prepares it.

    Args:
        name (`str`): One of `PHANTOMS`: `"phantom-mini"` and `"phantom-std"` are brains, `"phantom-raters"` pictures with several annotations.
        out (`str` or `Path`): As in [`prepare`].
        recipe (`dict`, *optional*): Instead of the packaged one, see [`phantom_recipe`].
        anatomy (`str`): Of brains, as in [`~data.phantom.write_phantom`].
        seed (`int`): As in [`~data.phantom.write_phantom`] and [`~data.raters.write_rater_phantom`].
        raw (`str` or `Path`, *optional*): Where the raw volumes are kept; must not exist. They are not kept by default.
        progress (`bool`): Show progress bars.
    """
    out = Path(out)
    if out.exists():
        raise FileExistsError(f"`out` {out} exists: choose another folder or delete it first.")
    if name not in PHANTOMS:
        raise ValueError(f"`name` must be one of {', '.join(PHANTOMS)}, got {name!r}.")
    brains = name in PHANTOM_SETS
    recipe = dict(recipe or phantom_recipe(name))
    what = f"{_PHANTOM_SOURCES[0]}, anatomy {anatomy}" if brains else _PHANTOM_SOURCES[1]
    recipe["source"] = f"{name} of {what}, seed {seed}"
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-raw-", dir=out.parent) as temporary:
        raw = Path(temporary) / name if raw is None else Path(raw)
        if brains:
            write_phantom(raw, name, seed=seed, anatomy=anatomy, progress=progress)
        else:
            write_rater_phantom(raw, name, seed=seed, progress=progress)
        return prepare_recipe(recipe, raw, out, progress=progress)


def phantom_recipe(name: str) -> dict:
    """The packaged recipe of a phantom of `PHANTOMS`."""
    return read_recipe("phantom_raters" if name in RATER_SETS else "phantom_mini")


def describe_population(recipe: dict) -> str:
    """Whom a model that was trained on data of `recipe` has seen, in words for a card or a report."""
    rule = {
        "healthy_by_mask": "lesion-free slices of the training subjects, who may be ill",
        "healthy_by_label": "healthy training subjects",
        "all": "all slices of the training subjects",
        "not_anomalous": "slices of the training subjects that are not known to be anomalous",
    }[recipe.get("trained_on") or recipe.get("slices", {}).get("train", "all")]
    return f"{rule} ({recipe['source']})" if "source" in recipe else rule


def is_phantom(recipe: dict) -> bool:
    """Whether everybody may see the images that were prepared with `recipe`: nobody's body is in them."""
    return any(source in recipe.get("source", "") for source in _PHANTOM_SOURCES)


def _check_keys(block: str, given: dict, known: Iterable[str], required: Iterable[str] = ()) -> None:
    if not isinstance(given, dict):
        raise ValueError(f"`{block}` must hold `key: value` pairs, got {given!r}.")
    unknown = [str(key) for key in given if key not in known]
    if unknown:
        raise ValueError(f"`{block}` has no key {', '.join(unknown)}; known are {', '.join(known)}.")
    missing = [key for key in required if key not in given]
    if missing:
        raise ValueError(f"`{block}` needs the key {', '.join(missing)}.")


def _check_subjects(subjects: Sequence[Subject], raters: RaterRule | None) -> None:
    if not subjects:
        raise ValueError("`subjects` is empty.")
    names = [subject.name for subject in subjects]
    if len(set(names)) != len(names):
        twice = sorted(name for name in set(names) if names.count(name) > 1)
        raise ValueError(f"Subjects must have different names, twice there are {', '.join(twice[:10])}.")
    several = [subject.name for subject in subjects if len(subject.masks) > 1]
    if raters is not None and several:
        raise ValueError(f"`raters` makes annotations of one mask, and subject {several[0]} has several already.")


def _check_train_rule(rule: str, subjects: Sequence[Subject]) -> None:
    for subject in subjects:
        if rule == "healthy_by_mask" and not subject.masks:
            raise ValueError(
                f"`slices.train: healthy_by_mask` needs a mask of every training subject, {subject.name} has none. Use"
                " `healthy_by_label` or `all`."
            )
        if rule == "healthy_by_label" and subject.label is None and not subject.masks:
            raise ValueError(
                f"`slices.train: healthy_by_label` needs a label or a mask of every training subject, {subject.name} has"
                " neither. Use `all` if the training subjects are healthy."
            )


def _slices_of(
    subject: Subject,
    processor: VolumeProcessor,
    rule: SliceRule,
    raters: RaterRule | None,
    training: bool,
    annotations: int,
) -> tuple[dict, dict]:
    """The kept slices of a subject, and what `subjects.parquet` says of it."""
    processed = processor.preprocess(subject.volume, subject.brain)
    geometry = processed.geometry
    images, brain = processed.slices.numpy(), processed.brain.numpy()
    marked = [_read_marked(path, subject, processed) for path in subject.masks]
    if raters is not None and marked:
        spacing = np.linalg.norm(geometry.input_affine[:3, :3], axis=0)
        marked = list(raters.annotate(marked[0], spacing, subject.name))
    masks = np.zeros((len(images), annotations, *brain.shape[1:]), dtype=np.uint8)
    touched = np.zeros(len(images), dtype=bool)
    label = subject.label
    for index, array in enumerate(marked):
        array = array.astype(np.float32)
        if rule.masks == "linear":
            masks[:, index] = geometry.to_network(array) > 0.5
        else:
            masks[:, index] = processor.preprocess_mask(array, geometry)
        touched |= _touched(array, geometry)
        if subject.label is None:
            label = max(label or 0, int(array.any()))
    slice_labels = masks.any((1, 2, 3)).astype(np.int8) if subject.masks else np.full(len(images), -1, dtype=np.int8)
    if not subject.masks and label is not None:
        slice_labels[:] = label

    share = brain.mean((1, 2))
    last = len(images) - 1 if rule.last is None else rule.last
    kept = np.arange(rule.first or 0, min(last + 1, len(images)), rule.step)
    kept = kept[(share[kept] > 0) & (share[kept] >= rule.min_brain)]
    if rule.min_sum:
        bright = np.flatnonzero(_intensity_sums(processed, processor) > rule.min_sum)
        kept = kept[(kept >= bright.min(initial=len(images))) & (kept <= bright.max(initial=-1))]
    if training and rule.train == "healthy_by_mask":
        kept = kept[~touched[kept]]
    if training and rule.train == "healthy_by_label" and label != 0:
        kept = kept[:0]

    arrays = {
        "image": images[kept],
        "mask": masks[kept],
        "brain": brain[kept].astype(np.uint8),
        "label": slice_labels[kept],
        "slice": kept.astype(np.int32),
    }
    return arrays, {
        "group": subject.group,
        "label": -1 if label is None else label,
        "annotations": len(marked),
        "rows": len(kept),
        "anomalous_rows": int((slice_labels[kept] == 1).sum()),
        "shape": list(geometry.input_shape),
        "spacing": np.linalg.norm(geometry.input_affine[:3, :3], axis=0).tolist(),
        "affine": geometry.input_affine.ravel().tolist(),
        "network_shape": list(geometry.network_shape),
        "network_affine": geometry.network_affine.ravel().tolist(),
    }


def _read_marked(path: Path, subject: Subject, processed: ProcessedVolume) -> np.ndarray:
    """What an annotation marks on the grid of the input, `(X, Y, Z)` bool."""
    mask, geometry = read_volume(path), processed.geometry
    if mask.shape != geometry.input_shape or not np.allclose(mask.affine, geometry.input_affine, atol=1e-3):
        raise ValueError(
            f"The mask {path} must lie on the grid of {processed.source.name}: shape {geometry.input_shape}, got"
            f" {mask.shape}, or another affine."
        )
    (array,) = mask.arrays.values()
    if subject.mask_above >= 1 and array.max() == 1:
        # It would count as empty without a word.
        raise ValueError(
            f"The mask {path} holds 0 and 1, and values above {subject.mask_above:g} are marked: set `label_max: 1`."
        )
    return array > subject.mask_above


def _intensity_sums(processed: ProcessedVolume, processor: VolumeProcessor) -> np.ndarray:
    """`(N,)`: for every slice the sum that `SliceRule.min_sum` is compared with."""
    geometry = processed.geometry
    mean = np.zeros(geometry.input_shape)
    for array in processed.source.arrays.values():
        mean += array / np.quantile(array[array > 0], processor.config.quantile) / len(processed.source.arrays)
    slice_axis = int(np.argsort(plane_orientation(geometry.input_affine, geometry.plane)[:, 0])[2])
    others = tuple(axis for axis in range(3) if axis != slice_axis)
    # A volume that holds every slice's sum in all of its voxels, brought to the network's slices.
    sums = np.broadcast_to(mean.sum(others, keepdims=True), mean.shape).astype(np.float32)
    return geometry.to_network(sums, nearest=True).max((1, 2))


def _touched(mask: np.ndarray, geometry: Geometry) -> np.ndarray:
    """`(N,)` bool: slices that see any voxel of a mask. Every voxel counts, as the widened kernel leaves none out."""
    return dataclasses.replace(geometry, antialias=True, bspline=False).to_network(mask).any((1, 2))


def _files(subject: Subject) -> list[Path]:
    volume = list(subject.volume.values()) if isinstance(subject.volume, dict) else [subject.volume]
    return [Path(file) for file in (*volume, *subject.masks, *([subject.brain] if subject.brain else []))]


def _sources(subject: Subject, root: Path) -> dict:
    def relative(file) -> str:
        return Path(os.path.relpath(file, root)).as_posix()

    volume = subject.volume if isinstance(subject.volume, dict) else {"": subject.volume}
    return {
        "volume_files": [relative(file) for file in volume.values()],
        "mask_files": [relative(file) for file in subject.masks],
        "brain_file": relative(subject.brain) if subject.brain else None,
    }


_SUBJECTS_SCHEMA = pa.schema(
    {
        "subject": pa.string(),
        "split": pa.string(),
        "group": pa.string(),
        "label": pa.int8(),
        "annotations": pa.int32(),
        "rows": pa.int32(),
        "anomalous_rows": pa.int32(),
        "shape": pa.list_(pa.int32()),
        "spacing": pa.list_(pa.float64()),
        "affine": pa.list_(pa.float64()),
        "network_shape": pa.list_(pa.int32()),
        "network_affine": pa.list_(pa.float64()),
        "volume_files": pa.list_(pa.string()),
        "mask_files": pa.list_(pa.string()),
        "brain_file": pa.string(),
    }
)


def _table(arrays: dict, subject: str, dtype: str) -> pa.Table:
    image, mask, brain = arrays["image"].astype(dtype), arrays["mask"], arrays["brain"]
    features = datasets.Features(
        {
            "image": datasets.Array3D(image.shape[1:], dtype),
            "mask": datasets.Array3D(mask.shape[1:], "uint8"),
            "brain": datasets.Array2D(brain.shape[1:], "uint8"),
            "label": datasets.Value("int8"),
            "subject": datasets.Value("string"),
            "slice": datasets.Value("int32"),
        }
    )
    pixels = [
        pa.ExtensionArray.from_storage(features[name](), numpy_to_pyarrow_listarray(array))
        for name, array in (("image", image), ("mask", mask), ("brain", brain))
    ]
    columns = [
        *pixels,
        pa.array(arrays["label"]),
        pa.array([subject] * len(image), pa.string()),
        pa.array(arrays["slice"]),
    ]
    return pa.Table.from_arrays(columns, schema=features.arrow_schema)


def _write_shards(tables: Iterator[pa.Table], folder: Path, split: str, shard_rows: int) -> None:
    """Writes `split-00000-of-0000N.parquet`; N is known at the end only, so the files are renamed then."""
    pending: list[pa.Table] = []
    shards: list[Path] = []
    rows = 0
    for table in itertools.chain(tables, [None]):
        if table is not None:
            pending.append(table)
            rows += table.num_rows
        while rows >= shard_rows or (table is None and rows):
            together = pa.concat_tables(pending)
            shards.append(folder / f"{split}-{len(shards):05d}")
            # Pixels have no dictionary; looking for one takes time and gains nothing.
            pq.write_table(
                together.slice(0, shard_rows), shards[-1], row_group_size=_ROW_GROUP, use_dictionary=["subject"]
            )
            pending = [together.slice(shard_rows)]
            rows = pending[0].num_rows
    for shard in shards:
        shard.rename(folder / f"{shard.name}-of-{len(shards):05d}.parquet")


def _card(name: str, processor: VolumeProcessor, recipe: dict, rows: list[dict], failures: dict) -> str:
    """A card whose header makes `load_dataset` find the shards of every split, and nothing else."""
    lines, files = [], []
    for split in SPLITS:
        of_split = [row for row in rows if row["split"] == split and row["rows"]]
        if of_split:
            counts = (
                len(of_split),
                sum(row["rows"] for row in of_split),
                sum(row["anomalous_rows"] for row in of_split),
            )
            lines.append(f"| {split} | " + " | ".join(map(str, counts)) + " |")
            files.append({"split": split, "path": f"data/{split}-*.parquet"})
    header = {
        "license": recipe.get("license", "unknown"),
        "tags": ["anomaly-detection", "medical-imaging", "anodiff"],
        "configs": [{"config_name": "default", "data_files": files}],
    }
    left_out = f"\nLeft out, because they could not be read: {', '.join(sorted(failures))}.\n" if failures else ""
    return f"""---
{yaml.safe_dump(header, sort_keys=False)}---

# {name}

Slices for anomaly detection with diffusion models, prepared by `anodiff` with `recipe.yaml`.

- Source: {recipe.get("source", "not stated")}
- Licence of the images: {recipe.get("license", "unknown")}
- Modalities, in channel order: {", ".join(processor.config.modalities)}

| split | subjects | slices | anomalous slices |
| --- | --- | --- | --- |
{chr(10).join(lines)}
{left_out}
| column | content |
| --- | --- |
| `image` | (C, H, W), in the range {list(processor.config.value_range)}{"" if processor.config.clip else ", may exceed it"} |
| `mask` | (A, H, W), one lesion mask per annotator, 0 or 1; the first `annotations` of `subjects.parquet`, then zeros |
| `brain` | (H, W), 0 or 1 |
| `label` | 1 anomalous, 0 healthy, -1 unknown |
| `subject` | name; the rows of a subject are together and in slice order |
| `slice` | index of the slice in the volume, on the network's grid |

`subjects.parquet` holds groups, grids and source files, `processor/` the settings that checkpoints need to see the same slices.

```python
from anodiff.data.prepared import load_prepared
split = load_prepared("{name}", "{files[0]["split"]}")     # this folder, or its id on the Hub
```
"""
