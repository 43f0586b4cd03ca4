"""Label maps of heads that need no download: the phantom's brains with a simple skull around them."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
from scipy import ndimage
from tqdm.auto import tqdm

from ...checks import check_integer
from ...files import making_folder
from .brains import draw_tissues


# X, Y, Z voxels of the grid (RAS), V voxels inside the brain; mm are those of the template, MNI152.

# Nuclei of the right half: FreeSurfer's number on the left and on the right, centre and semi-axes in mm.
NUCLEI = (
    ((12, 51), (26, 2, 1), (8, 19, 12)),  # putamen
    ((13, 52), (19, -4, 0), (6, 9, 7)),  # pallidum
    ((11, 50), (13, 12, 9), (7, 15, 13)),  # caudate
    ((10, 49), (11, -18, 7), (11, 15, 10)),  # thalamus
)
CSF, GM, WM = range(3)
OUTER_FLUID, EYE, SOFT, SKIN, BONE, MARROW = 24, 506, 508, 511, 515, 516


def write_head_maps(folder: str | Path, count: int, *, spacing: float = 1.5, progress: bool = True) -> None:
    """
    Writes label maps of heads with FreeSurfer's numbers, `head_00.nii.gz` and so on, for synthetic heads
    ([`~data.phantoms.head_files.write_heads`]). The folder appears as a whole; it must not exist.

    Shape, folds and the width of the ventricles are drawn anew for each, of one template (ICBM152 2009a, in nilearn's
    wheel). Nuclei are ellipsoids, and skull, eyes and face are a sketch: they teach no network what a patient's head
    looks like.

    Args:
        count: Maps, 1 or more.
        spacing: Voxel size in mm, 1 to 8.
    """
    check_integer("count", count, 1)
    with making_folder(Path(folder)) as unfinished:
        for number in tqdm(range(count), desc="label maps", unit="head", disable=not progress):
            tissues, brain, source, affine = draw_tissues(number, spacing=spacing)
            rng = np.random.default_rng([number, 1])
            labels = _draw_head(rng, brain, affine)
            labels[brain] = _name_tissues(tissues, source)
            image = nib.Nifti1Image(labels, affine)
            image.header.set_xyzt_units("mm")
            nib.save(image, unfinished / f"head_{number:02d}.nii.gz")


def _name_tissues(tissues: np.ndarray, source: np.ndarray) -> np.ndarray:
    """Returns FreeSurfer's numbers `(V,)` of tissues `(V,)`, CSF, GM or WM, that lie at `source (3, V)` in mm."""
    x, y, z = source
    right = (x > 0).astype(np.int16)
    labels = np.choose(tissues, (np.full_like(right, OUTER_FLUID), 3 + 39 * right, 2 + 39 * right))
    solid = tissues != CSF
    # Below the tentorium, and the stem in front of it.
    below = (y < -38) & (z < -10 + 0.25 * (y + 40) - 0.006 * x**2)
    labels[below & (tissues == GM)] = (8 + 39 * right)[below & (tissues == GM)]
    labels[below & (tissues == WM)] = (7 + 39 * right)[below & (tissues == WM)]
    labels[solid & (np.abs(x) < 16) & (y > -46) & (y < -12) & (z < -8)] = 16
    for (left_number, right_number), centre, axes in NUCLEI:
        inside = sum(((p - c) / a) ** 2 for p, c, a in zip((np.abs(x), y, z), centre, axes, strict=True)) < 1
        labels[solid & inside] = np.where(right, right_number, left_number)[solid & inside]
    # Fluid in the middle: lateral, third and fourth ventricle.
    lateral = (((np.abs(x) - 16) / 20) ** 2 + ((y + 12) / 52) ** 2 + ((z - 10) / 26) ** 2) < 1
    middle = (np.abs(x) < 9) & (y > -52) & (y < 4) & (z > -42) & (z < 8)
    labels[(tissues == CSF) & (lateral | middle)] = (4 + 39 * right)[(tissues == CSF) & (lateral | middle)]
    return labels


def _draw_head(rng: np.random.Generator, brain: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """Returns the labels `(X, Y, Z)` of what lies around a brain: fluid, skull, soft tissue, eyes, skin."""
    spacing, origin = affine[0, 0], affine[:3, 3]
    axes = [o + spacing * np.arange(n) for o, n in zip(origin, brain.shape, strict=True)]
    x, y, z = np.meshgrid(*axes, indexing="ij", sparse=True)
    # The skull spans the gaps between the lobes and the cerebellum.
    near = ndimage.distance_transform_edt(~brain, spacing)
    hull = brain | (ndimage.distance_transform_edt(near < 20, spacing) > 20)
    outside = ndimage.distance_transform_edt(~hull, spacing)
    fluid, skull, soft = rng.uniform((1.0, 5.0, 5.0), (3.5, 8.0, 9.0))
    face = (x / 62) ** 2 + ((y - 36) / 58) ** 2 + ((z + 62) / 62) ** 2 < 1
    neck = ((x / 58) ** 2 + ((y + 38) / 55) ** 2 < 1) & (z < -40)
    head = (outside < fluid + skull + soft) | face | neck
    labels = np.where(head, np.int16(SOFT), np.int16(0))
    labels[head & (ndimage.distance_transform_edt(head, spacing) <= max(2.5, spacing))] = SKIN
    share = (outside - fluid) / skull
    labels[(outside < fluid + skull) & (z > -45)] = BONE
    labels[(share > 0.3) & (share < 0.7) & (z > -35)] = MARROW
    labels[hull | (outside < fluid)] = BONE
    labels[near < np.where(hull, 6.0, fluid)] = OUTER_FLUID
    for side in (-1, 1):
        labels[(x - side * 32) ** 2 + (y - 62) ** 2 + (z + 40) ** 2 < 12**2] = EYE
    return labels
