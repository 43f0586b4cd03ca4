"""The tables of a cohort, `cohort.tsv` and `regions.tsv`, which several commands may write at once. No torch here.

Both are tab-separated UTF-8 text with a first line of names, `n/a` where there is no value, and a `.json` beside them
that says what the columns are, as BIDS has it. Every row begins with the scan. Who writes holds the tables
([`hold_tables`]), reads them, puts its rows in place of those of the same scans, and replaces the file in one step: no
row of another process is lost, whichever comes last, and a reader finds whole tables at any time."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import filelock

from ..files import read_json, read_text, write_json, write_text
from ..volumes.results import is_whole


COHORT, REGIONS = "cohort.tsv", "regions.tsv"
_LOCK = ".cohort.lock"
DONE, SKIPPED, FAILED = "done", "skipped", "failed"

# Column to what `cohort.json` says of it.
COHORT_COLUMNS = {
    "scan": {"Description": "Name of the scan and of the folder of its result; n/a for a path that has none"},
    "source": {"Description": "The scan as it was named: a path, or the line of a table"},
    "status": {
        "Description": "What the last command for this scan did. The other columns describe the result in the folder,"
        " whichever command made it",
        "Levels": {
            DONE: "predicted",
            SKIPPED: "left out, as its result was there (--skip_existing)",
            FAILED: "not predicted; values are n/a unless an earlier result is still there",
        },
    },
    "reason": {"Description": "Why it failed"},
    "checkpoint": {"Description": "The checkpoint as it was named: a folder, an id of the Hub, or a shipped one"},
    "revision": {
        "Description": "Commit of the checkpoint on the Hub, or sha256: and the SHA-256 of its model_index.json, which"
        " holds those of all its files"
    },
    "volume_score": {"Description": "Score of the scan by the rule of the checkpoint", "Units": "arbitrary"},
    "max_slice_score": {"Description": "Largest score of a slice", "Units": "arbitrary"},
    "threshold": {"Description": "What is above it in the anomaly map is marked", "Units": "arbitrary"},
    "marked_voxels": {"Description": "Voxels (pixels of a picture) in the mask"},
    "marked_ml": {"Description": "Volume of the mask; n/a for a picture", "Units": "mL"},
    "components": {"Description": "Connected components of the mask; voxels are connected with corners"},
    "largest_component_ml": {"Description": "Volume of the largest component; n/a for a picture", "Units": "mL"},
    "atlas": {"Description": "Image of labels that regions.tsv is measured by"},
    "seconds": {
        "Description": "Time for reading, computing and writing, without waiting for other scans",
        "Units": "s",
    },
    "warnings": {"Description": "What was warned of, separated by |"},
}
REGION_COLUMNS = {
    "scan": {"Description": "Name of the scan, as in cohort.tsv"},
    "region": {"Description": "Label of the region in the atlas; 0 is outside of all regions"},
    "name": {"Description": "Name of the region"},
    "region_voxels": {"Description": "Voxels of the region"},
    "region_ml": {"Description": "Volume of the region; n/a for a picture", "Units": "mL"},
    "marked_voxels": {"Description": "Voxels of the mask in the region"},
    "marked_ml": {"Description": "Volume of the mask in the region; n/a for a picture", "Units": "mL"},
    "components": {
        "Description": "Connected components of the mask that reach into the region; one that lies in several counts"
        " in each"
    },
}


@contextmanager
def hold_tables(folder: str | os.PathLike) -> Iterator[None]:
    """Holds the tables of a folder, which is made if it is missing, for one process; others wait. The lock is the
    system's, and ends with the process, however it ends."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(folder / _LOCK):
        yield


def check_tables(folder: str | os.PathLike) -> None:
    """Raises a `FileExistsError` if a folder holds files with the names of the tables that this library did not write.
    To be called before anything is computed."""
    for name, columns in ((COHORT, COHORT_COLUMNS), (REGIONS, REGION_COLUMNS)):
        table = Path(folder) / name
        sidecar = table.with_suffix(".json")
        _read_lines(table, columns)
        if not table.exists() and os.path.lexists(sidecar) and not _is_sidecar(sidecar, columns):
            raise FileExistsError(
                f"{sidecar} is none of this command: nothing is replaced. Move it away, or choose another folder for the"
                " results."
            )


def read_rows(folder: str | os.PathLike) -> dict[str, dict[str, str | None]]:
    """Returns the rows of `cohort.tsv` in a folder, values as text by column, `None` for `n/a`, by their scans as
    [`cell`] writes them; none if there is no such file. Paths that are no scans are left out."""
    rows = {}
    for line in _read_lines(Path(folder) / COHORT, COHORT_COLUMNS):
        cells = [None if text == "n/a" else text for text in line.split("\t")]
        if cells[0] is not None:
            rows[cells[0]] = dict(zip(COHORT_COLUMNS, cells, strict=True))
    return rows


def write_rows(folder: str | os.PathLike, rows: Sequence[tuple[dict, Sequence[dict] | None]]) -> None:
    """
    Puts rows into the tables of a folder, in place of earlier rows of the same scans. The caller holds the tables.

    A scan that was skipped or has failed keeps the values that it has in the table, if its whole result is still there.
    One that has failed under the name of such a result, from another source, gets a row of its own, without a name.

    Args:
        folder (`str` or `os.PathLike`): Of the results, one folder per scan.
        rows (sequence of `(row, regions)`):
            Values by column, left out where there is none; and the rows of the regions without the scan, `None` to
            keep those of the table with the values.
    """
    folder, scans, others, regions_of = Path(folder), {}, {}, {}
    for line in _read_lines(folder / COHORT, COHORT_COLUMNS):
        scan, source, _ = line.split("\t", 2)
        if scan == "n/a":
            others[source] = line
        else:
            scans[scan] = line
    for row, regions in rows:
        name, source = row.get("scan"), cell(row["source"])
        key = cell(name)
        others.pop(source, None)  # it may have become a scan
        if name is None:
            others[source] = _line(row, COHORT_COLUMNS)
            continue
        if regions is None and key in scans and row["status"] != DONE and is_whole(folder / name, ("result",)):
            earlier = dict(zip(COHORT_COLUMNS, scans[key].split("\t"), strict=True))
            if row["status"] == FAILED and source != earlier["source"]:
                # The values are of the other source, and so is the name.
                others[source] = _line({name: row[name] for name in ("source", "status", "reason")}, COHORT_COLUMNS)
                continue
            row = earlier | {column: row.get(column) for column in ("source", "status", "reason")}
        else:
            regions_of[key] = regions or []
        scans[key] = _line(row, COHORT_COLUMNS)
    _write_lines(folder / COHORT, COHORT_COLUMNS, [scans[name] for name in sorted(scans)] + sorted(others.values()))
    lines = _read_lines(folder / REGIONS, REGION_COLUMNS)
    if not any(regions_of.values()) and not lines:
        return
    kept = [line for line in lines if line[: line.index("\t")] not in regions_of]
    new = [_line({"scan": name} | one, REGION_COLUMNS) for name, regions in regions_of.items() for one in regions]
    _write_lines(folder / REGIONS, REGION_COLUMNS, sorted(kept + new, key=lambda line: line[: line.index("\t")]))


def write_table(table: Path, columns: dict, rows: list[dict]) -> None:
    """Writes a table anew, in place of an earlier one of the same `columns`, with their descriptions beside it; raises a
    `FileExistsError` if another table is there."""
    _read_lines(table, columns)
    _write_lines(table, columns, sorted(_line(row, columns) for row in rows))


def _read_lines(table: Path, columns: dict) -> list[str]:
    """Returns the lines of a table below its first one, none if it is missing; raises a `FileExistsError` if it is none
    of this version."""
    if not os.path.lexists(table):
        return []
    first, *lines = (line.removesuffix("\r") for line in read_text(table).removesuffix("\n").split("\n"))
    if first.split("\t") != [*columns] or any(line.count("\t") != len(columns) - 1 for line in lines):
        raise FileExistsError(
            f"{table} is no table of this command, with the columns {', '.join(columns)}: nothing is replaced. Move it"
            " away, or choose another folder for the results."
        )
    return lines


def _write_lines(table: Path, columns: dict, lines: list[str]) -> None:
    write_text(table, "\n".join(["\t".join(columns), *lines, ""]))
    if not table.with_suffix(".json").exists():
        write_json(table.with_suffix(".json"), columns)


def _line(row: dict, columns: dict) -> str:
    return "\t".join(cell(row.get(column)) for column in columns)


def _is_sidecar(path: Path, columns: dict) -> bool:
    try:
        return read_json(path) == columns
    except (OSError, ValueError):
        return False


def cell(value) -> str:
    """Returns a value as a cell of a table: one line, and no quotation mark, which readers of tables would take for more
    than that; bytes of a path that are no UTF-8 as `\\udcff`."""
    if value is None or value == "":
        return "n/a"
    if isinstance(value, float):
        return f"{value:.9g}"
    text = str(value).encode("utf-8", "backslashreplace").decode("utf-8")
    return " ".join(text.split()).replace('"', "'")
