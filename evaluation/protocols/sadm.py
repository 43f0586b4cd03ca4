"""The evaluation protocol of cDDPM and SADM, beside our own in `scoring.py`: volume by volume, over all voxels, background included.

Values are means over the test volumes, those that are undefined (Dice of an empty mask that was rightly left empty, distances to nothing)
left out. The threshold is chosen once, on the pooled voxels of the validation volumes with lesions: by the authors' search, which
halves an interval ten times (`search`), and by trying every score (`exact`); or, without any lesion, as the score that 1, 5 or 10 % of the
brain voxels of healthy validation slices exceed (`fpr1`, `fpr5`, `fpr10`).

Counts have their usual names; the original's true positives are true negatives, its false positive rate is the false discovery rate, and
its healthy thresholds are the smallest score. Means per slice, which it takes along the sagittal axis, are left out. Method
card, sections 7 and 8.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from scipy import ndimage

from ...pipelines.postprocessing import remove_small_components
from ..calibration import threshold_for_dice, threshold_for_fpr
from ..metrics import auroc, average_precision, confusion, dice, false_positive_rate, precision, recall
from ..scoring import Case


HEALTHY_RATES = {"fpr1": 0.01, "fpr5": 0.05, "fpr10": 0.1}
POLICIES = ("search", "exact", *HEALTHY_RATES)
LESION_SIZES = ("small", "medium", "large")


def find_best_val(maps: Sequence[np.ndarray], masks: Sequence[np.ndarray], steps: int = 10) -> tuple[float, float]:
    """
    The threshold with the highest pooled Dice that cDDPM's search finds: of an interval, at first from 0 to the largest score, the Dice
    at its quarters are compared, and the half with the higher one (the lower half if they are equal) is the next interval. It is not
    always the best one; [`threshold_for_dice`] is.

    Args:
        maps, masks (sequences of `np.ndarray`): Scores >= 0 and lesion masks, bool, of some volumes.
        steps (`int`, *optional*, defaults to 10): How often the interval is halved.

    Returns:
        `tuple[float, float]`: Dice and threshold, for `map > threshold`; `nan` twice without a lesion.
    """
    positives = np.concatenate([scores[mask] for scores, mask in zip(maps, masks, strict=True)])
    if not positives.size:
        return float("nan"), float("nan")

    def dice_at(threshold: float) -> float:
        predicted = sum(np.count_nonzero(scores > threshold) for scores in maps)
        return 2 * np.count_nonzero(positives > threshold) / (predicted + positives.size)

    low, high = 0.0, float(max(np.max(scores) for scores in maps))
    best, threshold = 0.0, 0.0
    for _ in range(steps):
        middle = (low + high) / 2
        points = (low + middle) / 2, (middle + high) / 2
        lower, upper = map(dice_at, points)
        if lower >= upper:
            point, value, high = points[0], lower, middle
        else:
            point, value, low = points[1], upper, middle
        if value >= best:
            best, threshold = value, point
    return best, threshold


def hausdorff_distance(predicted: np.ndarray, reference: np.ndarray) -> float:
    """The largest distance in voxels from the surface of one mask to the surface of the other, as MONAI; `nan` if one is empty."""
    if not (predicted.any() and reference.any()):
        return float("nan")
    # Nothing lies outside the box that holds both masks.
    box = ndimage.find_objects((predicted | reference).astype(np.uint8))[0]
    first, second = (mask[box] ^ ndimage.binary_erosion(mask[box]) for mask in (predicted, reference))
    distances = ndimage.distance_transform_edt(~second)[first], ndimage.distance_transform_edt(~first)[second]
    return float(max(values.max() for values in distances))


def volume_metrics(predicted: np.ndarray, reference: np.ndarray) -> dict[str, float]:
    """Dice, precision, recall, specificity, accuracy, false positive rate and Hausdorff distance of one volume, `nan` where undefined,
    from masks `(N, H, W)`."""
    tp, fp, fn, tn = confusion(predicted, reference)
    rate = false_positive_rate(predicted, reference)
    return {
        "dice": dice(predicted, reference, empty=float("nan")),
        "precision": precision(predicted, reference),
        "recall": recall(predicted, reference),
        "specificity": 1 - rate,
        "fpr": rate,
        "accuracy": (tp + tn) / (tp + fp + fn + tn),
        "hausdorff": hausdorff_distance(predicted, reference),
    }


def reconstruction_metrics(error: np.ndarray, reference: np.ndarray) -> dict[str, float]:
    """Mean absolute difference of slices and reconstructions `(N, H, W)`: of all voxels, of the lesion, of the others, and the ratio of
    these two."""
    lesion = float(error[reference].mean()) if reference.any() else float("nan")
    healthy = float(error[~reference].mean())
    ratio = lesion / healthy if healthy > 0 else float("nan")
    return {"l1": float(error.mean()), "l1_lesion": lesion, "l1_healthy": healthy, "l1_ratio": ratio}


def choose_thresholds(validation: list[Path]) -> dict[str, float | None]:
    """The threshold of every policy, `None` where the validation split does not allow it."""
    maps, masks, healthy_maps, healthy_brain = [], [], [], []
    for case in map(Case.load, validation):
        if case.mask is not None and case.mask.any():
            maps.append(case.maps)
            masks.append(case.mask)
        healthy_maps.append(case.maps[case.labels == 0])
        healthy_brain.append(case.brain[case.labels == 0])
    thresholds = dict.fromkeys(POLICIES)
    if maps:
        thresholds |= {"search": find_best_val(maps, masks)[1], "exact": threshold_for_dice(maps, masks)}
    if any(brain.any() for brain in healthy_brain):
        for name, fpr in HEALTHY_RATES.items():
            thresholds[name] = threshold_for_fpr(healthy_maps, healthy_brain, fpr)
    return thresholds


def score_sadm(
    test: list[Path], validation: list[Path], *, min_component_size: int = 0
) -> tuple[dict[str, float | None], list[dict], list[dict]]:
    """
    Metrics of one method under the protocol of cDDPM and SADM.

    Args:
        test, validation (`list[Path]`):
            Files that [`Case.save`] wrote. Test volumes without a mask count for the false positive rate of healthy slices only.
        min_component_size (`int`):
            Smallest 3-D component of a predicted mask, in voxels: 8 for cDDPM, 0 for SADM.

    Returns:
        `tuple[dict, list[dict], list[dict]]`: Metrics `sadm_...`, `None` where undefined; one record per case, with its values at the
        threshold `search`, its confusion counts and its lesion's size; and the thirds of the volumes with lesions by lesion size, with
        their Dice. `sadm_healthy_fpr_{policy}` is the share of the brain voxels of healthy test slices above the threshold.
        `sadm_best_dice` has a threshold of its own for every volume, an oracle.
    """
    thresholds = choose_thresholds(validation)
    chosen = {policy: value for policy, value in thresholds.items() if value is not None}
    records, rows = [], []
    healthy_voxels, above = 0, dict.fromkeys(POLICIES, 0)
    for case in map(Case.load, test):
        healthy = case.maps[case.labels == 0][case.brain[case.labels == 0]]
        healthy_voxels += healthy.size
        for policy, threshold in chosen.items():
            above[policy] += np.count_nonzero(healthy > np.float32(threshold))
        records.append({})
        if case.mask is None:
            continue
        scores, labels = case.maps.ravel(), case.mask.ravel()
        row = {
            "auprc": average_precision(scores, labels) if labels.any() else float("nan"),
            "auroc": auroc(scores, labels),
            "best_dice": find_best_val([case.maps], [case.mask])[0],
        }
        if case.error is not None:
            row |= reconstruction_metrics(case.error, case.mask)
        for policy, threshold in chosen.items():
            predicted = remove_small_components(case.maps > np.float32(threshold), min_component_size, 3)
            row |= {f"{name}_{policy}": value for name, value in volume_metrics(predicted, case.mask).items()}
            if policy == "search":
                counts = dict(zip(("tp", "fp", "fn", "tn"), confusion(predicted, case.mask), strict=True))
                records[-1] |= {f"sadm_{name}": value for name, value in counts.items()}
        records[-1] |= {f"sadm_{name}": value for name, value in row.items() if np.isfinite(value)}
        records[-1]["sadm_lesion_voxels"] = int(labels.sum())
        rows.append(row)

    names = dict.fromkeys(name for row in rows for name in row)
    values = {name: np.array([row[name] for row in rows if np.isfinite(row.get(name, np.nan))]) for name in names}
    metrics = {f"sadm_{name}": float(some.mean()) if some.size else None for name, some in values.items()}
    for policy, threshold in thresholds.items():
        metrics[f"sadm_threshold_{policy}"] = threshold
        some = values.get(f"dice_{policy}", np.empty(0))
        metrics[f"sadm_dice_{policy}_std"] = float(some.std()) if some.size else None
        defined = policy in chosen and healthy_voxels
        metrics[f"sadm_healthy_fpr_{policy}"] = above[policy] / healthy_voxels if defined else None

    with_lesion = [record for record in records if record.get("sadm_lesion_voxels")]
    with_lesion.sort(key=lambda record: record["sadm_lesion_voxels"])
    sizes = []
    for name, third in zip(LESION_SIZES, np.array_split(np.arange(len(with_lesion)), len(LESION_SIZES)), strict=True):
        own = [with_lesion[number] for number in third]
        sizes.append(
            {
                "size": name,
                "volumes": len(own),
                "voxels": [own[0]["sadm_lesion_voxels"], own[-1]["sadm_lesion_voxels"]] if own else None,
            }
        )
        for policy in chosen if own else ():
            sizes[-1][f"dice_{policy}"] = float(np.mean([record[f"sadm_dice_{policy}"] for record in own]))
        metrics[f"sadm_dice_{name}"] = sizes[-1].get("dice_search")
    return metrics, records, sizes
