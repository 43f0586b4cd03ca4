"""Finds the subjects of data sets that keep no volumes: a picture or an array per slice, and crops in a pickle. What
`subjects.py` says of readers holds here too."""

from __future__ import annotations

import itertools
import math
import pickle
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import nibabel as nib
import numpy as np

from ...checks import check_integer
from ...volumes.volume import PICTURE_AFFINE, InputVolume, StoredVolume, check_fetched, check_voxels, open_picture
from .listing import (
    Missing,
    as_text,
    fields_of,
    find_files,
    folders_in,
    list_names,
    list_some,
    match_fields,
    require_folder,
)
from .subjects import Subject


# C channels, X and Y in the plane, Z slices, R x K rows and columns of a picture.

_NUMBERS = "biuf"  # kinds of data types


@dataclass(frozen=True)
class PictureStack(StoredVolume):
    """Reads pictures, one on another, from the lowest slice up: rows to posterior, columns to the left, as pictures
    are shown.

    Args:
        files: One slice each, R x K pixels, any kind that PIL reads.
        channels: Name to channel of colour pictures; grey ones by default.
        filler: Channel that stands in for others that were not taken: those are an error.
    """

    files: tuple[Path, ...]
    channels: Mapping[str, int] | None = None
    filler: int | None = None

    def read(self) -> InputVolume:
        slices = []
        for file in self.files:
            slices.append(np.asarray(open_picture(file)))
            check_voxels(len(self.files) * slices[-1].size, f"{file} and the slices beside it")
            if slices[-1].shape != slices[0].shape:
                raise ValueError(
                    f"{file} must have the shape {slices[0].shape} of {self.files[0]}, got {slices[-1].shape}."
                )
        stack = np.stack(slices).astype(np.float32)  # (Z, R, K) or (Z, R, K, C)
        count = stack.shape[3] if stack.ndim == 4 else 1
        if self.channels is None:
            if count != 1:
                raise ValueError(f"{self} must be grey, and has {count} channels.")
            arrays = {"": stack.reshape(stack.shape[:3])}
        else:
            wrong = {name: index for name, index in self.channels.items() if not 0 <= index < count}
            if wrong:
                raise ValueError(f"{self} has the channels 0 to {count - 1}, and `modalities` ask for {wrong}.")
            stack = stack.reshape(*stack.shape[:3], count)
            arrays = {name: stack[..., index] for name, index in self.channels.items()}
            for name, index in self.channels.items():
                if self.filler not in (None, index) and np.array_equal(arrays[name], stack[..., self.filler]):
                    raise ValueError(
                        f"{self}: `{name}` was not taken, its channel {index} is a copy of {self.filler}."
                    )
        arrays = {name: np.ascontiguousarray(array.transpose(2, 1, 0)) for name, array in arrays.items()}
        return InputVolume(arrays, PICTURE_AFFINE, None, False, 3, str(self))


@dataclass(frozen=True)
class ArrayStack(StoredVolume):
    """Reads arrays of `.npz` files, one on another.

    Args:
        files: One slice each.
        key: Array in the file: `(1, C, X, Y)`.
        channels: Name to channel; one channel by default.
        affine: Sixteen numbers, voxels to millimetres, by rows.
    """

    files: tuple[Path, ...]
    key: str
    channels: Mapping[str, int] | None
    affine: tuple[float, ...]

    def read(self) -> InputVolume:
        slices = []
        for file in self.files:
            array = _read_array(file, self.key)
            check_voxels(len(self.files) * array.size, f"{file} and the slices beside it")
            if array.ndim != 4 or len(array) != 1 or (slices and array.shape[1:] != slices[0].shape):
                raise ValueError(f"{file}: `{self.key}` must be (1, C, X, Y), equal in all slices, got {array.shape}.")
            slices.append(array[0])
        stack = np.stack(slices, axis=-1).astype(np.float32)  # (C, X, Y, Z)
        channels = {"": 0} if self.channels is None else self.channels
        if self.channels is None and len(stack) != 1 or max(channels.values()) >= len(stack):
            raise ValueError(f"{self}: `{self.key}` has {len(stack)} channels, and {dict(channels)} is asked for.")
        arrays = {name: stack[index] for name, index in channels.items()}
        return InputVolume(arrays, np.reshape(self.affine, (4, 4)), None, False, 3, str(self))


def _read_array(file: Path, key: str) -> np.ndarray:
    """Reads one array of an `.npz` file; its header has to agree with what there is before memory is taken."""
    check_fetched(file)
    try:
        with zipfile.ZipFile(file) as archive:
            entry = archive.getinfo(f"{key}.npy")
            with archive.open(entry) as content:
                version = np.lib.format.read_magic(content)
                read_header = {
                    (1, 0): np.lib.format.read_array_header_1_0,
                    (2, 0): np.lib.format.read_array_header_2_0,
                }
                shape, _, dtype = read_header[version](content)
                start = content.tell()
    except KeyError:
        raise ValueError(f"{file} holds no array `{key}`.") from None
    except Exception as error:  # a damaged file ends in any of nine kinds of error
        raise ValueError(f"{file} cannot be read, it may be truncated or damaged: {error}.") from error
    check_voxels(math.prod(shape), f"`{key}` in {file} (shape {shape})")
    if not dtype.hasobject and math.prod(shape) * dtype.itemsize != entry.file_size - start:
        raise ValueError(
            f"{file} cannot be read, it may be truncated or damaged: `{key}` has the shape {shape}, and"
            f" {entry.file_size - start} bytes."
        )
    try:
        with np.load(file, allow_pickle=False) as arrays:
            array = arrays[key]
    except Exception as error:
        raise ValueError(f"{file} cannot be read, it may be truncated or damaged: {error}.") from error
    if array.dtype.kind not in _NUMBERS:
        raise ValueError(f"{file}: `{key}` must hold real numbers, got data type {array.dtype}.")
    return array


@dataclass(frozen=True, eq=False)
class PicklePicture(StoredVolume):
    """Holds a picture, R x K, from a pickle that has many; it is in memory."""

    name: str
    files: tuple[Path, ...]
    array: np.ndarray = field(repr=False)

    def __str__(self) -> str:
        return f"{self.name} of {self.files[0]}"

    def read(self) -> InputVolume:
        array = np.ascontiguousarray(self.array.T[..., None], dtype=np.float32)
        return InputVolume({"": array}, PICTURE_AFFINE, None, True, 2, str(self))


def read_picture_stacks(
    root: str | Path,
    modalities: Mapping[str, int],
    pictures: str = "{subject}_{slice}.tif",
    masks: str | None = "{subject}_{slice}_mask.tif",
    filler: int | None = None,
) -> list[Subject]:
    """
    Finds one subject per folder, with a picture per slice, whose channels are modalities, and a picture per mask:
    `kaggle_3m` of TCGA-LGG. No voxel size is known; every voxel counts as 1 mm. Marked is what is above 0.

    Args:
        modalities: Name to channel, from 0. TCGA-LGG: 0 before contrast, 1 FLAIR, 2 after contrast.
        pictures, masks: File names with the field `{slice}`, a number that grows upwards; `{subject}` is the folder's
            name. `masks` null: unlabelled. Every picture needs a mask, and every mask a picture.
        filler: Channel that stands in where a sequence was not taken (FLAIR in TCGA-LGG): a subject whose modality is
            a copy of it is listed as unreadable.
    """
    root = require_folder(root)
    modalities, pictures = _check_channels(modalities), as_text("pictures", pictures)
    subjects = []
    for folder, stack in _stacks(root, pictures):
        if isinstance(stack, Missing):
            subjects.append(Subject(folder.name, stack, () if masks is None else (stack,)))
            continue
        found = ()
        if masks is not None:
            mask = _slices_in(folder, as_text("masks", masks))
            if isinstance(mask, Missing) or mask.keys() == stack.keys():
                found = (mask if isinstance(mask, Missing) else PictureStack(tuple(mask.values())),)
            else:
                missing, alone = sorted(stack.keys() - mask.keys()), sorted(mask.keys() - stack.keys())
                what = (
                    f"mask {masks} of the slices {missing}" if missing else f"picture {pictures} of the masks {alone}"
                )
                found = (Missing(f"Subject {folder.name} has no {what}."),)
        subjects.append(Subject(folder.name, PictureStack(tuple(stack.values()), modalities, filler), found))
    return subjects


def read_array_stacks(
    root: str | Path,
    modalities: Mapping[str, int],
    arrays: str = "slice_{slice}.npz",
    image: str = "x",
    mask: str | None = "y",
    mask_above: float = 0.5,
    orientation: str = "LPS",
    spacing: tuple[float, float, float] = (1.0, 1.0, 1.0),
) -> list[Subject]:
    """
    Finds one subject per folder, with an `.npz` file per slice: what AnoFPDM's `preprocess.py` writes,
    `patient_ID/slice_Z.npz` with the image `x (1, C, X, Y)` and the mask `y (1, 1, X, Y)`, of fractions. The slices of
    a subject follow one another without a gap.

    Args:
        modalities: Name to channel, from 0.
        arrays: File names with the field `{slice}`; `{subject}` is the folder's name.
        image, mask: Arrays in a file; `mask` null: unlabelled.
        mask_above: Value of the mask above which a voxel is marked.
        orientation: Directions in which X, Y and the slices grow; those of the files they were made of.
        spacing: Voxel size in mm, of X, Y and the slices.
    """
    root = require_folder(root)
    modalities, arrays, orientation = _check_channels(modalities), as_text("arrays", arrays), str(orientation)
    image, mask = as_text("image", image), None if mask is None else as_text("mask", mask)
    try:
        axes = nib.orientations.axcodes2ornt(orientation)
    except (ValueError, KeyError):
        axes = np.full((3, 2), np.nan)
    if axes.shape != (3, 2) or sorted(axes[:, 0].tolist()) != [0, 1, 2]:
        raise ValueError(f"`orientation` must be three of L or R, A or P, S or I, got {orientation!r}.")
    affine = np.zeros((4, 4))
    affine[3, 3] = 1
    for axis, (world, sign) in enumerate(axes):
        affine[int(world), axis] = sign * spacing[axis]
    subjects = []
    for folder, stack in _stacks(root, arrays):
        if isinstance(stack, Missing):
            subjects.append(Subject(folder.name, stack, () if mask is None else (stack,)))
            continue
        placed = affine.copy()
        placed[:3, 3] = affine[:3, 2] * next(iter(stack))
        place, files = tuple(placed.ravel().tolist()), tuple(stack.values())
        masks = () if mask is None else (ArrayStack(files, mask, None, place),)
        volume = ArrayStack(files, image, modalities, place)
        subjects.append(Subject(folder.name, volume, masks, mask_above=mask_above))
    return subjects


def read_crop_pickles(root: str | Path, files: str = "*.pickle") -> list[Subject]:
    """
    Finds the crops in a pickle, as the public one of LIDC-IDRI by the author of Probabilistic-Unet-Pytorch: a dict,
    name to dict with `image` (R x K, in [0, 1]), `masks` (a list of R x K, 0 or 1, one per annotator) and
    `series_uid`. Crops of one series are one group.

    A pickle can run any code when it is opened: this reader admits arrays of numbers and plain containers, and refuses
    the file otherwise. All of it is in memory while the set is made. `files` is the pattern of the pickles in `root`.
    """
    root = require_folder(root)
    paths = find_files(root, as_text("files", files))
    if not paths:
        raise ValueError(f"No file in {root} is {files}; there are {list_names(root)}.")
    subjects: dict[str, Subject] = {}
    for path in paths:
        check_fetched(path)
        size = path.stat().st_size
        with open(path, "rb") as file:
            try:
                crops = _ArrayUnpickler(file).load()
            except pickle.UnpicklingError as error:
                raise ValueError(f"{path} cannot be read: {error}.") from error
            except Exception as error:  # a damaged pickle ends in any kind of error
                raise ValueError(f"{path} cannot be read, it may be truncated or damaged: {error}.") from error
        if not isinstance(crops, dict):
            raise ValueError(f"{path} must hold a dict of crops, got {type(crops).__name__}.")
        while crops:  # what is taken over need not be in memory twice
            name, crop = crops.popitem()
            if not isinstance(name, (str, int)):
                raise ValueError(f"{path}: the name of a crop must be text or a number, got {type(name).__name__}.")
            name = str(name)
            if not isinstance(crop, dict) or not {"image", "masks", "series_uid"} <= crop.keys():
                raise ValueError(f"{path}: the crop {name} must be a dict with image, masks and series_uid.")
            if not isinstance(crop["masks"], (list, tuple)) or not isinstance(crop["series_uid"], (str, int)):
                raise ValueError(f"{path}: the crop {name} must have a list of masks, and a `series_uid` of text.")
            pictures = [crop["image"], *crop["masks"]]
            if not all(
                isinstance(array, np.ndarray) and array.ndim == 2 and array.dtype.kind in _NUMBERS
                for array in pictures
            ):
                raise ValueError(
                    f"{path}: image and masks of the crop {name} must be arrays of two dimensions, of numbers."
                )
            if sum(array.nbytes for array in {id(array): array for array in pictures}.values()) > size:
                raise ValueError(
                    f"{path} cannot be read: the crop {name} claims arrays that are larger than the file."
                )
            # What stands for several masks is in memory once.
            marked = {id(array): (array > 0).astype(np.uint8) for array in crop["masks"]}
            if name in subjects:
                raise ValueError(f"Two crops are called {name}, one of them in {path}.")
            subjects[name] = Subject(
                name,
                volume=PicklePicture(name, (path,), crop["image"].astype(np.float32)),
                masks=tuple(PicklePicture(name, (path,), marked[id(array)]) for array in crop["masks"]),
                group=str(crop["series_uid"]),
            )
    return [subjects[name] for name in sorted(subjects)]


class _ArrayUnpickler(pickle.Unpickler):
    """Admits arrays of numbers and plain containers (dict, list, tuple, set, text): nothing that runs code."""

    # How numpy puts arrays and numbers together; its modules are called otherwise before version 2.
    _MODULES = ("numpy.core.multiarray", "numpy._core.multiarray", "numpy.core.numeric", "numpy._core.numeric")
    _FUNCTIONS = {
        # Empty, as numpy writes it; the content that follows brings its size, and is as long as it says.
        "_reconstruct": lambda *_: np.empty(1).__reduce__()[0](np.ndarray, (0,), b"b"),
        "_frombuffer": np.empty(1).__reduce_ex__(5)[0],
        "scalar": np.float64(0).__reduce__()[0],
    }

    def find_class(self, module, name):
        if module in self._MODULES and name in self._FUNCTIONS:
            return self._FUNCTIONS[name]
        if module == "numpy" and name in ("ndarray", "dtype"):
            return {"ndarray": np.ndarray, "dtype": np.dtype}[name]
        if module in ("builtins", "__builtin__") and name in ("set", "frozenset"):
            return {"set": set, "frozenset": frozenset}[name]
        if (module, name) == ("_codecs", "encode"):
            return _encode_latin1
        raise pickle.UnpicklingError(f"it holds {module}.{name}, and only arrays and plain containers are admitted")


def _encode_latin1(text: str, encoding: str) -> bytes:
    # How Python 3 writes bytes for Python 2; of all codecs, this one is used there.
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"it asks for the codec {encoding!r}")
    return text.encode("latin1")


def _check_channels(modalities: Mapping[str, int]) -> dict[str, int]:
    """Returns the channels of the modalities; raises a `ValueError` unless they are numbers."""
    if not isinstance(modalities, Mapping) or not modalities:
        raise ValueError(f"`modalities` must give each modality its channel, {{flair: 1}}, got {modalities!r}.")
    for name, channel in modalities.items():
        check_integer(f"modalities.{name}", channel, 0)
    return {as_text("modalities", name): channel for name, channel in modalities.items()}


def _stacks(root: Path, pattern: str) -> list[tuple[Path, dict[int, Path] | Missing]]:
    """Returns the folders that hold slices, with the slices by their number, in order."""
    if "slice" not in fields_of(pattern):
        raise ValueError(f"The pattern {pattern!r} must hold the field {{slice}}.")
    stacks, others = [], []
    for folder in folders_in(root):
        slices = _slices_in(folder, pattern)
        if not slices:
            others.append(folder.name)
            continue
        if not isinstance(slices, Missing) and max(slices) - min(slices) >= len(slices):
            gaps = (number for number in range(min(slices), max(slices)) if number not in slices)
            listed = ", ".join(map(str, itertools.islice(gaps, 10)))
            more = max(slices) - min(slices) + 1 - len(slices) - 10
            more = f" and {more} more" if more > 0 else ""
            slices = Missing(f"Subject {folder.name} has no slices {listed}{more} ({pattern}).")
        stacks.append((folder, slices))
    if not stacks:
        raise ValueError(f"No folder in {root} holds slices {pattern}; there are {list_names(root)}.")
    if others:
        message = (
            f"{len(others)} folders in {root} hold no slices {pattern}, and are no subjects: {list_some(others)}."
        )
        warnings.warn(message, stacklevel=3)
    return stacks


def _slices_in(folder: Path, pattern: str) -> dict[int, Path] | Missing:
    """Returns the slices in a folder by their number, in order, or the reason why they are not unique."""
    slices: dict[int, Path] = {}
    for values, path in match_fields(folder, pattern, subject=folder.name):
        if not values["slice"].isdecimal():
            continue
        number = int(values["slice"])
        if slices.setdefault(number, path) != path:
            both = (slices[number], path)
            names = " and ".join(file.name for file in both)
            return Missing(f"Subject {folder.name} has slice {number} twice: {names}.", both)
    return dict(sorted(slices.items()))
