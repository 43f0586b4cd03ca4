"""Chooses the values of a pipeline that turn its maps into masks, from labels of slices, without any mask."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import torch

from ..checks import check_choice, check_integer
from ..data.prepared import PreparedSplit
from ..pipelines.base import AnomalyPipeline
from .cases import slice_numbers
from .thresholds import otsu_threshold, threshold_for_fpr, yen_threshold


CALIBRATION_POLICIES = ("labels", "healthy", "yen", "otsu")


class LabelledSlices:
    """The slices of a prepared split with their labels, subject by subject, for [`calibrate`]: all, or `max_slices` of
    them, evenly spread. Those of unknown label (-1) are left out, and the column of masks is not read."""

    def __init__(self, split: PreparedSplit, max_slices: int | None = None):
        self.split = split
        self.rows = np.flatnonzero(split.labels >= 0)
        if max_slices is not None:
            check_integer("max_slices", max_slices, 1)
            if max_slices < len(self.rows):
                self.rows = self.rows[np.linspace(0, len(self.rows) - 1, max_slices).round().astype(int)]

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        """Yields dicts `image (N, C, H, W)`, `brain (N, H, W)`, `label (N,)`, `slice (N,)` of the chosen slices of one
        subject each; `slice` is as of [`slice_numbers`]."""
        for subject in self.split.subjects:
            own = self.split.subject_rows(subject)
            rows = self.rows[(self.rows >= own.start) & (self.rows < own.stop)]
            if len(rows):
                item = self.split.read_rows(rows, ("image", "brain", "label", "slice"))
                yield {**item, "slice": slice_numbers(self.split, subject, item["slice"])}


@torch.no_grad()
def calibrate(
    pipeline: AnomalyPipeline,
    slices: Iterable[dict],
    policy: str = "labels",
    *,
    guidance_scales: Sequence[float] = (),
    healthy_fpr: float = 0.05,
    seed: int = 0,
    batch_size: int | None = None,
    noise: torch.Tensor | Callable | None = None,
) -> dict:
    """Chooses the values that turn a pipeline's maps into masks, from slices with labels and without any mask, and
    puts them into its configuration, so that they are saved with it.

    `policy="labels"` is the calibration of a method that has one of its own (AnoFPDM), [`~AnomalyPipeline.calibrate`],
    which `guidance_scales` are for. For any pipeline there is a `threshold` of its maps: `"healthy"`, the score that a
    share `healthy_fpr` of the brain pixels of healthy slices exceeds; `"yen"` and `"otsu"`, of all brain pixels, which
    need no labels.

    Args:
        slices (iterable of `dict`, to be walked more than once): As of [`LabelledSlices`]; nothing else is read.
        seed, batch_size, noise: As of the pipeline's call.

    Returns:
        `dict`: The record: `policy`, `slices`, `anomalous_slices`, `values` (what went into the configuration), and
        for `"labels"` what the method adds.
    """
    check_choice("policy", policy, CALIBRATION_POLICIES)
    if guidance_scales and policy != "labels":
        raise ValueError(f"`guidance_scales` belongs to the policy labels, got it with {policy}.")
    arguments = {"seed": seed, "batch_size": batch_size, "noise": noise}
    if policy == "labels":
        return pipeline.calibrate(slices, guidance_scales=guidance_scales, **arguments)
    scores, labels = [], []
    for item in slices:
        brain = torch.as_tensor(item["brain"], dtype=torch.bool, device=pipeline._execution_device)
        images = torch.as_tensor(item["image"], device=brain.device)
        maps = pipeline.map_slices(images, brain, item["slice"].tolist(), **arguments).maps.numpy()
        used = item["label"] == 0 if policy == "healthy" else np.ones(len(maps), bool)
        scores.append(maps[used[:, None, None] & item["brain"]])
        labels.append(item["label"])
    scores, labels = np.concatenate(scores), np.concatenate(labels)
    if policy == "healthy":
        threshold = threshold_for_fpr(scores, healthy_fpr)
    else:
        threshold = yen_threshold(scores) if policy == "yen" else otsu_threshold(scores)
    pipeline.register_to_config(threshold=threshold)
    return {
        "policy": policy,
        "slices": len(labels),
        "anomalous_slices": int((labels == 1).sum()),
        "values": {"threshold": threshold},
    }
