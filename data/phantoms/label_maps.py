"""Label maps: which tissue every voxel of a head is. Synthetic heads are made of them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import torch

from ...volumes.volume import check_whole


# M maps, X x Y x Z voxels, axes RAS; mm are RAS millimetres from the centre of a map's brain.

TISSUES = (
    *("air", "white", "cortex", "fluid", "thalamus", "caudate", "putamen", "pallidum", "hippocampus", "amygdala"),
    *("accumbens", "ventral_dc", "brain_stem", "cerebellar_white", "cerebellar_cortex", "chiasm", "choroid", "vessel"),
    *("outer_fluid", "soft", "eye", "mucosa", "skin", "cord", "vein", "bone", "marrow", "nerve"),
)
AIR, WHITE, CORTEX, FLUID = range(4)
VESSEL, OUTER_FLUID = TISSUES.index("vessel"), TISSUES.index("outer_fluid")
# Tissues up to here are brain.
LAST_OF_BRAIN = TISSUES.index("vessel")

# FreeSurfer's numbers, left and right; from 500 on those of the head that SynthSeg's public maps have.
LABELS = {
    "white": (2, 41, 25, 57, 77, 78, 79, 192, 250, 251, 252, 253, 254, 255),
    "cortex": (3, 42, 19, 55, 80, 81, 82),
    "fluid": (4, 5, 14, 15, 43, 44, 72, 213, 221),
    "cerebellar_white": (7, 46),
    "cerebellar_cortex": (8, 47),
    "thalamus": (9, 10, 48, 49),
    "caudate": (11, 50),
    "putamen": (12, 51),
    "pallidum": (13, 52),
    "brain_stem": (16, 170, 173, 174, 175, 178),
    "hippocampus": (17, 53),
    "amygdala": (18, 54),
    "outer_fluid": (24, 257),
    "accumbens": (26, 58),
    "ventral_dc": (28, 60),
    "vessel": (30, 62, 502),
    "chiasm": (85,),
    "choroid": (31, 63, 136, 137, 163, 164),
    "eye": (506,),
    "soft": (507, 508),
    "mucosa": (509,),
    "skin": (511,),
    "cord": (512,),
    "vein": (514,),
    "bone": (515,),
    "marrow": (516,),
    "nerve": (530,),
}


@dataclass(frozen=True)
class LabelMaps:
    """
    Holds the maps that heads are made of.

    Args:
        tissues (`torch.Tensor` of shape `(M, X, Y, Z)`, uint8): Number in `TISSUES`, axes RAS, air where a map ends.
        to_voxel (`torch.Tensor` of shape `(M, 3, 4)`): Millimetres from the centre of the brain to voxel indices.
        low, high (`torch.Tensor` of shape `(M,)`): Millimetres of the lowest and highest slice that holds brain.
        names: Of the files.
    """

    tissues: torch.Tensor
    to_voxel: torch.Tensor
    low: torch.Tensor
    high: torch.Tensor
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.tissues)

    def to(self, device: torch.device | str) -> LabelMaps:
        """Returns the maps on another device."""
        moved = (tensor.to(device) for tensor in (self.tissues, self.to_voxel, self.low, self.high))
        return LabelMaps(*moved, self.names)


# Centre of the brain of MNI152 in its own millimetres, the middle of its mask's box.
MNI_CENTRE = (0.0, -17.0, 5.0)


def find_label_maps(folder: str | Path) -> list[Path]:
    """Returns the files of the label maps in a folder, in their order; a `FileNotFoundError` if there are none."""
    files = sorted(
        path for path in Path(folder).glob("*") if path.name.lower().endswith((".nii", ".nii.gz", ".mgz", ".mgh"))
    )
    if not files:
        raise FileNotFoundError(f"There are no label maps (.nii, .nii.gz, .mgz) in {folder}.")
    return files


def split_maps(count: int) -> dict[str, range]:
    """Returns the numbers of the maps that heads for `train`, `validation` and `test` are made of: different ones
    where there are three or more, of which the last fifth is held back."""
    held = max(1, count // 10) if count >= 3 else 0
    train = count - 2 * held
    if not held:
        return dict.fromkeys(("train", "validation", "test"), range(count))
    return {"train": range(train), "validation": range(train, train + held), "test": range(train + held, count)}


def read_label_maps(folder: str | Path) -> LabelMaps:
    """
    Reads the label maps in a folder: segmentations with FreeSurfer's numbers, as FreeSurfer, FastSurfer and SynthSeg
    write them, in any orientation and resolution.

    Raises:
        FileNotFoundError: There is no such folder, or no volume in it.
        ValueError: A volume is no segmentation, holds a number that is not known, or no brain.
    """
    files = find_label_maps(folder)
    tissue_of = {label: TISSUES.index(tissue) for tissue, labels in LABELS.items() for label in labels}
    found = [_read_map(path, tissue_of) for path in files]
    shape = np.max([tissues.shape for tissues, _ in found], 0)
    volumes = torch.zeros(len(found), *shape.tolist(), dtype=torch.uint8)
    to_voxel, low, high = [], [], []
    for path, volume, (tissues, affine) in zip(files, volumes, found, strict=True):
        volume[tuple(slice(size) for size in tissues.shape)] = torch.from_numpy(tissues)
        is_brain = (tissues > AIR) & (tissues < LAST_OF_BRAIN)
        if not is_brain.any():
            raise ValueError(f"{path} holds no label of the brain, such as 2 and 41, white matter.")
        ends = [np.flatnonzero(is_brain.any(axes))[[0, -1]] for axes in ((1, 2), (0, 2), (0, 1))]
        brain = np.array(list(itertools.product(*ends))) @ affine[:3, :3].T + affine[:3, 3]
        centre = (brain.min(0) + brain.max(0)) / 2
        to_voxel.append(_to_voxel(affine, centre))
        low.append(brain[:, 2].min() - centre[2])
        high.append(brain[:, 2].max() - centre[2])
    tensors = (torch.tensor(np.array(values), dtype=torch.float32) for values in (to_voxel, low, high))
    return LabelMaps(volumes, *tensors, tuple(path.name for path in files))


def read_lesion_masks(files: Sequence[str | Path], centre: tuple[float, float, float] = MNI_CENTRE) -> LabelMaps:
    """
    Reads masks of lesions, to be put into heads of any map ([`~data.phantoms.heads.make_slices`]): shape, size and place
    are those of the masks, as far as the heads have the size of the brain that they were drawn in.

    Args:
        files: Volumes in any orientation and resolution, lesion where a voxel is not 0.
        centre (`tuple[float, float, float]`): Centre of the brain that they lie in, in RAS millimetres of the files.

    Returns:
        [`LabelMaps`]: Maps that are 1 in the lesion and 0 elsewhere; `low` and `high` are those of the lesion.

    Raises:
        ValueError: A file is no volume, or holds no lesion.
    """
    volumes, to_voxel, ends = [], [], []
    for path in files:
        image = nib.as_closest_canonical(nib.load(path))
        mask = np.asarray(image.dataobj)
        check_whole(path)
        if mask.ndim != 3 or not mask.any():
            raise ValueError(f"{path} must be a volume with lesion, voxels that are not 0, got shape {mask.shape}.")
        volumes.append(torch.from_numpy((mask != 0).astype(np.uint8)))
        to_voxel.append(_to_voxel(image.affine, np.array(centre)))
        heights = nib.affines.apply_affine(image.affine, np.argwhere(mask))[:, 2] - centre[2]
        ends.append((heights.min(), heights.max()))
    shape = np.max([volume.shape for volume in volumes], 0).tolist()
    masks = torch.zeros(len(volumes), *shape, dtype=torch.uint8)
    for mask, volume in zip(masks, volumes, strict=True):
        mask[tuple(slice(size) for size in volume.shape)] = volume
    tensors = (torch.tensor(np.array(values), dtype=torch.float32) for values in (to_voxel, *zip(*ends, strict=True)))
    return LabelMaps(masks, *tensors, tuple(Path(path).name for path in files))


def _to_voxel(affine: np.ndarray, centre: np.ndarray) -> np.ndarray:
    """The matrix `(3, 4)` from millimetres from a centre to indices of voxels."""
    inverse = np.linalg.inv(affine)
    return np.column_stack([inverse[:3, :3], inverse[:3, :3] @ centre + inverse[:3, 3]])


def _read_map(path: Path, tissue_of: dict[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Tissues `(X, Y, Z)` of a map, axes RAS, and their affine."""
    image = nib.as_closest_canonical(nib.load(path))
    labels = np.asarray(image.dataobj)
    check_whole(path)
    whole = labels.dtype.kind in "iu" or np.array_equal(labels, np.rint(labels))
    if labels.ndim != 3 or not whole or labels.min() < 0:
        raise ValueError(f"{path} must be a segmentation, one whole number >= 0 per voxel, got shape {labels.shape}.")
    labels = labels.astype(np.int32)
    present = np.flatnonzero(np.bincount(labels.ravel())).tolist()
    unknown = [label for label in present if label not in tissue_of and label != 0 and not 1000 <= label < 5000]
    if unknown:
        raise ValueError(f"{path} holds labels that are none of FreeSurfer's that are known here: {unknown}.")
    # Parcels of the cortex, 1000 to 2999, and of the white matter beneath, 3000 to 4999, of FreeSurfer's atlases.
    table = np.zeros(present[-1] + 1, np.uint8)
    for label in present[present[0] == 0 :]:
        table[label] = tissue_of.get(label, CORTEX if label < 3000 else WHITE)
    return table[labels], image.affine
