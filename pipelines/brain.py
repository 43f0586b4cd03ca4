"""Finds the brain of a scan that comes without a mask."""

from __future__ import annotations

import numpy as np
import scipy.ndimage

from ..models.brain_extractor import BrainExtractor
from ..volumes.volume import InputVolume


# How the mask of a scan came about: it was given; found by the brain extractor; the scan came without skull; by the
# rules of the processor, voxels above the background, or all of them.
BRAIN_ORIGINS = ("given", "extracted", "stripped", "nonzero", "none")

# Share of the voxels that are not background that the network finds to be brain, in a scan without skull: of whole
# heads and necks the brain is a third, of slabs above the ears less than two thirds. It may find less of a brain without
# skull, as it looks for the skull around it; there is then no more than a brain, in ml.
_BRAIN = 0.75
_PART, _LARGEST = 0.5, 1800.0
# A scan that is thinner than `_THIN` mm may hold a whole brain whose file does not say how far apart its slices are. It
# is looked at as if it were `_THICK` mm thick, too, to see whether its skull is off.
_THIN, _THICK = 60.0, 100.0


def find_brain(extractor: BrainExtractor, volume: InputVolume) -> tuple[np.ndarray, str]:
    """
    Finds the brain in a scan. One whose skull is off already is left alone: its mask is where it is not background.

    Returns:
        the mask `(X, Y, Z)`, bool, and how it came about: `"extracted"` or `"stripped"`.

    Raises:
        ValueError: The scan is a picture or a single slice, or no brain was found.
    """
    images = list(volume.arrays.values())
    if min(volume.shape) < 2:
        raise ValueError(
            f"{volume.name} is a single slice, and the brain is found in whole volumes: give its mask, `brain_mask=...`."
        )
    brain = extractor.find_brain(images, volume.affine)
    signal = np.any([image != _find_background(image) for image in images], axis=0)
    found = brain
    extents = np.linalg.norm(volume.affine[:3, :3], axis=0) * volume.shape
    if extents.min() < _THIN:
        thicker = volume.affine.copy()
        thicker[:3, extents.argmin()] *= _THICK / extents.min()
        found = brain | extractor.find_brain(images, thicker)
    share = (signal & found).sum() / max(signal.sum(), 1)
    millilitres = signal.sum() * abs(np.linalg.det(volume.affine[:3, :3])) / 1000
    if share >= _BRAIN or (share >= _PART and millilitres <= _LARGEST):
        return scipy.ndimage.binary_fill_holes(signal), "stripped"
    if not brain.any():
        raise ValueError(f"{volume.name}: no brain was found. Give its mask, `brain_mask=...`.")
    return brain, "extracted"


def _find_background(image: np.ndarray) -> np.float32:
    """The most frequent value on the six faces of `(X, Y, Z)`."""
    faces = [np.take(image, (0, -1), axis).ravel() for axis in range(3)]
    values, counts = np.unique(np.concatenate(faces), return_counts=True)
    return values[counts.argmax()]
