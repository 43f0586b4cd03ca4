"""Makes prepared data sets: a reader's subjects, through the processor, by a recipe's rules, into Parquet."""

from __future__ import annotations

import csv
import dataclasses
import inspect
import os
import shutil
import warnings
from collections.abc import Iterable, Sequence
from contextlib import closing
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from tqdm.auto import tqdm

from ..checks import check_choice, check_integer, check_keys
from ..configs import read_yaml
from ..files import check_name, lock_folder, rename_folder, write_text
from ..volumes.processor import VolumeProcessor
from . import shards
from .card import make_card
from .correction import Correction
from .layout import PROCESSOR, RECIPE, SPLITS, SUBJECTS, SUBJECTS_SCHEMA
from .participants import read_participants
from .raters import RaterRule
from .readers.arrays import read_array_stacks, read_crop_pickles, read_picture_stacks
from .readers.files import read_bids, read_file_patterns
from .readers.listing import LeftOut
from .readers.subjects import (
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
    *("correction", "rehosting", "participants"),
)
# Whether the licence lets others than the owner offer the images for download.
REHOSTING = ("allowed", "forbidden")


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
    participants: dict[str, dict] | None = None,
    root: str | Path | None = None,
    shard_rows: int = 1024,
    num_proc: int = 1,
    scheduler: str | None = None,
    progress: bool = True,
) -> dict[str, str]:
    """
    Writes a prepared data set. Memory holds one subject per process, and one shard.

    Subjects that are done are kept in `OUT.partial` until all are: if the run is interrupted, the same call goes on
    from there. A subject is done again if what it depends on has changed: its files (by their sizes and times), the
    settings, this code. At the end `out` appears as a whole. Until then the disk holds everything about twice. One run
    at a time may make `out`.

    Labels of slices: 1 if one of the subject's masks has a pixel in the slice, else 0; without mask the subject's
    label. The label of a subject is the given one, or else 1 if any of its masks has a voxel.

    Args:
        subjects: What a reader found.
        processor: Makes the slices, which must all have one size.
        out: Folder to write; must not exist.
        recipe: Written to `recipe.yaml`; `license`, `rehosting` and `source` go into the card.
        correction: Applied before the processor. `corrections.csv` lists what was done, the folder `quality` has a
            picture of every subject.
        raters: Make several annotations of the one that subjects have.
        split: How subjects are divided; as the subjects say by default.
        dtype: `"float32"` or `"float16"` of `image`.
        participants: Further columns of `subjects.parquet`: name of every subject to its values, numbers, texts or
            `None`, as [`~data.participants.read_participants`] reads them.
        root: What file names are written relative to; the common folder of all files by default.
        shard_rows: Slices per file.
        num_proc: Processes that subjects are shared out to, by a local cluster of Dask. Changes no bit of the result.
            A script that gives more than 1 calls this below `if __name__ == "__main__":`, as every process reads the
            script.
        scheduler: Address of a Dask cluster, `"tcp://HOST:PORT"`, that subjects are shared out to instead. Its workers
            have one thread each, this version of the package, and see all files under the same names: give absolute
            ones. Changes no bit of the result.

    Returns:
        `dict[str, str]`: Subjects that could not be read and why. The others were written.

    Raises:
        FileExistsError: `out` exists.
        BlockingIOError: Another run is making `out`.
        ValueError: Rules and subjects do not fit together, no subject can be read, or a split keeps no slice.
        ChildProcessError: A worker process was stopped, as the system does when memory is short, or could not start.
        ConnectionError: The cluster at `scheduler` does not answer.
    """
    out, slices, split = Path(out), slices or SliceRule(), split or SplitRule()
    if num_proc != 1:
        shards.leave_if_worker()
    _check_absent(out)
    check_choice("dtype", dtype, DTYPES)
    check_integer("shard_rows", shard_rows, 1)
    check_integer("num_proc", num_proc, 1)
    if num_proc != 1 and scheduler is not None:
        raise ValueError("`num_proc` is of this computer, and `scheduler` of a cluster: give one of them.")
    _check_subjects(subjects, raters, processor)
    split_of = split.assign(subjects)
    _check_train_rule(slices.train, [subject for subject in subjects if split_of[subject.name] == "train"])
    if correction is not None:
        correction.check()
    if root is None:
        root = os.path.commonpath([file.parent.absolute() for subject in subjects for file in subject.files])

    annotations = max(1, *(len(subject.masks) for subject in subjects)) if raters is None else raters.number
    rules = _Rules(processor, correction, slices, raters, annotations, dtype)
    corrected = None if correction is None else correction.describe()
    settings = [*rules.settings(), corrected, shards.code_digest()]
    partial = out.with_name(f"{out.name}.partial")
    ordered = sorted(subjects, key=lambda subject: (SPLITS.index(split_of[subject.name]), subject.name))
    tasks = [(subject, split_of[subject.name] == "train") for subject in ordered]
    pieces = {task[0].name: partial / shards.piece_name(settings, *task) for task in tasks}

    shards.check_partial(partial)
    with lock_folder(partial):
        _check_absent(out)
        shards.open_partial(partial)
        tasks = [(*task, piece) for task, piece in zip(tasks, pieces.values(), strict=True)]
        try:
            with closing(shards.run_tasks(rules.finish_piece, tasks, num_proc, scheduler)) as results:
                bar = tqdm(ordered, desc="prepare", unit="subject", disable=not progress)
                rows, failures = _read_rows(zip(bar, results, strict=True), pieces, split_of, Path(root))
            _check_rows(rows, slices)
        except (ValueError, ImportError):
            # What is done is kept: a subject or the split may be what has to change.
            if not any(piece.exists() for piece in pieces.values()):
                shutil.rmtree(partial)
            raise
        unfinished = partial / "unfinished"
        _write_rows(unfinished, rows, pieces, shard_rows, participants or {})
        processor.save_pretrained(unfinished / PROCESSOR)
        write_text(unfinished / RECIPE, yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True))
        write_text(unfinished / "README.md", make_card(out.name, processor, recipe, rows, failures, corrected))
        rename_folder(unfinished, out)
        shutil.rmtree(partial, ignore_errors=True)
    return failures


def _check_absent(out: Path) -> None:
    if os.path.lexists(out):
        raise FileExistsError(f"`out` {out} exists: choose another folder or delete it first.")


@dataclasses.dataclass(frozen=True)
class _Rules:
    """Holds how every subject is made into rows."""

    processor: VolumeProcessor
    correction: Correction | None
    slices: SliceRule
    raters: RaterRule | None
    annotations: int
    dtype: str

    def settings(self) -> list:
        """Returns what is set, but for the correction, in plain values."""
        raters = self.raters and dataclasses.asdict(self.raters)
        return [self.processor.settings(), dataclasses.asdict(self.slices), raters, self.annotations, self.dtype]

    def finish_piece(self, subject: Subject, training: bool, piece: Path) -> str | None:
        """Makes the piece of a subject, unless it is there. Returns why the subject cannot be read."""
        if piece.exists():
            return None
        row = {}
        try:
            subject.check_files()
            source = subject
            if self.correction is not None:
                source, row["correction"] = self.correction.apply(subject, piece.with_suffix(".png"))
            arrays, found = slices_of(source, self.processor, self.slices, self.raters, training, self.annotations)
        except ImportError:
            raise  # of every subject
        except (ValueError, OSError) as error:
            return str(error)
        except Exception as error:  # noqa: BLE001 (whatever is wrong with one subject, the others are still wanted)
            return f"{type(error).__name__}: {error}"
        table = shards.make_table(arrays, subject.name, self.dtype)
        shards.write_piece(piece, table, {**found, **row, "size": list(arrays["image"].shape[1:])})
        return None


def _read_rows(
    done: Iterable[tuple[Subject, str | None]], pieces: dict[str, Path], split_of: dict[str, str], root: Path
) -> tuple[list[dict], dict[str, str]]:
    """Reads the rows of `subjects.parquet` from the pieces as they are done; returns them, and why subjects failed."""
    rows: list[dict] = []
    failures: dict[str, str] = {}
    for subject, failure in done:
        if failure is not None:
            failures[subject.name] = failure
            continue
        row = shards.read_piece_row(pieces[subject.name])
        if rows and row["size"] != rows[0]["size"]:
            raise ValueError(
                f"Subject {subject.name} has slices {tuple(row['size'])}, those before it {tuple(rows[0]['size'])}:"
                " set `size` of the processor."
            )
        names = shards.source_files(subject, root)
        rows.append({"subject": subject.name, "split": split_of[subject.name], **row, **names})
    if not rows:
        raise ValueError("No subject can be read:\n" + "\n".join(f"{k}: {v}" for k, v in list(failures.items())[:10]))
    return rows, failures


def _check_rows(rows: list[dict], slices: SliceRule) -> None:
    for name in {row["split"] for row in rows}:
        if not any(row["rows"] for row in rows if row["split"] == name):
            raise ValueError(f"`slices` keeps no slice of the split {name}: {slices}. Loosen it.")


def _write_rows(
    folder: Path, rows: list[dict], pieces: dict[str, Path], shard_rows: int, participants: dict[str, dict]
) -> None:
    """Writes the shards of all splits and `subjects.parquet`, and `corrections.csv` and `quality/SUBJECT.png` if there
    are any."""
    (folder / "data").mkdir(parents=True)
    for split in SPLITS:
        tables = (shards.read_piece(pieces[row["subject"]]) for row in rows if row["split"] == split)
        shards.write_shards(tables, folder / "data", split, shard_rows)
    schema = SUBJECTS_SCHEMA
    for column in next(iter(participants.values()), {}):
        known = [values[column] for values in participants.values() if values[column] is not None]
        text = any(isinstance(value, str) for value in known)
        schema = schema.append(pa.field(column, pa.string() if text else pa.float64()))
    described = [{**row, **participants.get(row["subject"], {})} for row in rows]
    pq.write_table(pa.Table.from_pylist(described, schema=schema), folder / SUBJECTS)
    if "correction" not in rows[0]:
        return
    (folder / "quality").mkdir()
    with open(folder / "corrections.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["subject", *rows[0]["correction"]], lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({"subject": row["subject"], **row["correction"]})
            name = row["subject"].replace("/", "--")
            shutil.copyfile(pieces[row["subject"]].with_suffix(".png"), folder / "quality" / f"{name}.png")


def read_recipe(name: str | Path) -> dict:
    """Reads and checks a recipe: a YAML file, or one that comes with the package by its bare name, such as
    `tcga_lgg_flair`."""
    packaged = Path(__file__).parent.parent / "configs" / "recipes"
    path = Path(name)
    if not path.is_file() and path.parent.name == "":
        path = packaged / f"{path.name.removesuffix('.yaml')}.yaml"
    if not path.is_file():
        available = ", ".join(sorted(file.stem for file in packaged.glob("*.yaml")))
        raise FileNotFoundError(f"There is no recipe {name}. The package comes with {available}.")
    recipe = read_yaml(path)
    _check_block("recipe", recipe, RECIPE_KEYS, required=("reader", "reader_options", "processor"))
    return recipe


def prepare_recipe(
    recipe: dict,
    root: str | Path,
    out: str | Path,
    *,
    template: str | Path | None = None,
    reference: str | Path | None = None,
    num_proc: int = 1,
    scheduler: str | None = None,
    progress: bool = True,
) -> dict[str, str]:
    """
    Reads the raw data set in `root` as a recipe says and writes the prepared one, as [`prepare`]. An unknown or
    missing key is a `ValueError`. What the reader finds in no subject (masks without an image, rows without a file) is
    listed among what was left out.

    Args:
        recipe: `reader` (a key of `READERS`), `reader_options`, `processor` (settings of [`VolumeProcessor`]), and
            optionally `correction` ([`~data.correction.Correction`]), `slices` ([`SliceRule`]), `raters`
            ([`RaterRule`]), `split` ([`SplitRule`]), `participants` ([`~data.participants.read_participants`]), `dtype`, `license` (identifier of the Hub), `rehosting`
            (`"allowed"` or `"forbidden"` by the licence) and `source` (one line of the card). Paths in it are relative
            to `root`.
        template, reference: Files of `correction`: the template that subjects are registered to, and the scan whose
            histograms they are matched to (a file, or a folder with one per modality, called after it).
    """
    if scheduler is not None:
        # Workers need not have our working directory.
        root, out = Path(root).absolute(), Path(out).absolute()
        template, reference = (file and Path(file).absolute() for file in (template, reference))
    _check_block("recipe", recipe, RECIPE_KEYS, required=("reader", "reader_options", "processor"))
    check_choice("reader", recipe["reader"], READERS)
    check_choice("rehosting", recipe.get("rehosting", "allowed"), REHOSTING)
    reader, options = READERS[recipe["reader"]], recipe["reader_options"]
    parameters = {key: value for key, value in inspect.signature(reader).parameters.items() if key != "root"}
    required = [key for key, value in parameters.items() if value.default is inspect.Parameter.empty]
    _check_block("reader_options", options, parameters, required)
    absolute = []
    for value in options.values():
        values = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else [value]
        values = [text for one in values for text in (one if isinstance(one, (list, tuple)) else [one])]
        absolute += [text for text in values if isinstance(text, str) and Path(text).is_absolute()]
    if absolute:
        raise ValueError(f"`reader_options` must hold paths relative to the root, got {', '.join(absolute)}.")
    processor, rules = read_rules(recipe, template, reference)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        subjects = reader(root, **options)
        participants = None
        if "participants" in recipe:
            given = recipe["participants"]
            _check_block("participants", given, ("table", "columns", "key"), required=("table", "columns"))
            participants = read_participants(Path(root), subjects, **given)
    left_out = {}
    for warning in said:
        if isinstance(warning.message, LeftOut):
            left_out[warning.message.what] = warning.message.reason
        else:
            warnings.warn(warning.message, stacklevel=2)
    failures = prepare(
        subjects,
        processor,
        out,
        recipe=recipe,
        dtype=recipe.get("dtype", "float32"),
        participants=participants,
        root=root,
        num_proc=num_proc,
        scheduler=scheduler,
        progress=progress,
        **rules,
    )
    return failures | left_out


def read_rules(
    recipe: dict, template: str | Path | None, reference: str | Path | None
) -> tuple[VolumeProcessor, dict]:
    """Returns the processor and the rules of a recipe, as [`prepare`] takes them."""
    rules = {}
    for key, rule in (("slices", SliceRule), ("split", SplitRule), ("raters", RaterRule)):
        if key in recipe:
            _check_block(key, recipe[key], [field.name for field in dataclasses.fields(rule)])
            rules[key] = rule(**recipe[key])
    processor = VolumeProcessor.from_dict(recipe["processor"])
    if processor.config.context:
        raise ValueError(
            f"`processor.context` must be left out of a recipe, got {processor.config.context}: slices are prepared one"
            " by one, and a training finds their neighbours. Give it to train.py."
        )
    if "correction" in recipe or template is not None or reference is not None:
        _check_block("correction", recipe.get("correction", {}), Correction.rules())
        files = {"template": template, "reference": reference, "modalities": tuple(processor.config.modalities)}
        rules["correction"] = Correction(**recipe.get("correction", {}), **files)
    return processor, rules


def _check_block(block: str, given: dict, known: Iterable[str], required: Iterable[str] = ()) -> None:
    if not isinstance(given, dict):
        raise ValueError(f"`{block}` must hold `key: value` pairs, got {given!r}.")
    check_keys(block, map(str, given), known, "it")
    missing = [key for key in required if key not in given]
    if missing:
        raise ValueError(f"`{block}` needs the key {', '.join(missing)}.")


def _check_subjects(subjects: Sequence[Subject], raters: RaterRule | None, processor: VolumeProcessor) -> None:
    for name in processor.config.modalities:
        check_name("a modality", name)
    if not subjects:
        raise ValueError("`subjects` is empty.")
    names = [subject.name for subject in subjects]
    if len(set(names)) != len(names):
        twice = sorted(name for name in set(names) if names.count(name) > 1)
        raise ValueError(f"Subjects must have different names, twice there are {', '.join(twice[:10])}.")
    files = [name.replace("/", "--") for name in names]
    if len(set(files)) != len(files):  # of their pictures
        twice = sorted(name for name, file in zip(names, files, strict=True) if files.count(file) > 1)
        raise ValueError(
            f"The names of subjects must differ in more than / and --, which {', '.join(twice[:10])} do not."
        )
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
                f"`slices.train: healthy_by_label` needs a label or a mask of every training subject, {subject.name}"
                " has neither. Use `all` if the training subjects are healthy."
            )
