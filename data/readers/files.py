"""Finds the subjects of data sets whose layout is described by file names: by patterns with fields, and BIDS. What
`subjects.py` says of readers holds here too."""

from __future__ import annotations

import math
import os
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from ...checks import check_choice
from ..layout import SPLITS
from .listing import (
    SPLIT_NAMES,
    Missing,
    as_modalities,
    as_text,
    as_text_map,
    as_texts,
    check_healthy,
    fields_of,
    folders_in,
    leave_out,
    list_names,
    list_some,
    match_fields,
    match_files,
    read_table,
    require_folder,
)
from .subjects import Subject


MISSING_MASKS = ("error", "healthy", "unknown")

_UNKNOWN = ("", "n/a")  # as BIDS writes it
_NOT_GIVEN = ("n/a", "na", "n.a.", "nan", "none", "null")  # what people write, without case


def read_file_patterns(
    root: str | Path,
    modalities: Mapping[str, str],
    masks: Sequence[str] = (),
    brain: str | None = None,
    name: str = "{subject}",
    group: str | None = None,
    splits: Mapping[str, str] | None = None,
    label: int | None = None,
    healthy: Sequence[str] = (),
    missing_masks: str = "error",
    mask_above: float = 0.0,
    ages: str | Path | None = None,
    ages_key: str = "{subject}",
    ages_columns: Sequence[str] = ("subject", "age"),
) -> list[Subject]:
    """
    Finds subjects by file names that say what belongs together: `IXI-T1/IXI{id}-{site}-{scan}-T1.nii.gz`. A field in
    braces is a part of one name; files with equal fields are one subject. `*`, `?` and `**/` mean what they do in the
    shell.

    The field `site` is kept with the subject, `split` is its split, `class` its class; others are free. A pattern of
    masks that no subject has a file of is an error; masks of no subject are left out, with a warning.

    Args:
        modalities: Name to pattern below `root`; all with the same fields.
        masks: Patterns of the lesion masks, one per annotator, with fields of the modalities. None: unlabelled.
        brain: Pattern of the brain mask, likewise.
        name: Of a subject, made of the fields; unique.
        group: What no split may divide, made of the fields (`"{subject}"` of several sessions); `name` by default.
        splits: Values of the field `split` to `"train"`, `"validation"` or `"test"`; subjects with other values are
            left out. By default the value is train (or training), validation (or val) or test (or testing).
        label: Of every subject: 0 in a healthy set.
        healthy: Values of the field `class` that are healthy; the others are anomalous. Each must occur.
        missing_masks: What a subject without any mask is: `"error"` unreadable, `"healthy"`, or `"unknown"`.
        mask_above: Value in the files of the masks above which a voxel is marked.
        ages: Table (`.csv`, `.tsv` or `.xls`, relative to `root`) of ages in years.
        ages_key: What it names a subject by, made of the fields; zeros in front do not matter.
        ages_columns: Its columns with the key and the age.
    """
    root, modalities, masks = require_folder(root), as_modalities(modalities), as_texts("masks", masks)
    healthy, splits = as_texts("healthy", healthy), splits and as_text_map("splits", splits)
    _check_labels(missing_masks, label, healthy)
    made = {"name": name, "group": group, "ages_key": ages_key if ages else None, "brain": brain}
    fields = _check_fields(modalities, splits, healthy, **made, masks=" ".join(masks))
    patterns = {*modalities.values(), *masks, *([brain] if brain else [])}
    files = {pattern: _by_fields(root, pattern) for pattern in patterns}
    keys = sorted({key for pattern in modalities.values() for key in files[pattern]})
    if not keys:
        raise ValueError(f"No file in {root} is {', '.join(modalities.values())}; there are {list_names(root)}.")
    check_healthy(healthy, {dict(key).get("class") for key in keys} - {None}, f"the classes in {root}")
    for pattern in (*masks, *([brain] if brain else [])):
        _check_masks(pattern, files[pattern], keys, root)
    split_of = _splits_of_keys(root, keys, splits) if "split" in fields else dict.fromkeys(keys)
    age_of = {} if ages is None else _read_ages(root / as_text("ages", ages), ages_columns)
    subjects: dict[str, Subject] = {}
    for key, split in split_of.items():
        values = dict(key)
        full_name = _fill(name, values)
        if full_name in subjects:
            raise ValueError(
                f"Two subjects are called {full_name}: {subjects[full_name].volume} and {values}. Put more fields into"
                f" `name` ({', '.join(sorted(fields))})."
            )

        def find(pattern, values=values, full_name=full_name):
            wanted = tuple(sorted((field, values[field]) for field in fields_of(pattern)))
            return _one(files[pattern].get(wanted, []), root, _fill(pattern, values), full_name)

        found, own_label = _masks_and_label([find(pattern) for pattern in masks], missing_masks, label)
        subjects[full_name] = Subject(
            full_name,
            volume={modality: find(pattern) for modality, pattern in modalities.items()},
            masks=found,
            brain=None if brain is None else find(brain),
            label=int(values["class"] not in healthy) if healthy else own_label,
            split=split,
            group=_fill(group or name, values),
            mask_above=mask_above,
            age=age_of.get(_plain(_fill(ages_key, values))),
            site=values.get("site"),
        )
    _tell_missing_masks(subjects.values(), masks, missing_masks)
    _tell_missing_ages(subjects.values(), ages)
    return [subjects[full_name] for full_name in sorted(subjects)]


def read_bids(
    root: str | Path,
    modalities: Mapping[str, str],
    masks: Sequence[str] = (),
    brain: str | None = None,
    label_column: str | None = None,
    healthy: Sequence[str] = (),
    missing_masks: str = "error",
    mask_above: float = 0.0,
) -> list[Subject]:
    """
    Finds the subjects of a BIDS tree: `root/sub-*/[ses-*/]anat/*`. Every session is a subject, `sub-01_ses-2`; those
    of one participant are one group.

    A pattern is relative to the folder of the session, `anat/*_T1w.nii.gz`. What is not there is looked for in the
    same place of every `derivatives/PIPELINE`: masks and brain masks, mostly. `participants.tsv` gives labels, and
    ages and sites where it has columns called so.

    Args:
        modalities: Name to pattern. Sessions with none of them are no subjects, which a warning names.
        masks: Patterns of the lesion masks, one per annotator. None: unlabelled.
        brain: Pattern of the brain mask.
        label_column: Column of `participants.tsv` that tells healthy from ill; `n/a` is unknown.
        healthy: Its values that are healthy; the others are anomalous. Each must occur.
        missing_masks, mask_above: As in [`read_file_patterns`].
    """
    root, modalities, masks = require_folder(root), as_modalities(modalities), as_texts("masks", masks)
    healthy = as_texts("healthy", healthy)
    label_column = None if label_column is None else as_text("label_column", label_column)
    brain = None if brain is None else as_text("brain", brain)
    _check_labels(missing_masks, None, healthy)
    if bool(label_column) != bool(healthy):
        raise ValueError("`label_column` and `healthy` belong together: a column and its values that are healthy.")
    participants, table = {}, root / "participants.tsv"
    if label_column is not None or os.path.lexists(table):
        participants = _read_participants(table, label_column, healthy)
    pipelines = folders_in(root / "derivatives") if (root / "derivatives").is_dir() else []
    sessions = list(_sessions(root))
    subjects, empty, used = [], [], set()
    for participant, session in sessions:
        name = "_".join(session.relative_to(root).parts)

        def find(pattern, session=session, name=name):
            places = [pipeline / session.relative_to(root) for pipeline in pipelines]
            beside = sorted(path for place in places for path in match_files(place, pattern))
            found = match_files(session, pattern) or beside
            used.update([pattern] if found else [])
            return _one(found, root, (session.relative_to(root) / pattern).as_posix(), name)

        volume = {modality: find(pattern) for modality, pattern in modalities.items()}
        if all(isinstance(file, Missing) and not file.files for file in volume.values()):
            empty.append(name)
            continue
        if label_column is not None and participant not in participants:
            raise ValueError(f"{table} does not list {participant}.")
        label, age, site = participants.get(participant, (None, None, None))
        found, label = _masks_and_label([find(pattern) for pattern in masks], missing_masks, label)
        known = {"label": label, "group": participant, "mask_above": mask_above, "age": age, "site": site}
        subjects.append(Subject(name, volume, found, None if brain is None else find(brain), **known))
    wanted = ", ".join(modalities.values())
    if not subjects:
        raise ValueError(f"No session in {root} (sub-*/[ses-*/]) holds a file {wanted}; there are {list_names(root)}.")
    for pattern in (*masks, *([brain] if brain else [])):
        if pattern not in used:
            raise ValueError(f"No session in {root}, or beside it in derivatives, holds the mask {pattern}.")
    if empty:
        message = f"{len(empty)} sessions hold no file {wanted}, and are no subjects: {list_some(empty)}."
        warnings.warn(message, stacklevel=2)
    absent = sorted(participants.keys() - {participant for participant, _ in sessions})
    leave_out("participants", absent, f"{table} lists them, and {root} has no folder of them")
    _tell_missing_masks(subjects, masks, missing_masks)
    return subjects


def _splits_of_keys(root: Path, keys: list[tuple], splits: Mapping[str, str] | None) -> dict[tuple, str]:
    """Returns the split of every key of fields that is in one; raises if none is, or a split is unknown."""
    names = SPLIT_NAMES if splits is None else splits
    there = sorted({dict(key)["split"] for key in keys})
    unknown = [name for name in there if name not in names]
    if unknown and splits is None:
        raise ValueError(
            f"The split {unknown[0]!r} in {root} is none of {', '.join(SPLIT_NAMES)}: say in `splits` what it is."
        )
    if len(unknown) == len(there):
        raise ValueError(f"`splits` names none of the splits in {root}: {', '.join(there)}.")
    absent = [name for name in names if name not in there]
    if unknown and splits is not None and absent:
        raise ValueError(
            f"`splits` names {', '.join(absent)}; the splits in {root} are {', '.join(there)}. Leave out of `splits`"
            " what is not there."
        )
    if unknown:
        left = sum(dict(key)["split"] in unknown for key in keys)
        message = f"{left} subjects are left out, whose splits `splits` does not name: {', '.join(unknown)}."
        warnings.warn(message, stacklevel=3)
    return {key: names[dict(key)["split"]] for key in keys if dict(key)["split"] in names}


def _sessions(root: Path) -> Iterator[tuple[str, Path]]:
    """Yields the participants and folders of all sessions; what has none, or scans beside them, is one itself."""
    for participant in (folder for folder in folders_in(root) if folder.name.startswith("sub-")):
        sessions = [folder for folder in folders_in(participant) if folder.name.startswith("ses-")]
        beside = [participant] if not sessions or (participant / "anat").is_dir() else []
        yield from ((participant.name, session) for session in (*beside, *sessions))


def _check_fields(
    modalities: Mapping[str, str], splits: Mapping[str, str] | None, healthy: Sequence[str], **made: str | None
) -> set[str]:
    """Returns the fields of the modalities; checks the options `made` of them."""
    fields = fields_of(next(iter(modalities.values())))
    listed = ", ".join(sorted(fields)) or "none"
    for modality, pattern in modalities.items():
        if fields_of(pattern) != fields:
            raise ValueError(f"`modalities` must all have the same fields ({listed}), got {pattern!r} of {modality}.")
    for option, text in made.items():
        unknown = sorted(fields_of("" if text is None else as_text(option, text)) - fields)
        if unknown:
            raise ValueError(
                f"`{option}` has the field {', '.join(unknown)}; the fields of `modalities` are {listed}."
            )
    for option, given, field in (("splits", splits, "split"), ("healthy", healthy, "class")):
        if given and field not in fields:
            raise ValueError(f"`{option}` needs the field {{{field}}} in the patterns of `modalities`.")
    wrong = sorted(set((splits or {}).values()) - set(SPLITS))
    if wrong:
        raise ValueError(f"`splits` must lead to {', '.join(SPLITS)}, got {', '.join(map(str, wrong))}.")
    return fields


def _check_labels(missing_masks: str, label: int | None, healthy: Sequence[str]) -> None:
    check_choice("missing_masks", missing_masks, MISSING_MASKS)
    if label is not None and healthy:
        raise ValueError("`label` and `healthy` both say what is healthy: give one.")


def _masks_and_label(masks: list, missing_masks: str, label: int | None) -> tuple[tuple, int | None]:
    """Returns the masks that a subject has, and its label."""
    absent = [mask for mask in masks if isinstance(mask, Missing) and not mask.files]
    if not masks or missing_masks == "error" or not absent:
        return tuple(masks), label
    there = tuple(mask for mask in masks if mask not in absent)
    return there, 0 if missing_masks == "healthy" and not there and label is None else label


def _by_fields(root: Path, pattern: str) -> dict[tuple, list[Path]]:
    found: dict[tuple, list[Path]] = {}
    for values, path in match_fields(root, pattern):
        found.setdefault(tuple(sorted(values.items())), []).append(path)
    return found


def _one(found: Sequence[Path], root: Path, pattern: str, subject: str) -> Path | Missing:
    if len(found) == 1:
        return found[0]
    if not found:
        return Missing(f"Subject {subject}: there is no file {root / pattern}.")
    names = ", ".join(path.relative_to(root).as_posix() for path in found)
    return Missing(f"Subject {subject}: one file must be {pattern}, there are {names}.", tuple(found))


def _check_masks(pattern: str, files: Mapping[tuple, list[Path]], keys: Iterable[tuple], root: Path) -> None:
    """Raises if no subject has a file of a mask's pattern: all of them would be healthy, or unreadable. Tells which
    files belong to no subject."""
    fields = fields_of(pattern)
    of_subjects = {tuple((field, value) for field, value in key if field in fields) for key in keys}
    orphans = [path.relative_to(root).as_posix() for key in files if key not in of_subjects for path in files[key]]
    if not files.keys() & of_subjects:
        found = f"; {list_some(orphans)} belong to none" if orphans else ""
        raise ValueError(f"No file in {root} is the mask {pattern} of a subject{found}.")
    leave_out("masks", orphans, "there is no image of the same fields")


def _tell_missing_masks(subjects: Iterable[Subject], masks: Sequence[str], missing_masks: str) -> None:
    without = [subject.name for subject in subjects if len(subject.masks) < len(masks)]
    if without:
        few = "a mask is missing" if len(masks) > 1 else "there is no mask"
        message = f"{few} of {len(without)} subjects (`missing_masks: {missing_masks}`): {list_some(without)}."
        warnings.warn(message[0].upper() + message[1:], stacklevel=3)


def _tell_missing_ages(subjects: Iterable[Subject], table: str | Path | None) -> None:
    without = [subject.name for subject in subjects if subject.age is None]
    if table is not None and without:
        warnings.warn(f"{table} gives no age of {len(without)} subjects: {list_some(without)}.", stacklevel=3)


def _fill(pattern: str, values: Mapping[str, str]) -> str:
    return re.sub(r"\{(\w+)\}", lambda field: values.get(field[1], field[0]), pattern)


def _read_participants(path: Path, label_column: str | None, healthy: Sequence[str]) -> dict[str, tuple]:
    """Reads label, age and site of every participant."""
    columns = ["participant_id", *([label_column] if label_column else [])]
    row_of: dict[str, dict[str, str]] = {}
    for row in read_table(path, columns, "label_column"):
        participant = "sub-" + row["participant_id"].removeprefix("sub-")
        if row_of.setdefault(participant, row) != row:
            raise ValueError(f"{path} has several rows of {participant}, which differ: keep the right one.")
    label_of: dict[str, int | None] = dict.fromkeys(row_of)
    if label_column is not None:
        said = {name: row[label_column] for name, row in row_of.items() if row[label_column] not in _UNKNOWN}
        check_healthy(healthy, said.values(), f"the values of `{label_column}` in {path}")
        unclear = sorted({text for text in said.values() if text.casefold() in _NOT_GIVEN} - set(healthy))
        if unclear:
            raise ValueError(f"{path}: `{label_column}` holds {', '.join(unclear)}: write n/a where it is not known.")
        label_of |= {name: 0 if text in healthy else 1 for name, text in said.items()}
    age_of = _numbers(path, {name: row.get("age", "") for name, row in row_of.items()})
    sites = {name: row.get("site", "") for name, row in row_of.items()}
    return {name: (label_of[name], age_of[name], None if sites[name] in _UNKNOWN else sites[name]) for name in row_of}


def _read_ages(path: Path, columns: Sequence[str]) -> dict[str, float | None]:
    columns = as_texts("ages_columns", columns)
    if len(columns) != 2:
        raise ValueError(f"`ages_columns` must be two columns, that of the key and that of the age, got {columns!r}.")
    age_of: dict[str, str] = {}
    different = set()
    for row in read_table(path, columns, "ages"):
        key, age = _plain(row[columns[0]]), row[columns[1]]
        if _number(age_of.setdefault(key, age)) != _number(age):
            different.add(key)
    if different:
        warnings.warn(
            f"{path} lists different ages, which are left out, of {list_some(sorted(different))}.", stacklevel=3
        )
    return _numbers(path, {key: "" if key in different else age for key, age in age_of.items()})


def _numbers(path: Path, ages: Mapping[str, str]) -> dict[str, float | None]:
    odd = [f"{age} ({key})" for key, age in ages.items() if _number(age) is None and age not in _UNKNOWN]
    if odd:
        warnings.warn(f"{path}: ages that are no numbers are left out: {list_some(odd)}.", stacklevel=4)
    return {key: _number(age) for key, age in ages.items()}


def _plain(key: str) -> str:
    # Spreadsheets keep 002 as the number 2, and xlrd gives it as 2.0.
    return key.strip().removesuffix(".0").lstrip("0")


def _number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None
