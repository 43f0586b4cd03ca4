"""The free-response curve: how many lesions are found at how many false positives a volume."""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from .metrics import draw_groups, percentiles


# T thresholds, falling.

RATES = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)  # false positives a volume at which the recall is read off
# Shares of the scored voxels that exceed the thresholds: 32 from a hundred-thousandth to a tenth, evenly on the
# logarithm. Below that masks flow together to one component, which finds everything.
SHARES = np.geomspace(1e-5, 0.1, 32)


def count_detections(
    maps: np.ndarray, reference: np.ndarray, brain: np.ndarray, thresholds: np.ndarray, smallest: int, volumes: int
) -> np.ndarray:
    """Returns what [`~evaluation.metrics.lesion_counts`] calls found lesions and wrong components, `(T, 2)`, of the
    masks `map > threshold` inside the brain of one volume `(N, H, W)`, without components of fewer than `smallest`
    voxels. `reference` lies inside the brain.

    Where one volume alone has so many wrong components that the mean of all `volumes` exceeds the last of [`RATES`], no
    recall is read off below; the counts are repeated from there on, which saves most of the time."""
    structure = np.ones((3, 3, 3))
    lesion_of = ndimage.label(reference, structure=structure)[0][reference]
    counts = np.zeros((len(thresholds), 2), np.int64)
    for step, threshold in enumerate(np.asarray(thresholds, np.float32)):
        labels, number = ndimage.label((maps > threshold) & brain, structure=structure)
        kept = np.ones(number + 1, bool)
        if smallest > 1:
            kept = np.bincount(labels.ravel(), minlength=number + 1) >= smallest
        kept[0] = False
        inside = labels[reference]
        touched = np.zeros(number + 1, bool)
        touched[inside] = True
        counts[step:] = np.unique(lesion_of[kept[inside]]).size, np.count_nonzero(kept & ~touched)
        if counts[step, 1] > RATES[-1] * volumes:
            break
    return counts


def free_response(
    counts: np.ndarray, lesions: np.ndarray, groups: np.ndarray, thresholds: np.ndarray
) -> tuple[dict, dict]:
    """
    Returns the metrics `froc_score` and `froc_recall_RATE` with the ends of their intervals, and the curve, as a report
    holds them; `None` where there is no lesion. The curve ends at the first threshold with more false positives a volume
    than the last of [`RATES`].

    The recall at a rate is the highest one of the thresholds down to which no threshold has more false positives a
    volume than that: where components flow together, fewer of them are no merit. It is 0 where already the highest
    threshold has more. The score is the mean over [`RATES`].

    Args:
        counts (`np.ndarray` of shape `(V, T, 2)`): Of each volume, as [`count_detections`].
        lesions (`np.ndarray` of shape `(V,)`): Number of lesions; 0 of a healthy volume.
        groups (`np.ndarray` of shape `(V,)`): Number of the group, which is drawn as a whole for an interval.
        thresholds (`np.ndarray` of shape `(T,)`): Falling.
    """
    number = int(groups.max()) + 1 if len(groups) else 0
    # Of each group: found lesions and wrong components at each threshold, lesions, volumes.
    sums = np.zeros((number, 2 * len(thresholds) + 2))
    np.add.at(sums, groups, np.column_stack([counts[..., 0], counts[..., 1], lesions, np.ones(len(lesions))]))
    recall, wrong, recalls = _read_off(sums.sum(0)[None])
    shown = slice(0, int(np.argmax(np.append(wrong[0], np.inf) > RATES[-1])) + 1)
    names = [f"froc_recall_{rate:g}" for rate in RATES] + ["froc_score"]
    metrics = {name: None if np.isnan(value) else float(value) for name, value in zip(names, recalls[0], strict=True)}
    ends = [(None, None)] * len(names)
    if number > 1:
        times = np.stack([np.bincount(drawn, minlength=number) for drawn in draw_groups(number)])
        ends = [percentiles(values) for values in _read_off(times @ sums)[2].T]
    for name, (low, high) in zip(names, ends, strict=True):
        metrics |= {f"{name}_low": low, f"{name}_high": high}
    curve = {
        "thresholds": np.asarray(thresholds)[shown].tolist(),
        "recall": recall[0, shown].tolist() if lesions.any() else None,
        "false_positives": wrong[0, shown].tolist(),
        "rates": list(RATES),
        "lesions": int(lesions.sum()),
        "volumes": len(lesions),
    }
    return metrics, curve


def _read_off(sums: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Recall and false positives a volume at each threshold, `(R, T)`, and the recall at [`RATES`] and their mean,
    `(R, 8)`, of R rows of sums; `nan` where there is no lesion."""
    found, wrong = np.split(sums[:, :-2], 2, 1)
    with np.errstate(invalid="ignore", divide="ignore"):
        recall, wrong = found / sums[:, -2:-1], wrong / sums[:, -1:]
    most = np.maximum.accumulate(wrong, 1)
    recalls = np.stack([np.where(most <= rate, recall, 0).max(1, initial=0) for rate in RATES], 1)
    recalls[sums[:, -2] == 0] = np.nan
    return recall, wrong, np.column_stack([recalls, recalls.mean(1)])
