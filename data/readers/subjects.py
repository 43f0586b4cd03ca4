"""Finds the subjects of a raw data set: which files belong together, what is known about them, what a split must not
divide.

Every reader returns its subjects sorted by name, and raises a `ValueError` (a `FileNotFoundError` for a table) that
says what in `root`, the folder of the data set, does not fit its options. A file of a subject that is missing or not
unique is no error: the subject is left out when the set is made, [`prepare`] lists it, and the others are written.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ...checks import check_number
from ...files import check_name
from ...volumes.volume import IMAGE_SUFFIXES, StoredVolume
from ..layout import SPLITS
from .listing import (
    SCAN_SUFFIXES,
    SPLIT_NAMES,
    Missing,
    as_modalities,
    as_text,
    as_texts,
    check_healthy,
    find_files,
    folders_below,
    folders_in,
    leave_out,
    list_names,
    list_some,
    match_files,
    read_rows,
    read_table,
    require_folder,
)


_T1_WORD = re.compile(r"(?<![a-zA-Z0-9])t1(?![a-zA-Z0-9])")


@dataclass(frozen=True)
class Subject:
    """Names the files of one subject of a raw data set, and what is known about it. Nothing is read yet.

    Args:
        name: Unique in its data set, and one that a file can have.
        volume: Modality to file, or one file.
        masks: Lesion masks on the volume's grid, one per annotator; empty if the subject is unlabelled. Subjects of
            one data set may have different numbers of them.
        brain: Brain mask on the volume's grid.
        label: 1 anomalous, 0 healthy, `None` unknown or to be seen from the masks.
        split: `"train"`, `"validation"` or `"test"`, where the data set says so.
        group: What no split may divide (a patient); the name by default.
        mask_above: Value in the files of the masks above which a voxel is marked.
        mask_max: Value of a marked voxel, where it is known.
        age: In years, where the data set says so.
        site: Centre or scanner, where the data set says so.
    """

    name: str
    volume: dict[str, Path | StoredVolume] | Path | StoredVolume
    masks: tuple[Path | StoredVolume, ...] = ()
    brain: Path | StoredVolume | None = None
    label: int | None = None
    split: str | None = None
    group: str = ""
    mask_above: float = 0.0
    mask_max: float | None = None
    age: float | None = None
    site: str | None = None

    def __post_init__(self):
        check_name("a subject", self.name)
        if not _is_unicode(self.name):
            raise ValueError(f"The name of a subject must be UTF-8, got {self.name!a}: rename its files.")
        if self.label not in (0, 1, None):
            raise ValueError(f"Subject {self.name}: `label` must be 0, 1 or None, got {self.label!r}.")
        if self.split is not None and self.split not in SPLITS:
            raise ValueError(f"Subject {self.name}: `split` must be one of {', '.join(SPLITS)}, got {self.split!r}.")
        object.__setattr__(self, "group", self.group or self.name)

    @property
    def volume_files(self) -> list[Path]:
        """Returns the files that the volume is read from, in channel order."""
        return _files_of(self.volume.values() if isinstance(self.volume, dict) else [self.volume])

    @property
    def mask_files(self) -> list[Path]:
        """Returns the files that the masks are read from."""
        return _files_of(self.masks)

    @property
    def files(self) -> list[Path]:
        """Returns all files of the subject."""
        return [*self.volume_files, *self.mask_files, *_files_of([self.brain] if self.brain else [])]

    def check_files(self) -> None:
        """Raises a `ValueError` if the name of a file could not be kept in a table."""
        for file in self.files:
            if not _is_unicode(str(file)):
                raise ValueError(f"The name of the file {str(file)!a} must be UTF-8: rename it.")


def read_volume_folders(
    root: str | Path,
    modalities: Mapping[str, str],
    masks: Sequence[str] = (),
    brain: str | None = None,
    splits: str | Path | None = None,
    mask_above: float = 0.0,
) -> list[Subject]:
    """
    Finds one subject per folder: `root/SUBJECT/...`. Folders that hold none of the modalities are no subjects; a
    warning names those that are empty or hold other images.

    Args:
        modalities: Name to glob pattern inside the subject's folder, e.g. `{"flair": "{subject}_flair.nii.gz"}`;
            `{subject}` is the folder's name. A pattern must match one file.
        masks: Patterns of the lesion masks, one per annotator. None: the data set is unlabelled.
        brain: Pattern of the brain mask.
        splits: Folder (relative to `root`) with `train.csv`, `validation.csv` (or `val.csv`), `test.csv`, whose column
            `subject` or `Subject_ID` (ANDi's), or else first column, lists the subjects; `scans_train.csv` (ANDi's) is
            a name too. Every subject must be in one of them.
        mask_above: Value in the files of the masks above which a voxel is marked.
    """
    root, modalities, masks = require_folder(root), as_modalities(modalities), as_texts("masks", masks)
    brain = None if brain is None else as_text("brain", brain)
    there = folders_in(root)
    folders = _folders_with(root, there, modalities)
    _tell_other_folders(root, sorted(set(there) - set(folders)), modalities)
    leave_out("files", _images_in(root), "an image must be in the folder of its subject")
    names = {folder.name for folder in folders}
    split_of = {} if splits is None else _read_splits(root / as_text("splits", splits), names)
    subjects = [
        Subject(
            folder.name,
            volume={name: _file_or_missing(folder, pattern) for name, pattern in modalities.items()},
            masks=tuple(_file_or_missing(folder, pattern) for pattern in masks),
            brain=_file_or_missing(folder, brain) if brain is not None else None,
            split=split_of.get(folder.name),
            mask_above=mask_above,
        )
        for folder in folders
    ]
    _check_patterns(subjects)
    return subjects


def read_image_folders(
    root: str | Path, healthy: Sequence[str], groups: str | Path | None = None, group_column: str = "group"
) -> list[Subject]:
    """
    Finds labelled pictures: `root/SPLIT/CLASS/*` if the first level is called train (or training), validation (or val)
    and test (or testing), else `root/CLASS/*`. Every picture is a subject, named by its path without the suffix.

    Args:
        healthy: Classes that are healthy; the others are anomalous. Each must be there.
        groups: CSV file (relative to `root`) with a column `file`, relative to `root`, and the column `group_column`:
            pictures of one group (a patient, copies of one slice) stay in one split. Every picture must be listed.
    """
    root, healthy = require_folder(root), as_texts("healthy", healthy)
    if not healthy:
        raise ValueError("`healthy` must name at least one class, got none.")
    tops = _split_folders(root)
    classes = [(split, folder) for split, top in tops for folder in folders_in(top)]
    check_healthy(healthy, (folder.name for _, folder in classes), f"the classes in {root}")

    pictures = {
        path.relative_to(root): (split, path)
        for split, folder in classes
        for path in sorted(folder.iterdir())
        if path.name.lower().endswith(IMAGE_SUFFIXES) and not path.name.startswith(".")
    }
    places = {
        root,
        *(top for _, top in tops),
        *(below for _, folder in classes for below in (folder, *folders_below(folder))),
    }
    others = [
        file
        for place in sorted(places)
        for file in _images_in(place)
        if Path(place, file).relative_to(root) not in pictures
    ]
    leave_out("files", others, f"a picture ({', '.join(IMAGE_SUFFIXES)}) must be in the folder of its class")
    group_of = _read_groups(root, groups, "file", group_column, [file.as_posix() for file in pictures])
    subjects: dict[str, Subject] = {}
    for file, (split, path) in pictures.items():
        name, label = file.with_suffix("").as_posix(), 0 if path.parent.name in healthy else 1
        if name in subjects:
            raise ValueError(f"Two pictures have the name {name}: {subjects[name].volume} and {path}.")
        subjects[name] = Subject(name, path, label=label, split=split, group=group_of.get(file.as_posix(), ""))
    if not subjects:
        raise ValueError(
            f"There is no picture ({', '.join(IMAGE_SUFFIXES)}) in the classes of {root}: {list_names(root)}."
        )
    return [subjects[name] for name in sorted(subjects)]


def read_annotated_folders(
    root: str | Path,
    modalities: Mapping[str, str],
    annotations: Sequence[str],
    label_threshold: float = 0.5,
    label_max: float = 255.0,
    split_folders: bool = True,
    groups: str | Path | None = None,
    group_column: str = "group",
) -> list[Subject]:
    """
    Finds one case per folder, at any depth: the image, in a file per channel, and any number of annotations of it
    (CIMD's layout is `{training,testing}/K/image_{K+1}.jpg` with `label0_.jpg` to `label3_.jpg`). Every folder that
    holds a channel is a case, named by its path.

    A case may have fewer annotations than others, or none, which a warning names; one that marks nothing is an
    annotation.

    Args:
        modalities: Channel to glob pattern inside the case's folder, each of one file: `{"image": "image_*"}`.
        annotations: Glob patterns inside the case's folder, each of any number of files: `["label*"]`. Each must
            match in some case.
        label_threshold: What is marked: above this share of `label_max`. JPEG leaves small values around every edge,
            so that 0.0, the rule of CIMD's authors, marks half as much again.
        label_max: Value of a marked pixel: 255 in pictures of 8 bits, 1 in files that hold 0 and 1.
        split_folders: Whether folders of the first level called train (or training), validation (or val) and test (or
            testing) are the splits. `False`: no case has a split.
        groups: CSV file (relative to `root`) with a column `case`, relative to `root`, and the column `group_column`:
            cases of one group (a patient) stay in one split. Every case must be listed.
    """
    root, modalities = require_folder(root), as_modalities(modalities)
    annotations = as_texts("annotations", annotations)
    if not annotations:
        raise ValueError("`annotations` must name at least one pattern, got none.")
    check_number("label_threshold", label_threshold, least=0, below=1)
    check_number("label_max", label_max, above=0)
    tops = _split_folders(root) if split_folders else [(None, root)]
    split_of = {folder: split for split, top in tops for folder in (top, *folders_below(top))}
    cases = {folder.relative_to(root).as_posix(): folder for folder in _folders_with(root, split_of, modalities)}
    group_of = _read_groups(root, groups, "case", group_column, cases)
    subjects = []
    for name, folder in sorted(cases.items()):
        volume = {channel: _file_or_missing(folder, pattern, name) for channel, pattern in modalities.items()}
        found = {path for pattern in annotations for path in match_files(folder, pattern)} - set(volume.values())
        subjects.append(
            Subject(
                name,
                volume=volume,
                masks=tuple(sorted(found)),
                split=split_of[folder],
                group=group_of.get(name, ""),
                mask_above=label_threshold * label_max,
                mask_max=label_max,
            )
        )
    _check_patterns(subjects)
    for pattern in annotations:
        if not any(match_files(folder, pattern) for folder in cases.values()):
            raise ValueError(f"`annotations`: no case in {root} holds a file {pattern}.")
    without = [subject.name for subject in subjects if not subject.masks]
    if without:
        warnings.warn(f"There is no annotation of {len(without)} cases: {list_some(without)}.", stacklevel=2)
    return subjects


def read_split_tables(
    root: str | Path,
    modality: str,
    splits: Mapping[str, Sequence[str]],
    available: str | None = None,
) -> list[Subject]:
    """
    Finds the volumes that CSV tables list, in the layout of the authors of pDDPM, cDDPM and SADM: `root/splits/*.csv`,
    and the volumes where the tables say, `root/Train/ixi/t1/IXI076-Guys-0753_t1.nii.gz`; with all of it in
    `root/Data`, too.

    The columns are `img_name`, `img_path`, `mask_path`, and where the authors have them `label` and `seg_path`; the
    paths begin with "/" and mean `root` (or `root/Data`). A subject is called `img_name` without modality and suffix;
    `seg_path` is the mask, marked above 0. A table names the T1 file: for another modality, folders called t1 and the
    t1 in the file's name are replaced below `root`, never in `root` itself. What the tables get wrong is repaired with
    a warning that names it: a scan that is listed twice is taken once, and one in several splits stays in the last of
    train, validation and test, so that nothing is tested that was learnt from. A path that leads out of `root` is an
    error.

    Args:
        modality: `"t1"`, or what takes its place in the names of folders and files, such as `"t2"`.
        splits: Split to its tables, with or without `.csv`. `Brats21_val[10:]` is the rows from the eleventh on,
            `Brats21_val[:10]` those before.
        available: Table, `avail_t2`, whose column `0` lists the scans of IXI that have the modality, by `img_name`; of
            tables called `IXI_...` the others are left out.
    """
    root, modality = require_folder(root), as_text("modality", modality)
    root = root / "Data" if (root / "Data" / "splits").is_dir() else root
    unknown = [name for name in splits if name not in SPLITS]
    if unknown or not splits:
        raise ValueError(f"`splits` must name {', '.join(SPLITS)}, got {', '.join(unknown) or 'none'}.")
    if any(isinstance(tables, str) for tables in splits.values()):
        raise ValueError(f"`splits` must hold lists of tables, got {splits}.")
    splits = {split: as_texts("splits", tables) for split, tables in splits.items()}
    kept = None
    if available is not None:
        rows = _read_table(root, as_text("available", available), ("0",))
        kept = {_scan_name(row["0"], modality) for row in rows}

    subjects: dict[str, Subject] = {}
    twice, moved = [], []
    for split in (name for name in SPLITS if name in splits):
        for table in splits[split]:
            for row in _read_table(root, table, ("img_name", "img_path", "mask_path")):
                name = _scan_name(row["img_name"], modality)
                if kept is not None and table.startswith("IXI_") and name not in kept:
                    continue
                if name in subjects:
                    (twice if subjects[name].split == split else moved).append(name)
                subject = _subject_of_row(root, table, row, modality, split)
                if name in subjects and subjects[name].label != subject.label:
                    raise ValueError(f"The table {table} gives {name} another label than an earlier row: correct one.")
                subjects[name] = subject
    if not subjects:
        raise ValueError(f"`splits`: the tables in {root / 'splits'} list no subject.")
    for names, problem in (
        (twice, "listed more than once, and taken once"),
        (moved, "in several splits, and taken for the last of train, validation and test only"),
    ):
        if names:
            warnings.warn(f"{len(set(names))} scans are {problem}: {', '.join(sorted(set(names)))}.", stacklevel=2)
    return [subjects[name] for name in sorted(subjects)]


def _subject_of_row(root: Path, table: str, row: Mapping[str, str], modality: str, split: str) -> Subject:
    label, segmentation = (row.get(key) or "" for key in ("label", "seg_path"))
    if label not in ("", "0", "1", "0.0", "1.0"):
        raise ValueError(f"The table {table} must have labels 0 or 1, got {label!r} of {row['img_name']}.")
    for column in ("img_path", "mask_path", *(("seg_path",) if segmentation else ())):
        check_name(f"a file in `{column}` of the table {table}, row {row['img_name']},", row[column].lstrip("/"))
    return Subject(
        _scan_name(row["img_name"], modality),
        volume={modality: root / _in_modality(row["img_path"], modality)},
        masks=(root / segmentation.lstrip("/"),) if segmentation else (),
        brain=root / row["mask_path"].lstrip("/"),
        label=int(float(label)) if label else None,
        split=split,
    )


def _images_in(folder: Path) -> list[str]:
    """Returns the names in a folder that look like images, whether a reader takes them or not."""
    names = sorted(path.name for path in folder.iterdir() if not path.is_dir())
    return [name for name in names if name.lower().endswith(SCAN_SUFFIXES) and not name.startswith(".")]


def _is_unicode(text: str) -> bool:
    # Python keeps bytes of a file's name that are no UTF-8 as surrogates.
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _files_of(sources: Iterable[Path | StoredVolume]) -> list[Path]:
    return [file for one in sources for file in (one.files if isinstance(one, StoredVolume) else [Path(one)])]


def _split_folders(root: Path) -> list[tuple[str | None, Path]]:
    """Returns the folders of the first level with the splits that they are called after; or the root without split."""
    first_level = folders_in(root)
    if not any(folder.name in SPLIT_NAMES for folder in first_level):
        return [(None, root)]
    others = [folder.name for folder in first_level if folder.name not in SPLIT_NAMES]
    if others:
        raise ValueError(
            f"{root} mixes splits with other folders: {', '.join(others)}. The first level must be splits"
            f" ({', '.join(SPLIT_NAMES)}), or none of them."
        )
    return [(SPLIT_NAMES[folder.name], folder) for folder in first_level]


def _file_or_missing(folder: Path, pattern: str, name: str = "") -> Path | Missing:
    found = match_files(folder, pattern)
    if len(found) == 1:
        return found[0]
    what = ", ".join(path.name for path in found) if found else f"none; the folder holds {list_names(folder)}"
    return Missing(f"Subject {name or folder.name}: the pattern {pattern!r} must match one file, it matches {what}.")


def _folders_with(root: Path, folders: Iterable[Path], modalities: Mapping[str, str]) -> list[Path]:
    """Returns the folders that hold any of the modalities; raises if none does."""
    patterns = modalities.values()
    found = [folder for folder in folders if any(match_files(folder, pattern) for pattern in patterns)]
    if not found:
        raise ValueError(f"No folder in {root} holds a file {', '.join(patterns)}; there are {list_names(root)}.")
    return found


def _tell_other_folders(root: Path, folders: Iterable[Path], modalities: Mapping[str, str]) -> None:
    """Warns of folders that are no subjects, if they are empty or hold images: they may have been meant to be."""
    others = []
    for folder in folders:
        if not any(folder.iterdir()):
            others.append(f"{folder.name} (empty)")
        elif any(_images_in(below) for below in (folder, *folders_below(folder))):
            others.append(folder.name)
    if others:
        wanted = ", ".join(modalities.values())
        message = f"{len(others)} folders in {root} hold no file {wanted}, and are no subjects: {list_some(others)}."
        warnings.warn(message, stacklevel=3)


def _check_patterns(subjects: Sequence[Subject]) -> None:
    """Raises if every subject lacks a file: then the patterns are wrong, and not a subject."""
    files = ((*subject.volume.values(), *subject.masks, subject.brain) for subject in subjects)
    missing = [next((file for file in own if isinstance(file, Missing)), None) for own in files]
    if all(missing):
        raise ValueError(missing[0].reason)


def _read_splits(folder: Path, names: set[str]) -> dict[str, str]:
    files = find_files(folder, "*.csv")
    if not files:
        raise ValueError(f"`splits`: there is no CSV file in {folder}.")
    split_of: dict[str, str] = {}
    for path in files:
        split = SPLIT_NAMES.get(path.stem.rpartition("_")[2])
        if split is None:
            raise ValueError(f"`splits`: {path} must be named after a split: {', '.join(SPLIT_NAMES)}.")
        rows = read_rows(path, "splits")
        column = 0
        named = [column for column in ("subject", "Subject_ID") if rows and column in rows[0]]
        if named or (rows and rows[0][0] not in names):  # a header, perhaps with another word for it
            header = rows.pop(0)
            column = header.index(named[0]) if named else 0
            if not named:
                message = f"{path}: the first row, {header[0]!r}, is no subject, and is taken for the header."
                warnings.warn(message, stacklevel=3)
        for row in rows:
            name = row[column] if column < len(row) else ""
            if name not in names:
                raise ValueError(f"{path} lists the subject {name!r}, which has no folder with the modalities.")
            if split_of.setdefault(name, split) != split:
                raise ValueError(f"Subject {name} is in two splits: {split_of[name]} and {split}.")
    missing = sorted(names - set(split_of))
    if missing:
        raise ValueError(
            f"No file in {folder} lists {', '.join(missing[:10])} ({len(missing)} of {len(names)} subjects)."
        )
    return split_of


def _read_groups(root: Path, groups: str | Path | None, key: str, column: str, names: Iterable[str]) -> dict[str, str]:
    """Reads the groups of all `names`; without a table there are none."""
    if groups is None:
        return {}
    path, column = root / as_text("groups", groups), as_text("group_column", column)
    group_of: dict[str, str] = {}
    for row in read_table(path, (key, column), "groups"):
        if group_of.setdefault(row[key], row[column]) != row[column]:
            raise ValueError(f"{path} lists {row[key]} in two groups: {group_of[row[key]]} and {row[column]}.")
    names = set(names)
    for name in sorted(names):
        if name not in group_of:
            raise ValueError(f"{path} does not list {name} in its column `{key}`.")
        if not group_of[name]:
            raise ValueError(f"{path} gives {name} no group in its column `{column}`.")
    leave_out("rows", sorted(set(group_of) - names), f"{path} lists them, and they are not in {root}")
    return group_of


def _read_table(root: Path, table: str, columns: Sequence[str]) -> list[dict[str, str]]:
    name, rows = re.fullmatch(r"(.*?)(?:\[(\d*:\d*)\])?", table, re.DOTALL).groups()
    check_name("a table in `splits`", name)
    path = root / "splits" / f"{name.removesuffix('.csv')}.csv"
    if not path.is_file():
        there = list_names(path.parent) if path.parent.is_dir() else "no such folder"
        raise FileNotFoundError(f"There is no table {path}: {there}.")
    listed = read_table(path, columns, "splits")
    if rows:
        listed = listed[slice(*(int(end) if end else None for end in rows.split(":")))]
    if not listed:
        raise ValueError(f"`splits`: the rows of {table} list no subject.")
    return listed


def _in_modality(path: str, modality: str) -> str:
    """Returns a path of a table, which names T1, in another modality: replaces t1 in folders and the file's name."""
    *folders, name = path.lstrip("/").split("/")
    folders = [modality if folder == "t1" else folder for folder in folders]
    return "/".join([*folders, _T1_WORD.sub(modality, name)])


def _scan_name(name: str, modality: str) -> str:
    """Returns `img_name` without suffix and modality: what scans of one examination share."""
    stem = re.sub(r"\.nii(\.gz)?$", "", name.rpartition("/")[2])
    return re.sub(rf"_(t1|{re.escape(modality)})$", "", stem)
