"""What readers share: folders, files by pattern, tables, and how a subject is kept whose files are missing."""

from __future__ import annotations

import csv
import glob
import io
import itertools
import os
import re
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ...files import read_text
from ...volumes.dicom import holds_dicom
from ...volumes.volume import IMAGE_SUFFIXES, VOLUME_SUFFIXES, InputVolume, StoredVolume, check_fetched
from ..layout import SPLITS


SPLIT_NAMES = {name: name for name in SPLITS} | {"val": "validation", "training": "train", "testing": "test"}

# What looks like an image, whether a reader takes it or not.
SCAN_SUFFIXES = (*VOLUME_SUFFIXES, *IMAGE_SUFFIXES, ".tif", ".tiff", ".bmp", ".gif", ".webp", ".dcm", ".npz", ".npy")

_TOKEN = re.compile(r"\{(\w+)\}|(\*\*/)|(\*)|(\?)")
_DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs"}


class LeftOut(UserWarning):
    """Says what of a raw data set is in no subject: `what` and the `reason`. [`prepare_recipe`] lists it."""

    def __init__(self, what: str, reason: str):
        super().__init__(f"Left out {what}: {reason}")
        self.what, self.reason = what, reason


@dataclass(frozen=True)
class Missing(StoredVolume):
    """Stands for a file that is missing or not unique: its subject is listed as unreadable, with the reason."""

    reason: str
    files: tuple[Path, ...] = ()

    def read(self) -> InputVolume:
        raise ValueError(self.reason)


def require_folder(root: str | Path) -> Path:
    """Returns the folder of a data set as a path; raises a `NotADirectoryError` if it is none."""
    root = Path(root)
    if not root.is_dir():
        raise NotADirectoryError(f"`root` must be a folder, and {root} is none.")
    return root


def as_text(option: str, value) -> str:
    """Returns a value of a recipe as the text that it is compared with in files and names: 0 is "0". YAML turns words
    like `no` into a truth value, which says no more what was written: those are a `ValueError`."""
    if isinstance(value, bool):
        raise ValueError(
            f"`{option}` must be text, got {str(value).lower()}, which YAML makes of unquoted true, false, yes, no, on"
            ' and off: write it in quotes as it stands in the data set, such as "no".'
        )
    if value is None or isinstance(value, (Mapping, list, tuple, set)):
        raise ValueError(f"`{option}` must be text, got {value!r}.")
    return str(value)


def as_texts(option: str, value: Sequence) -> tuple[str, ...]:
    """Returns a list of a recipe as texts ([`as_text`]); raises a `ValueError` if it is no list."""
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"`{option}` must be a list, got {value!r}.")
    return tuple(as_text(option, one) for one in value)


def as_text_map(option: str, value: Mapping | None) -> dict[str, str]:
    """Returns a block of a recipe with keys and values as texts ([`as_text`]); `None` is an empty one."""
    if not isinstance(value, (Mapping, type(None))):
        raise ValueError(f"`{option}` must hold `key: value` pairs, got {value!r}.")
    return {as_text(option, key): as_text(option, one) for key, one in (value or {}).items()}


def as_modalities(modalities: Mapping) -> dict[str, str]:
    """Returns the patterns of the modalities as texts; raises a `ValueError` if there are none."""
    if not modalities:
        raise ValueError("`modalities` must name at least one modality and its pattern, got none.")
    return as_text_map("modalities", modalities)


def check_healthy(healthy: Collection[str], found: Iterable[str], where: str) -> None:
    """Raises a `ValueError` if a value of the option `healthy` does not occur among those that are `found`, or one
    that occurs could be meant by it and is written otherwise: either would make healthy subjects anomalous."""
    values = set(found)
    listed = list_some(sorted(values)) or "none"
    unknown = [value for value in healthy if value not in values]
    if unknown:
        raise ValueError(f"`healthy` names {', '.join(unknown)}; {where} are {listed}.")
    alike = {_alike(value): value for value in healthy}
    for value in sorted(values - set(healthy)):
        if _alike(value) in alike:
            raise ValueError(
                f"`healthy` names {alike[_alike(value)]}, and {where} are {listed}: {value} is written otherwise. Name"
                " both, or correct the data set."
            )


def _alike(value: str) -> str | float:
    try:
        return float(value)
    except ValueError:
        return value.strip().casefold()


def list_some(names: Iterable, most: int = 10) -> str:
    """Returns the first names in a text, and how many more there are."""
    names = list(names)
    return ", ".join(map(str, names[:most])) + (f" and {len(names) - most} more" if len(names) > most else "")


def leave_out(what: str, names: Collection, reason: str) -> None:
    """Warns that files or rows are in no subject, if there are any."""
    if names:
        warnings.warn(LeftOut(f"{len(names)} {what}", f"{reason}: {list_some(names)}."), stacklevel=3)


def folders_in(path: Path) -> list[Path]:
    """Returns the folders in a folder, sorted, without hidden ones; a link to a folder that is not there is an
    error."""
    entries = sorted(entry for entry in path.iterdir() if not entry.name.startswith("."))
    for entry in entries:
        dead = entry.is_symlink() and not entry.exists()
        if dead and not entry.suffix and "/annex/objects/" not in os.path.realpath(entry):
            check_fetched(entry)
    return [entry for entry in entries if entry.is_dir()]


def folders_below(path: Path) -> Iterator[Path]:
    """Yields the folders in a folder at every depth, without hidden ones, and without links to a folder above."""
    yield from _folders_below(path, (os.path.realpath(path),))


def _folders_below(path: Path, above: tuple[str, ...]) -> Iterator[Path]:
    for folder in folders_in(path):
        real = os.path.realpath(folder)
        if real not in above:
            yield folder
            yield from _folders_below(folder, (*above, real))


def list_names(folder: Path) -> str:
    """Returns the first names in a folder, for a message."""
    return list_some(sorted(path.name for path in folder.iterdir())) or "no files"


def find_files(folder: Path, pattern: str) -> list[Path]:
    """Returns what matches a glob pattern in a folder, sorted, but for hidden names. Links are followed; one whose
    target is not there counts as the file that it should be, which [`check_fetched`] reports."""
    start, deep, rest = pattern.partition("**/")
    if not deep:
        found = (folder / name for name in glob.glob(pattern, root_dir=folder))
        return sorted(path for path in found if not path.name.startswith("."))  # macOS puts `._NAME` beside a file
    tops = find_files(folder, start) if start else [folder]
    folders = {below for top in tops if top.is_dir() for below in (top, *folders_below(top))}
    return sorted({path for below in folders for path in find_files(below, rest)})


def match_files(folder: Path, pattern: str) -> list[Path]:
    """Returns what matches a glob pattern, in which `{subject}` is the folder's name ([`find_files`])."""
    return find_files(folder, pattern.replace("{subject}", glob.escape(folder.name)))


def match_fields(root: Path, pattern: str, **known: str) -> list[tuple[dict[str, str], Path]]:
    """Returns the files below `root` that match a glob pattern with fields, sorted, with the fields' values: `{name}`
    is a part of one name in the path, and the same wherever it stands; of those that are `known` it is the value.
    Folders match if they hold DICOM, hidden files and folders do not."""
    expression, wildcard, end, seen = "", "", 0, set()
    for token in _TOKEN.finditer(pattern):
        literal = pattern[end : token.start()]
        expression, wildcard, end = expression + re.escape(literal), wildcard + glob.escape(literal), token.end()
        name, folders, star, _ = token.groups()
        if name in known:
            expression, wildcard = expression + re.escape(known[name]), wildcard + glob.escape(known[name])
            continue
        if name is not None:
            expression += f"(?P={name})" if name in seen else f"(?P<{name}>[^/]+?)"
            seen.add(name)
        else:
            expression += "(?:[^/]+/)*" if folders else "[^/]*" if star else "[^/]"
        wildcard += token.group() if name is None else "*"
    expression, wildcard = expression + re.escape(pattern[end:]), wildcard + glob.escape(pattern[end:])
    found = []
    for path in find_files(root, wildcard):
        relative = path.relative_to(root)
        match = re.fullmatch(expression, relative.as_posix())
        if (
            match
            and not (path.is_dir() and not holds_dicom(path))
            and not any(part.startswith(".") for part in relative.parts)
        ):
            found.append((match.groupdict(), path))
    return found


def fields_of(pattern: str) -> set[str]:
    """Returns the names in braces of a pattern."""
    return {token.group(1) for token in _TOKEN.finditer(pattern) if token.group(1)}


def read_rows(path: Path, option: str) -> list[list[str]]:
    """Reads the rows of a table as text, without empty ones and without blanks around the cells: `.csv`, `.tsv`, or
    the first sheet of an `.xls` file. `option` is what messages call it."""
    if not os.path.lexists(path):
        raise FileNotFoundError(f"`{option}`: there is no file {path}.")
    check_fetched(path)
    suffix = path.suffix.lower()
    if suffix == ".xls":
        rows = _read_sheet(path, option)
    elif suffix in (".xlsx", ".ods"):
        raise ValueError(f"`{option}`: {path} is a spreadsheet, which is not read: save it as CSV and name that file.")
    else:
        delimiter = "\t" if suffix == ".tsv" else ","
        try:
            rows = list(csv.reader(io.StringIO(read_text(path), newline=""), delimiter=delimiter))
        except csv.Error as error:
            raise ValueError(f"`{option}`: {path} cannot be read as a table: {error}.") from error
        other = next((mark for mark in _DELIMITERS if rows and len(rows[0]) == 1 and mark in rows[0][0]), None)
        if other is not None:
            raise ValueError(
                f"`{option}`: {path} is divided by {_DELIMITERS[other]}, and must be by {_DELIMITERS[delimiter]}: save"
                " it so (`.csv` by commas, `.tsv` by tabs)."
            )
    return [row for row in ([cell.strip() for cell in row] for row in rows) if any(row)]


def read_table(path: Path, columns: Sequence[str], option: str) -> list[dict[str, str]]:
    """Reads the rows of a table, which must have the `columns`, by the names of its columns ([`read_rows`])."""
    header, *rows = read_rows(path, option) or [[]]
    missing = [name for name in columns if name not in header]
    if missing:
        raise ValueError(f"{path} has no column {', '.join(missing)}; it has {', '.join(header) or 'none'}.")
    twice = sorted({name for name in header if name and header.count(name) > 1})
    if twice:
        raise ValueError(f"{path} has several columns {', '.join(twice)}: rename or delete all but one.")
    for number, row in enumerate(rows, 1):
        if any(row[len(header) :]):
            raise ValueError(
                f"{path}, row {number} below the header, has {len(row)} cells, and the table {len(header)} columns:"
                f" {list_some(row)}. Put text that holds the delimiter in quotes."
            )
    # Rows may be shorter than the header.
    return [dict(itertools.zip_longest(header, row[: len(header)], fillvalue="")) for row in rows]


def _read_sheet(path: Path, option: str) -> list[list[str]]:
    try:
        import xlrd
    except ImportError as error:
        raise ImportError(
            f"`{option}`: reading {path.name} needs xlrd: `pip install anodiff[preprocess]`; or save it as CSV and"
            " name that file."
        ) from error
    try:
        sheet = xlrd.open_workbook(path).sheet_by_index(0)
    except (xlrd.XLRDError, xlrd.compdoc.CompDocError) as error:
        raise ValueError(f"`{option}`: {path} cannot be read as a spreadsheet: {error}.") from error
    return [list(map(str, sheet.row_values(row))) for row in range(sheet.nrows)]
