"""The evaluation protocol of AnoFPDM, beside our own in `scoring.py`: slice by slice, in two settings. Mixed: all slices.
Unhealthy: the slices with a lesion, whose masks are not emptied by a wrong image label.

Dice and IoU are means over slices, and 1 where mask and prediction are both empty, as nearly all healthy slices of a good method
are; precision and recall are of all pixels together and have their usual names, which the original swaps. AUROC and AUPRC (average
precision) are of all pixels whose mean over modalities is above -0.95, on [-1, 1]. Components of 40 pixels and fewer are
removed, in each slice. The image label is the method's own, or whether the mask has a pixel before that.

The original scores random batches and averages their values; here every slice counts once. Method card, section 7. Maps are those
of the cases, 0 outside the brain.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from ...pipelines.postprocessing import remove_small_components
from ..calibration import threshold_for_fpr
from ..metrics import PooledScores, dice, iou
from ..scoring import Case


# First and last threshold and step of the grid that validation data with masks decide on.
ANOFPDM_SWEEP = (0.01, 0.69, 0.01)

FOREGROUND = -0.95  # of the mean over modalities, on [-1, 1]
MIN_COMPONENT_SIZE = 41
SETTINGS = ("mixed", "unhealthy")


class SliceScores:
    """
    Segmentation metrics of many slices in one setting, fed with one volume after the other.

    Args:
        min_component_size (`int`, defaults to 41): Smallest 2-D component of a predicted mask, in pixels.
    """

    def __init__(self, min_component_size: int = MIN_COMPONENT_SIZE):
        self.min_component_size = min_component_size
        self._dice, self._iou = [], []
        self._counts = np.zeros(3, np.int64)  # overlap, predicted, reference

    def update(self, predicted: np.ndarray, reference: np.ndarray) -> None:
        """Adds slices: masks `(N, H, W)`, the predicted ones not yet filtered."""
        predicted = remove_small_components(predicted, self.min_component_size, 2)
        for pair in zip(predicted, reference, strict=True):
            self._dice.append(dice(*pair))
            self._iou.append(iou(*pair))
        self._counts += [(predicted & reference).sum(), predicted.sum(), reference.sum()]

    def metrics(self) -> dict[str, float | None]:
        """`dice`, `iou`, `precision` and `recall`, `None` where undefined."""
        overlap, predicted, reference = self._counts.tolist()
        return {
            "dice": float(np.mean(self._dice)) if self._dice else None,
            "iou": float(np.mean(self._iou)) if self._iou else None,
            "precision": overlap / predicted if predicted else None,
            "recall": overlap / reference if reference else None,
        }


def image_metrics(predicted: np.ndarray, labels: np.ndarray) -> dict[str, float | None]:
    """
    Accuracy, precision and recall of image labels.

    Args:
        predicted, labels (`np.ndarray` of shape `(N,)`): 1 anomalous, 0 healthy; slices of unknown label (-1) do not count.

    Returns:
        `dict`: `accuracy`, `precision`, `recall`, `None` where undefined.
    """
    known = np.asarray(labels) >= 0
    predicted, labels = np.asarray(predicted)[known] == 1, np.asarray(labels)[known] == 1
    overlap = np.count_nonzero(predicted & labels)
    return {
        "accuracy": float((predicted == labels).mean()) if labels.size else None,
        "precision": overlap / np.count_nonzero(predicted) if predicted.any() else None,
        "recall": overlap / np.count_nonzero(labels) if labels.any() else None,
    }


def foreground_of(image: np.ndarray, value_range: tuple[float, float]) -> np.ndarray:
    """`(N, H, W)` bool of slices `(N, C, H, W)` in `value_range`: what AUROC and AUPRC are measured in."""
    low, high = value_range
    return (image.mean(1) - low) / (high - low) * 2 - 1 > FOREGROUND


def best_threshold(
    validation: list[Path], thresholds: np.ndarray, min_component_size: int = MIN_COMPONENT_SIZE
) -> tuple[float | None, float | None]:
    """
    The threshold of a grid with the highest mean Dice over the slices of the cases with masks, and that Dice; `None` without such
    cases. Scores equal to a threshold are positive, as in the original.
    """
    totals, count = np.zeros(len(thresholds)), 0
    for case in map(Case.load, validation):
        if case.mask is None:
            continue
        count += len(case.mask)
        for number, threshold in enumerate(thresholds):
            predicted = remove_small_components(case.maps >= np.float32(threshold), min_component_size, 2)
            totals[number] += sum(dice(*pair) for pair in zip(predicted, case.mask, strict=True))
    if not count:
        return None, None
    best = int(totals.argmax())
    return float(thresholds[best]), float(totals[best] / count)


def score_anofpdm(
    test: list[Path],
    validation: list[Path],
    foreground: Callable[[str], np.ndarray],
    thresholds: np.ndarray,
    *,
    healthy_fpr: float = 0.05,
    min_component_size: int = MIN_COMPONENT_SIZE,
) -> dict[str, float | None]:
    """
    Metrics of one method under AnoFPDM's protocol.

    Args:
        test, validation (`list[Path]`): Files that [`Case.save`] wrote; those without a mask count for the image labels only.
        foreground (`Callable`): Name of a test subject to its foreground, `(N, H, W)` bool; see [`foreground_of`].
        thresholds (`np.ndarray` of shape `(T,)`): Grid of the policy "validation", in the units of the maps.
        healthy_fpr (`float`, *optional*, defaults to 0.05): Share of healthy validation voxels above the policy "healthy".
        min_component_size (`int`, *optional*, defaults to 41): Smallest component of a mask, in pixels of a slice.

    Returns:
        `dict`: `anofpdm_{auprc,auroc}_{setting}`, `anofpdm_{dice,iou,precision,recall}_{setting}_{policy}`,
        `anofpdm_image_{accuracy,precision,recall}_{policy}` and `anofpdm_threshold_{policy}`, `None` where undefined. Policies: `own`,
        the method's own masks and labels; `validation`, the grid on validation masks; `healthy`, no masks.
    """
    chosen = {
        "validation": best_threshold(validation, thresholds, min_component_size)[0],
        "healthy": _healthy_threshold(validation, healthy_fpr),
    }
    policies = ("own", *chosen)
    pooled = {setting: PooledScores() for setting in SETTINGS}
    scores = {(setting, policy): SliceScores(min_component_size) for setting in SETTINGS for policy in policies}
    image_labels: dict[str, list] = {policy: [] for policy in policies}
    for case in map(Case.load, test):
        rows = {"mixed": np.ones(len(case.maps), bool), "unhealthy": case.labels == 1}
        if case.mask is not None:
            inside = foreground(case.subject)
            for setting, chosen_rows in rows.items():
                visible = inside & chosen_rows[:, None, None]
                pooled[setting].update(case.maps[visible], case.mask[visible])
        for policy in policies:
            if policy == "own":
                if case.own_mask is None:
                    continue
                ungated, labels = case.own_mask, case.own_labels
            else:
                if chosen[policy] is None:
                    continue
                # The grid's scores count at the threshold itself; that of a false positive rate is to be exceeded.
                compare = np.greater_equal if policy == "validation" else np.greater
                ungated = compare(case.maps, np.float32(chosen[policy]))
                labels = ungated.any((1, 2)).astype(int)
            image_labels[policy].append((labels, case.labels))
            if case.mask is None:
                continue
            # A slice that was called healthy has no mask; where the label is given, it is not asked.
            gated = ungated & (labels == 1)[:, None, None]
            scores["mixed", policy].update(gated, case.mask)
            scores["unhealthy", policy].update(ungated[rows["unhealthy"]], case.mask[rows["unhealthy"]])

    metrics = {}
    for setting in SETTINGS:
        both = pooled[setting].num_positives and pooled[setting].num_negatives
        metrics[f"anofpdm_auprc_{setting}"] = pooled[setting].average_precision() if both else None
        metrics[f"anofpdm_auroc_{setting}"] = pooled[setting].auroc() if both else None
    for policy in policies:
        for setting in SETTINGS:
            for name, value in scores[setting, policy].metrics().items():
                metrics[f"anofpdm_{name}_{setting}_{policy}"] = value
        pairs = image_labels[policy]
        predicted, labels = (np.concatenate(part) for part in zip(*pairs, strict=True)) if pairs else ([], [])
        for name, value in image_metrics(predicted, labels).items():
            metrics[f"anofpdm_image_{name}_{policy}"] = value
    metrics |= {f"anofpdm_threshold_{policy}": value for policy, value in chosen.items()}
    return metrics


def _healthy_threshold(validation: list[Path], fpr: float) -> float | None:
    maps, brain = [], []
    for case in map(Case.load, validation):
        maps.append(case.maps[case.labels == 0])
        brain.append(case.brain[case.labels == 0])
    return threshold_for_fpr(maps, brain, fpr) if any(part.any() for part in brain) else None
