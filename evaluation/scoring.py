"""From the maps of one method on a validation and a test split to the row of a table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..pipelines.postprocessing import remove_small_components
from .calibration import threshold_for_dice, threshold_for_fpr, yen_threshold
from .metrics import PooledScores, auroc, average_precision, bootstrap_interval, dice


@dataclass(frozen=True)
class Case:
    """
    One subject under one method.

    Args:
        subject (`str`): Name.
        maps (`np.ndarray` of shape `(N, H, W)`): Post-processed anomaly maps.
        brain (`np.ndarray` of shape `(N, H, W)`): bool.
        mask (`np.ndarray` of shape `(N, H, W)`, *optional*): bool, where a reference mask exists.
        labels (`np.ndarray` of shape `(N,)`): 1 anomalous slice, 0 healthy, -1 unknown.
        slice_scores (`np.ndarray` of shape `(N,)`): Score of each slice.
        volume_score (`float`): Score of the subject.
        own_mask (`np.ndarray` of shape `(N, H, W)`, *optional*):
            bool, the segmentation of a method that chooses its thresholds itself, whatever its image labels are.
        own_labels (`np.ndarray` of shape `(N,)`, *optional*): With `own_mask`: 1 where the method calls a slice anomalous, else 0.
        error (`np.ndarray` of shape `(N, H, W)`, *optional*):
            Absolute difference of slice and reconstruction, mean over modalities, on [0, 1]; for the protocol `sadm`.
    """

    subject: str
    maps: np.ndarray
    brain: np.ndarray
    mask: np.ndarray | None
    labels: np.ndarray
    slice_scores: np.ndarray
    volume_score: float
    own_mask: np.ndarray | None = None
    own_labels: np.ndarray | None = None
    error: np.ndarray | None = None

    def save(self, folder: Path) -> None:
        # A picture's name holds the folders it came from.
        path = folder / f"{self.subject}.npz"
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(path, **{name: value for name, value in vars(self).items() if value is not None})

    @classmethod
    def load(cls, path: Path) -> Case:
        with np.load(path, allow_pickle=False) as arrays:
            values = {name: arrays[name] for name in arrays.files}
        return cls(
            **{
                "mask": None,
                **values,
                "subject": str(values["subject"]),
                "volume_score": float(values["volume_score"]),
            }
        )


def score_cases(
    test: list[Path], validation: list[Path], *, min_component_size: int = 0, healthy_fpr: float = 0.05
) -> tuple[dict[str, float | None], list[dict]]:
    """
    Metrics of one method under every threshold policy, and a record per test subject. The policy "own" is there for methods that
    make masks themselves.

    Args:
        test, validation (`list[Path]`): Files that [`Case.save`] wrote.
        min_component_size (`int`): Smallest 3-D component of a predicted mask, in voxels.
        healthy_fpr (`float`): Share of healthy validation voxels above the healthy-only threshold.

    Returns:
        `tuple[dict, list[dict]]`: Metrics, `None` where a metric is undefined (no masks, one class only), and one record per
        subject.
    """
    pooled = PooledScores()
    slice_scores, slice_labels, subject_scores, subject_labels, records = [], [], [], [], []
    has_own = False
    for case in map(Case.load, test):
        if case.mask is not None:
            pooled.update(case.maps[case.brain], case.mask[case.brain])
        has_own |= case.own_mask is not None
        known = case.labels >= 0
        slice_scores.append(case.slice_scores[known])
        slice_labels.append(case.labels[known])
        label = -1 if not known.any() else int(case.labels.max())
        if label >= 0:
            subject_scores.append(case.volume_score)
            subject_labels.append(label)
        records.append({"subject": case.subject, "label": label, "score": case.volume_score})

    thresholds = _thresholds(pooled, validation, healthy_fpr)
    metrics = {
        "voxel_average_precision": pooled.average_precision() if pooled.num_positives else None,
        "voxel_auroc": pooled.auroc() if pooled.num_positives and pooled.num_negatives else None,
    }
    totals = {policy: np.zeros(3) for policy in (*thresholds, "yen", *(["own"] if has_own else []))}
    defined = {policy for policy in totals if thresholds.get(policy, 0.0) is not None}
    for case, record in zip(map(Case.load, test), records, strict=True):
        if case.mask is None:
            continue
        for policy in totals:
            if policy not in defined:
                continue
            if policy == "own":
                predicted = case.own_mask & (case.own_labels == 1)[:, None, None]
            else:
                threshold = yen_threshold(case.maps[case.brain]) if policy == "yen" else thresholds[policy]
                predicted = case.maps > threshold
            predicted = remove_small_components(predicted & case.brain, min_component_size, 3)
            reference = case.mask & case.brain
            totals[policy] += [(predicted & reference).sum(), predicted.sum(), reference.sum()]
            if reference.any():
                record[f"dice_{policy}"] = dice(predicted, reference)
    for policy, (overlap, predicted, reference) in totals.items():
        scored = policy in defined and reference > 0
        metrics[f"dice_{policy}"] = float(2 * overlap / (predicted + reference)) if scored else None
    for policy in totals:
        values = np.array([record[f"dice_{policy}"] for record in records if f"dice_{policy}" in record])
        metrics[f"volume_dice_{policy}"] = float(values.mean()) if values.size else None
        if policy == "validation" and values.size > 1:
            low, high = bootstrap_interval(values)
            metrics |= {"volume_dice_validation_low": low, "volume_dice_validation_high": high}
    metrics |= {f"threshold_{policy}": value for policy, value in thresholds.items()}
    scores, labels = np.concatenate(slice_scores), np.concatenate(slice_labels)
    metrics["slice_auroc"] = _if_two_classes(auroc, scores, labels)
    metrics["slice_average_precision"] = _if_two_classes(average_precision, scores, labels)
    metrics["subject_auroc"] = _if_two_classes(auroc, np.array(subject_scores), np.array(subject_labels))
    return metrics, records


def score_statistic(test: tuple[np.ndarray, np.ndarray], validation: tuple[np.ndarray, np.ndarray] | None) -> dict:
    """Slice-level AUROC of a statistic `(scores, labels)`, in the direction that is better on the validation split (higher is
    anomalous without one)."""
    direction = None if validation is None else _if_two_classes(auroc, *validation)
    sign = -1.0 if direction is not None and direction < 0.5 else 1.0
    return {"slice_auroc": _if_two_classes(auroc, sign * test[0], test[1]), "direction": sign}


def _thresholds(pooled: PooledScores, validation: list[Path], healthy_fpr: float) -> dict[str, float | None]:
    """Threshold of each policy that needs data; `None` where the data does not allow it."""
    maps, masks, healthy_maps, healthy_brain = [], [], [], []
    for case in map(Case.load, validation):
        if case.mask is not None:
            maps.append(case.maps[case.brain])
            masks.append(case.mask[case.brain])
        healthy = case.labels == 0
        healthy_maps.append(case.maps[healthy])
        healthy_brain.append(case.brain[healthy])
    has_lesion = any(mask.any() for mask in masks)
    has_healthy = any(brain.any() for brain in healthy_brain)
    return {
        "oracle": pooled.best_dice()[1] if pooled.num_positives else None,
        "validation": threshold_for_dice(maps, masks) if has_lesion else None,
        "healthy": threshold_for_fpr(healthy_maps, healthy_brain, healthy_fpr) if has_healthy else None,
    }


def _if_two_classes(metric: Callable, scores: np.ndarray, labels: np.ndarray) -> float | None:
    return float(metric(scores, labels == 1)) if len(np.unique(labels[labels >= 0])) == 2 else None
