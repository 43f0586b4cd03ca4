"""Our own protocol: voxels of the brain, pooled over the test split, under every threshold policy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from ...pipelines.postprocessing import remove_small_components
from ..cases import Case, Needs, Scores
from ..metrics import PooledScores, auroc, average_precision, dice, lesion_f1
from ..options import EvalOptions
from ..scoring import (
    group_interval,
    healthy_scores,
    healthy_threshold,
    masked_cases,
    name_interval,
    score_intervals,
)
from ..thresholds import threshold_for_dice, yen_threshold


TASK = "anomaly-detection"
TEXT = {
    "unit_of_averaging": (
        "pooled brain voxels; volume_dice and lesion_f1: mean over subjects with lesion; slices and subjects for AUROC"
    ),
    "threshold_policy": (
        "oracle: best pooled Dice on the test split; validation: best pooled Dice on the validation split; healthy:"
        " {healthy_fpr:g} of the voxels of healthy validation slices; yen: label-free, per subject; all chosen "
        "before small components are removed; own: the method's own masks of the slices that it calls anomalous"
    ),
}
COLUMNS = {
    "voxel_average_precision": "AP (voxels)",
    "voxel_auroc": "AUROC (voxels)",
    "dice_oracle": "Dice, oracle",
    "dice_validation": "Dice, validation",
    "dice_healthy": "Dice, healthy only",
    "dice_yen": "Dice, label-free",
    "volume_dice_validation": "Dice per volume, validation",
    "slice_auroc": "AUROC (slices)",
    "subject_auroc": "AUROC (subjects)",
    "dice_own": "Dice, own masks",
}
SWEEP = None
NEEDS = Needs()


def score(row: dict, files: dict[str, list[Path]], thresholds: None, options: EvalOptions) -> Scores:
    """Scores one method under every threshold policy, with one record per subject. The policy "own" is there for
    methods that make masks themselves. Where there are too many voxels to be exact, `error_bounds` are those of
    [`PooledScores`]."""
    test, validation = files["test"], files.get("validation", [])
    pooled = PooledScores()
    slice_scores, slice_labels, records, groups, masked_groups = [], [], [], [], []
    has_own = False
    for case in map(Case.load, test):
        if case.mask is not None:
            pooled.update(case.maps[case.brain], case.mask[case.brain], case.drawn_with)
            masked_groups.append(case.drawn_with)
        has_own |= case.own_mask is not None
        slice_scores.append(case.slice_scores)
        slice_labels.append(case.labels)
        records.append({"subject": case.subject, "label": case.label, "score": case.volume_score})
        groups.append(case.drawn_with)

    inside = [(case.maps[case.brain], case.mask[case.brain]) for case in masked_cases(validation)]
    has_lesion = any(mask.any() for _, mask in inside)
    found = {
        "oracle": pooled.best_dice()[1] if pooled.num_positives else None,
        "validation": threshold_for_dice(*zip(*inside, strict=True)) if has_lesion else None,
        "healthy": healthy_threshold(healthy_scores(validation), options.healthy_fpr),
    }
    metrics = {
        "voxel_average_precision": pooled.average_precision() if pooled.num_positives else None,
        "voxel_auroc": pooled.auroc() if pooled.num_positives and pooled.num_negatives else None,
    }
    policies = (*found, "yen", *(["own"] if has_own else []))
    for name, interval in pooled.intervals().items():
        metrics |= name_interval(f"voxel_{name}", interval)
    totals = _score_masks(test, records, found, policies, row["settings"]["min_component_size"])
    for policy, counts in totals.items():
        overlap, size = counts.sum(0)
        metrics[f"dice_{policy}"] = float(2 * overlap / size) if size else None
        interval = group_interval(2 * counts[:, 0], masked_groups[: len(counts)], counts[:, 1])
        metrics |= name_interval(f"dice_{policy}", interval)
    for name in ("volume_dice", "lesion_f1"):
        for policy in policies:
            key = f"{name}_{policy}".removeprefix("volume_")
            some = [(record[key], group) for record, group in zip(records, groups, strict=True) if key in record]
            values, owners = np.array([value for value, _ in some]), [group for _, group in some]
            metrics[f"{name}_{policy}"] = float(values.mean()) if some else None
            metrics |= name_interval(f"{name}_{policy}", group_interval(values, owners))
    metrics |= {f"threshold_{policy}": value for policy, value in found.items()}
    scores, labels = np.concatenate(slice_scores), np.concatenate(slice_labels)
    metrics["slice_auroc"] = _if_two_classes(auroc, scores, labels)
    metrics["slice_average_precision"] = _if_two_classes(average_precision, scores, labels)
    owners = np.repeat(groups, [len(one) for one in slice_labels])
    for name, interval in score_intervals(scores, labels, owners).items():
        metrics |= name_interval(f"slice_{name}", interval)
    subjects = [np.array([record[name] for record in records]) for name in ("score", "label")]
    metrics["subject_auroc"] = _if_two_classes(auroc, *subjects)
    metrics |= name_interval("subject_auroc", score_intervals(*subjects, np.array(groups))["auroc"])
    bounded = not pooled.is_exact and pooled.num_positives and pooled.num_negatives
    return Scores(metrics, records, {"error_bounds": pooled.error_bounds()} if bounded else {})


def score_statistic(
    test: tuple[np.ndarray, np.ndarray, np.ndarray], validation: tuple[np.ndarray, np.ndarray, np.ndarray] | None
) -> dict:
    """Returns the AUROC over slices of a statistic, scores, labels and names of groups `(N,)` each, in the direction
    that is better on the validation split (without one, high values are anomalous), and its interval. Slices of unknown
    label (-1) do not count."""
    direction = None if validation is None else _if_two_classes(auroc, *validation[:2])
    sign = -1.0 if direction is not None and direction < 0.5 else 1.0
    scores, labels, groups = sign * test[0], *test[1:]
    interval = name_interval("slice_auroc", score_intervals(scores, labels, groups)["auroc"])
    return {"slice_auroc": _if_two_classes(auroc, scores, labels), **interval, "direction": sign}


def _score_masks(
    test: list[Path], records: list[dict], found: dict[str, float | None], policies: tuple[str, ...], smallest: int
) -> dict[str, np.ndarray]:
    """Adds the scores of the masks under each policy to the records of the subjects with lesion; returns the voxels
    that prediction and reference share, and the sum of both, of every subject with a mask, `(N, 2)`: none without a
    threshold, and 0 if no subject has a lesion."""
    totals: dict[str, list] = {policy: [] for policy in policies}
    defined = [policy for policy in policies if found.get(policy, 0.0) is not None]
    lesions = 0
    for case, record in zip(map(Case.load, test), records, strict=True):
        if case.mask is None:
            continue
        reference = case.mask & case.brain
        lesions += np.count_nonzero(reference)
        for policy in defined:
            if policy == "own":
                predicted = case.own_mask & (case.own_labels == 1)[:, None, None]
            else:
                predicted = case.maps > (yen_threshold(case.maps[case.brain]) if policy == "yen" else found[policy])
            predicted = remove_small_components(predicted & case.brain, smallest, 3)
            totals[policy].append([(predicted & reference).sum(), predicted.sum() + reference.sum()])
            if reference.any():
                record[f"dice_{policy}"] = dice(predicted, reference)
                record[f"lesion_f1_{policy}"] = lesion_f1(predicted, reference)
    return {policy: np.reshape(counts, (-1, 2)) * float(lesions > 0) for policy, counts in totals.items()}


def _if_two_classes(metric: Callable, scores: np.ndarray, labels: np.ndarray) -> float | None:
    known = labels >= 0
    scores, labels = scores[known], labels[known]
    return float(metric(scores, labels == 1)) if len(np.unique(labels)) == 2 else None
