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
    """The slices of a prepared split with their labels, subject by subject, for [`calibrate`]. The column of masks is
    not read.

    Args:
        split ([`PreparedSplit`]): Slices of unknown label (-1) are left out.
        max_slices (`int`, *optional*): Take this many of the slices, evenly spread; all by default.
    """

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
    batch_size: int = 16,
    noise: torch.Tensor | Callable | None = None,
) -> dict:
    """Chooses the values that turn a pipeline's maps into masks, from slices with labels and without any mask, and
    puts them into its configuration, so that they are saved with it.

    `policy="labels"` is the calibration of a method that has one of its own (AnoFPDM), [`~AnomalyPipeline.calibrate`].
    For any pipeline there is a `threshold`: `"healthy"`, the score that a share `healthy_fpr` of the brain pixels of
    healthy slices exceeds; `"yen"` and `"otsu"`, of all brain pixels, which need no labels.

    Args:
        pipeline ([`AnomalyPipeline`]): What is calibrated, with all its other values as they will be used.
        slices (iterable of `dict`, to be walked more than once):
            For each subject `image (N, C, H, W)` in the processor's value range, `label (N,)` (1 unhealthy, 0
            healthy), `slice (N,)`, the numbers that the random numbers depend on, and `brain (N, H, W)` for a
            `threshold`. Nothing else is read. See [`LabelledSlices`].
        policy (`str`, defaults to `"labels"`): `"labels"`, `"healthy"`, `"yen"` or `"otsu"`.
        guidance_scales (`Sequence[float]`, *optional*):
            Candidates of the policy "labels"; the pipeline's own by default.
        healthy_fpr (`float`, defaults to 0.05): Of the policy "healthy".
        seed, batch_size, noise: As of the pipeline's call.

    Returns:
        `dict`: The record: `policy`, `slices`, `anomalous_slices`, `values` (what went into the configuration), and
        for `"labels"` what the method adds.

    Raises:
        ValueError: An unknown policy, one that the pipeline or the labels do not allow, or a `guidance_scales` without
        use.
    """
    check_choice("policy", policy, CALIBRATION_POLICIES)
    if guidance_scales and policy != "labels":
        raise ValueError(f"`guidance_scales` belongs to the policy labels, got it with {policy}.")
    arguments = {"seed": seed, "batch_size": batch_size, "noise": noise}
    if policy == "labels":
        return pipeline.calibrate(slices, guidance_scales=guidance_scales, **arguments)
    values = {"threshold": _map_threshold(pipeline, slices, policy, healthy_fpr, arguments)}
    pipeline.register_to_config(**values)
    labels = np.concatenate([item["label"] for item in slices])
    anomalous = int((labels == 1).sum())
    return {"policy": policy, "slices": len(labels), "anomalous_slices": anomalous, "values": values}


def _map_threshold(
    pipeline: AnomalyPipeline, slices: Iterable[dict], policy: str, healthy_fpr: float, arguments: dict
) -> float:
    """Threshold of the post-processed maps, pooled over all slices."""
    maps, brains = [], []
    device = pipeline._execution_device
    for item in slices:
        images, brain = torch.as_tensor(item["image"]).to(device), torch.as_tensor(item["brain"], device=device)
        results = pipeline.map_slices(images, brain.bool(), item["slice"].tolist(), **arguments)
        chosen = np.asarray(item["label"]) == 0 if policy == "healthy" else slice(None)
        maps.append(results.maps.numpy()[chosen])
        brains.append(np.asarray(item["brain"], bool)[chosen])
    if policy == "healthy":
        return threshold_for_fpr(maps, brains, healthy_fpr)
    values = np.concatenate([part[inside] for part, inside in zip(maps, brains, strict=True)])
    return yen_threshold(values) if policy == "yen" else otsu_threshold(values)
