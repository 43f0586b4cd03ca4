"""From one subject to the rows that a prepared data set keeps of it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from .geometry import Geometry, plane_orientation
from .processor import ProcessedVolume, VolumeProcessor
from .raters import RaterRule
from .readers import Subject
from .rules import SliceRule
from .volume import read_volume


# N slices, C modalities, A annotations, H x W pixels.


def slices_of(
    subject: Subject,
    processor: VolumeProcessor,
    rule: SliceRule,
    raters: RaterRule | None,
    training: bool,
    annotations: int,
) -> tuple[dict, dict]:
    """The kept slices of a subject, and what `subjects.parquet` says of it."""
    processed = processor.preprocess(subject.volume, subject.brain)
    geometry = processed.geometry
    images, brain = processed.slices.numpy(), processed.brain.numpy()
    marked = [_read_marked(path, subject, processed) for path in subject.masks]
    if raters is not None and marked:
        spacing = np.linalg.norm(geometry.input_affine[:3, :3], axis=0)
        marked = list(raters.annotate(marked[0], spacing, subject.name))
    masks = np.zeros((len(images), annotations, *brain.shape[1:]), dtype=np.uint8)
    touched = np.zeros(len(images), dtype=bool)
    label = subject.label
    for index, array in enumerate(marked):
        array = array.astype(np.float32)
        if rule.masks == "linear":
            masks[:, index] = geometry.to_network(array) > 0.5
        else:
            masks[:, index] = processor.preprocess_mask(array, geometry)
        touched |= _touched(array, geometry)
        if subject.label is None:
            label = max(label or 0, int(array.any()))
    slice_labels = masks.any((1, 2, 3)).astype(np.int8) if subject.masks else np.full(len(images), -1, dtype=np.int8)
    if not subject.masks and label is not None:
        slice_labels[:] = label

    share = brain.mean((1, 2))
    last = len(images) - 1 if rule.last is None else rule.last
    kept = np.arange(rule.first or 0, min(last + 1, len(images)), rule.step)
    kept = kept[(share[kept] > 0) & (share[kept] >= rule.min_brain)]
    if rule.min_sum:
        bright = np.flatnonzero(_intensity_sums(processed, processor) > rule.min_sum)
        kept = kept[(kept >= bright.min(initial=len(images))) & (kept <= bright.max(initial=-1))]
    if training and rule.train == "healthy_by_mask":
        kept = kept[~touched[kept]]
    if training and rule.train == "healthy_by_label" and label != 0:
        kept = kept[:0]

    arrays = {
        "image": images[kept],
        "mask": masks[kept],
        "brain": brain[kept].astype(np.uint8),
        "label": slice_labels[kept],
        "slice": kept.astype(np.int32),
    }
    return arrays, {
        "group": subject.group,
        "label": -1 if label is None else label,
        "age": subject.age,
        "site": subject.site,
        "annotations": len(marked),
        "rows": len(kept),
        "anomalous_rows": int((slice_labels[kept] == 1).sum()),
        "shape": list(geometry.input_shape),
        "spacing": np.linalg.norm(geometry.input_affine[:3, :3], axis=0).tolist(),
        "affine": geometry.input_affine.ravel().tolist(),
        "network_shape": list(geometry.network_shape),
        "network_affine": geometry.network_affine.ravel().tolist(),
    }


def _read_marked(path: Path, subject: Subject, processed: ProcessedVolume) -> np.ndarray:
    """What an annotation marks on the grid of the input, `(X, Y, Z)` bool."""
    mask, geometry = read_volume(path), processed.geometry
    if mask.shape != geometry.input_shape or not np.allclose(mask.affine, geometry.input_affine, atol=1e-3):
        raise ValueError(
            f"The mask {path} must lie on the grid of {processed.source.name}: shape {geometry.input_shape}, got"
            f" {mask.shape}, or another affine."
        )
    (array,) = mask.arrays.values()
    if subject.mask_above >= 1 and array.max() == 1:
        # It would count as empty without a word.
        raise ValueError(
            f"The mask {path} holds 0 and 1, and values above {subject.mask_above:g} are marked: set `label_max: 1`"
            " (or a smaller `mask_above`)."
        )
    return array > subject.mask_above


def _intensity_sums(processed: ProcessedVolume, processor: VolumeProcessor) -> np.ndarray:
    """`(N,)`: for every slice the sum that `SliceRule.min_sum` is compared with."""
    geometry = processed.geometry
    mean = np.zeros(geometry.input_shape)
    for array in processed.source.arrays.values():
        mean += array / np.quantile(array[array > 0], processor.config.quantile) / len(processed.source.arrays)
    slice_axis = int(np.argsort(plane_orientation(geometry.input_affine, geometry.plane)[:, 0])[2])
    others = tuple(axis for axis in range(3) if axis != slice_axis)
    # A volume that holds every slice's sum in all of its voxels, brought to the network's slices.
    sums = np.broadcast_to(mean.sum(others, keepdims=True), mean.shape).astype(np.float32)
    return geometry.to_network(sums, nearest=True).max((1, 2))


def _touched(mask: np.ndarray, geometry: Geometry) -> np.ndarray:
    """`(N,)` bool: slices that see any voxel of a mask. Every voxel counts, as the widened kernel leaves none out."""
    return dataclasses.replace(geometry, antialias=True, bspline=False).to_network(mask).any((1, 2))
