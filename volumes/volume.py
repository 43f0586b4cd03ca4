"""Reads volumes of every accepted kind, and says in one sentence what is wrong with one that cannot be used."""

from __future__ import annotations

import os
import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import PIL.Image


VOLUME_SUFFIXES = (".nii", ".nii.gz", ".mgz", ".mgh")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg")

# A picture's columns run to the patient's left and its rows to posterior, as in radiological convention.
PICTURE_AFFINE = np.diag([-1.0, -1.0, 1.0, 1.0])

# What a result takes over from the input's header, so that both lie at the same place for every reader.
_GRID_FIELDS = (
    "xyzt_units sform_code srow_x srow_y srow_z qform_code quatern_b quatern_c quatern_d qoffset_x qoffset_y qoffset_z"
).split()


@dataclass(frozen=True)
class InputVolume:
    """Holds one or several co-registered images on one grid, before any processing.

    Args:
        arrays: Name to float32 array `(X, Y, Z)` in the file's units. An unnamed input (a file, an array) has the
            single key `""`, an unnamed 4-D file the keys `"0"`, `"1"`, ...
        affine (`np.ndarray` of shape `(4, 4)`): Voxel indices to world millimetres (RAS+).
        header: Header that results copy units and codes from.
        is_picture: Whether the input is a 2-D picture, whose results are pictures too.
        ndim: Dimensions of one modality as it came, 2 or 3.
        name: What messages call it.
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
        """Returns a result `(X, Y, Z)` as the input came: `(rows, columns)` of a picture, `(X, Y)` of a 2-D array."""
        if self.is_picture:
            return array[..., 0].T
        return array[..., 0] if self.ndim == 2 else array

    def image(self, array: np.ndarray) -> nib.Nifti1Image:
        """Returns a NIfTI image of a result (in the input's form, modalities last) on this grid: affine, sform, qform
        and units of the input, dtype of `array`."""
        if self.ndim == 2 and array.ndim == 3:
            array = array[:, :, None]  # modalities belong on the fourth axis
        image_class = nib.Nifti2Image if isinstance(self.header, nib.Nifti2Header) else nib.Nifti1Image
        image = image_class(array, self.affine, dtype=array.dtype)
        if self.header is None:
            image.header.set_xyzt_units("mm")
            return image
        # Where the input's own header gives another affine than the one in use, saving replaces it by the latter.
        for field in _GRID_FIELDS:
            image.header[field] = self.header[field]
        image.header["pixdim"][:4] = self.header["pixdim"][:4]
        return image


class StoredVolume(ABC):
    """Stands for a volume that no file of its own holds, but `files` together: slices in a file each, an entry of an
    archive. Readers make them, and [`read_volume`] takes them like a path."""

    files: tuple[Path, ...]

    def __str__(self) -> str:
        return str(self.files[0])

    @abstractmethod
    def read(self) -> InputVolume:
        """Reads the volume; errors as in [`read_volume`]."""


def read_volume(source) -> InputVolume:
    """Reads a path, nibabel image, array or tensor `(X, Y)` or `(X, Y, Z)`, PIL image, [`StoredVolume`], or a dict of
    those, into an [`InputVolume`].

    Raises:
        FileNotFoundError: There is no such file.
        TypeError: `source` is none of the accepted kinds.
        ValueError: The content cannot be used: unreadable, empty, wrong number of dimensions, NaN, colour, or
            modalities that do not share one grid. The message names the input.
    """
    import torch  # here, so that listing files does not wait for it

    if isinstance(source, InputVolume):
        return source
    if isinstance(source, StoredVolume):
        return _checked(source.read())
    if isinstance(source, Mapping):
        return _read_modalities(source)
    if isinstance(source, (str, os.PathLike)):
        return _read_file(Path(source))
    if isinstance(source, nib.spatialimages.SpatialImage):
        return _from_nibabel(source, source.get_filename() or "the nibabel image")
    if isinstance(source, PIL.Image.Image):
        return _from_picture(source, getattr(source, "filename", "") or "the PIL image")
    if isinstance(source, torch.Tensor):
        source = source.detach().cpu().numpy()
    if isinstance(source, np.ndarray):
        return _from_array(source)
    raise TypeError(
        "A volume must be a path, a nibabel image, an array, a tensor, a PIL image or a dict of modalities,"
        f" got {type(source).__name__}."
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
                f"Modalities `{first_name}` and `{name}` lie on different grids: shapes {first.shape} and"
                f" {volume.shape}, affines {first.affine.round(3).tolist()} and {volume.affine.round(3).tolist()}."
                " Resample them to one grid first."
            )
    arrays = {name: next(iter(volume.arrays.values())) for name, volume in volumes.items()}
    return InputVolume(arrays, first.affine, first.header, first.is_picture, first.ndim, first.name)


def _read_file(path: Path) -> InputVolume:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is a folder, not a file." if path.is_dir() else f"There is no file {path}.")
    name = path.name.lower()
    if not name.endswith(VOLUME_SUFFIXES + IMAGE_SUFFIXES):
        raise ValueError(f"{path} must end in one of {', '.join(VOLUME_SUFFIXES + IMAGE_SUFFIXES)}.")
    try:
        if name.endswith(VOLUME_SUFFIXES):
            image = nib.load(path)
        else:
            with PIL.Image.open(path) as image:
                image.load()
    except Exception as error:  # a damaged header ends in any of nine kinds of error
        raise _unreadable(path, error) from error
    if isinstance(image, PIL.Image.Image):
        return _from_picture(image, str(path))
    return _from_nibabel(image, str(path))


def _unreadable(name, error: Exception) -> ValueError:
    reason = str(error).rstrip(".") or type(error).__name__
    return ValueError(f"{name} cannot be read, it may be truncated or damaged: {reason}.")


def _from_nibabel(image, name: str) -> InputVolume:
    if image.ndim not in (2, 3, 4):
        raise ValueError(
            f"{name} must have 2, 3 or 4 dimensions (the fourth being modalities), got shape {image.shape}."
        )
    if image.get_data_dtype().fields is not None or np.issubdtype(image.get_data_dtype(), np.complexfloating):
        raise ValueError(f"{name} must hold one real number per voxel, got data type {image.get_data_dtype()}.")
    if 0 in image.shape:
        raise ValueError(f"{name} holds no voxels, got shape {image.shape}.")
    try:
        array = np.asarray(image.get_fdata(dtype=np.float32, caching="unchanged"))
    except Exception as error:  # a damaged file ends in any of nine kinds of error
        raise _unreadable(name, error) from error
    if array.ndim == 2:
        array = array[..., None]
    affine = np.asarray(image.affine, dtype=np.float64)
    header = image.header if isinstance(image.header, nib.Nifti1Header) else None
    no_codes = header is not None and not (int(header["sform_code"]) or int(header["qform_code"]))
    if (
        not np.isfinite(affine).all()
        or (  # or singular, relative to the voxel size, whatever its unit
            abs(np.linalg.det(affine[:3, :3])) <= 1e-6 * np.prod(np.linalg.norm(affine[:3, :3], axis=0))
        )
    ):
        zooms = [zoom if np.isfinite(zoom) and zoom > 0 else 1.0 for zoom in image.header.get_zooms()[:3]]
        affine = np.diag([*(zooms + [1.0] * 3)[:3], 1.0])
        no_codes = True
    if no_codes:
        warnings.warn(
            f"{name} has no usable affine: left and right cannot be told apart. Its voxel sizes and axes are taken as"
            " they stand; write the right affine into the header if you know it.",
            stacklevel=2,
        )
    arrays = {"": array}
    if array.ndim == 4:
        arrays = {str(index): array[..., index] for index in range(array.shape[3])}
    return _checked(InputVolume(arrays, affine, header, False, min(image.ndim, 3), name))


def _from_picture(picture: PIL.Image.Image, name: str) -> InputVolume:
    if picture.mode == "F":
        raise ValueError(
            f"{name} holds decimal numbers (mode F), which picture files cannot; give an array:"
            " `np.asarray(picture).T`."
        )
    if picture.mode not in ("1", "L", "I", "I;16"):
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
    return _checked(InputVolume({"": array}, PICTURE_AFFINE, None, True, 2, name))


def _from_array(array: np.ndarray) -> InputVolume:
    if array.ndim not in (2, 3):
        raise ValueError(
            f"An array or tensor must have the shape (X, Y) or (X, Y, Z), got {array.shape}. Several modalities go"
            " into a dict of arrays; slices that are already processed, a tensor (N, C, H, W), go to the pipeline."
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
