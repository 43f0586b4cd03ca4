"""The evaluation protocol of cDDPM and SADM, beside our own in `pooled.py`: volume by volume, over all voxels,
background included.

Values are means over the test volumes, those that are undefined left out. The threshold is chosen once, on the pooled
voxels of the validation volumes with lesions: by the authors' search, which halves an interval ten times (`search`),
and by trying every score (`exact`); or, without any lesion, as the score that 1, 5 or 10 % of the brain voxels of
healthy validation slices exceed (`fpr1`, `fpr5`, `fpr10`).

Counts have their usual names; the original's true positives are true negatives, its false positive rate is the false
discovery rate, and its healthy thresholds are the smallest score. Means per slice, which it takes along the sagittal
axis, are left out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from scipy import ndimage

from ...pipelines.postprocessing import remove_small_components
from ..cases import Case, Needs, Scores
from ..metrics import auroc, average_precision, confusion, dice, false_positive_rate, precision, recall
from ..options import EvalOptions
from ..scoring import group_interval, healthy_scores, healthy_threshold, masked_cases, name_interval
from ..thresholds import threshold_for_dice


HEALTHY_RATES = {"fpr1": 0.01, "fpr5": 0.05, "fpr10": 0.1}
POLICIES = ("search", "exact", *HEALTHY_RATES)
LESION_SIZES = ("small", "medium", "large")

TASK = "anomaly-detection"
TEXT = {
    "unit_of_averaging": (
        "; SADM columns: means over volumes, all their voxels with background, Dice of a mask that was rightly left"
        " empty and distances to nothing left out; Hausdorff distance in voxels; FPR of healthy slices: their brain"
        " voxels pooled"
    ),
    "threshold_policy": (
        "; SADM columns: search as cDDPM's interval search and exact as the best of all scores, both for the pooled"
        " Dice of the validation volumes with lesions; fpr1, fpr5, fpr10: 1, 5, 10 % of the brain voxels of healthy"
        " validation slices; best Dice: oracle per volume"
    ),
}
COLUMNS = {
    f"sadm_{name}": f"{title} (SADM)"
    for name, title in {
        "dice_search": "Dice, search",
        "dice_exact": "Dice, exact threshold",
        "best_dice": "Dice, best per volume",
        "auprc": "AP",
        "auroc": "AUROC",
        "hausdorff_search": "Hausdorff, search",
        "dice_small": "Dice, small lesions",
        "dice_medium": "Dice, medium lesions",
        "dice_large": "Dice, large lesions",
        "healthy_fpr_search": "FPR of healthy slices, search",
        "dice_fpr5": "Dice at 5 % FPR",
        "healthy_fpr_fpr5": "FPR of healthy slices, 5 % FPR",
        "l1": "l1",
        "l1_ratio": "l1 ratio",
    }.items()
}
SWEEP = None


def reconstruction_error(
    image: np.ndarray, reconstruction: np.ndarray | None, value_range: tuple[float, float]
) -> np.ndarray | None:
    """Returns the absolute difference of slices and reconstructions `(N, C, H, W)` in `value_range`: its mean over
    modalities, on [0, 1], `(N, H, W)`; `None` for a method that reconstructs nothing."""
    low, high = value_range
    return None if reconstruction is None else np.abs(image - reconstruction).mean(1) / (high - low)


NEEDS = Needs(details={"error": reconstruction_error})


def find_best_val(maps: Sequence[np.ndarray], masks: Sequence[np.ndarray]) -> tuple[float, float]:
    """Returns the pooled Dice and its threshold, for `map > threshold`, that cDDPM's search finds for scores >= 0 and
    bool masks of some volumes; `nan` twice without a lesion. Of an interval, at first from 0 to the largest score, the
    Dice at its quarters are compared, and the half with the higher one (the lower half if they are equal) is the next
    interval. It is not always the best one; [`threshold_for_dice`] is."""
    positives = np.concatenate([scores[mask] for scores, mask in zip(maps, masks, strict=True)])
    if not positives.size:
        return float("nan"), float("nan")

    def dice_at(threshold: float) -> float:
        predicted = sum(np.count_nonzero(scores > threshold) for scores in maps)
        return 2 * np.count_nonzero(positives > threshold) / (predicted + positives.size)

    low, high = 0.0, float(max(np.max(scores) for scores in maps))
    best, threshold = 0.0, 0.0
    for _ in range(10):
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
    """Returns the largest distance in voxels from the surface of one mask to that of the other, as MONAI; `nan` if one
    is empty."""
    if not (predicted.any() and reference.any()):
        return float("nan")
    # Nothing lies outside the box that holds both masks.
    box = ndimage.find_objects((predicted | reference).astype(np.uint8))[0]
    first, second = (mask[box] ^ ndimage.binary_erosion(mask[box]) for mask in (predicted, reference))
    distances = ndimage.distance_transform_edt(~second)[first], ndimage.distance_transform_edt(~first)[second]
    return float(max(values.max() for values in distances))


def volume_metrics(predicted: np.ndarray, reference: np.ndarray) -> dict[str, float]:
    """Returns Dice, precision, recall, specificity, accuracy, false positive rate and Hausdorff distance of one
    volume, `nan` where undefined, from masks `(N, H, W)`."""
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
    """Returns the mean of the errors `(N, H, W)` of a reconstruction: of all voxels, of the lesion, of the others, and
    the ratio of these two."""
    lesion = float(error[reference].mean()) if reference.any() else float("nan")
    healthy = float(error[~reference].mean())
    ratio = lesion / healthy if healthy > 0 else float("nan")
    return {"l1": float(error.mean()), "l1_lesion": lesion, "l1_healthy": healthy, "l1_ratio": ratio}


def choose_thresholds(validation: list[Path]) -> dict[str, float | None]:
    """Returns the threshold of every policy, `None` where the validation split does not allow it."""
    pairs = [(case.maps, case.mask) for case in masked_cases(validation) if case.mask.any()]
    thresholds = dict.fromkeys(POLICIES)
    if pairs:
        maps, masks = zip(*pairs, strict=True)
        thresholds |= {"search": find_best_val(maps, masks)[1], "exact": threshold_for_dice(maps, masks)}
    healthy = healthy_scores(validation)
    return thresholds | {name: healthy_threshold(healthy, fpr) for name, fpr in HEALTHY_RATES.items()}


def score(row: dict, files: dict[str, list[Path]], thresholds: None, options: EvalOptions) -> Scores:
    """Scores one method under the protocol of cDDPM and SADM, with a record per case: its values at the threshold
    `search`, its confusion counts and its lesion's size. `lesion_sizes` are the thirds of the volumes with lesions by
    lesion size: number, smallest and largest in voxels, mean Dice under each policy. `sadm_healthy_fpr_{policy}` is
    the share of the brain voxels of healthy test slices above the threshold. Of the settings, `min_component_size` (in
    3-D, voxels) is 8 for cDDPM, 0 for SADM. Test volumes without a mask count for the rate of healthy slices only."""
    found = choose_thresholds(files.get("validation", []))
    chosen = {policy: value for policy, value in found.items() if value is not None}
    rows, records, groups = [], [], []
    for case in map(Case.load, files["test"]):
        values, record = _score_case(case, chosen, row["settings"]["min_component_size"])
        records.append(record)
        if values:
            rows.append(values)
            groups.append(case.drawn_with)
    names = dict.fromkeys(name for values in rows for name in values)
    defined = {name: np.array([one[name] for one in rows if np.isfinite(one.get(name, np.nan))]) for name in names}
    metrics = {f"sadm_{name}": float(some.mean()) if some.size else None for name, some in defined.items()}
    for name, some in defined.items():
        if name in ("auprc", "auroc") or "dice" in name:
            owners = [group for group, one in zip(groups, rows, strict=True) if np.isfinite(one.get(name, np.nan))]
            metrics |= name_interval(f"sadm_{name}", group_interval(some, owners))
    healthy = healthy_scores(files["test"])
    for policy, threshold in found.items():
        metrics[f"sadm_threshold_{policy}"] = threshold
        some = defined.get(f"dice_{policy}", np.empty(0))
        metrics[f"sadm_dice_{policy}_std"] = float(some.std()) if some.size else None
        rate = None if threshold is None or not healthy.size else float((healthy > np.float32(threshold)).mean())
        metrics[f"sadm_healthy_fpr_{policy}"] = rate

    with_lesion = [record for record in records if record.get("sadm_lesion_voxels")]
    with_lesion.sort(key=lambda record: record["sadm_lesion_voxels"])
    sizes = []
    for name, third in zip(LESION_SIZES, np.array_split(np.arange(len(with_lesion)), len(LESION_SIZES)), strict=True):
        own = [with_lesion[number] for number in third]
        voxels = [own[0]["sadm_lesion_voxels"], own[-1]["sadm_lesion_voxels"]] if own else None
        sizes.append({"size": name, "volumes": len(own), "voxels": voxels})
        for policy in chosen if own else ():
            sizes[-1][f"dice_{policy}"] = float(np.mean([record[f"sadm_dice_{policy}"] for record in own]))
    metrics |= {f"sadm_dice_{third['size']}": third.get("dice_search") for third in sizes}
    return Scores(metrics, records, {"lesion_sizes": sizes})


def _score_case(case: Case, chosen: dict[str, float], min_component_size: int) -> tuple[dict, dict]:
    """Metrics of a case at the thresholds that were chosen, `nan` where undefined, and what the report records of it;
    both empty without a mask."""
    if case.mask is None:
        return {}, {}
    scores, labels = case.maps.ravel(), case.mask.ravel()
    values = {
        "auprc": average_precision(scores, labels) if labels.any() else float("nan"),
        "auroc": auroc(scores, labels),
        "best_dice": find_best_val([case.maps], [case.mask])[0],
    }
    if case.error is not None:
        values |= reconstruction_metrics(case.error, case.mask)
    record = {}
    for policy, threshold in chosen.items():
        predicted = remove_small_components(case.maps > np.float32(threshold), min_component_size, 3)
        values |= {f"{name}_{policy}": value for name, value in volume_metrics(predicted, case.mask).items()}
        if policy == "search":
            counts = dict(zip(("tp", "fp", "fn", "tn"), confusion(predicted, case.mask), strict=True))
            record = {f"sadm_{name}": value for name, value in counts.items()}
    record |= {f"sadm_{name}": value for name, value in values.items() if np.isfinite(value)}
    return values, record | {"sadm_lesion_voxels": int(labels.sum())}
