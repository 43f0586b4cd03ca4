"""Scores of some of the subjects alone: by size and contrast of the lesion, and by the columns of `subjects.parquet`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from scipy import ndimage

from ..data.prepared import PreparedSplit
from .cases import Tally, slice_spacing
from .metrics import PooledScores
from .scoring import group_interval, masked_cases, name_interval


# N slices, H x W pixels.

OF_LESIONS = ("size", "contrast")
SIZES = (1.0, 10.0)  # ml
RING = 5  # pixels around a lesion in its slices, its surroundings
LEAST_CONTRAST = 0.5  # standard deviations of the brain; less is alike
FEW = 5  # subjects; fewer are marked


def check_strata(names: list[str], split: PreparedSplit) -> None:
    """Raises a `ValueError` unless subjects can be divided by each of the names: `size`, `contrast`, or a column of
    `subjects.parquet` of texts or numbers."""
    columns = next(iter(split.subject_info.values()))
    able = [name for name in columns if not any(isinstance(row[name], list) for row in split.subject_info.values())]
    able = [*OF_LESIONS, *(name for name in able if name != "subject")]
    unknown = [name for name in names if name not in able]
    if unknown:
        raise ValueError(
            f"`strata` must be of {', '.join(able)}, got {', '.join(unknown)}. Other columns come into"
            " subjects.parquet by `participants` of the recipe."
        )


def divide(split: PreparedSplit, names: list[str]) -> dict[str, dict[str, list[str]]]:
    """Returns, for each of the names, the strata in their order and the subjects in each. Sizes are those of a subject's
    whole lesion in ml, below 1, to 10 and above, or thirds of the pixels where a subject has no voxel size. Contrasts are
    the mean of the first modality in the lesion less that of its surroundings, in standard deviations of the rest of the
    brain. Both leave out subjects without lesion, and so does a contrast without surroundings. Numbers in columns are
    divided into thirds of the subjects."""
    values: dict[str, dict] = {name: {} for name in names}
    volumes: dict[str, float] = {}  # of a voxel, in ml
    for subject in split.subjects if set(names) & set(OF_LESIONS) else ():
        item = split.read_subject(subject)
        lesion = (
            item["brain"] & (item["mask"].mean(1) >= 0.5) if item["mask"].shape[1] else np.zeros_like(item["brain"])
        )
        if not lesion.any():
            continue
        spacing = slice_spacing(split, subject, item["slice"])
        if "size" in names:
            values["size"][subject] = np.count_nonzero(lesion)
            volumes[subject] = 0.0 if spacing is None else spacing.prod() / 1000
        contrast = _contrast(item["image"][:, 0], lesion, item["brain"]) if "contrast" in names else None
        if contrast is not None:
            values["contrast"][subject] = contrast
    divided = {}
    for name in names:
        if name == "size" and all(volumes.values()):
            sizes = {subject: count * volumes[subject] for subject, count in values[name].items()}
            low, high = (f"{bound:g}" for bound in SIZES)
            divided[name] = _divide_at(sizes, SIZES, (f"< {low} ml", f"{low} to {high} ml", f"> {high} ml"))
        elif name == "contrast":
            bounds = (-LEAST_CONTRAST, LEAST_CONTRAST)
            divided[name] = _divide_at(values[name], bounds, ("darker", "alike", "brighter"))
        else:
            own = values[name]
            if name != "size":
                own = {subject: split.subject_info[subject][name] for subject in split.subjects}
            divided[name] = _divide_column(own, " pixels" if name == "size" else "")
    return divided


def score_strata(tally: Tally, files: list[Path], divided: dict[str, dict[str, list[str]]]) -> dict[str, list[dict]]:
    """Returns the scores of one method in each stratum, as `strata` of a row of the report holds them: `stratum`,
    number of `subjects` with a reference, `few` if there are fewer than [`FEW`], and `metrics`: average precision, Dice
    and lesion recall of each policy with their intervals. Thresholds are those of all subjects. `files` are those of
    the cases."""
    place = {subject: number for number, subject in enumerate(tally.subjects)}
    scored: dict[str, list[dict]] = {}
    for name, strata in divided.items():
        stratum_of = {subject: stratum for stratum, some in strata.items() for subject in some}
        voxels = {stratum: PooledScores() for stratum in strata}
        for case in masked_cases(files):
            if case.subject in stratum_of:
                inside = case.maps[case.brain], case.mask[case.brain]
                voxels[stratum_of[case.subject]].update(*inside, case.drawn_with)
        scored[name] = [
            {
                "stratum": stratum,
                **_score_some(tally, [place[one] for one in some if one in place], voxels.pop(stratum)),
            }
            for stratum, some in strata.items()
        ]
    return scored


def _score_some(tally: Tally, cases: list[int], voxels: PooledScores) -> dict:
    masked = [number for number in cases if tally.masked[number]]
    metrics = {"voxel_average_precision": voxels.average_precision() if voxels.num_positives else None}
    metrics |= name_interval("voxel_average_precision", voxels.intervals()["average_precision"])
    for policy, counts in tally.overlaps.items():
        overlap, size = counts[masked].astype(float).T
        # As of all subjects: without a lesion there is none.
        size = size * any(tally.lesions[policy][number, 1] for number in masked)
        metrics[f"dice_{policy}"] = float(2 * overlap.sum() / size.sum()) if size.any() else None
        groups = [tally.groups[number] for number in masked]
        metrics |= name_interval(f"dice_{policy}", group_interval(2 * overlap, groups, size))
        found, lesions = tally.lesions[policy][cases, :2].astype(float).T
        groups = [tally.groups[number] for number in cases]
        metrics[f"lesion_recall_{policy}"] = float(found.sum() / lesions.sum()) if lesions.any() else None
        metrics |= name_interval(f"lesion_recall_{policy}", group_interval(found, groups, lesions))
    return {"subjects": len(cases), "few": len(cases) < FEW, "metrics": metrics}


def _contrast(image: np.ndarray, lesion: np.ndarray, brain: np.ndarray) -> float | None:
    """The contrast of the lesion in one modality `(N, H, W)`; `None` where the rest of the brain has none."""
    cross = ndimage.generate_binary_structure(2, 1)[None]
    around = ndimage.binary_dilation(lesion, cross, iterations=RING) & brain & ~lesion
    deviation = image[brain & ~lesion].std() if around.any() else 0.0
    return float((image[lesion].mean() - image[around].mean()) / deviation) if deviation > 0 else None


def _divide_at(values: dict[str, float], bounds: tuple[float, float], titles: tuple[str, str, str]) -> dict:
    low, high = bounds
    strata = {title: [] for title in titles}
    for subject, value in values.items():
        strata[titles[int(value >= low) + int(value > high)]].append(subject)
    return {title: some for title, some in strata.items() if some}


def _divide_column(values: dict, unit: str) -> dict[str, list[str]]:
    """Numbers in thirds, but for three different ones or fewer; texts each by itself; what is not known comes last."""
    known = {subject: value for subject, value in values.items() if value is not None}
    different = sorted(set(known.values()))
    strata: dict[str, list[str]] = {}
    if len(different) > 3 and not isinstance(different[0], str):
        edges = np.quantile(list(known.values()), [1 / 3, 2 / 3])
        thirds: list[dict] = [{}, {}, {}]
        for subject, value in known.items():
            thirds[int((value > edges).sum())][subject] = value
        for third in filter(None, thirds):
            ends = dict.fromkeys((f"{min(third.values()):g}", f"{max(third.values()):g}"))
            strata[" to ".join(ends) + unit] = list(third)
    else:
        titles = {value: value if isinstance(value, str) else f"{value:g}{unit}" for value in different}
        strata = {titles[value]: [one for one in known if known[one] == value] for value in different}
    unknown = [subject for subject, value in values.items() if value is None]
    return strata | ({"not known": unknown} if unknown else {})
