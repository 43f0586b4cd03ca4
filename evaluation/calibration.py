"""Thresholds of anomaly maps. Each function stands for one threshold policy of the protocol: validation data with
lesion masks, validation data of healthy subjects only, or no labels at all. A threshold is used as `map > threshold`,
in float32. `calibrate` chooses the values of a pipeline from labels of slices, without any mask."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import torch

from ..data.prepared import PreparedSplit
from ..pipelines.base import AnomalyPipeline
from ..pipelines.pipeline_anofpdm import AnoFPDMPipeline
from .metrics import PooledScores


CALIBRATION_POLICIES = ("labels", "healthy", "yen", "otsu")


def threshold_for_dice(maps: Sequence[np.ndarray], masks: Sequence[np.ndarray]) -> float:
    """
    The threshold with the highest Dice over the pooled voxels of validation volumes with lesion masks. The search is
    over all distinct scores and exact up to 50 million voxels, and over bins 0.05 % wide above (see [`PooledScores`]).
    The published programs search a grid (AnoFPDM, ANDi) or halve an interval (SADM), which can miss the optimum. The
    pooled optimum weighs a volume by its lesion size; it is not the optimum of the mean Dice over volumes.

    Args:
        maps (sequence of `np.ndarray`, or one array):
            Anomaly maps, post-processed as they will be at test time.
        masks (sequence of `np.ndarray`, boolean or 0/1, or one array):
            Lesion masks of the same shapes.

    Returns:
        `float`: the threshold, halfway between two scores.
    """
    _check_lengths("masks", maps, masks)
    pooled = PooledScores()
    for scores, mask in zip(maps, masks, strict=True):
        pooled.update(scores, mask)
    if not pooled.num_positives:
        raise ValueError(
            "`masks` must hold at least one lesion voxel; for healthy validation data use `threshold_for_fpr`."
        )
    return pooled.best_dice()[1]


def threshold_for_fpr(healthy_maps: Sequence[np.ndarray], brain: Sequence[np.ndarray], fpr: float) -> float:
    """
    The lowest score that at most a share `fpr` of the brain voxels of healthy subjects exceeds, pooled over them. An
    order statistic, so exact whatever ties there are. (The program of SADM reads it off scikit-learn's thinned ROC
    curve, which returns the smallest score at every rate.)

    Args:
        healthy_maps (sequence of `np.ndarray`, or one array):
            Anomaly maps of healthy subjects, post-processed as they will be at test time.
        brain (sequence of boolean `np.ndarray`, or one array):
            Brain masks of the same shapes: only voxels inside count.
        fpr (`float`):
            Accepted false positive rate in [0, 1), for example 0.05.

    Returns:
        `float`: the threshold; at `fpr=0` the largest healthy score.
    """
    if not 0 <= fpr < 1:
        raise ValueError(f"`fpr` must be at least 0 and below 1, got {fpr}.")
    _check_lengths("brain", healthy_maps, brain)
    inside = []
    for scores, mask in zip(healthy_maps, brain, strict=True):
        scores, mask = np.asarray(scores, dtype=np.float32), np.asarray(mask, dtype=bool)
        if scores.shape != mask.shape:
            raise ValueError(
                f"`healthy_maps` and `brain` must have the same shapes, got {scores.shape} and {mask.shape}."
            )
        inside.append(scores[mask])
    values = _finite("healthy_maps", np.concatenate(inside) if inside else np.empty(0))
    rank = values.size - 1 - math.floor(fpr * values.size)
    return float(np.partition(values, rank)[rank])


def yen_threshold(values: np.ndarray) -> float:
    """
    Label-free threshold of one map: Yen's maximum correlation criterion (Yen, Chang, Chang 1995) on a histogram of 256
    bins over the range of the values, as scikit-image's `threshold_yen`. ANDi applies it per volume, background
    included. It does not change when the map is scaled, so it needs no normalisation, but it always finds something: a
    healthy volume gets a mask as well.

    Args:
        values (`np.ndarray`):
            Anomaly map of one volume, of any shape.

    Returns:
        `float`: centre of a bin; the value itself for a constant map, so that the mask is empty.
    """
    values = _finite("values", np.asarray(values).ravel())
    # Equal, or so nearly equal that 256 bins have no room between them.
    if values.max() - values.min() <= 256 * np.spacing(max(abs(values.max()), abs(values.min()))):
        return float(values.max())
    counts, edges = np.histogram(values, bins=256)
    share = counts / values.size
    # p: share of values up to a bin; square_low and square_high: sum of squared shares up to it and beyond it.
    p = share.cumsum()[:-1]
    square_low = (share**2).cumsum()[:-1]
    square_high = (share**2)[::-1].cumsum()[::-1][1:]
    criterion = 2 * np.log(p * (1 - p)) - np.log(square_low * square_high)
    best = int(criterion.argmax())
    return float((edges[best] + edges[best + 1]) / 2)


def otsu_threshold(values: np.ndarray) -> float:
    """
    Label-free threshold of one map: the largest variance between the two classes (Otsu 1979) on a histogram of 256 bins over the
    range of the values, as scikit-image's `threshold_otsu`. Like Yen's it always finds something.

    Args:
        values (`np.ndarray`):
            Anomaly map of one volume, of any shape.

    Returns:
        `float`: centre of a bin; the value itself for a constant map, so that the mask is empty.
    """
    values = _finite("values", np.asarray(values).ravel())
    if values.max() - values.min() <= 256 * np.spacing(max(abs(values.max()), abs(values.min()))):
        return float(values.max())
    counts, edges = np.histogram(values, bins=256)
    centres = (edges[:-1] + edges[1:]) / 2
    # Number and mean of the values up to a bin and beyond it. The first and the last bin are never empty.
    below, above = counts.cumsum()[:-1], counts[::-1].cumsum()[::-1][1:]
    mean_below = (counts * centres).cumsum()[:-1] / below
    mean_above = (counts * centres)[::-1].cumsum()[::-1][1:] / above
    return float(centres[(below * above * (mean_below - mean_above) ** 2.0).argmax()])


def similarity_threshold(similarity: torch.Tensor, labels: torch.Tensor) -> tuple[float, int]:
    """
    AnoFPDM's threshold of the similarity, below which a slice is unhealthy: of 100 low quantiles (0.5 to 9.5 %) of the healthy slices
    the first with the fewest wrong labels (method card 6.1).

    Args:
        similarity (`torch.Tensor` of shape `(N,)`): Of every slice, float32.
        labels (`torch.Tensor` of shape `(N,)`): 0 healthy, 1 unhealthy; at least one slice of each.

    Returns:
        `tuple[float, int]`: the threshold, and how many slices are on the wrong side of it.
    """
    healthy, unhealthy = similarity[labels == 0], similarity[labels == 1]
    if not len(healthy) or not len(unhealthy):
        raise ValueError(
            "`labels` must hold healthy (0) and unhealthy (1) slices, got"
            f" {len(healthy)} and {len(unhealthy)}: choose other validation data, or the policy healthy, yen or otsu."
        )
    levels = torch.linspace(0.005, 0.095, 100, dtype=healthy.dtype, device=healthy.device)
    candidates = torch.quantile(healthy, levels)[:, None]
    wrong = (unhealthy > candidates).sum(1) + (healthy < candidates).sum(1)
    # The first of equals; `argmin` of torch does not promise it.
    best = int(np.argmin(wrong.cpu().numpy()))
    return float(candidates[best]), int(wrong[best])


class LabelledSlices:
    """
    The slices of a prepared split with their labels, subject by subject, for [`calibrate`]. The column of masks is not read.

    Args:
        split ([`PreparedSplit`]): Slices of unknown label (-1) are left out.
        max_slices (`int`, *optional*): Take this many of the slices, evenly spread; all by default.
    """

    def __init__(self, split: PreparedSplit, max_slices: int | None = None):
        if max_slices is not None and max_slices < 1:
            raise ValueError(f"`max_slices` must be at least 1, got {max_slices}.")
        self.split = split
        self.rows = np.flatnonzero(split.labels >= 0)
        if max_slices is not None and max_slices < len(self.rows):
            self.rows = self.rows[np.linspace(0, len(self.rows) - 1, max_slices).round().astype(int)]

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        """Dicts `image (N, C, H, W)`, `brain (N, H, W)`, `label (N,)`, `slice (N,)` of the chosen slices of one subject each."""
        for subject in self.split.subjects:
            own = self.split.subject_rows(subject)
            rows = self.rows[(self.rows >= own.start) & (self.rows < own.stop)]
            if len(rows):
                yield self.split.read_rows(rows, ("image", "brain", "label", "slice"))


@torch.no_grad()
def calibrate(
    pipeline: AnomalyPipeline,
    slices: Iterable[dict],
    policy: str = "labels",
    *,
    guidance_scales: Sequence[float] = (),
    healthy_fpr: float = 0.05,
    seed: int = 0,
    batch_size: int = 16,
    noise: torch.Tensor | Callable | None = None,
) -> dict:
    """
    Chooses the values that turn a pipeline's maps into masks, from slices with labels and without any mask, and puts them into its
    configuration, so that they are saved with it.

    `policy="labels"` is AnoFPDM's own calibration. For every guidance scale w: `similarity_threshold` by the fewest wrong image labels,
    and `gap_scale`, the largest gap of the unhealthy slices. Then the w with the highest image-level accuracy, among equals that
    with the largest mean gap of the unhealthy slices (this is how the method card reads the authors' figure; their program does not
    choose w). Each scale costs a forward process of every slice. For any pipeline there is a `threshold`: `"healthy"`, the score that a
    share `healthy_fpr` of the brain pixels of healthy slices exceeds; `"yen"` and `"otsu"`, of all brain pixels, which need no labels.

    Args:
        pipeline ([`AnomalyPipeline`]): What is calibrated, with all its other values as they will be used.
        slices (iterable of `dict`, to be walked more than once):
            For each subject `image (N, C, H, W)` in the processor's value range, `label (N,)` (1 unhealthy, 0 healthy), `slice (N,)`,
            numbers in the volume, which the random numbers depend on, and `brain (N, H, W)` for a `threshold`. Nothing else is
            read. See [`LabelledSlices`].
        policy (`str`, defaults to `"labels"`): `"labels"`, `"healthy"`, `"yen"` or `"otsu"`.
        guidance_scales (`Sequence[float]`, *optional*): Candidates of w; the pipeline's own by default.
        healthy_fpr (`float`, defaults to 0.05): Of the policy "healthy".
        seed, batch_size, noise: As of the pipeline's call.

    Returns:
        `dict`: The record: `policy`, `slices`, `anomalous_slices`, `values` (what went into the configuration), and for `"labels"`
        `image_accuracy` and `candidates`, one record per w.

    Raises:
        ValueError: An unknown policy, one that the pipeline or the labels do not allow, or a `guidance_scales` without use.
    """
    if policy not in CALIBRATION_POLICIES:
        raise ValueError(f"`policy` must be one of {', '.join(CALIBRATION_POLICIES)}, got {policy!r}.")
    if policy == "labels" and not isinstance(pipeline, AnoFPDMPipeline):
        raise ValueError(
            f"`policy` labels is that of AnoFPDMPipeline, got {type(pipeline).__name__}: use healthy, yen or otsu."
        )
    if guidance_scales and policy != "labels":
        raise ValueError(f"`guidance_scales` belongs to the policy labels, got it with {policy}.")
    labels = np.concatenate([np.asarray(item["label"]) for item in slices])
    record = {"policy": policy, "slices": len(labels), "anomalous_slices": int((labels == 1).sum())}
    arguments = {"seed": seed, "batch_size": batch_size, "noise": noise}
    if policy == "labels":
        scales = list(guidance_scales) or [pipeline.config.guidance_scale]
        record["candidates"] = [_candidate(pipeline, slices, labels, scale, arguments) for scale in scales]
        best = max(record["candidates"], key=lambda one: (one["image_accuracy"], one["mean_gap"]))
        record["image_accuracy"] = best["image_accuracy"]
        # A threshold would be used instead of the method's own masks.
        names = ("guidance_scale", "similarity_threshold", "gap_scale")
        record["values"] = {name: best[name] for name in names} | {"threshold": None}
    else:
        # Only what is drawn has a `noise`.
        arguments = {name: value for name, value in arguments.items() if value is not None}
        record["values"] = {"threshold": _map_threshold(pipeline, slices, policy, healthy_fpr, arguments)}
    pipeline.register_to_config(**record["values"])
    return record


def _candidate(pipeline: AnoFPDMPipeline, slices: Iterable[dict], labels: np.ndarray, scale: float, arguments: dict):
    """What AnoFPDM's calibration says with one guidance scale."""
    similarity, gap = [], []
    for item in slices:
        images = torch.as_tensor(item["image"]).to(pipeline._execution_device)
        numbers = [int(number) for number in item["slice"]]
        statistics = pipeline.slice_statistics(images, numbers, guidance_scale=scale, **arguments)
        similarity.append(statistics["similarity"].float().cpu())
        gap.append(statistics["gap"].float().cpu())
    threshold, wrong = similarity_threshold(torch.cat(similarity), torch.from_numpy(labels))
    unhealthy = torch.cat(gap)[torch.from_numpy(labels == 1)]
    return {
        "guidance_scale": float(scale),
        "similarity_threshold": threshold,
        "gap_scale": unhealthy.amax(0).tolist(),
        "mean_gap": float(unhealthy.mean()),
        "wrong_labels": wrong,
        "image_accuracy": 1 - wrong / int((labels >= 0).sum()),
    }


def _map_threshold(
    pipeline: AnomalyPipeline, slices: Iterable[dict], policy: str, healthy_fpr: float, arguments: dict
) -> float:
    """Threshold of the post-processed maps, pooled over all slices."""
    maps, brains = [], []
    for item in slices:
        brain = np.asarray(item["brain"], bool)
        active = np.flatnonzero(brain.any((1, 2)))
        images = torch.as_tensor(item["image"])[active].to(pipeline._execution_device)
        numbers = [int(item["slice"][row]) for row in active]
        raw, added = np.zeros(brain.shape, np.float32), None
        results = pipeline.compute_maps(images, numbers, **arguments, **pipeline.default_settings())
        raw[active] = results.maps.float().cpu().numpy()
        if results.added is not None:
            added = np.zeros(brain.shape, np.float32)
            added[active] = results.added.float().cpu().numpy()
        filtered = pipeline.postprocessing.filter(raw, brain, added)
        chosen = np.asarray(item["label"]) == 0 if policy == "healthy" else slice(None)
        maps.append(filtered[chosen])
        brains.append(brain[chosen])
    if policy == "healthy":
        return threshold_for_fpr(maps, brains, healthy_fpr)
    values = np.concatenate([part[inside] for part, inside in zip(maps, brains, strict=True)])
    return yen_threshold(values) if policy == "yen" else otsu_threshold(values)


def _check_lengths(name: str, maps: Sequence[np.ndarray], masks: Sequence[np.ndarray]) -> None:
    if len(maps) != len(masks):
        raise ValueError(f"`{name}` must have one entry per map, got {len(masks)} for {len(maps)} maps.")


def _finite(name: str, values: np.ndarray) -> np.ndarray:
    if not values.size:
        raise ValueError(f"`{name}` must hold at least one voxel (inside the brain), got none.")
    if not np.isfinite(values).all():
        raise ValueError(f"`{name}` must be finite, got nan or infinite values.")
    return values
