"""Says which files a result is made of, and which files of a folder earlier results wrote. No torch here.

A result is some arrays, a picture, and a record, which names them and is written last: where it is, the result is
whole. Nothing but what a record names is replaced or removed."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from ..files import read_json, replacing, write_json


# What an array of a result is, which decides how it becomes a picture: raw scores >= 0 in 16 bits, whose factor goes
# into the record; a share in [0, 1] in 16 bits, 65535 is 1; a mask in 8 bits, 255 is 1; or an image in the input's
# units.
SCORES, SHARE, MASK, IMAGE = "scores", "share", "mask", "image"
# Of calibrated pipelines only.
CALIBRATED_ARRAYS = {"probability_map": SHARE, "healthy_rank_map": SHARE}
MAP_ARRAYS = {
    "anomaly_map": SCORES,
    "pred_mask": MASK,
    "reconstruction": IMAGE,
    "brain_mask": MASK,
    **CALIBRATED_ARRAYS,
}
ENSEMBLE_ARRAYS = {
    "member_masks": MASK,
    "member_maps": SHARE,
    "mean_map": SHARE,
    "std_map": SHARE,
    "probability_map": SHARE,
    "agreement": SHARE,
    "majority_mask": MASK,
}
DISPERSION_ARRAYS = {"member_maps": SCORES, "mean_map": SCORES, "dispersion": SCORES}

# What is written for a scan in DICOM, too: masks as segmentations, maps as parametric maps.
DICOM_FILES = {
    "pred_mask": "pred_mask_seg.dcm",
    "majority_mask": "majority_mask_seg.dcm",
    "anomaly_map": "anomaly_map_pm.dcm",
    "probability_map": "probability_map_pm.dcm",
}
DICOM_STEMS = {name.partition(".")[0] for name in DICOM_FILES.values()}

# Record to the name of the picture beside it.
PICTURES = {"result": "overview", "dispersion": "dispersion"}
_STEMS = {
    "result": {*MAP_ARRAYS, *ENSEMBLE_ARRAYS, *DICOM_STEMS, PICTURES["result"]},
    "dispersion": {*DISPERSION_ARRAYS, PICTURES["dispersion"]},
}
# Files of a result in a BIDS data set, whose record is named after the scan, too.
_DERIVATIVE = re.compile(r"sub-[^/]+_space-orig_[^/]+\.(nii\.gz|json)")
# Of a picture each member, and the reconstruction of each of several modalities, is a file of its own.
_FILE = re.compile(r"(reconstruction)_[^/]+\.png|(member_masks|member_maps)_\d+\.png|(\w+)\.(?:nii\.gz|png|dcm)")


@dataclass(frozen=True)
class Result:
    """Says where a result lies: its record, its folder, and the paths of its files by the names that `predict.py` gives
    them."""

    record: dict
    folder: Path
    files: dict[str, Path]


def read_result(folder: str | os.PathLike, record: str) -> Result:
    """Reads the record of a result in a folder, `"result"` or `"dispersion"`."""
    folder = Path(folder)
    values = read_json(folder / f"{record}.json")
    return Result(values, folder, {name: folder / name for name in values["files"]})


def result_files(folder: str | os.PathLike, records: Iterable[str] = tuple(PICTURES)) -> set[str]:
    """
    Returns the names of the files in a folder that earlier results wrote, by what their records say; also those of a
    result that was interrupted while it replaced another one.

    Args:
        folder (`str` or `os.PathLike`): It may be missing.
        records (iterable of `str`): Which results, `"result"` and `"dispersion"`, or the name of one in a BIDS data
            set.
    """
    folder, names = Path(folder), set()
    for record in records:
        for path in (folder / f"{record}.json", folder / _mark(record)):
            try:
                values = read_json(path)
            except (OSError, ValueError):  # there is none, or it is not ours
                continue
            if isinstance(values, dict) and isinstance(values.get("files"), list):
                files, stems = values["files"], _STEMS.get(record)
            elif isinstance(values, dict) and "settings" in values and {"pred_score", "num_members"} & set(values):
                # Of a version that did not name them, and made no brain mask and no calibrated maps.
                maps = {*MAP_ARRAYS} - {"brain_mask", *CALIBRATED_ARRAYS}
                arrays = DISPERSION_ARRAYS if record == "dispersion" else maps
                files = os.listdir(folder)
                stems = {PICTURES[record], *(ENSEMBLE_ARRAYS if "num_members" in values else arrays)}
            else:
                continue
            # A record that somebody else wrote must not name other files.
            files = [name for name in files if isinstance(name, str)]
            belong = _DERIVATIVE.fullmatch if stems is None else lambda name, stems=stems: _stem(name) in stems
            names |= {path.name, *filter(belong, files)}
    return names


def check_place(folder: str | os.PathLike, stems: Iterable[str], records: Iterable[str]) -> None:
    """Raises a `FileExistsError` if a folder holds files with the names of a result, records included, that no earlier
    result wrote. To be called before anything is computed."""
    folder = Path(folder)
    if not folder.is_dir():
        return
    stems, wanted = set(stems), {f"{record}.json" for record in records}
    ours = result_files(folder)
    _refuse(
        folder, (name for name in os.listdir(folder) if (name in wanted or _stem(name) in stems) and name not in ours)
    )


def is_whole(folder: str | os.PathLike, records: Iterable[str]) -> bool:
    """Returns whether a folder holds whole results: for each of these `records` its file, and all that it names."""
    folder = Path(folder)
    for record in records:
        try:
            files = read_json(folder / f"{record}.json")["files"]
            whole = all((folder / name).is_file() for name in files)
        except (OSError, ValueError, TypeError, KeyError):  # there is none, or it is not ours
            return False
        if not whole:
            return False
    return True


def remove_results(folder: str | os.PathLike) -> None:
    """Removes earlier results from a folder: their records first, then what these name, and nothing else."""
    folder = Path(folder)
    for record in PICTURES:
        names = result_files(folder, (record,))
        if names:
            write_json(folder / _mark(record), {"files": sorted(names)})
            (folder / f"{record}.json").unlink(missing_ok=True)
            for name in names - {_mark(record)}:
                (folder / name).unlink(missing_ok=True)
            (folder / _mark(record)).unlink()


def write_result(
    folder: str | os.PathLike, record: str, values: dict, writers: Mapping[str, Callable[[Path], object]]
) -> None:
    """
    Writes a result into a folder, made if missing, in place of an earlier one with the same record.

    All files are written beside their places first, then the earlier record is removed, then they take their places,
    the record last: an error or an interruption leaves the earlier result, or no record.

    Args:
        folder (`str` or `os.PathLike`): Where to.
        record (`str`): `"result"` or `"dispersion"`, or the name of one in a BIDS data set.
        values (`dict`): What the record holds, but for `files`.
        writers (mapping): Names of files to functions that write them to a path.

    Raises:
        FileExistsError: There is a file with the name of one of these that no earlier result wrote.
    """
    folder, name = Path(folder), f"{record}.json"
    folder.mkdir(parents=True, exist_ok=True)
    earlier, new = result_files(folder, (record,)), {name, *writers}
    _refuse(folder, (one for one in new - earlier if os.path.lexists(folder / one)))
    # The contexts end in reverse order: that of the record last.
    with ExitStack() as stack:
        write_json(stack.enter_context(replacing(folder / name)), {**values, "files": sorted(writers)})
        for file, write in writers.items():
            write(stack.enter_context(replacing(folder / file)))
        write_json(folder / _mark(record), {"files": sorted(earlier | new)})
        (folder / name).unlink(missing_ok=True)
        for stale in earlier - new - {_mark(record)}:
            (folder / stale).unlink(missing_ok=True)
    (folder / _mark(record)).unlink()


def _mark(record: str) -> str:
    return f".{record}.unfinished.json"


def _stem(name: str) -> str | None:
    match = _FILE.fullmatch(name)
    return match and match[match.lastindex]


def _refuse(folder: Path, names: Iterable[str]) -> None:
    names = sorted(names)
    if names:
        raise FileExistsError(
            f"{folder} holds {', '.join(names)}, which no earlier result wrote: nothing is replaced. Choose another"
            " folder for the results, or move that away."
        )
