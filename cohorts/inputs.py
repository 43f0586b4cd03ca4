"""Finds the scans that a command names: by files and folders, patterns, tables of subjects, or a list in standard
input. No torch here."""

from __future__ import annotations

import glob
import hashlib
import os
import sys
import unicodedata
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

from tqdm.auto import tqdm

from ..files import check_name, read_json, read_text, sha256
from ..volumes.dicom import list_source_files, split_choice
from ..volumes.results import is_whole, result_files
from ..volumes.scans import ALIASES, Scan, find_modality, find_scans, name_modality
from ..volumes.volume import StoredVolume
from .options import PredictOptions


_SUBJECT, _BRAIN, _ATLAS = "subject", "brain", "atlas"
_NONE = ("", "n/a")


@dataclass
class Inputs:
    """What a command names: `paths` of files and folders, `tables`, and what is neither, with the reason."""

    paths: list[str] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    failed: list[tuple[str, str]] = field(default_factory=list)


@dataclass
class Table:
    """Holds a table of subjects: `modalities`, as its columns call them, and `rows`, `(line, cells by column)`."""

    path: Path
    modalities: list[str]
    rows: list[tuple[int, dict[str, str]]]


def read_inputs(arguments: list[str]) -> Inputs:
    """
    Resolves what a command names.

    Args:
        arguments: Paths; patterns with `*`, `?` or `[`, `**` for any folders; tables, `NAME.tsv` ([`read_table`]); and
            `-` for paths in standard input, one per line, each taken as it stands. What exists by a name with such
            characters is no pattern. Files that earlier results wrote are no scans: a pattern leaves them out, as a
            folder does, and others that are named are listed.

    Raises:
        ValueError: A table is wrong, or standard input is named twice.
    """
    if arguments.count("-") > 1:
        raise ValueError("`-`, the list in standard input, can be named once.")
    inputs, results = Inputs(), {}
    for argument in arguments:
        if argument == "-":
            lines = os.fsdecode(sys.stdin.buffer.read()).split("\n")
            listed = [line.removesuffix("\r") for line in lines if line.strip()]
            if not listed:
                inputs.failed.append(("-", "standard input holds no path: write one per line."))
        elif glob.has_magic(argument) and not os.path.lexists(argument):
            listed = [path for path in sorted(glob.glob(argument, recursive=True)) if not _is_result(path, results)]
            if not listed:
                inputs.failed.append((argument, "no file or folder has a name of this pattern."))
        else:
            listed = [argument]
        for path in dict.fromkeys(listed):
            if path.lower().endswith(".tsv"):
                inputs.tables.append(read_table(path))
            elif _is_result(path, results):
                inputs.failed.append(
                    (path, "an earlier result wrote it, so that it is no scan; copy it if it is one.")
                )
            else:
                inputs.paths.append(path)
    return inputs


def read_table(path: str | os.PathLike) -> Table:
    """
    Reads a table of subjects: tab-separated, UTF-8, with the columns `subject`, one for each modality (any spelling of
    `ALIASES`, or the checkpoint's own name), and `brain` and `atlas`, where there are any.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: A column or subject is there twice, a row has other cells than the first line, or a name of a
            subject is none that a folder can have; the message names file and line.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}.")
    lines = read_text(path).split("\n")
    header = [name.strip() for name in lines[0].split("\t")]
    if _SUBJECT not in header or "" in header:
        raise ValueError(
            f"{path}, line 1: a table of scans must have the column `{_SUBJECT}` and one for each modality, separated by"
            f" tabs, got {', '.join(header)!r}."
        )
    keys = [_key(name) for name in header]
    twice = [name for name, key in zip(header, keys, strict=True) if keys.count(key) > 1]
    if twice:
        raise ValueError(f"{path}, line 1: the columns {', '.join(twice)} mean the same: keep one of them.")
    rows, subjects = [], {}
    for number, line in enumerate(lines[1:], 2):
        if not line.strip():
            continue
        cells = [cell.strip() for cell in line.split("\t")]
        if len(cells) != len(header):
            raise ValueError(f"{path}, line {number}: it has {len(cells)} cells, and the first line {len(header)}.")
        row = dict(zip(header, cells, strict=True))
        subject = "" if row[_SUBJECT] in _NONE else row[_SUBJECT]
        check_name(f"the subject in {path}, line {number},", subject)
        first = subjects.setdefault(_folded(row[_SUBJECT]), number)
        if first != number:
            raise ValueError(
                f"{path}, line {number}: the subject {row[_SUBJECT]} is in line {first} already; results of both would go"
                " into one folder."
            )
        rows.append((number, row))
    if not rows:
        raise ValueError(f"{path} has no row below its first line.")
    return Table(path, [name for name in header if name not in (_SUBJECT, _BRAIN, _ATLAS)], rows)


def find_input_modality(inputs: Inputs, options: PredictOptions) -> str | None:
    """Finds the modality that the names of scans and the columns of tables say, as
    [`~volumes.scans.find_modality`]."""
    said = {}
    for table in inputs.tables:
        for name in table.modalities:
            said.setdefault(_key(name), f"{table.path}, column {name}")
    if inputs.paths or not said:
        said.setdefault(
            find_modality(inputs.paths, options.brain, options.output, atlas=beside(options.atlas)), "files"
        )
    if len(said) > 1:
        names = " and ".join(f"{modality or 'unknown'} ({place})" for modality, place in said.items())
        raise ValueError(
            f"The scans are of several modalities: {names}. Say by `--modality` which are meant, or name a model by"
            " `--model`."
        )
    modality = next(iter(said))
    return modality if modality in {line[0] for line in ALIASES} else None


def list_scans(
    inputs: Inputs,
    options: PredictOptions,
    modalities: list[str],
    records: tuple[str, ...],
    optional: Collection[str] = (),
) -> tuple[list[Scan], list[tuple[str, str]], list[Scan]]:
    """
    Lists the scans of a command, or of its part (`options.shard`).

    The parts are made of all scans in the order of their names, so that they are the same in whatever order scans are
    named, and however many are finished: part i of n takes the scans i, i + n, i + 2 n, ...; the first part also says
    what is no scan.

    Args:
        modalities: Of the checkpoint, in its order.
        records: Of a whole result.
        optional: Modalities that a scan may lack, if it has others.

    Returns:
        scans to predict; what is not taken, with the reason; and scans that are left out, as their results are there.
    """
    scans, failed = find_scans(
        inputs.paths, modalities, options.brain, options.output, atlas=beside(options.atlas), optional=optional
    )
    failed = [*inputs.failed, *failed]
    for table in inputs.tables:
        more, reasons = _table_scans(table, modalities, options, optional)
        scans += more
        failed += reasons
    places: dict[str, Scan] = {}
    for scan in scans:
        other = places.setdefault(_folded(scan.name), scan)
        if other is not scan:
            raise ValueError(
                f"{other.source} and {scan.source} would be written into the same folder, {scan.name}: name one of them"
                " differently, or predict them separately."
            )
    if options.atlas is not None and beside(options.atlas) is None:
        scans = [replace(scan, atlas=scan.atlas or Path(options.atlas)) for scan in scans]
    number, count = options.part()
    if count > 1:
        scans = sorted(scans, key=lambda scan: scan.name)[number - 1 :: count]
        failed = failed if number == 1 else []
    if not options.skip_existing:
        return scans, failed, []
    missing, finished = [], []
    for scan in tqdm(scans, desc="earlier results", leave=False, disable=len(scans) < 2):
        folder = Path(options.output) / scan.name
        reason = why_another(folder / "result.json", scan)
        if reason is not None:
            failed.append((str(scan.source), reason))
        else:
            (finished if is_whole(folder, records) else missing).append(scan)
    return missing, failed, finished


def why_another(record: Path, scan: Scan) -> str | None:
    """Returns why the result with this record may not count as that of a scan: it was made of other images. `None` if it
    was made of these, there is none, or it does not say so, as of earlier versions.

    Contents are compared, not paths: a data set may be moved, a scan may be named by its file or its folder, and one
    path, from another working directory, may be another patient."""
    try:
        made_of = set(read_json(record)["settings"]["inputs"])
    except (OSError, ValueError, TypeError, KeyError):  # there is none, or it is not ours
        return None
    try:
        images = set(hash_files(scan.images()).values())
    except (OSError, ValueError) as error:
        return f"{record} is there, and whether it is of this scan cannot be told: {error}"
    if images == made_of:
        return None
    return (
        f"{record} is of other images (by SHA-256): of another scan of this name, or of this one before its files"
        " changed. Choose another folder for the results, or replace it by `--overwrite` instead of `--skip_existing`."
    )


def hash_files(images: Iterable) -> dict[str, str]:
    """Returns the SHA-256 of images, as a [`~volumes.scans.Scan`] has them, by their paths; of several files, as of a
    DICOM series, that of their digests in the order of names."""
    digests = {}
    for image in images:
        files = image.files if isinstance(image, StoredVolume) else list_source_files(image)
        several = "".join(map(sha256, files)).encode()
        # Names of slices are not kept: they may be made of what is known about a patient.
        digests[str(image)] = hashlib.sha256(several).hexdigest() if len(files) > 1 else sha256(files[0])
    return digests


def beside(atlas: str | None) -> str | None:
    """Returns the name of the atlas that lies beside each scan; `None` if there is none, or one for all scans, which
    has a folder in front."""
    return atlas if atlas is not None and os.path.basename(atlas) == atlas else None


def _table_scans(
    table: Table, modalities: list[str], options: PredictOptions, optional: Collection[str]
) -> tuple[list[Scan], list]:
    """Returns the scans of a table, and the subjects that lack a file, with the reason."""
    known = {line[0] for line in ALIASES}
    wanted, columns = {_key(name): name for name in modalities}, {_key(name): name for name in table.modalities}
    if len(wanted) == len(columns) == 1 and not wanted.keys() & known:
        columns = {next(iter(wanted)): next(iter(columns.values()))}  # a checkpoint for any contrast
    unknown = [name for key, name in columns.items() if key not in known and key not in wanted]
    missing = [name for key, name in wanted.items() if key not in columns and name not in optional]
    if unknown or missing:
        problem = (
            f"has no column for {', '.join(missing)}" if missing else f"has unknown columns, {', '.join(unknown)}"
        )
        raise ValueError(
            f"{table.path}, line 1: the table {problem}. Its columns must be `{_SUBJECT}`, one for each of"
            f" {', '.join(modalities)}, if wanted other modalities, `{_BRAIN}` and `{_ATLAS}`, got"
            f" {', '.join(table.rows[0][1])}."
        )
    scans, failed, folder = [], [], table.path.parent
    for number, row in table.rows:
        source = f"{table.path}, line {number}"
        given = {name: row[columns[key]] for key, name in wanted.items() if key in columns}
        files = {name: folder / cell for name, cell in given.items() if cell not in _NONE}
        empty = [
            columns.get(key, name)
            for key, name in wanted.items()
            if name not in files and not (files and name in optional)
        ]
        if empty:
            failed.append((source, f"{row[_SUBJECT]} has no file for {', '.join(empty)}."))
            continue
        others = {}
        for name, beside_name in ((_BRAIN, options.brain), (_ATLAS, beside(options.atlas))):
            if row.get(name, "") not in _NONE:
                others[name] = folder / row[name]
            elif name not in row and beside_name is not None:
                others[name] = next(iter(files.values())).parent / beside_name
        absent = [str(path) for path in (*files.values(), *others.values()) if not split_choice(path)[0].exists()]
        if absent:
            failed.append((source, f"{row[_SUBJECT]}: there is no file {', '.join(absent)}."))
            continue
        volume = files if len(modalities) > 1 else next(iter(files.values()))
        scans.append(Scan(row[_SUBJECT], volume, others.get(_BRAIN), Path(source), others.get(_ATLAS)))
    return scans, failed


def _is_result(path: str, results: dict[Path, set[str]]) -> bool:
    """Tells whether an earlier result wrote a file; `results` holds the files of folders that were looked into."""
    folder, name = Path(path).parent, os.path.basename(path)
    if folder not in results:
        results[folder] = result_files(folder)
    return name in results[folder]


def _key(column: str) -> str:
    """Returns what a column means: a modality by its first spelling, or its own name, in any case."""
    try:
        return name_modality(column)
    except ValueError:
        return column.casefold()


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()
