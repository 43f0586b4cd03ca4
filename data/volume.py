"""Reads what a volume may be, and says in one sentence what is wrong with it."""

from __future__ import annotations

import os
import warnings
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import PIL.Image


VOLUME_SUFFIXES = (".nii", ".nii.gz", ".mgz", ".mgh")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg")

# A picture's columns run to the patient's left and its rows to posterior, as in radiological convention.
_PICTURE_AFFINE = np.diag([-1.0, -1.0, 1.0, 1.0])


@dataclass(frozen=True)
class InputVolume:
    """One or several co-registered images on one grid, before any processing.

    Args:
        arrays (`dict[str, np.ndarray]`): Name to float32 array `(X, Y, Z)` in the file's units. An unnamed input (a file, an
            array) has the single key `""`, an unnamed 4-D file the keys `"0"`, `"1"`, ...
        affine (`np.ndarray` of shape `(4, 4)`): Voxel indices to world millimetres (RAS+).
        header (`nibabel.Nifti1Header` or `None`): Header that results copy units and codes from.
        is_picture (`bool`): Whether the input is a 2-D picture, whose results are pictures too.
        ndim (`int`): Dimensions of one modality as it came, 2 or 3.
        name (`str`): What messages call it.
    """

    arrays: dict[str, np.ndarray]
    affine: np.ndarray
    header: nib.Nifti1Header | None
    is_picture: bool
    ndim: int
    name: str

    @property
    def shape(self) -> tuple[int, int, int]:
        return next(iter(self.arrays.values())).shape

    def as_given(self, array: np.ndarray) -> np.ndarray:
        """A result `(X, Y, Z)` in the form of the input: `(rows, columns)` of a picture, `(X, Y)` of a 2-D array."""
        if self.is_picture:
            return array[..., 0].T
        return array[..., 0] if self.ndim == 2 else array

    def image(self, array: np.ndarray) -> nib.Nifti1Image:
        """A NIfTI image of a result (in the input's form) on this grid: affine, codes and units of the input, dtype of `array`."""
        image_class = nib.Nifti2Image if isinstance(self.header, nib.Nifti2Header) else nib.Nifti1Image
        image = image_class(array, self.affine, dtype=array.dtype)
        if self.header is not None:
            image.header.set_xyzt_units(*self.header.get_xyzt_units())
            image.set_sform(self.affine, code=int(self.header["sform_code"]) or 1)
            if int(self.header["qform_code"]) and np.allclose(self.header.get_qform(), self.affine, atol=1e-3):
                image.set_qform(self.affine, code=int(self.header["qform_code"]))
        return image


def read_volume(source) -> InputVolume:
    """Reads a path, nibabel image, array, PIL image, or a dict of those, into an [`InputVolume`].

    Raises:
        TypeError: `source` is none of the accepted kinds.
        ValueError: The content cannot be used: unreadable, empty, wrong number of dimensions, NaN, colour, or modalities that do
            not share one grid. The message names the input.
    """
    if isinstance(source, Mapping):
        return _read_modalities(source)
    if isinstance(source, (str, os.PathLike)):
        return _read_file(Path(source))
    if isinstance(source, nib.spatialimages.SpatialImage):
        return _from_nibabel(source, source.get_filename() or "the nibabel image")
    if isinstance(source, PIL.Image.Image):
        return _from_picture(source, getattr(source, "filename", "") or "the PIL image")
    if isinstance(source, np.ndarray):
        return _from_array(source)
    raise TypeError(
        "A volume must be a path, a nibabel image, a numpy array, a PIL image, a dict of modalities or a tensor"
        f" (N, C, H, W), got {type(source).__name__}."
    )


def _read_modalities(source: Mapping) -> InputVolume:
    if not source:
        raise ValueError("The dict of modalities is empty: give at least one `name: image` pair.")
    volumes = {str(name): read_volume(image) for name, image in source.items()}
    first_name, first = next(iter(volumes.items()))
    for name, volume in volumes.items():
        if len(volume.arrays) != 1:
            raise ValueError(f"Modality `{name}` has {len(volume.arrays)} channels; one 3-D image per name is needed.")
        if volume.shape != first.shape or not np.allclose(volume.affine, first.affine, atol=1e-3):
            raise ValueError(
                f"Modalities `{first_name}` and `{name}` lie on different grids: shapes {first.shape} and {volume.shape},"
                f" affines {first.affine.round(3).tolist()} and {volume.affine.round(3).tolist()}. Resample them to one grid first."
            )
    arrays = {name: next(iter(volume.arrays.values())) for name, volume in volumes.items()}
    return InputVolume(arrays, first.affine, first.header, first.is_picture, first.ndim, first.name)


def _read_file(path: Path) -> InputVolume:
    if not path.exists():
        raise FileNotFoundError(f"There is no file {path}.")
    name = path.name.lower()
    if name.endswith(IMAGE_SUFFIXES):
        try:
            with PIL.Image.open(path) as picture:
                picture.load()
                return _from_picture(picture, str(path))
        except (OSError, SyntaxError) as error:
            raise ValueError(f"{path} cannot be read as a picture: {error}.") from error
    if name.endswith(VOLUME_SUFFIXES):
        try:
            return _from_nibabel(nib.load(path), str(path))
        except (nib.filebasedimages.ImageFileError, OSError, EOFError, zlib.error) as error:
            raise ValueError(f"{path} cannot be read to its end, it may be truncated or damaged: {error}.") from error
    raise ValueError(f"{path} must end in one of {', '.join(VOLUME_SUFFIXES + IMAGE_SUFFIXES)}.")


def _from_nibabel(image, name: str) -> InputVolume:
    if image.ndim not in (2, 3, 4):
        raise ValueError(
            f"{name} must have 2, 3 or 4 dimensions (the fourth being modalities), got shape {image.shape}."
        )
    if image.get_data_dtype().fields is not None or np.issubdtype(image.get_data_dtype(), np.complexfloating):
        raise ValueError(f"{name} must hold one real number per voxel, got data type {image.get_data_dtype()}.")
    if 0 in image.shape:
        raise ValueError(f"{name} holds no voxels, got shape {image.shape}.")
    array = np.asarray(image.get_fdata(dtype=np.float32, caching="unchanged"))
    if array.ndim == 2:
        array = array[..., None]
    affine = np.asarray(image.affine, dtype=np.float64)
    header = image.header if isinstance(image.header, nib.Nifti1Header) else None
    no_codes = header is not None and not (int(header["sform_code"]) or int(header["qform_code"]))
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-9:
        zooms = [zoom if np.isfinite(zoom) and zoom > 0 else 1.0 for zoom in image.header.get_zooms()[:3]]
        affine = np.diag([*(zooms + [1.0] * 3)[:3], 1.0])
        no_codes = True
    if no_codes:
        warnings.warn(
            f"{name} has no usable affine: left and right cannot be told apart. Its voxel sizes and axes are taken as they"
            " stand; write the right affine into the header if you know it.",
            stacklevel=2,
        )
    if array.ndim == 3:
        arrays = {"": array}
    else:
        arrays = {str(index): array[..., index] for index in range(array.shape[3])}
    return _checked(InputVolume(arrays, affine, header, False, min(image.ndim, 3), name))


def _from_picture(picture: PIL.Image.Image, name: str) -> InputVolume:
    if picture.mode not in ("1", "L", "I", "I;16", "F"):
        colours = np.asarray(picture.convert("RGB"))
        # Grey pictures are often stored with three equal channels; only real colour is refused.
        if not (colours[..., 0] == colours[..., 1]).all() or not (colours[..., 0] == colours[..., 2]).all():
            raise ValueError(
                f"{name} is a colour picture (mode {picture.mode}); a grey one is needed: `picture.convert('L')`."
            )
        array = colours[..., 0]
    else:
        array = np.asarray(picture)
    array = np.ascontiguousarray(array.T[..., None], dtype=np.float32)
    return _checked(InputVolume({"": array}, _PICTURE_AFFINE, None, True, 2, name))


def _from_array(array: np.ndarray) -> InputVolume:
    if array.ndim not in (2, 3):
        raise ValueError(
            f"An array must have the shape (X, Y) or (X, Y, Z), got {array.shape}. Several modalities go into a dict of arrays;"
            " colour pictures are not accepted."
        )
    if not (np.issubdtype(array.dtype, np.number) or array.dtype == bool) or np.iscomplexobj(array):
        raise TypeError(f"An array must hold real numbers, got data type {array.dtype}.")
    volume = array.reshape(*array.shape, 1) if array.ndim == 2 else array
    return _checked(InputVolume({"": volume.astype(np.float32)}, np.eye(4), None, False, array.ndim, "the array"))


def _checked(volume: InputVolume) -> InputVolume:
    for key, array in volume.arrays.items():
        where = f"{volume.name}, channel {key}," if key else volume.name
        if array.size == 0:
            raise ValueError(f"{where} holds no voxels, got shape {array.shape}.")
        invalid = int(array.size - np.isfinite(array).sum())
        if invalid:
            raise ValueError(
                f"{where} holds {invalid} voxels that are NaN or infinite. Replace them (background is 0) first."
            )
    return volume
