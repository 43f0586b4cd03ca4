"""The grid of a network's slices and its relation to the grid of the input.

A volume is reoriented so that its slices lie along the last axis and every slice is shown in radiological convention;
what is left between the two grids is one offset and one scale per axis. So a volume travels in both directions by
three one-dimensional interpolations, whatever its orientation, spacing or obliquity: rotations stay in the affine,
voxels are never mixed across axes.
"""

from __future__ import annotations

from dataclasses import dataclass

import nibabel as nib
import numpy as np
import scipy.ndimage


# Directions in which (W, H, slice) grow. Axial: W from the patient's right to left, H from anterior to posterior.
PLANES = {"axial": "LPS", "coronal": "LIP", "sagittal": "PIL"}


@dataclass(frozen=True)
class Geometry:
    """Says how the network's slices lie in the input volume, and brings arrays from one grid to the other.

    Args:
        input_shape: Voxels of the input, `(X, Y, Z)`.
        input_affine (`np.ndarray` of shape `(4, 4)`): Input voxel indices to world millimetres (RAS+).
        plane: Slice plane, a key of `PLANES`.
        start: Where the centre of network voxel 0 lies, in voxels of the reoriented input, in the order (W, H, slice).
        step: Distance of neighbouring network voxels, in voxels of the reoriented input.
        network_shape: Voxels of the network's grid, `(W, H, N)`.
        antialias: Widen the interpolation kernel where the network's grid is the coarser one. On the way back it is
            always widened where the input's grid is coarser.
        bspline: Bring images to the network's grid by cubic B-splines, without `antialias`, instead of linearly.
    """

    input_shape: tuple[int, int, int]
    input_affine: np.ndarray
    plane: str
    start: tuple[float, float, float]
    step: tuple[float, float, float]
    network_shape: tuple[int, int, int]
    antialias: bool = True
    bspline: bool = False

    @property
    def network_affine(self) -> np.ndarray:
        """Returns the matrix `(4, 4)` from network voxel indices (w, h, slice) to world millimetres (RAS+)."""
        oriented = self.input_affine @ nib.orientations.inv_ornt_aff(
            plane_orientation(self.input_affine, self.plane), self.input_shape
        )
        to_oriented = np.diag([*self.step, 1.0])
        to_oriented[:3, 3] = self.start
        return oriented @ to_oriented

    def to_network(self, array: np.ndarray, *, nearest: bool = False) -> np.ndarray:
        """Brings an array of the input's grid, `(X, Y, Z)`, to slices `(N, H, W)`; outside the input it is 0."""
        if array.shape != self.input_shape:
            raise ValueError(f"`array` must have the input's shape {self.input_shape}, got {array.shape}.")
        oriented = nib.orientations.apply_orientation(array, plane_orientation(self.input_affine, self.plane))
        if self.bspline and not nearest:
            grid = _resample_bspline(oriented, self.network_shape, self.start, self.step)
        else:
            grid = _resample(oriented, self.network_shape, self.start, self.step, nearest, self.antialias)
        return np.ascontiguousarray(grid.transpose(2, 1, 0))

    def to_input(self, slices: np.ndarray, *, nearest: bool = False) -> np.ndarray:
        """Brings slices `(N, H, W)` back to the grid of the input, `(X, Y, Z)`; outside the slices it is 0."""
        width, height, count = self.network_shape
        if slices.shape != (count, height, width):
            raise ValueError(f"`slices` must have the shape {(count, height, width)}, got {slices.shape}.")
        there = plane_orientation(self.input_affine, self.plane)
        oriented_shape = tuple(int(self.input_shape[axis]) for axis in np.argsort(there[:, 0]))
        start = tuple(-offset / scale for offset, scale in zip(self.start, self.step, strict=True))
        step = tuple(1.0 / scale for scale in self.step)
        oriented = _resample(slices.transpose(2, 1, 0), oriented_shape, start, step, nearest, antialias=True)
        # The inverse of an orientation maps each axis of the target to where it came from, with the same flip.
        back = np.empty_like(there)
        for axis, (target, flip) in enumerate(there):
            back[int(target)] = axis, flip
        return np.ascontiguousarray(nib.orientations.apply_orientation(oriented, back))

    def slices_to_input(self, values: np.ndarray) -> np.ndarray:
        """Brings one value per network slice, `(N, ...)`, to the input's own slices along the slice axis: each takes
        that of the nearest network slice, and 0 beyond them."""
        orientation = plane_orientation(self.input_affine, self.plane)
        axis = int(np.argsort(orientation[:, 0])[2])
        index = np.arange(self.input_shape[axis])
        if orientation[axis, 1] < 0:
            index = index[::-1]
        nearest = _nearest((index - self.start[2]) / self.step[2])
        inside = (nearest >= 0) & (nearest < len(values))
        result = np.zeros((len(index), *values.shape[1:]), dtype=values.dtype)
        result[inside] = values[nearest[inside]]
        return result


def plane_orientation(affine: np.ndarray, plane: str) -> np.ndarray:
    """Returns the nibabel orientation `(3, 2)` that turns voxel axes into (W, H, slice) of a plane of `PLANES`."""
    orientations = nib.orientations
    return orientations.ornt_transform(orientations.io_orientation(affine), orientations.axcodes2ornt(PLANES[plane]))


def _resample(array, shape, start, step, nearest, antialias):
    for axis in range(3):
        if nearest:
            array = _gather(array, axis, shape[axis], start[axis], step[axis])
        elif not (start[axis] == 0 and step[axis] == 1 and shape[axis] == array.shape[axis]):
            weights = _linear_weights(array.shape[axis], shape[axis], start[axis], step[axis], antialias)
            array = np.moveaxis(np.tensordot(weights, array.astype(np.float32, copy=False), (1, axis)), 0, axis)
    return array


def _resample_bspline(array, shape, start, step):
    # The field of view in whole voxels first, 0 outside of the input: splines see beyond their neighbours, and are to
    # see nothing else. They go on at its border as if mirrored in the centre of the outermost voxel, as those of ITK.
    low = np.floor(np.subtract(start, np.divide(step, 2)) + 0.5 + 1e-6).astype(int)
    high = np.ceil(np.add(start, np.multiply(step, np.subtract(shape, 0.5))) + 0.5 - 1e-6).astype(int)
    window = np.zeros(high - low)
    inside_low, inside_high = np.maximum(low, 0), np.minimum(high, array.shape)
    if (inside_low < inside_high).all():
        source = tuple(slice(*ends) for ends in zip(inside_low, inside_high, strict=True))
        target = tuple(slice(*ends) for ends in zip(inside_low - low, inside_high - low, strict=True))
        window[target] = array[source]
    grid = scipy.ndimage.affine_transform(window, step, start - low, output_shape=shape, order=3, mode="mirror")
    return grid.astype(np.float32)


def _nearest(coordinates):
    # Halves go up: to even would take a voxel twice and skip the next. 1e-6 is for rounding errors, as the half 29.5
    # may come as 29.49999999999999. So every index is the one of exact fractions; torch's
    # `interpolate(mode="nearest-exact")` has the same but for halves that its float32 coordinates turn down.
    return np.floor(coordinates + 0.5 + 1e-6).astype(int)


def _gather(array, axis, size, start, step):
    index = _nearest(start + step * np.arange(size))
    inside = (index >= 0) & (index < array.shape[axis])
    gathered = np.take(array, np.where(inside, index, 0), axis=axis)
    return gathered * inside.reshape([-1 if other == axis else 1 for other in range(3)]).astype(array.dtype)


def _linear_weights(source: int, target: int, start: float, step: float, antialias: bool) -> np.ndarray:
    # Row k interpolates at source coordinate start + k * step. Weights are renormalised at the source's border and zero
    # beyond it, which makes a plain resize equal to torch's `interpolate(mode="bilinear", align_corners=False)`.
    centre = start + step * np.arange(target)
    radius = max(1.0, step) if antialias else 1.0
    weights = np.clip(1.0 - np.abs(np.arange(source)[None] - centre[:, None]) / radius, 0.0, None)
    total = weights.sum(1, keepdims=True)
    inside = (centre >= -0.5 - 1e-6) & (centre <= source - 0.5 + 1e-6)
    return np.where(inside[:, None], weights / np.where(total > 0, total, 1.0), 0.0).astype(np.float32)
