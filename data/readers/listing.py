"""What readers share: folders, files by pattern, tables, and how a subject is kept whose files are missing."""

from __future__ import annotations

import csv
import glob
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ...volumes.volume import InputVolume, StoredVolume
from ..layout import SPLITS


SPLIT_NAMES = {name: name for name in SPLITS} | {"val": "validation", "training": "train", "testing": "test"}

_TOKEN = re.compile(r"\{(\w+)\}|(\*\*/)|(\*)|(\?)")


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


def require_list(name: str, value: Sequence[str]) -> None:
    """Raises a `ValueError` if an option is a text instead of a list of texts."""
    if isinstance(value, str):
        raise ValueError(f"`{name}` must be a list, got {value!r}.")


def require_modalities(modalities: Mapping) -> None:
    """Raises a `ValueError` if there are no modalities."""
    if not modalities:
        raise ValueError("`modalities` must name at least one modality and its pattern, got none.")


def folders_in(path: Path) -> list[Path]:
    """Returns the folders in a folder, sorted, without hidden ones."""
    return sorted(folder for folder in path.iterdir() if folder.is_dir() and not folder.name.startswith("."))


def folders_below(path: Path) -> Iterator[Path]:
    """Yields the folders in a folder at every depth, without hidden ones."""
    for folder in folders_in(path):
        yield folder
        yield from folders_below(folder)


def list_names(folder: Path) -> str:
    """Returns the first names in a folder, for a message."""
    names = sorted(path.name for path in folder.iterdir())
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "") if names else "no files"


def match_files(folder: Path, pattern: str) -> list[Path]:
    """Returns the files that match a glob pattern, in which `{subject}` is the folder's name, but for hidden ones."""
    found = folder.glob(pattern.replace("{subject}", glob.escape(folder.name)))
    return sorted(path for path in found if not path.name.startswith("."))  # macOS puts `._NAME` beside a file


def match_fields(root: Path, pattern: str) -> list[tuple[dict[str, str], Path]]:
    """Returns the files below `root` that match a glob pattern with fields, sorted, with the fields' values: `{name}`
    is a part of one name in the path, and the same wherever it stands. Hidden files and folders do not match."""
    expression, wildcard, end, seen = "", "", 0, set()
    for token in _TOKEN.finditer(pattern):
        literal = pattern[end : token.start()]
        expression, wildcard, end = expression + re.escape(literal), wildcard + glob.escape(literal), token.end()
        name, folders, star, _ = token.groups()
        if name is not None:
            expression += f"(?P={name})" if name in seen else f"(?P<{name}>[^/]+?)"
            seen.add(name)
        else:
            expression += "(?:[^/]+/)*" if folders else "[^/]*" if star else "[^/]"
        wildcard += token.group() if name is None else "*"
    expression, wildcard = expression + re.escape(pattern[end:]), wildcard + glob.escape(pattern[end:])
    found = []
    for path in sorted(root.glob(wildcard)):
        relative = path.relative_to(root)
        match = re.fullmatch(expression, relative.as_posix())
        if match and path.is_file() and not any(part.startswith(".") for part in relative.parts):
            found.append((match.groupdict(), path))
    return found


def fields_of(pattern: str) -> set[str]:
    """Returns the names in braces of a pattern."""
    return {token.group(1) for token in _TOKEN.finditer(pattern) if token.group(1)}


def read_table(path: Path, columns: Sequence[str], option: str) -> list[dict[str, str]]:
    """Reads the rows of a table, which must have the `columns`, as text: `.csv`, `.tsv`, or the first sheet of an
    `.xls` file. `option` is what messages call it."""
    if not path.is_file():
        raise FileNotFoundError(f"`{option}`: there is no file {path}.")
    if path.suffix.lower() == ".xls":
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
        header, *rows = [list(map(str, sheet.row_values(row))) for row in range(sheet.nrows)] or [[]]
    else:
        with open(path, newline="", encoding="utf-8-sig") as file:
            header, *rows = list(csv.reader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",")) or [[]]
    missing = [name for name in columns if name not in header]
    if missing:
        raise ValueError(f"{path} has no column {', '.join(missing)}; it has {', '.join(header) or 'none'}.")
    # Rows may be shorter than the header.
    return [dict(itertools.zip_longest(header, row[: len(header)], fillvalue="")) for row in rows if any(row)]
