"""Reads volumes of every accepted kind, and says in one sentence what is wrong with one that cannot be used."""

from __future__ import annotations

import math
import os
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import nibabel as nib
import numpy as np
import PIL.Image
import PIL.ImageOps

from .dicom import SUFFIXES, DicomSeries, find_series, names_dicom, split_choice


VOLUME_SUFFIXES = (".nii", ".nii.gz", ".mgz", ".mgh")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg")

# A picture's columns run to the patient's left and its rows to posterior, as in radiological convention.
PICTURE_AFFINE = np.diag([-1.0, -1.0, 1.0, 1.0])

# What one input, or the grid that it is brought to, may hold: 2 GiB of float32. `ANODIFF_MAX_VOXELS` is another limit.
MAX_VOXELS = 2**29
# Bytes that one byte of a gzip file can stand for.
_GZIP_RATIO = 1032
_COMPRESSED = (".gz", ".mgz", ".bz2", ".zst")

# How files begin whose content git-annex (DataLad) or Git LFS keeps elsewhere.
_POINTERS = (b"/annex/objects/", b"version https://git-lfs.github.com/spec/")

# Millimetres of NIfTI's units of space; 0 is unknown, and taken as mm.
_MILLIMETRES = {0: 1.0, 1: 1000.0, 2: 1.0, 3: 0.001}
# Units of a fourth dimension that is no list of modalities: a spectrum, and a time.
_SPECTRAL_UNITS, _TIME_UNITS = (32, 40, 48), (8, 16, 24)
# Meanings of voxels, by NIfTI's intent code: images (no intent, estimate, dimensionless), and labels.
_IMAGE_INTENTS, _LABEL_INTENTS = (0, 1001, 1011), (1002, 1003)
# Cosine of the angle from which two axes of an affine are not perpendicular, and that of 45 degrees, from which sform
# and qform do not mean the same axis.
_SHEAR, _SAME_AXIS = 0.05, 0.7

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
        series: The series of DICOM that it is (the first of several modalities), which results may refer to.
    """

    arrays: dict[str, np.ndarray]
    affine: np.ndarray
    header: nib.Nifti1Header | None
    is_picture: bool
    ndim: int
    name: str
    series: DicomSeries | None = None

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
        if self.header is None:
            image = image_class(array, self.affine, dtype=array.dtype)
            image.header.set_xyzt_units("mm")
            return image
        # In the unit of the header, which says so.
        scale = [1 / _millimetres(self.header, self.name)] * 3
        image = image_class(array, np.diag([*scale, 1.0]) @ self.affine, dtype=array.dtype)
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


@dataclass(frozen=True)
class DicomFiles(StoredVolume):
    """Stands for a series of DICOM whose files are named one by one."""

    files: tuple[Path, ...]

    def __str__(self) -> str:
        return str(self.files[0].parent)

    def read(self) -> InputVolume:
        return _from_series(find_series(self.files))


def read_volume(source, *, labels: bool = True) -> InputVolume:
    """Reads a path (of DICOM, a folder, an archive, or `folder#4` for the series with that number), nibabel image,
    array or tensor `(X, Y)` or `(X, Y, Z)`, PIL image, [`StoredVolume`], or a dict of those, into an [`InputVolume`].
    `labels` says whether a file may be used whose header says that it holds labels.

    Raises:
        FileNotFoundError: There is no such file, or its content was never fetched.
        TypeError: `source` is none of the accepted kinds.
        ValueError: The content cannot be used: unreadable, empty, too large, wrong number of dimensions, NaN, colour,
            a header that means no image of a body, or modalities that do not share one grid. The message names the
            input.
    """
    import torch  # here, so that listing files does not wait for it

    if isinstance(source, InputVolume):
        return source
    if isinstance(source, StoredVolume):
        return _checked(source.read())
    if isinstance(source, Mapping):
        return _read_modalities(source, labels)
    if isinstance(source, (str, os.PathLike)):
        return _read_file(Path(source), labels)
    if isinstance(source, nib.spatialimages.SpatialImage):
        return _from_nibabel(source, source.get_filename() or "the nibabel image", labels)
    if isinstance(source, PIL.Image.Image):
        return _from_picture(source, getattr(source, "filename", "") or "the PIL image")
    if isinstance(source, torch.Tensor):
        source = source.detach().cpu().numpy()
    if isinstance(source, np.ndarray):
        return _from_array(source)
    raise TypeError(
        "A volume must be a path, a nibabel image, an array, a tensor, a PIL image or a dict of modalities,"
        f" got {type(source).__name__}. A pipeline takes several as a list, or one by one as an iterator, `iter(...)`."
    )


def check_voxels(count: int, what: str) -> None:
    """Raises a `ValueError` if `what` has more voxels than one input may have: `MAX_VOXELS`, or the number in the
    environment variable `ANODIFF_MAX_VOXELS`. To be called before memory is taken for them."""
    given = os.environ.get("ANODIFF_MAX_VOXELS", str(MAX_VOXELS))
    if not given.isdecimal():
        raise ValueError(f"`ANODIFF_MAX_VOXELS` must be a whole number of voxels, got {given!r}.")
    if count > int(given):
        raise ValueError(
            f"{what} would have {count} voxels, and {int(given)} are the limit. If that is right, and there is memory"
            " for it, set the environment variable `ANODIFF_MAX_VOXELS` to a larger number."
        )


def check_fetched(path: str | os.PathLike) -> None:
    """Raises a `FileNotFoundError` unless `path` is a file, or a link to one, whose content is there: of a data set of
    DataLad, git-annex or Git LFS it may never have been fetched."""
    path = Path(path)
    annexed = path.is_symlink() and "annex/objects" in Path(os.readlink(path)).as_posix()
    if path.is_file():
        with open(path, "rb") as file:
            start = file.read(len(max(_POINTERS, key=len)))
        if not start.startswith(_POINTERS):
            return
        annexed = start.startswith(_POINTERS[0])
    elif path.is_dir():
        raise FileNotFoundError(f"{path} is a folder, not a file.")
    elif not path.is_symlink():
        raise FileNotFoundError(f"There is no file {path}.")
    elif not annexed:
        raise FileNotFoundError(f"{path} is a link to {os.readlink(path)}, and there is no such file.")
    command = "`datalad get` or `git annex get`" if annexed else "`git lfs pull`"
    raise FileNotFoundError(f"The content of {path} was never fetched: run {command} for it.")


def check_whole(path: str | os.PathLike) -> None:
    """Raises a `ValueError` if a compressed file does not end with the checksum of its content. Readers of images stop
    at the last voxel, before it, so that voxels which are damaged would go unnoticed."""
    if not str(path).lower().endswith(_COMPRESSED):
        return
    with _reading(path), nib.openers.ImageOpener(os.fspath(path)) as file:
        while file.read(2**20):
            pass


def open_picture(path: str | os.PathLike) -> PIL.Image.Image:
    """
    Reads a picture, and turns it upright where its EXIF orientation says that it was taken otherwise.

    Raises:
        FileNotFoundError: There is no such file, or its content was never fetched.
        ValueError: It cannot be read, is too large ([`check_voxels`]), or is several pictures; the message names it.
    """
    check_fetched(path)
    # PIL's own limit is lower, cannot be raised from a command line, and only warns up to twice its value.
    limit, PIL.Image.MAX_IMAGE_PIXELS = PIL.Image.MAX_IMAGE_PIXELS, None
    try:
        with _reading(path):
            picture = PIL.Image.open(path)
        with picture:
            width, height = picture.size
            check_voxels(width * height, f"{path} ({width} x {height} pixels)")
            with _reading(path):
                upright = PIL.ImageOps.exif_transpose(picture)
            with suppress(EOFError):
                picture.seek(1)
                raise ValueError(f"{path} holds several pictures. Give each as a file of its own.")
            return upright
    finally:
        PIL.Image.MAX_IMAGE_PIXELS = limit


def _read_modalities(source: Mapping, labels: bool) -> InputVolume:
    if not source:
        raise ValueError("The dict of modalities is empty: give at least one `name: image` pair.")
    volumes = {str(name): read_volume(image, labels=labels) for name, image in source.items()}
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
    return InputVolume(arrays, first.affine, first.header, first.is_picture, first.ndim, first.name, first.series)


def _read_file(path: Path, labels: bool) -> InputVolume:
    name, (base, _) = path.name.lower(), split_choice(path)
    is_other = not name.endswith(VOLUME_SUFFIXES + IMAGE_SUFFIXES)
    if not (is_other and base.is_dir()):
        check_fetched(base)
    if is_other and names_dicom(path):
        return _from_series(find_series(path))
    if name.endswith(IMAGE_SUFFIXES):
        return _from_picture(open_picture(path), str(path))
    if not name.endswith(VOLUME_SUFFIXES):
        wanted = ", ".join(VOLUME_SUFFIXES + IMAGE_SUFFIXES + SUFFIXES)
        raise ValueError(f"{path} must end in one of {wanted}, or hold DICOM.")
    with _reading(path):
        has_place = _check_start(path)
        image = nib.load(path)
    if not isinstance(image, nib.spatialimages.SpatialImage):
        raise ValueError(f"{path} must hold an image on a grid of voxels, got a {type(image).__name__}.")
    voxels = math.prod(image.shape)
    check_voxels(voxels, f"{path} (shape {image.shape})")
    needed, held = voxels * image.get_data_dtype().itemsize, path.stat().st_size
    if needed > held * (1 if name.endswith((".nii", ".mgh")) else _GZIP_RATIO):
        raise _unreadable(path, f"its header claims {needed} bytes of voxels, the file has {held} bytes")
    return _from_nibabel(image, str(path), labels, has_place)


def _from_series(series: DicomSeries) -> InputVolume:
    check_voxels(math.prod(series.shape), f"{series.name} (shape {series.shape})")
    volume = _from_nibabel(series.read(), series.name, labels=False)
    return replace(volume, series=series.close())


def _check_start(path: Path) -> bool:
    """Checks the first bytes of a volume, which nibabel reads as they stand or repairs: voxel sizes, and the sizes of
    what follows the header. Returns whether it says where the volume lies; only MGH has a flag for that."""
    with nib.openers.ImageOpener(str(path)) as file:
        start = file.read(nib.Nifti2Header.sizeof_hdr + 4)
        if path.name.lower().endswith((".mgz", ".mgh")):
            return start[28:30] != b"\0\0"
        kinds = (nib.Nifti1Header, nib.Nifti2Header)
        kind = next((one for one in kinds if one.may_contain_header(start)), None)
        if kind is None:
            return True
        header = kind(start[: kind.sizeof_hdr], check=False)
        sizes = np.abs(header["pixdim"][1:4])[: min(int(header["dim"][0]), 3)]
        counts = header["dim"][1 : len(sizes) + 1]
        if not int(header["sform_code"]) and not ((sizes > 0) & np.isfinite(sizes) | (counts == 1)).all():
            raise ValueError(f"`pixdim` must hold the sizes of its voxels, above 0, got {sizes.tolist()}")
        # Extensions end where the voxels begin; nibabel reads as many bytes as each claims.
        position, end = kind.sizeof_hdr + 4, int(header["vox_offset"])
        check_voxels(end, f"the header of {path}")
        if start[kind.sizeof_hdr] and end > position:
            file.seek(position)
            extensions = file.read(end - position)
            position = 0
            while position + 16 <= len(extensions):
                size = int(np.frombuffer(extensions, header.endianness + "i4", 1, position)[0])
                if not 8 <= size <= len(extensions) - position:
                    raise ValueError(f"an extension of its header claims {size} bytes")
                position += size
    return True


@contextmanager
def _reading(name) -> Iterator[None]:
    """Turns what libraries raise on a damaged file, any of nine kinds of error, into one that names the file."""
    try:
        yield
    except Exception as error:
        raise _unreadable(name, str(error).rstrip(".") or type(error).__name__) from error


def _unreadable(name, reason: str) -> ValueError:
    return ValueError(f"{name} cannot be read, it may be truncated or damaged: {reason}.")


def _from_nibabel(image, name: str, labels: bool, has_place: bool = True) -> InputVolume:
    if image.ndim not in (2, 3, 4):
        raise ValueError(
            f"{name} must have 2, 3 or 4 dimensions (the fourth being modalities), got shape {image.shape}. Save one"
            " volume of it."
        )
    if image.get_data_dtype().fields is not None or np.issubdtype(image.get_data_dtype(), np.complexfloating):
        raise ValueError(
            f"{name} must hold one real number per voxel, got data type {image.get_data_dtype()}. Save"
            " its brightness or magnitude."
        )
    if 0 in image.shape:
        raise ValueError(f"{name} holds no voxels, got shape {image.shape}.")
    check_voxels(math.prod(image.shape), f"{name} (shape {image.shape})")
    header = image.header if isinstance(image.header, nib.Nifti1Header) else None
    _check_meaning(image, header, name, labels)
    with _reading(name):
        array = np.asarray(image.get_fdata(dtype=np.float32, caching="unchanged"))
    if nib.is_proxy(image.dataobj) and "image" in image.file_map and image.file_map["image"].filename:
        check_whole(image.file_map["image"].filename)
    if array.ndim == 2:
        array = array[..., None]
    millimetres = _millimetres(header, name)
    affine = np.full((4, 4), np.nan) if image.affine is None else np.asarray(image.affine, dtype=np.float64)
    affine = np.diag([*[millimetres] * 3, 1.0]) @ affine
    if header is not None:
        has_place = bool(int(header["sform_code"]) or int(header["qform_code"]))
    if not _is_usable(affine):
        zooms = [zoom if np.isfinite(zoom) and zoom > 0 else 1.0 for zoom in image.header.get_zooms()[:3]]
        affine = np.diag([*(np.array(zooms + [1.0] * 3)[:3] * millimetres), 1.0])
        has_place = False
    directions = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    if np.abs(directions.T @ directions - np.eye(3)).max() > _SHEAR:
        raise ValueError(
            f"{name} has an affine whose axes are not perpendicular, as of a tilted gantry:"
            f" {affine.round(3).tolist()}. Resample it to a grid without shear first."
        )
    if not has_place:
        warnings.warn(
            f"{name} has no usable affine: left and right cannot be told apart. Its voxel sizes and axes are taken as"
            " they stand; write the right affine into the header if you know it.",
            stacklevel=2,
        )
    arrays = {"": array}
    if array.ndim == 4:
        arrays = {str(index): array[..., index] for index in range(array.shape[3])}
    return _checked(InputVolume(arrays, affine, header, False, min(image.ndim, 3), name))


def _check_meaning(image, header: nib.Nifti1Header | None, name: str, labels: bool) -> None:
    """Raises a `ValueError` for headers by which the voxels are no image, the fourth dimension holds no modalities, or
    nobody knows where the volume lies."""
    zooms = image.header.get_zooms()
    series = image.ndim == 4 and image.shape[3] > 1 and f"{name} is no list of modalities: its fourth dimension is"
    if header is None:
        if series and len(zooms) == 4 and zooms[3] > 0:
            raise ValueError(f"{series} time, with a repetition time of {zooms[3]:g} ms. Give one volume of it.")
        return
    intent = int(header["intent_code"])
    if intent not in _IMAGE_INTENTS + (_LABEL_INTENTS if labels else ()):
        meaning = nib.nifti1.intent_codes.label[intent] if intent in nib.nifti1.intent_codes else "unknown"
        raise ValueError(
            f"{name} is no image: its header says that the voxels are of the kind '{meaning}' (intent code {intent})."
            " If that is wrong, set `intent_code` to 0."
        )
    unit = int(header["xyzt_units"]) & 0x38
    if series and unit in _SPECTRAL_UNITS:
        raise ValueError(f"{series} a spectrum (unit code {unit}). Give one volume of it.")
    # Many programs write the unit of time and 0 or 1 whatever the dimension is.
    timed = unit in _TIME_UNITS and zooms[-1] not in (0, 1)
    if series and (timed or int(header["slice_code"]) or float(header["slice_duration"]) > 0):
        raise ValueError(f"{series} time, in steps of {zooms[3]:g}. Give one volume of it.")
    if not (int(header["sform_code"]) and int(header["qform_code"])):
        return
    sform, qform = header.get_sform()[:3, :3], header.get_qform()[:3, :3]
    if not (_is_usable(sform) and _is_usable(qform)):
        return
    sizes, by_qform = np.linalg.norm(sform, axis=0), np.linalg.norm(qform, axis=0)
    if ((sform / sizes * qform / by_qform).sum(0) < _SAME_AXIS).any():
        raise ValueError(
            f"{name} says by its sform that its axes run {''.join(nib.aff2axcodes(header.get_sform()))}, and by its"
            f" qform {''.join(nib.aff2axcodes(header.get_qform()))}. Find out which is right, and remove the other:"
            " `image.set_qform(None, code=0)`."
        )
    # A template's space, codes 3 to 5, has sizes of its own.
    if int(header["sform_code"]) <= 2 and not np.allclose(sizes, by_qform, rtol=0.01, atol=0):
        raise ValueError(
            f"{name} has voxels of {sizes.round(4).tolist()} by its sform, and of {by_qform.round(4).tolist()} by"
            " `pixdim`. Write the right sizes into both."
        )


def _is_usable(affine: np.ndarray) -> bool:
    """Tells whether a matrix `(3, 3)` or `(4, 4)` is finite and not singular, relative to its voxel sizes."""
    axes = affine[:3, :3]
    return bool(np.isfinite(affine).all() and abs(np.linalg.det(axes)) > 1e-6 * np.linalg.norm(axes, axis=0).prod())


def _millimetres(header: nib.Nifti1Header | None, name: str) -> float:
    """Returns the length of a header's unit of space."""
    unit = 0 if header is None else int(header["xyzt_units"]) & 0x07
    if unit not in _MILLIMETRES:
        raise ValueError(
            f"{name} has an unknown unit of space in its header, code {unit}; 1 is metre, 2 mm, 3 micron."
        )
    return _MILLIMETRES[unit]


def _from_picture(picture: PIL.Image.Image, name: str) -> InputVolume:
    with _reading(name):
        picture = PIL.ImageOps.exif_transpose(picture)
    if picture.mode == "F":
        raise ValueError(
            f"{name} holds decimal numbers (mode F), which picture files cannot; give an array:"
            " `np.asarray(picture).T`."
        )
    if picture.mode not in ("1", "L", "I") and not picture.mode.startswith("I;16"):
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
