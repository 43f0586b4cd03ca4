"""Makes the rows that a prepared data set keeps of one subject."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from ..volumes.geometry import Geometry, plane_orientation
from ..volumes.processor import ProcessedVolume, VolumeProcessor
from ..volumes.volume import read_volume
from .raters import RaterRule
from .readers.subjects import Subject
from .rules import SliceRule


# N slices, C modalities, A annotations, H x W pixels.


def slices_of(
    subject: Subject,
    processor: VolumeProcessor,
    rule: SliceRule,
    raters: RaterRule | None,
    training: bool,
    annotations: int,
) -> tuple[dict, dict]:
    """Makes the slices that are kept of a subject, which is in the `training` split or not. Returns arrays
    `image (N, C, H, W)`, `mask (N, A, H, W)` (A is `annotations`; those that the subject lacks are zeros),
    `brain (N, H, W)`, `label (N,)` and `slice (N,)`, and its columns of `subjects.parquet`."""
    processed = processor.preprocess(subject.volume, subject.brain)
    geometry = processed.geometry
    images, brain = processed.slices.numpy(), processed.brain.numpy()
    marked = given = [_read_marked(path, subject, processed) for path in subject.masks]
    if raters is not None and marked:
        spacing = np.linalg.norm(geometry.input_affine[:3, :3], axis=0)
        marked = list(raters.annotate(marked[0], spacing, subject.name))
    masks = np.zeros((len(images), annotations, *brain.shape[1:]), dtype=np.uint8)
    for index, array in enumerate(marked):
        if rule.masks == "linear":
            masks[:, index] = geometry.to_network(array) > 0.5
        else:
            masks[:, index] = processor.preprocess_mask(array, geometry)

    # Raters that are made may drop a lesion, which is there nevertheless.
    dropped = [] if raters is None else given
    label, slice_labels = subject.label, masks.any((1, 2, 3)).astype(np.int8)
    for array in dropped:
        slice_labels |= processor.preprocess_mask(array, geometry).any((1, 2))
    if given and label is None:
        label = int(any(array.any() for array in given))
    if not given:
        slice_labels[:] = -1 if label is None else label

    kept = _kept_slices(rule, processed, processor)
    if training and rule.train == "healthy_by_mask":
        for array in (*marked, *dropped):
            kept = kept[~_touched(array, geometry)[kept]]
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


def _kept_slices(rule: SliceRule, processed: ProcessedVolume, processor: VolumeProcessor) -> np.ndarray:
    """Returns the numbers of the slices that a rule keeps, whatever is marked in them."""
    share = processed.brain.numpy().mean((1, 2))
    count = len(share)
    last = count - 1 if rule.last is None else rule.last
    kept = np.arange(rule.first or 0, min(last + 1, count), rule.step)
    kept = kept[(share[kept] > 0) & (share[kept] >= rule.min_brain)]
    if rule.min_sum:
        bright = np.flatnonzero(_intensity_sums(processed, processor) > rule.min_sum)
        kept = kept[(kept >= bright.min(initial=count)) & (kept <= bright.max(initial=-1))]
    return kept


def _read_marked(path: Path, subject: Subject, processed: ProcessedVolume) -> np.ndarray:
    """Reads what an annotation marks on the grid of the input, `(X, Y, Z)` bool."""
    mask, geometry = read_volume(path), processed.geometry
    if len(mask.arrays) != 1:
        raise ValueError(f"The mask {mask.name} must have one channel, got {len(mask.arrays)}.")
    if mask.shape != geometry.input_shape or not np.allclose(mask.affine, geometry.input_affine, atol=1e-3):
        raise ValueError(
            f"The mask {mask.name} must lie on the grid of {processed.source.name}: shape {geometry.input_shape}, got"
            f" {mask.shape}, or another affine."
        )
    (array,) = mask.arrays.values()
    highest = array.max()
    # It would count as empty without a word. Fractions of a voxel may all be small; whole numbers mark something.
    if 0 < highest <= subject.mask_above and (subject.mask_max is not None or (array == np.rint(array)).all()):
        option = "a smaller `mask_above`" if subject.mask_max is None else "`label_max` to the value of a marked voxel"
        raise ValueError(
            f"The mask {mask.name} holds values up to {highest:g}, and those above {subject.mask_above:g} are marked:"
            f" set {option}."
        )
    return array > subject.mask_above


def _intensity_sums(processed: ProcessedVolume, processor: VolumeProcessor) -> np.ndarray:
    """Returns the sum `(N,)` of every slice that `SliceRule.min_sum` is compared with."""
    geometry = processed.geometry
    mean = np.zeros(geometry.input_shape)
    for name, array in processed.source.arrays.items():
        if not (array > 0).any():
            raise ValueError(
                f"{processed.source.name}: `slices.min_sum` needs values above 0, and {name or 'it'} has none."
            )
        mean += array / np.quantile(array[array > 0], processor.config.quantile) / len(processed.source.arrays)
    slice_axis = int(np.argsort(plane_orientation(geometry.input_affine, geometry.plane)[:, 0])[2])
    others = tuple(axis for axis in range(3) if axis != slice_axis)
    # A volume that holds every slice's sum in all of its voxels, brought to the network's slices.
    sums = np.broadcast_to(mean.sum(others, keepdims=True), mean.shape).astype(np.float32)
    return geometry.to_network(sums, nearest=True).max((1, 2))


def _touched(mask: np.ndarray, geometry: Geometry) -> np.ndarray:
    """Returns which slices see any voxel of a mask, `(N,)` bool; the widened kernel leaves none out."""
    return dataclasses.replace(geometry, antialias=True, bspline=False).to_network(mask).any((1, 2))
