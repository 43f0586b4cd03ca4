"""Columns that a table of participants adds to `subjects.parquet`: sex, scanner, diagnosis, ..."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from pathlib import Path

from .layout import SUBJECTS_SCHEMA
from .readers.listing import as_text, as_texts, list_some, read_table
from .readers.subjects import Subject


_UNKNOWN = ("", "n/a")  # as BIDS writes it


def read_participants(
    root: Path, subjects: Sequence[Subject], *, table: str, columns: Sequence[str], key: str = "participant_id"
) -> dict[str, dict[str, float | str | None]]:
    """
    Reads values of the subjects from a table (`.tsv`, `.csv`) with a row for each of them or of their groups.

    Args:
        table: Its path below `root`.
        columns: Columns to take. One of numbers alone becomes numbers, any other texts; empty cells and `n/a` are not
            known.
        key: Column that names the subject or its group; `sub-` before either does not matter.

    Returns:
        `dict`: Name of every subject to its values, `None` where not known. A warning lists the subjects without a row.

    Raises:
        ValueError: A column is not there or is called like one that there is already, rows of one subject differ, or no
            row is of a subject.
    """
    path, columns, key = root / as_text("table", table), as_texts("columns", columns), as_text("key", key)
    taken = [name for name in columns if name in SUBJECTS_SCHEMA.names]
    if taken:
        raise ValueError(
            f"`columns` of `participants` must not be called like ours, got {', '.join(taken)}: rename them."
        )
    row_of: dict[str, tuple[str, ...]] = {}
    for row in read_table(path, [key, *columns], "participants"):
        name, cells = row[key].removeprefix("sub-"), tuple(row[column] for column in columns)
        if row_of.setdefault(name, cells) != cells:
            raise ValueError(f"{path} has several rows of {row[key]}, which differ: keep the right one.")
    found = {}
    for subject in subjects:
        names = [name.removeprefix("sub-") for name in (subject.name, subject.group)]
        found[subject.name] = next((row_of[name] for name in names if name in row_of), None)
    without = [name for name, cells in found.items() if cells is None]
    if len(without) == len(found):
        raise ValueError(
            f"{path} has no row of a subject; they are {list_some(without)}: check `key`, which is {key}."
        )
    if without:
        warnings.warn(f"{path} has no row of {len(without)} subjects: {list_some(without)}.", stacklevel=3)
    values: dict[str, dict] = {name: {} for name in found}
    for number, column in enumerate(columns):
        texts = {
            name: None if cells is None or cells[number] in _UNKNOWN else cells[number]
            for name, cells in found.items()
        }
        numbers = {name: None if text is None else _number(text) for name, text in texts.items()}
        plain = all(numbers[name] is not None for name, text in texts.items() if text is not None)
        for name, value in (numbers if plain else texts).items():
            values[name][column] = value
    return values


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None
