"""The evaluation protocol of AnoFPDM, beside our own in `pooled.py`: slice by slice, in two settings. Mixed: all
slices. Unhealthy: the slices with a lesion, whose masks are not emptied by a wrong image label.

Precision and recall have their usual names, which the original swaps. The image label is the method's own, or whether
the mask has a pixel before small components are removed. The original scores random batches and averages their values;
here every slice counts once. Maps are those of the cases, 0 outside the brain."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ...pipelines.postprocessing import remove_small_components
from ..cases import Case, Needs, Scores
from ..metrics import PooledScores, dice, iou
from ..options import EvalOptions
from ..scoring import (
    group_interval,
    healthy_scores,
    healthy_threshold,
    masked_cases,
    name_interval,
    sweep_thresholds,
)


FOREGROUND = -0.95  # of the mean over modalities, on [-1, 1]
MIN_COMPONENT_SIZE = 41
SETTINGS = ("mixed", "unhealthy")

TASK = "anomaly-detection"
TEXT = {
    "unit_of_averaging": (
        "; AnoFPDM columns: Dice and IoU as means over slices, 1 where mask and prediction are both empty, of all "
        "slices (mixed) or those with lesion (unhealthy); precision and recall over their pixels together; AP and "
        "AUROC over the pixels brighter than -0.95 on [-1, 1]; image labels: slices"
    ),
    "threshold_policy": (
        "; AnoFPDM columns: own as above (unhealthy: whatever the method calls the slice), validation as the best "
        "mean Dice of a grid on the validation split, healthy without masks; components of 40 pixels and fewer of a"
        " slice are removed"
    ),
}
COLUMNS = {
    f"anofpdm_{name}": f"{title} (AnoFPDM)"
    for name, title in {
        "dice_mixed_own": "Dice, own masks, mixed",
        "dice_unhealthy_own": "Dice, own masks, unhealthy",
        "dice_mixed_validation": "Dice, validation, mixed",
        "dice_unhealthy_validation": "Dice, validation, unhealthy",
        "dice_mixed_healthy": "Dice, healthy only, mixed",
        "dice_unhealthy_healthy": "Dice, healthy only, unhealthy",
        "auprc_mixed": "AP, mixed",
        "auprc_unhealthy": "AP, unhealthy",
        "image_accuracy_own": "image accuracy, own",
        "image_accuracy_validation": "image accuracy, validation",
    }.items()
}
SWEEP = (0.01, 0.69, 0.01)  # the grid that validation data with masks decide on


def foreground_of(image: np.ndarray, reconstruction: None, value_range: tuple[float, float]) -> np.ndarray:
    """Returns where AUROC and AUPRC are measured, `(N, H, W)` bool, of slices `(N, C, H, W)` in `value_range`."""
    low, high = value_range
    return (image.mean(1) - low) / (high - low) * 2 - 1 > FOREGROUND


# The setting "unhealthy" needs the masks as they are before a wrong image label empties them.
NEEDS = Needs(settings={"gate_by_label": False}, details={"foreground": foreground_of})


class SliceScores:
    """Segmentation metrics of many slices in one setting, fed with one volume after the other; components of a
    predicted mask below `min_component_size` pixels are removed, in 2-D."""

    def __init__(self, min_component_size: int = MIN_COMPONENT_SIZE):
        self.min_component_size = min_component_size
        self._dice, self._iou, self._groups = [], [], []
        self._counts = np.zeros(3, np.int64)  # overlap, predicted, reference

    def update(self, predicted: np.ndarray, reference: np.ndarray, group: str = "") -> None:
        """Adds masks `(N, H, W)`, the predicted ones not yet filtered, of a group that is drawn as a whole for an
        interval."""
        predicted = remove_small_components(predicted, self.min_component_size, 2)
        for pair in zip(predicted, reference, strict=True):
            self._dice.append(dice(*pair))
            self._iou.append(iou(*pair))
            self._groups.append(group)
        self._counts += [(predicted & reference).sum(), predicted.sum(), reference.sum()]

    def metrics(self) -> dict[str, float | None]:
        """Returns `dice`, `iou`, `precision` and `recall`, `None` where undefined."""
        overlap, predicted, reference = self._counts.tolist()
        return {
            "dice": float(np.mean(self._dice)) if self._dice else None,
            "iou": float(np.mean(self._iou)) if self._iou else None,
            "precision": overlap / predicted if predicted else None,
            "recall": overlap / reference if reference else None,
        }

    def dice_interval(self, name: str) -> dict[str, float | None]:
        """Returns the interval of `dice` under the name of its metric."""
        return name_interval(name, group_interval(self._dice, self._groups))


def image_metrics(predicted: np.ndarray, labels: np.ndarray) -> dict[str, float | None]:
    """Returns `accuracy`, `precision` and `recall` of image labels `(N,)`, 1 anomalous and 0 healthy, `None` where
    undefined; slices of unknown label (-1) do not count."""
    known = np.asarray(labels) >= 0
    predicted, labels = np.asarray(predicted)[known] == 1, np.asarray(labels)[known] == 1
    overlap = np.count_nonzero(predicted & labels)
    return {
        "accuracy": float((predicted == labels).mean()) if labels.size else None,
        "precision": overlap / np.count_nonzero(predicted) if predicted.any() else None,
        "recall": overlap / np.count_nonzero(labels) if labels.any() else None,
    }


def best_threshold(validation: list[Path], thresholds: np.ndarray) -> tuple[float | None, float | None]:
    """Returns the threshold of a grid with the highest mean Dice over the slices of the cases with masks, and that
    Dice; `None` without such cases. Scores equal to a threshold are positive, as in the original."""
    totals, count = np.zeros(len(thresholds)), 0
    for case in masked_cases(validation):
        count += len(case.mask)
        for number, threshold in enumerate(thresholds):
            predicted = remove_small_components(case.maps >= np.float32(threshold), MIN_COMPONENT_SIZE, 2)
            totals[number] += sum(dice(*pair) for pair in zip(predicted, case.mask, strict=True))
    if not count:
        return None, None
    best = int(totals.argmax())
    return float(thresholds[best]), float(totals[best] / count)


def score(row: dict, files: dict[str, list[Path]], thresholds: np.ndarray | None, options: EvalOptions) -> Scores:
    """Scores one method under AnoFPDM's protocol, without records. Policies: `own`, the method's own masks and labels;
    `validation`, the grid, in the units of the maps, on validation masks; `healthy`, the share `healthy_fpr` of the
    options, no masks. Cases without a mask count for the image labels only."""
    validation = files.get("validation", [])
    chosen = {
        "validation": best_threshold(validation, sweep_thresholds(SWEEP) if thresholds is None else thresholds)[0],
        "healthy": healthy_threshold(healthy_scores(validation), options.healthy_fpr),
    }
    policies = ("own", *chosen)
    pooled = {setting: PooledScores() for setting in SETTINGS}
    scores = {(setting, policy): SliceScores() for setting in SETTINGS for policy in policies}
    image_labels: dict[str, list] = {policy: [] for policy in policies}
    for case in map(Case.load, files["test"]):
        rows = {"mixed": np.ones(len(case.maps), bool), "unhealthy": case.labels == 1}
        if case.mask is not None:
            for setting, chosen_rows in rows.items():
                visible = case.foreground & chosen_rows[:, None, None]
                pooled[setting].update(case.maps[visible], case.mask[visible], case.drawn_with)
        for policy in policies:
            mask, labels = _own_or_above(case, policy, chosen)
            if mask is None:
                continue
            image_labels[policy].append(np.stack([labels, case.labels]))
            if case.mask is None:
                continue
            # A slice that was called healthy has no mask; where the label is given, it is not asked.
            gated = mask & (labels == 1)[:, None, None]
            ill = rows["unhealthy"]
            scores["mixed", policy].update(gated, case.mask, case.drawn_with)
            scores["unhealthy", policy].update(mask[ill], case.mask[ill], case.drawn_with)

    metrics = {}
    for setting in SETTINGS:
        both = pooled[setting].num_positives and pooled[setting].num_negatives
        metrics[f"anofpdm_auprc_{setting}"] = pooled[setting].average_precision() if both else None
        metrics[f"anofpdm_auroc_{setting}"] = pooled[setting].auroc() if both else None
        intervals = pooled[setting].intervals()
        metrics |= name_interval(f"anofpdm_auprc_{setting}", intervals["average_precision"])
        metrics |= name_interval(f"anofpdm_auroc_{setting}", intervals["auroc"])
    for policy in policies:
        for setting in SETTINGS:
            for name, value in scores[setting, policy].metrics().items():
                metrics[f"anofpdm_{name}_{setting}_{policy}"] = value
            metrics |= scores[setting, policy].dice_interval(f"anofpdm_dice_{setting}_{policy}")
        predicted, labels = np.concatenate([np.empty((2, 0)), *image_labels[policy]], axis=1)
        for name, value in image_metrics(predicted, labels).items():
            metrics[f"anofpdm_image_{name}_{policy}"] = value
    return Scores(metrics | {f"anofpdm_threshold_{policy}": value for policy, value in chosen.items()}, [])


def _own_or_above(case: Case, policy: str, chosen: dict) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Mask `(N, H, W)` and image labels `(N,)` of a case under a policy, `None` twice where it has none."""
    if policy == "own":
        return case.own_mask, case.own_labels
    if chosen[policy] is None:
        return None, None
    # The grid's scores count at the threshold itself; that of a false positive rate is to be exceeded.
    compare = np.greater_equal if policy == "validation" else np.greater
    mask = compare(case.maps, np.float32(chosen[policy]))
    return mask, mask.any((1, 2)).astype(int)
