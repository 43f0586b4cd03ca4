"""Heads that nobody was scanned for, for pages that somebody looks at without data of their own."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import nibabel as nib
import numpy as np
import torch

from ..data.phantoms.head_files import HEAD_SIZE, HEAD_SPACING
from ..data.phantoms.head_maps import write_head_maps
from ..data.phantoms.heads import make_slices
from ..data.phantoms.label_maps import LabelMaps, read_label_maps
from ..schedulers.draws import make_keys


# Thickness of a slice, in mm.
_THICKNESS = 4.0


@dataclass(frozen=True)
class Head:
    """Holds a generated head on one grid: the image, the mask of its brain, and that of its lesion (empty if it has
    none); `middle` is the number of the slice that shows most of the lesion, or of the middle one."""

    image: nib.Nifti1Image
    brain: nib.Nifti1Image
    lesion: nib.Nifti1Image
    middle: int


@lru_cache(1)
def _label_map() -> LabelMaps:
    # The first of the `builtin` maps in coarser voxels, which take a second and no place on the disk.
    with tempfile.TemporaryDirectory() as folder:
        write_head_maps(Path(folder, "maps"), 1, spacing=2.0, progress=False)
        return read_label_maps(Path(folder, "maps"))


@lru_cache(8)
def generate_head(contrast: str, lesion: str | None = None, seed: int = 0, skull: bool = False) -> Head:
    """
    Generates a head from a drawn label map, the same for the same arguments.

    Args:
        contrast (`str`): Of `data.phantoms.heads.CONTRASTS`; the anatomy is the same in all.
        lesion (`str`, *optional*): Of `data.phantoms.heads.LESIONS`; none by default.
        seed (`int`): Which head, 0 or more.
        skull (`bool`): Keep what is around the brain.
    """
    maps = _label_map()
    low, high = (1.25 * float(limit[0]) for limit in (maps.low, maps.high))
    positions = torch.arange(low, high, _THICKNESS)[None]
    heads = make_slices(
        maps,
        torch.zeros(1, dtype=torch.int64),
        make_keys(seed, 0),
        positions,
        contrasts=[contrast],
        size=HEAD_SIZE,
        spacing=HEAD_SPACING,
        thickness=torch.full((1,), _THICKNESS),
        lesions=[lesion],
    )
    image = heads.images[0, 0] if skull else heads.images[0, 0] * heads.brain[0]
    affine = np.diag([-HEAD_SPACING, -HEAD_SPACING, _THICKNESS, 1.0])
    affine[:3, 3] = (HEAD_SIZE[1] - 1) / 2 * HEAD_SPACING, (HEAD_SIZE[0] - 1) / 2 * HEAD_SPACING, low
    volumes = []
    for volume in ((image * 1000).round().to(torch.int16), heads.brain[0].byte(), heads.lesion[0].byte()):
        made = nib.Nifti1Image(volume.permute(2, 1, 0).contiguous().numpy(), affine)
        made.header.set_xyzt_units("mm")
        volumes.append(made)
    areas = (heads.lesion if heads.lesion.any() else heads.brain)[0].sum((1, 2))
    return Head(*volumes, middle=int(areas.argmax()))
