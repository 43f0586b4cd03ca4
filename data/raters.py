"""How several annotations are made of the one mask that most data sets have."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from ..checks import check_integer, check_number
from .smooth_fields import smooth_field


# A raters, X, Y, Z voxels, H x W pixels.


@dataclass(frozen=True)
class RaterRule:
    """
    Makes several annotations of one mask, for data sets that have no more.

    Every rater draws the lesion wider or narrower, moves its boundary smoothly, and overlooks some of its connected
    components (corners connect). What they do depends on `seed`, the subject's name and the rater's number alone. Made
    raters show that a program works; they do not show how real ones differ.

    Args:
        number: Raters.
        radius: Standard deviation, in mm, of how much wider (dilation) or narrower (erosion) a rater draws. A pixel of
            a picture is 1 mm.
        warp: Standard deviation, in mm along each axis, of the displacement of the boundary.
        warp_scale: Distance, in mm, over which the displacement changes.
        drop: Probability that a rater overlooks a component, 0 to 1.
        seed: Of all draws.
    """

    number: int = 4
    radius: float = 1.0
    warp: float = 1.0
    warp_scale: float = 8.0
    drop: float = 0.1
    seed: int = 0

    def __post_init__(self):
        check_integer("raters.number", self.number, 1)
        check_integer("raters.seed", self.seed, 0)
        check_number("raters.radius", self.radius, least=0)
        check_number("raters.warp", self.warp, least=0)
        check_number("raters.warp_scale", self.warp_scale, above=0)
        check_number("raters.drop", self.drop, least=0, most=1)

    def annotate(self, mask: np.ndarray, spacing: Sequence[float], name: str) -> np.ndarray:
        """Draws the annotations `(A, *mask.shape)`, bool, of the mask `(H, W)` or `(X, Y, Z)` of the subject `name`;
        an empty one stays empty. `spacing` is in mm along every axis; an axis of one voxel (of a picture) is left
        alone. Without `radius`, `warp` and `drop` all are `mask`."""
        mask = np.asarray(mask) > 0
        if len(spacing) != mask.ndim:
            raise ValueError(f"`spacing` must have a number for each axis of {mask.shape}, got {tuple(spacing)}.")
        subject = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
        components, count = ndimage.label(mask, structure=np.ones((3,) * mask.ndim))
        drawn = np.zeros((self.number, *mask.shape), dtype=bool)
        for rater in range(self.number):
            rng = np.random.default_rng(np.random.SeedSequence([self.seed, subject, rater]))
            wider = self.radius * float(rng.standard_normal())
            seen = np.concatenate([[False], rng.random(count) >= self.drop])[components]
            if seen.any():
                # Nothing moves farther than this; the rest of the volume need not be looked at.
                reach = abs(wider) + 4 * self.warp
                box = tuple(
                    slice(max(int(index.min() - reach / step) - 2, 0), int(index.max() + reach / step) + 3)
                    for index, step in zip(np.nonzero(seen), spacing, strict=True)
                )
                drawn[(rater, *box)] = self._redraw(seen[box], spacing, wider, rng)
        return drawn

    def _redraw(
        self, mask: np.ndarray, spacing: Sequence[float], wider: float, rng: np.random.Generator
    ) -> np.ndarray:
        """Moves the boundary of a mask, which is not empty, by a smooth displacement, and `wider` by so many mm."""
        if mask.all():  # a lesion without boundary
            return mask
        axes = [axis for axis in range(mask.ndim) if mask.shape[axis] > 1]
        # Millimetres inside the boundary, which lies half a voxel from the outermost voxels; negative outside.
        half = min(spacing[axis] for axis in axes) / 2
        inside, outside = (ndimage.distance_transform_edt(part, spacing) for part in (mask, ~mask))
        depth = np.where(mask, inside - half, half - outside)
        if self.warp:
            extent = [(length - 1) * step for length, step in zip(mask.shape, spacing, strict=True)]
            places = np.indices(mask.shape, dtype=np.float32)
            for axis in axes:
                places[axis] += np.float32(self.warp / spacing[axis]) * smooth_field(
                    rng, mask.shape, spacing, extent, self.warp_scale
                )
            depth = ndimage.map_coordinates(depth, places, order=1, mode="nearest")
        return depth + wider > 0
