"""Makes prepared data sets: a reader's subjects, through the processor, by a recipe's rules, into Parquet.

The layout and the columns are those that `prepared.py` reads.
"""

from __future__ import annotations

import csv
import dataclasses
import inspect
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from tqdm.auto import tqdm

from ..volumes.processor import VolumeProcessor
from . import shards
from .card import make_card
from .correction import Correction
from .phantoms.brains import PHANTOM_SETS, SET_SEED, write_phantom
from .phantoms.nodules import RATER_SETS, RaterRule, write_rater_phantom
from .readers.arrays import read_array_stacks, read_crop_pickles, read_picture_stacks
from .readers.files import read_bids, read_file_patterns
from .readers.subjects import (
    SPLITS,
    Subject,
    read_annotated_folders,
    read_image_folders,
    read_split_tables,
    read_volume_folders,
)
from .rules import SliceRule, SplitRule
from .slicing import slices_of


DTYPES = ("float32", "float16")
READERS = {
    "volume_folders": read_volume_folders,
    "image_folders": read_image_folders,
    "annotated_folders": read_annotated_folders,
    "split_tables": read_split_tables,
    "file_patterns": read_file_patterns,
    "bids": read_bids,
    "picture_stacks": read_picture_stacks,
    "array_stacks": read_array_stacks,
    "crop_pickles": read_crop_pickles,
}
RECIPE_KEYS = (
    *("source", "license", "reader", "reader_options", "processor", "slices", "raters", "split", "dtype"),
    *("correction", "rehosting"),
)
# Whether the licence lets others than the owner offer the images for download.
REHOSTING = ("allowed", "forbidden")
# Every set that is made and not read; those with several annotations are pictures.
PHANTOMS = (*PHANTOM_SETS, *RATER_SETS)

_PHANTOM_SOURCES = ("anodiff.data.phantoms.brains", "anodiff.data.phantoms.nodules")


def prepare(
    subjects: Sequence[Subject],
    processor: VolumeProcessor,
    out: str | Path,
    *,
    recipe: dict,
    correction: Correction | None = None,
    slices: SliceRule | None = None,
    raters: RaterRule | None = None,
    split: SplitRule | None = None,
    dtype: str = "float32",
    root: str | Path | None = None,
    shard_rows: int = 1024,
    num_proc: int = 1,
    progress: bool = True,
) -> dict[str, str]:
    """
    Writes a prepared data set. Memory holds one subject per process, and one shard.

    Subjects that are done are kept in `OUT.partial` until all are: if the run is interrupted, the same call goes on from there. What a
    subject depends on (its files, settings, this code) is checked by the files' sizes and times, and it is done again if that has
    changed. At the end `out` appears as a whole. Until then the disk holds everything about twice.

    Labels of slices: 1 if one of the subject's masks has a pixel in the slice, else 0; without mask the subject's label. The label of a
    subject is the given one, or whether all its masks are empty.

    Args:
        subjects (`list[Subject]`): What a reader found.
        processor ([`VolumeProcessor`]): Makes the slices, which must all have one size.
        out (`str` or `Path`): Folder to write; must not exist.
        recipe (`dict`): Written to `recipe.yaml`; `license`, `rehosting` and `source` go into the card.
        correction ([`~data.correction.Correction`], *optional*):
            Before the processor. What was done is in `corrections.csv`, a picture of every subject in the folder `quality`.
        slices ([`SliceRule`], *optional*): Which slices are kept.
        raters ([`RaterRule`], *optional*): Make several annotations of the one that subjects have.
        split ([`SplitRule`], *optional*): How subjects are divided; as the subjects say by default.
        dtype (`str`): `"float32"` or `"float16"` of `image`.
        root (`str` or `Path`, *optional*): What file names are written relative to; the common folder of all files by default.
        shard_rows (`int`): Slices per file.
        num_proc (`int`): Processes that subjects are shared out to. Changes no bit of the result.
        progress (`bool`): Show a progress bar.

    Returns:
        `dict[str, str]`: Subjects that could not be read and why. The others were written.

    Raises:
        FileExistsError: `out` exists.
        ValueError: Rules and subjects do not fit together, no subject can be read, or a split keeps no slice.
        ChildProcessError: A worker process was stopped, as the system does when memory is short.
    """
    out, slices, split = Path(out), slices or SliceRule(), split or SplitRule()
    if out.exists():
        raise FileExistsError(f"`out` {out} exists: choose another folder or delete it first.")
    if dtype not in DTYPES:
        raise ValueError(f"`dtype` must be one of {', '.join(DTYPES)}, got {dtype!r}.")
    for name, number in (("shard_rows", shard_rows), ("num_proc", num_proc)):
        if number < 1:
            raise ValueError(f"`{name}` must be at least 1, got {number}.")
    _check_subjects(subjects, raters)
    annotations = max(1, *(len(subject.masks) for subject in subjects)) if raters is None else raters.number
    split_of = split.assign(subjects)
    _check_train_rule(slices.train, [subject for subject in subjects if split_of[subject.name] == "train"])
    if root is None:
        root = os.path.commonpath([file.parent.absolute() for subject in subjects for file in subject.files])

    ordered = sorted(subjects, key=lambda subject: (SPLITS.index(split_of[subject.name]), subject.name))
    rules = [dataclasses.asdict(rule) if rule else None for rule in (slices, raters)]
    corrected = None
    if correction is not None:
        correction.check()
        corrected = correction.describe()
    settings = [processor.settings(), *rules, annotations, dtype, corrected, shards.code_digest()]
    partial = out.with_name(f"{out.name}.partial")
    pieces, tasks = {}, []
    for subject in ordered:
        training = split_of[subject.name] == "train"
        piece = partial / shards.piece_name(json.dumps(settings, sort_keys=True), subject, training)
        pieces[subject.name] = piece
        tasks.append((subject, processor, correction, slices, raters, training, annotations, dtype, piece))

    shards.open_partial(partial)
    failures: dict[str, str] = {}
    rows: list[dict] = []
    try:
        bar = tqdm(ordered, desc="prepare", unit="subject", disable=not progress)
        for subject, failure in zip(bar, shards.run_tasks(_finish_piece, tasks, num_proc), strict=True):
            if failure is not None:
                failures[subject.name] = failure
                continue
            row = shards.read_piece_row(pieces[subject.name])
            if rows and row["size"] != rows[0]["size"]:
                raise ValueError(
                    f"Subject {subject.name} has slices {tuple(row['size'])}, those before it {tuple(rows[0]['size'])}: set `size` of"
                    " the processor."
                )
            names = shards.source_files(subject, Path(root))
            rows.append({"subject": subject.name, "split": split_of[subject.name], **row, **names})
        if not rows:
            raise ValueError(
                "No subject can be read:\n" + "\n".join(f"{k}: {v}" for k, v in list(failures.items())[:10])
            )
        for name in {row["split"] for row in rows}:
            if not any(row["rows"] for row in rows if row["split"] == name):
                raise ValueError(f"`slices` keeps no slice of the split {name}: {slices}.")
    except (ValueError, ImportError):
        # What is done is kept: a subject or the split may be what has to change.
        if not any(piece.exists() for piece in pieces.values()):
            shutil.rmtree(partial)
        raise

    # A folder of a temporary folder: it has ordinary permissions, and the renaming stays on one disk.
    with tempfile.TemporaryDirectory(dir=partial) as temporary:
        unfinished = Path(temporary) / out.name
        (unfinished / "data").mkdir(parents=True)
        for name in SPLITS:
            tables = (shards.read_piece(pieces[row["subject"]]) for row in rows if row["split"] == name)
            shards.write_shards(tables, unfinished / "data", name, shard_rows)
        pq.write_table(pa.Table.from_pylist(rows, schema=shards.SUBJECTS_SCHEMA), unfinished / "subjects.parquet")
        if correction is not None:
            _write_corrections(unfinished, rows, pieces)
        processor.save_pretrained(unfinished / "processor")
        (unfinished / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True))
        (unfinished / "README.md").write_text(make_card(out.name, processor, recipe, rows, failures, corrected))
        unfinished.rename(out)
    shutil.rmtree(partial, ignore_errors=True)
    return failures


def _finish_piece(
    subject: Subject,
    processor: VolumeProcessor,
    correction: Correction | None,
    slices: SliceRule,
    raters: RaterRule | None,
    training: bool,
    annotations: int,
    dtype: str,
    piece: Path,
) -> str | None:
    """Makes the piece of a subject, unless it is there. Returns why the subject cannot be read."""
    if piece.exists():
        return None
    row = {}
    try:
        source = subject
        if correction is not None:
            source, row["correction"] = correction.apply(subject, piece.with_suffix(".png"))
        arrays, found = slices_of(source, processor, slices, raters, training, annotations)
    except ImportError:
        raise  # of every subject
    except (ValueError, OSError) as error:
        return str(error)
    except Exception as error:  # noqa: BLE001 (whatever is wrong with one subject, the others are still wanted)
        return f"{type(error).__name__}: {error}"
    table = shards.make_table(arrays, subject.name, dtype)
    shards.write_piece(piece, table, {**found, **row, "size": list(arrays["image"].shape[1:])})
    return None


def _write_corrections(folder: Path, rows: list[dict], pieces: dict[str, Path]) -> None:
    """`corrections.csv` and `quality/SUBJECT.png`."""
    (folder / "quality").mkdir()
    with open(folder / "corrections.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["subject", *rows[0]["correction"]], lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({"subject": row["subject"], **row["correction"]})
            name = row["subject"].replace("/", "--")
            shutil.copyfile(pieces[row["subject"]].with_suffix(".png"), folder / "quality" / f"{name}.png")


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


def prepare_recipe(
    recipe: dict,
    root: str | Path,
    out: str | Path,
    *,
    template: str | Path | None = None,
    reference: str | Path | None = None,
    num_proc: int = 1,
    progress: bool = True,
) -> dict[str, str]:
    """
    Reads the raw data set in `root` as a recipe says and writes the prepared one; see [`prepare`] for what it returns.

    Args:
        recipe (`dict`):
            `reader` (a key of `READERS`), `reader_options`, `processor` (settings of [`VolumeProcessor`]), and optionally
            `correction` ([`~data.correction.Correction`]), `slices` ([`SliceRule`]), `raters` ([`~data.phantoms.nodules.RaterRule`]), `split`
            ([`SplitRule`]), `dtype`, `license` (identifier of the Hub), `rehosting` (`"allowed"` or `"forbidden"` by the licence) and
            `source` (one line of the card). Paths in it are relative to `root`.
        template, reference (`str` or `Path`, *optional*):
            Files of `correction`: the template that subjects are registered to, and the scan whose histograms they are matched to (a
            file, or a folder with one per modality, called after it).
        root, out, num_proc, progress: As in [`prepare`].

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
    absolute = [text for value in options.values() for text in _texts(value) if Path(text).is_absolute()]
    if absolute:
        raise ValueError(f"`reader_options` must hold paths relative to the root, got {', '.join(absolute)}.")
    if recipe.get("rehosting", "allowed") not in REHOSTING:
        raise ValueError(f"`rehosting` must be one of {', '.join(REHOSTING)}, got {recipe['rehosting']!r}.")
    processor, rules = _read_rules(recipe, template, reference)
    return prepare(
        reader(root, **options),
        processor,
        out,
        recipe=recipe,
        dtype=recipe.get("dtype", "float32"),
        root=root,
        num_proc=num_proc,
        progress=progress,
        **rules,
    )


def _read_rules(
    recipe: dict, template: str | Path | None, reference: str | Path | None
) -> tuple[VolumeProcessor, dict]:
    """Processor and rules of a recipe, as [`prepare`] takes them."""
    rules = {}
    for key, rule in (("slices", SliceRule), ("split", SplitRule)):
        _check_keys(key, recipe.get(key, {}), [field.name for field in dataclasses.fields(rule)])
        rules[key] = rule(**recipe.get(key, {}))
    if "raters" in recipe:
        _check_keys("raters", recipe["raters"], [field.name for field in dataclasses.fields(RaterRule)])
        rules["raters"] = RaterRule(**recipe["raters"])
    processor = VolumeProcessor.from_dict(recipe["processor"])
    if "correction" in recipe or template is not None or reference is not None:
        _check_keys("correction", recipe.get("correction", {}), Correction.rules())
        files = {"template": template, "reference": reference, "modalities": tuple(processor.config.modalities)}
        rules["correction"] = Correction(**recipe.get("correction", {}), **files)
    return processor, rules


def prepare_phantom(
    name: str,
    out: str | Path,
    *,
    recipe: dict | None = None,
    anatomy: str = "mni152",
    seed: int = SET_SEED,
    raw: str | Path | None = None,
    template: str | Path | None = None,
    reference: str | Path | None = None,
    num_proc: int = 1,
    progress: bool = True,
) -> dict[str, str]:
    """
    Makes a phantom and prepares it.

    Args:
        name (`str`): One of `PHANTOMS`: `"phantom-mini"` and `"phantom-std"` are brains, `"phantom-raters"` pictures with several annotations.
        out (`str` or `Path`): As in [`prepare`].
        recipe (`dict`, *optional*): Instead of the packaged one, see [`phantom_recipe`].
        anatomy (`str`): Of brains, as in [`~data.phantoms.brains.write_phantom`].
        seed (`int`): As in [`~data.phantoms.brains.write_phantom`] and [`~data.phantoms.nodules.write_rater_phantom`].
        raw (`str` or `Path`, *optional*): Where the raw volumes are kept; must not exist. They are not kept by default.
        template, reference (`str` or `Path`, *optional*): As in [`prepare_recipe`], of a recipe with `correction`.
        num_proc (`int`): As in [`prepare`]; the raw volumes are made by one process.
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
    _, rules = _read_rules(recipe, template, reference)
    if "correction" in rules:
        rules["correction"].check()  # before the work
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-raw-", dir=out.parent) as temporary:
        raw = Path(temporary) / name if raw is None else Path(raw)
        if brains:
            write_phantom(raw, name, seed=seed, anatomy=anatomy, progress=progress)
        else:
            write_rater_phantom(raw, name, seed=seed, progress=progress)
        files = {"template": template, "reference": reference}
        return prepare_recipe(recipe, raw, out, **files, num_proc=num_proc, progress=progress)


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


def _texts(value) -> list[str]:
    """The texts in an option of a reader."""
    values = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else [value]
    return [item for item in values if isinstance(item, str)]


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
        if rule == "healthy_by_mask" and not subject.masks and subject.label != 0:
            raise ValueError(
                f"`slices.train: healthy_by_mask` needs a mask of every training subject, {subject.name} has none. Use"
                " `healthy_by_label` or `all`."
            )
        if rule == "healthy_by_label" and subject.label is None and not subject.masks:
            raise ValueError(
                f"`slices.train: healthy_by_label` needs a label or a mask of every training subject, {subject.name} has"
                " neither. Use `all` if the training subjects are healthy."
            )
