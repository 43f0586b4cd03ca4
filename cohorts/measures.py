"""Measures masks: their volume and connected components, of a scan and of each region of an atlas."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence

import numpy as np
from scipy import ndimage

from ..files import read_text
from ..pipelines.output import AnomalyOutput, CIMDOutput
from ..volumes.results import Result, read_result
from ..volumes.volume import InputVolume, read_volume


# A float32 number holds whole numbers up to here.
_LARGEST_LABEL = 2**24


def measure_result(
    result: AnomalyOutput | CIMDOutput, labels: np.ndarray | None = None, names: dict[int, str] | None = None
) -> tuple[dict, list[dict]]:
    """
    Measures the result of a volume.

    Args:
        result ([`AnomalyOutput`] or [`CIMDOutput`]): What a pipeline has found; of an ensemble the majority counts.
        labels, names: As of [`measure_mask`].

    Returns:
        the columns of `cohort.tsv` that say what was found, and the rows of `regions.tsv`, none without a mask.
    """
    source = result.source
    if isinstance(result, AnomalyOutput):
        values, array = _scores(result.volume_score, result.pred_score, result.settings["threshold"]), result.pred_mask
    else:
        values, array = _scores(None, (), 0.5), result.majority_mask
    if array is None:
        return values, []
    # As the input came, to (X, Y, Z).
    array = (array.T if source.is_picture else array).reshape(source.shape)
    found, regions = measure_mask(dataclasses.replace(source, arrays={"": array}), labels, names)
    return values | found, regions


def measure_folder(
    folder: str | os.PathLike, labels: np.ndarray | None = None, names: dict[int, str] | None = None
) -> tuple[dict, list[dict]]:
    """Measures a result by the files that its `save` has written, as [`measure_result`] does."""
    return measure_saved(read_result(folder, "result"), labels, names)


def measure_saved(
    saved: Result, labels: np.ndarray | None = None, names: dict[int, str] | None = None
) -> tuple[dict, list[dict]]:
    """Measures a result by its files, wherever they are, as [`measure_result`] does."""
    record, mask = saved.record, _read_mask(saved)
    threshold = 0.5 if "num_members" in record else (record["settings"] or {}).get("threshold")
    values = _scores(record.get("volume_score"), record.get("pred_score") or (), threshold)
    if mask is None:
        return values, []
    found, regions = measure_mask(mask, labels, names)
    return values | found, regions


def _scores(volume_score: float | None, slice_scores: Sequence[float], threshold: float | None) -> dict:
    largest = float(max(slice_scores)) if len(slice_scores) else None
    return {"volume_score": volume_score, "max_slice_score": largest, "threshold": threshold}


def read_mask(folder: str | os.PathLike) -> InputVolume | None:
    """Returns the mask of a result, that of the majority of an ensemble; `None` if it has none."""
    return _read_mask(read_result(folder, "result"))


def _read_mask(saved: Result) -> InputVolume | None:
    masks = [path for name, path in saved.files.items() if name.split(".")[0] in ("pred_mask", "majority_mask")]
    return read_volume(masks[0]) if masks else None


def measure_mask(
    mask: InputVolume, labels: np.ndarray | None = None, names: dict[int, str] | None = None
) -> tuple[dict, list[dict]]:
    """
    Measures a mask.

    Args:
        mask ([`~volumes.volume.InputVolume`]): What is above 0 is marked.
        labels (`np.ndarray` of shape `(X, Y, Z)`, *optional*): As of [`read_atlas`].
        names (`dict[int, str]`, *optional*): Names of the labels.

    Returns:
        `marked_voxels`, `marked_ml`, `components` and `largest_component_ml`; and for each label that the atlas holds,
        0 outside of all regions included, `region`, `name`, `region_voxels`, `region_ml`, `marked_voxels`, `marked_ml`
        and `components`. Components are connected with corners (26 neighbours in 3-D, 8 in a picture); one that lies in
        several regions counts in each. Of a picture the volumes are `None`.
    """
    marked = next(iter(mask.arrays.values())) > 0
    unit = None if mask.is_picture else abs(float(np.linalg.det(mask.affine[:3, :3]))) / 1000

    def millilitres(voxels: int) -> float | None:
        return None if unit is None else voxels * unit

    # What is not marked need not be looked at.
    (box,) = ndimage.find_objects(marked.astype(np.uint8)) or [(slice(0, 0),) * 3]
    components, count = ndimage.label(marked[box], structure=np.ones((3, 3, 3)))
    sizes = np.bincount(components.ravel(), minlength=1)[1:]
    values = {
        "marked_voxels": int(sizes.sum()),
        "marked_ml": millilitres(int(sizes.sum())),
        "components": count,
        "largest_component_ml": millilitres(int(sizes.max(initial=0))),
    }
    if labels is None:
        return values, []
    voxels = np.bincount(labels.ravel())
    inside = components > 0
    pairs = np.unique(np.stack([labels[box][inside], components[inside]]), axis=1)
    marked_of = np.bincount(labels[box][inside], minlength=len(voxels))
    count_of = np.bincount(pairs[0], minlength=len(voxels))
    regions = [
        {
            "region": int(label),
            "name": (names or {}).get(int(label), "outside" if label == 0 else None),
            "region_voxels": int(voxels[label]),
            "region_ml": millilitres(int(voxels[label])),
            "marked_voxels": int(marked_of[label]),
            "marked_ml": millilitres(int(marked_of[label])),
            "components": int(count_of[label]),
        }
        for label in np.flatnonzero(voxels)
    ]
    return values, regions


def read_atlas(path: str | os.PathLike, like: InputVolume) -> np.ndarray:
    """
    Reads the labels of an atlas.

    Args:
        path (`str` or `os.PathLike`): Image with a whole number in each voxel, 0 outside of all regions.
        like ([`~volumes.volume.InputVolume`]): The scan, on whose grid it has to lie.

    Returns:
        `np.ndarray` of shape `(X, Y, Z)`, int32.

    Raises:
        ValueError: It lies on another grid, or holds other numbers.
    """
    atlas = read_volume(path)
    if atlas.shape != like.shape or not np.allclose(atlas.affine, like.affine, atol=1e-3):
        raise ValueError(
            f"The atlas {path} must lie on the grid of {like.name}: shape {like.shape}, got {atlas.shape}; affine"
            f" {like.affine.round(3).tolist()}, got {atlas.affine.round(3).tolist()}. Resample it to the scan, with"
            " nearest neighbours."
        )
    labels = next(iter(atlas.arrays.values()))
    if (
        len(atlas.arrays) > 1
        or labels.min() < 0
        or labels.max() >= _LARGEST_LABEL
        or (labels != np.rint(labels)).any()
    ):
        raise ValueError(
            f"The atlas {path} must hold one whole number from 0 to {_LARGEST_LABEL - 1} per voxel, got"
            f" {labels.min():g} to {labels.max():g} in {len(atlas.arrays)} channel(s)."
        )
    return labels.astype(np.int32)


def read_region_names(path: str | os.PathLike) -> dict[int, str]:
    """Reads the names of labels from a TSV file with the columns `index` and `name`, as BIDS has it; raises a
    `ValueError` that names the file and line if it is none, or names a label twice."""
    lines = [line.rstrip("\r").split("\t") for line in read_text(path).split("\n")]
    if not {"index", "name"} <= set(lines[0]):
        raise ValueError(
            f"{path}, line 1: names of regions must have the columns `index` and `name`, separated by tabs, got"
            f" {', '.join(lines[0])!r}."
        )
    names = {}
    for number, cells in enumerate(lines[1:], 2):
        if cells == [""]:
            continue
        row = dict(zip(lines[0], cells, strict=False))
        index = row["index"].strip()
        if len(cells) != len(lines[0]) or not index.isdecimal() or int(index) in names:
            raise ValueError(
                f"{path}, line {number}: each line must have {len(lines[0])} cells and an index of its own, a whole"
                f" number, got {cells}."
            )
        names[int(index)] = row["name"].strip()
    return names
