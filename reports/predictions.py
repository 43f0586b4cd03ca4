"""The report of predictions: reads the folders that `predict.py` has written, and the scans that they are of."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import nibabel as nib
import numpy as np
import PIL.Image
from tqdm.auto import tqdm

from ..pipelines.guarantee import describe_claims
from ..volumes.results import MASK, SCORES, SHARE, Result, read_result
from ..volumes.scans import Scan
from ..volumes.volume import InputVolume, check_whole, read_volume
from .page import Column, Layer, ScanView, Section, Table, write_report


# Array of a result to its name on the page, the kind of its layer, and how a picture of it is stored. Of several maps
# and masks, the first one has the threshold.
_MAPS = {
    "anomaly_map": ("Anomaly map", "map", SCORES),
    "probability_map": ("Probability", "probability", SHARE),
    "pred_mask": ("Mask", "mask", MASK),
    "majority_mask": ("Mask of the majority", "mask", MASK),
    "member_masks": ("Members", "members", MASK),
    "agreement": ("Agreement", "probability", SHARE),
    "std_map": ("Deviation of the members", "map", SHARE),
    "healthy_rank_map": ("Rank among healthy voxels", "probability", SHARE),
    "brain_mask": ("Brain", "mask", MASK),
}
_SPREAD = {
    "mean_map": ("Mean of the draws", "map", SCORES),
    "member_maps": ("Draws", "members", SCORES),
    "dispersion": ("Deviation of the draws", "map", SCORES),
}


def write_predictions(
    path: str | os.PathLike,
    scans: Sequence[Scan],
    failed: Sequence[tuple[str, str]],
    *,
    plane: str,
    model: str,
    results: Mapping[str, Result] | None = None,
) -> list[tuple[str, str]]:
    """
    Writes the report of the scans whose results lie beside it, those with the highest score first.

    Args:
        path (`str` or `os.PathLike`): The page, in the folder that holds a folder of results for each scan.
        scans (sequence of `Scan`): Those that have results.
        failed (sequence): What was not predicted, with the reason.
        plane (`str`): Of the slices that the checkpoint's processor makes.
        model (`str`): What the page calls the checkpoint.
        results (mapping, *optional*): The result of each scan by its name, where that is in no folder of this name.

    Returns:
        list: Scans that could not be read any more, with the reason; the page names them.
    """
    path, unread = Path(path), []
    results = results or {scan.name: read_result(path.parent / scan.name, "result") for scan in scans}
    scores = {name: result.record.get("volume_score") for name, result in results.items()}
    settings = [result.record["settings"] or {} for result in results.values()]
    common = {
        name: value
        for name, value in settings[0].items()
        if name != "inputs" and all(name in one and one[name] == value for one in settings)
    }
    missing = [{"scan": name, "reason": reason} for name, reason in failed]

    def views() -> Iterator[ScanView]:
        ordered = sorted(scans, key=lambda scan: (-(scores[scan.name] or 0), scan.name))
        for scan in tqdm(ordered, desc="report", disable=len(ordered) < 2, leave=False):
            try:
                yield view_result(results[scan.name], scan, plane=plane, leave_out={**common, "inputs": None})
            except (OSError, ValueError) as error:
                unread.append((str(scan.source), f"its result is there, but not in the report: {error}"))
                # The tables are written after the last scan.
                missing.append({"scan": unread[-1][0], "reason": unread[-1][1]})

    sections = [
        Section(
            "Not predicted",
            [Table("", [Column("scan", "Scan"), Column("reason", "Reason")], missing)],
        ),
        Section(
            "Settings",
            [
                Table(
                    "",
                    [Column("name", "Setting"), Column("value", "Value")],
                    [{"name": name, "value": str(value)} for name, value in common.items()],
                    "Of every scan; what differs stands beside the scan.",
                )
            ],
            folded=True,
        ),
    ]
    what = "Segmentations" if "num_members" in next(iter(results.values())).record else "Anomaly maps"
    write_report(
        path,
        f"{what} of {scans[0].name if len(scans) == 1 else f'{len(scans)} scans'}",
        scans=views(),
        sections=sections,
        summary=f"Model: {model}.",
    )
    return unread


def view_result(result: Result, scan: Scan, *, plane: str, leave_out: dict) -> ScanView:
    """Returns a result with its scan; `leave_out` are settings that its facts do not name."""
    record, source = result.record, read_volume(scan.volume)
    layers = [
        Layer(name or "Scan", "scan", nib.Nifti1Image(array, source.affine)) for name, array in source.arrays.items()
    ]
    layers += _layers(result, _MAPS, source)
    if not any(layer.name != "Brain" and layer.kind == "mask" for layer in layers):
        layers = [layer for layer in layers if layer.name != "Brain"]  # it is no mask of a threshold
    several = len(source.arrays) > 1
    first = next(iter(source.arrays))
    stem = f"reconstruction_{first}" if several and source.is_picture else "reconstruction"
    for array in _read_arrays(result, stem, source):
        array = array[..., 0] if array.ndim > 3 else array
        name = f"Reconstruction ({first})" if several else "Reconstruction"
        layers.append(Layer(name, "reconstruction", nib.Nifti1Image(array, source.affine)))
    if (result.folder / "dispersion.json").exists():
        layers += _layers(read_result(result.folder, "dispersion"), _SPREAD, source)
    settings = record["settings"] or {}
    facts = {}
    mask = next((layer for layer in layers if layer.kind == "mask"), None)
    if mask is not None:
        count = int(np.count_nonzero(mask.image.dataobj))
        volume = count * abs(float(np.linalg.det(source.affine[:3, :3]))) / 1000
        facts[mask.name] = f"{count} pixels" if source.is_picture else f"{volume:.2f} ml"
    if record.get("guarantee") is not None:
        facts["Guarantee"] = describe_claims(record["guarantee"])
    if record.get("warnings") is not None:
        facts["Warnings"] = " ".join(record["warnings"])
    facts |= {
        name: value if isinstance(value, (int, float)) else str(value)
        for name, value in settings.items()
        if name not in leave_out
    }
    return ScanView(
        scan.name,
        layers,
        score=record.get("volume_score"),
        threshold=0.5 if "num_members" in record else settings.get("threshold"),
        slice_scores=record.get("pred_score"),
        facts=facts,
        plane=plane,
        is_picture=source.is_picture,
    )


def _layers(result: Result, wanted: dict, source: InputVolume) -> list[Layer]:
    layers = []
    for stem, (name, kind, stored) in wanted.items():
        for array in _read_arrays(result, stem, source):
            if source.is_picture:
                array = (
                    array
                    * {SCORES: result.record.get(f"{stem}_per_grey_level"), SHARE: 1 / 65535, MASK: 1 / 255}[stored]
                )
            layers.append(Layer(name, kind, nib.Nifti1Image(array.astype(np.float32), source.affine)))
    return layers


def _read_arrays(result: Result, stem: str, source: InputVolume) -> list[np.ndarray]:
    """The array of a result, `(X, Y, Z)` or with members last, in a list that is empty if there is none."""
    files = result.files
    if f"{stem}.nii.gz" in files:
        array = np.asanyarray(nib.load(files[f"{stem}.nii.gz"]).dataobj, dtype=np.float32)
        check_whole(files[f"{stem}.nii.gz"])
        return [array.reshape(*array.shape, *(1,) * (3 - array.ndim))]
    pictures = sorted(
        name for name in files if name == f"{stem}.png" or (name.startswith("member_") and name.startswith(f"{stem}_"))
    )
    if not pictures:
        return []
    arrays = [np.asarray(PIL.Image.open(files[name]), dtype=np.float32).T[..., None] for name in pictures]
    return [arrays[0] if pictures[0] == f"{stem}.png" else np.stack(arrays, -1)]
