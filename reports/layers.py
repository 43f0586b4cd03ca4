"""Turns the images of a report into what its page holds: NIfTI files of few bytes, and pictures."""

from __future__ import annotations

import base64
import gzip
import io
import os
from collections.abc import Mapping
from dataclasses import dataclass

import nibabel as nib
import numpy as np
import PIL.Image

from ..volumes.geometry import plane_orientation
from ..volumes.volume import check_whole


# What a layer shows, which decides its colours and how it is stored.
SCAN, MAP, MASK, REFERENCE, RECONSTRUCTION, PROBABILITY, MEMBERS = KINDS = (
    "scan",
    "map",
    "mask",
    "reference",
    "reconstruction",
    "probability",
    "members",
)
_GREY, _BINARY = (SCAN, RECONSTRUCTION), (MASK, REFERENCE)

# How a scan that is too large for a page is stored instead, one step after the other, and what the page says of it:
# bits of grey images (whole numbers keep up to 16), bits of maps, voxels along an axis that become one.
STEPS = (
    (12, 16, 1, ""),
    (8, 16, 1, "Scan and reconstruction are stored in 256 grey levels, to keep this page small."),
    (8, 8, 1, "All images are stored in 256 levels, to keep this page small: volumes at other thresholds are coarse."),
    *(
        (
            8,
            8,
            factor,
            f"All images are stored in 256 levels and at 1/{factor} of their resolution along each axis, to keep this"
            " page small: volumes in ml are those of the stored images, not of the result's files.",
        )
        for factor in (2, 4, 8, 16)
    ),
)


@dataclass(frozen=True)
class EncodedLayer:
    """Holds a layer as the page has it: `file`, a compressed NIfTI file in base64, and `facts` for the viewer."""

    file: str
    facts: dict


def read_layer(name: str, image) -> tuple[np.ndarray, np.ndarray]:
    """Returns the values of an image, float32 `(X, Y, Z)` or `(X, Y, Z, E)`, and its affine; raises a `ValueError` if
    they are not finite or of another shape."""
    path, image = (image, nib.load(image)) if isinstance(image, (str, os.PathLike)) else (None, image)
    array = np.asanyarray(image.dataobj, dtype=np.float32)
    if path is not None:
        check_whole(path)
    array = array.reshape(*array.shape, *(1,) * (3 - array.ndim))
    if array.ndim == 4 and array.shape[3] == 1:
        array = array[..., 0]
    if array.ndim > 4 or not array.size:
        raise ValueError(f"The image of the layer {name!r} must have 2 to 4 dimensions, got shape {array.shape}.")
    if not np.isfinite(array).all():
        raise ValueError(f"The image of the layer {name!r} holds values that are NaN or infinite.")
    return array, np.asarray(image.affine, dtype=np.float64)


def encode_layers(
    arrays: Mapping[int, tuple[str, np.ndarray, np.ndarray]], threshold: float | None, step: int
) -> dict[int, EncodedLayer]:
    """
    Encodes the layers of a scan.

    Args:
        arrays (mapping): Number of a layer to its kind, its values `(X, Y, Z)` or `(X, Y, Z, E)`, and its affine.
        threshold (`float`, *optional*): Of the first map or probability, in its units.
        step (`int`): Which of `STEPS`.
    """
    grey_bits, map_bits, factor, _ = STEPS[step]
    marked = next((number for number, (kind, _, _) in arrays.items() if kind in (MAP, PROBABILITY)), None)
    encoded = {}
    for number, (kind, array, affine) in arrays.items():
        array, affine = _shrink(kind, array, affine, factor)
        is_mask = kind in _BINARY or (kind == MEMBERS and set(np.unique(array)) <= {0.0, 1.0})
        if is_mask:
            levels, slope, offset, mark = (array > 0).astype(np.uint8), 1.0, 0.0, None
        else:
            bits = grey_bits if kind in _GREY else map_bits
            levels, slope, offset, mark = _quantize(
                kind, array, bits, threshold if number == marked and factor == 1 else None
            )
        facts = {
            "shape": list(array.shape),
            "affine": affine.tolist(),
            "slope": slope,
            "offset": offset,
            "bytes": levels.dtype.itemsize,
            "mark": mark,
            "low": float(array.min()) if kind in _GREY else 0.0,
            "high": 1.0 if is_mask else _display_maximum(kind, array),
            "voxel_ml": float(abs(np.linalg.det(affine[:3, :3]))) / 1000,
        }
        encoded[number] = EncodedLayer(_nifti(levels, affine, slope, offset), facts)
    return encoded


def _quantize(
    kind: str, array: np.ndarray, bits: int, threshold: float | None
) -> tuple[np.ndarray, float, float, int | None]:
    """Levels, 0 to 2**bits - 1, slope and offset of values, and the level that a value above the threshold exceeds.

    Level k holds the values between `offset + (k - 0.5) * slope` and `offset + (k + 0.5) * slope`, and the threshold
    is one of these bounds: what the page counts above a bound is what the values count.
    """
    top = 2**bits - 1
    low, high = float(array.min()), float(array.max())
    if kind in _GREY and bits == 8:
        low, high = float(np.quantile(array, 0.001)), float(np.quantile(array, 0.999))
    elif kind not in _GREY:
        low = min(low, 0.0)
    whole = (
        kind in _GREY and high - low <= (255 if bits == 8 else 65535) and low == round(low) and not (array % 1).any()
    )
    slope = 1.0 if whole else (high - low) / top or 1.0
    mark = None
    if threshold is not None and threshold >= high:
        mark = top  # nothing is above it
    elif threshold is not None and threshold > low:
        mark = int(np.floor(top * (threshold - low) / (high - low) - 0.5))
        if mark < 0:
            mark = None  # too near to the lowest value
        else:
            slope = (threshold - low) / (mark + 0.5)
    most = np.iinfo(np.uint16).max if whole and bits > 8 else top
    levels = np.clip(np.ceil((array.astype(np.float64) - low) / slope - 0.5), 0, most)
    if mark is not None and mark < top:
        above = array > threshold
        levels = np.where(above, np.maximum(levels, mark + 1), np.minimum(levels, mark))
    return levels.astype(np.uint8 if bits == 8 else "<u2"), slope, low, mark


def _display_maximum(kind: str, array: np.ndarray) -> float:
    if kind == PROBABILITY:
        return 1.0
    of_scores = kind in (MAP, MEMBERS)
    positive = array[array > 0] if of_scores else array
    top = float(np.quantile(positive, 0.998)) if positive.size else 0.0
    return top if top > (0.0 if of_scores else float(array.min())) else float(array.max()) or 1.0


def _shrink(kind: str, array: np.ndarray, affine: np.ndarray, factor: int) -> tuple[np.ndarray, np.ndarray]:
    """Means of blocks of voxels, maxima of masks; blocks at the end are filled with the last voxel."""
    factors = [min(factor, size) for size in array.shape[:3]]
    if max(factors) == 1:
        return array, affine
    pad = [(0, -size % one) for size, one in zip(array.shape, factors, strict=False)]
    array = np.pad(array, [*pad, *[(0, 0)] * (array.ndim - 3)], mode="edge")
    blocks = [size for one, factor in zip(array.shape, factors, strict=False) for size in (one // factor, factor)]
    array = array.reshape(*blocks, *array.shape[3:])
    array = array.max((1, 3, 5)) if kind in _BINARY else array.mean((1, 3, 5), dtype=np.float32)
    change = np.diag([*factors, 1.0])
    change[:3, 3] = (np.array(factors) - 1) / 2
    return array, affine @ change


def _nifti(levels: np.ndarray, affine: np.ndarray, slope: float, offset: float) -> str:
    """A compressed NIfTI file in base64, with a header that says nothing but the grid and the scaling."""
    header = nib.Nifti1Header(endianness="<")
    header.set_data_dtype(levels.dtype)
    header.set_data_shape(levels.shape)
    header.set_sform(affine, code="scanner")
    header["pixdim"][1:4] = np.linalg.norm(affine[:3, :3], axis=0)
    header.set_xyzt_units("mm")
    header.set_slope_inter(slope, offset)
    header["magic"], header["vox_offset"] = b"n+1", 352
    content = header.binaryblock + b"\0" * 4 + levels.tobytes(order="F")
    return base64.b64encode(gzip.compress(content, 6, mtime=0)).decode("ascii")


def plane_axes(affine: np.ndarray) -> dict[str, tuple[int, int]]:
    """Returns for each plane the voxel axis that runs through its slices, and 1 or -1, whether it runs to the right,
    to the front or upwards, or against that."""
    axes = {}
    for plane in ("axial", "coronal", "sagittal"):
        to_plane = plane_orientation(affine, plane)
        axis = int(np.argsort(to_plane[:, 0])[2])
        row = {"axial": 2, "coronal": 1, "sagittal": 0}[plane]
        axes[plane] = axis, 1 if affine[row, axis] >= 0 else -1
    return axes


def draw_slice(
    scan: np.ndarray, overlay: np.ndarray | None, affine: np.ndarray, plane: str, start: list[int], width: int
) -> str:
    """Returns the slice of a scan that `start`, a voxel, lies in, as a JPEG picture in a data address: in radiological
    convention, `width` pixels wide at most, with what is high in `overlay` in colour."""
    to_plane = plane_orientation(affine, plane)
    index = start[int(np.argsort(to_plane[:, 0])[2])]

    def in_plane(array: np.ndarray) -> np.ndarray:
        axis = int(np.argsort(to_plane[:, 0])[2])
        one = np.take(array, [index], axis=axis)
        return nib.orientations.apply_orientation(one, to_plane)[..., 0].T

    low, high = float(scan.min()), _display_maximum(SCAN, scan)
    grey = np.clip((in_plane(scan) - low) / (high - low or 1.0), 0, 1)[..., None] * np.ones(3)
    if overlay is not None:
        strength = np.clip(in_plane(overlay) / _display_maximum(MAP, overlay), 0, 1)[..., None]
        colour = np.concatenate([np.ones_like(strength), 0.25 + 0.6 * strength, 0.1 * strength], -1)
        grey = grey * (1 - 0.8 * strength**0.5 * (strength > 0.15)) + colour * 0.8 * strength**0.5 * (strength > 0.15)
    picture = PIL.Image.fromarray(np.rint(grey * 255).astype(np.uint8))
    zooms = np.linalg.norm(affine[:3, :3], axis=0)[np.argsort(to_plane[:, 0])]
    scale = width / max(picture.width * zooms[0], picture.height * zooms[1])
    size = [max(1, round(n * zoom * scale)) for n, zoom in zip(picture.size, zooms, strict=False)]
    content = io.BytesIO()
    picture.resize(size, PIL.Image.Resampling.BILINEAR).save(content, "JPEG", quality=82)
    return "data:image/jpeg;base64," + base64.b64encode(content.getvalue()).decode("ascii")
