"""Reads series of DICOM images. Needs the extra `dicom`; no torch here.

What is read of a header is geometry, and numbers of the sequence: messages never hold a name, an identity, a date, a
UID, a description, or the name of a file in a folder, which exports often make of these.
"""

from __future__ import annotations

import importlib.util
import io
import itertools
import math
import os
import re
import tempfile
import threading
import zipfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import nibabel as nib
import numpy as np


SUFFIXES = (".dcm", ".ima", ".zip")

_ONE_THREAD = threading.Lock()
# DICOM's axes run to the patient's left, posterior and superior; ours to right, anterior and superior.
_LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
# Tolerances: of unit vectors; of a step between slices, as a share of the step; of a shift between slices along their
# plane, as a share of the step (a tilted gantry); and the step in mm below which two slices are one.
_DIRECTION, _STEP, _SHIFT, _SAME = 1e-4, 0.01, 0.05, 1e-3
# Positions are often written with two decimals.
_ROUNDED = 0.011
# Objects with pixels that are no scans: segmentations and their kin, parametric maps.
_DERIVED = ("1.2.840.10008.5.1.4.1.1.66.", "1.2.840.10008.5.1.4.1.1.30")
_SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"
# Files without suffix that lie on discs with images.
_NO_SLICES = ("DICOMDIR", "README", "LICENSE", "VERSION", "LOCKFILE")
# What the list of series needs; nothing else is read for it.
_LISTED = (
    "SOPClassUID SeriesInstanceUID SeriesNumber Modality Rows Columns NumberOfFrames RepetitionTime EchoTime"
    " InversionTime"
).split()
_REQUIRED = (
    "SOPClassUID SOPInstanceUID StudyInstanceUID SeriesInstanceUID FrameOfReferenceUID Modality Rows Columns"
    " BitsAllocated"
).split()
# Whose series it is: what results take over from it. Nobody else is named in them.
PATIENT_AND_STUDY = (
    "PatientName PatientID IssuerOfPatientID PatientBirthDate PatientSex PatientAge PatientIdentityRemoved"
    " DeidentificationMethod DeidentificationMethodCodeSequence StudyDate StudyTime StudyID AccessionNumber"
    " ReferringPhysicianName StudyDescription"
).split()
_READ = (
    "SpecificCharacterSet InstanceNumber SeriesNumber PositionReferenceIndicator NumberOfFrames SamplesPerPixel"
    " PhotometricInterpretation ImagePositionPatient ImageOrientationPatient PixelSpacing SliceThickness"
    " SpacingBetweenSlices ImageType RescaleSlope RescaleIntercept ModalityLUTSequence LossyImageCompression"
    " LossyImageCompressionRatio LossyImageCompressionMethod SharedFunctionalGroupsSequence"
    " PerFrameFunctionalGroupsSequence"
).split()
_PIXELS = (
    "Rows Columns NumberOfFrames SamplesPerPixel PhotometricInterpretation BitsAllocated BitsStored HighBit"
    " PixelRepresentation PixelData"
).split()


@contextmanager
def quoting_nothing() -> Iterator[None]:
    """Keeps pydicom, in the block, from warning of values that it finds odd, which it quotes. Its settings are those
    of the process, so one thread at a time is in such a block. Raises an `ImportError` that names the extra."""
    if not all(map(importlib.util.find_spec, ("pydicom", "highdicom", "SimpleITK"))):
        raise ImportError("DICOM needs pydicom, highdicom and SimpleITK: `pip install anodiff[dicom]`.")
    from pydicom import config

    with _ONE_THREAD, config.disable_value_validation():
        yield


@dataclass(frozen=True)
class _File:
    """Names a file in a folder or an archive, and opens it."""

    folder: str
    name: str
    open: Callable[[], io.IOBase]

    @property
    def is_slice(self) -> bool:
        """Whether its name is one that slices have: ends in .dcm or .ima, or in nothing that is a word."""
        suffix = Path(self.name).suffix.lower()
        return suffix in SUFFIXES[:2] or (not re.search("[a-z]", suffix) and self.name.upper() not in _NO_SLICES)


@dataclass(frozen=True)
class _Listed:
    """Says of a file what the list of series does: number of its series, how many images it is, and what tells
    sequences apart and is no free text."""

    file: _File
    number: str
    images: int
    facts: str


@dataclass(frozen=True)
class _Frame:
    """Describes one slice: where its pixels are, where it lies (mm, LPS), and what makes values of its pixels."""

    dataset: int
    index: int
    label: str
    size: tuple[int, int]
    position: np.ndarray
    orientation: np.ndarray
    spacing: np.ndarray
    slope: float
    intercept: float


@dataclass(frozen=True)
class DicomSeries:
    """
    Holds the headers of one series, whose slices make one volume.

    Args:
        name: What messages call it: the path as given.
        datasets: What is needed of the headers of its files: of one file per slice in the order of the slices, or of
            one file with all slices. They say who the patient is, and are left out of the representation.
        frames: The slices, in the direction of their normal.
        shape: Columns, rows, slices.
        affine (`np.ndarray` of shape `(4, 4)`): Voxel indices to world millimetres (RAS+).
    """

    name: str
    datasets: tuple = field(repr=False)
    frames: tuple[_Frame, ...] = field(repr=False)
    shape: tuple[int, int, int]
    affine: np.ndarray
    _openers: tuple[Callable[[], io.IOBase], ...] = field(repr=False)

    @quoting_nothing()
    def read(self) -> nib.Nifti1Image:
        """Reads the pixels: an image `(columns, rows, slices)` of float32, after each slice's rescale slope and
        intercept; raises a `ValueError` if they cannot be decoded."""
        import pydicom

        array = np.empty(self.shape, dtype=np.float32)
        stored, held = None, None
        for number, frame in enumerate(self.frames):
            if held != frame.dataset:
                held = frame.dataset
                with _reading(self.name, frame.label), self._openers[held]() as file:
                    stored = _decode(pydicom.dcmread(file))
            if stored.shape[1:] != self.shape[1::-1] or not frame.index < len(stored):
                raise ValueError(f"{self.name}: the pixels of {frame.label} are not as many as its header says.")
            array[..., number] = stored[frame.index].T * frame.slope + frame.intercept
        image = nib.Nifti1Image(array, self.affine)
        image.header.set_xyzt_units("mm")
        image.set_sform(self.affine, code="scanner")
        image.set_qform(self.affine, code="scanner")
        return image

    def close(self) -> DicomSeries:
        """Returns the series without its files, for what refers to it; an archive is closed when nothing else reads
        it."""
        return replace(self, _openers=())


def names_dicom(path: str | os.PathLike) -> bool:
    """Tells whether a path is one that [`find_series`] reads, by its looks: a folder, a file of DICOM, a ZIP archive,
    or one of these with a chosen series behind `#`."""
    path, choice = split_choice(path)
    return choice is not None or path.is_dir() or path.suffix.lower() in SUFFIXES or is_dicom_file(path)


def is_dicom_file(path: str | os.PathLike) -> bool:
    """Tells whether a file begins as DICOM does. An index of files (DICOMDIR) is none that is read."""
    if Path(path).name.upper() == "DICOMDIR" or not Path(path).is_file():
        return False
    with open(path, "rb") as file:
        return file.read(132)[128:] == b"DICM"


def list_source_files(path: str | os.PathLike) -> list[Path]:
    """Returns the files that a volume is read from: those of a folder of DICOM, or the file itself, or the archive."""
    path, _ = split_choice(path)
    return [Path(file.folder, file.name) for file in _list_files(path)] if path.is_dir() else [path]


def find_study(path: str | os.PathLike) -> str | None:
    """Returns the UID of the examination that a file is of, for comparison; `None` if it cannot be read."""
    with suppress(ImportError, ValueError), _reading(str(path), "the file"), quoting_nothing():
        import pydicom

        return str(pydicom.dcmread(path, specific_tags=["StudyInstanceUID"]).StudyInstanceUID)
    return None


def holds_dicom(folder: Path) -> bool:
    """Tells whether a folder holds files of DICOM, not in folders below it."""
    return any(is_dicom_file(file) for file in folder.iterdir() if not file.name.startswith("."))


def split_choice(path: str | os.PathLike) -> tuple[Path, str | None]:
    """Returns what is in front of the last `#` of a path, and the choice of a series behind it; or the path and `None`
    if there is no such choice."""
    base, mark, choice = str(path).rpartition("#")
    if not mark or os.path.lexists(path) or not base or not os.path.lexists(base):
        return Path(path), None
    return Path(base), choice


@quoting_nothing()
def find_series(source: str | os.PathLike | Sequence[Path]) -> DicomSeries:
    """
    Finds the one series in files, and reads and checks its headers.

    Args:
        source: A folder (its own files, or, if none of them is DICOM, all below it), a ZIP archive, a file with all
            slices, or a sequence of files. `path#4` chooses the series with the number 4 of several; its UID may stand
            there, too.

    Raises:
        ImportError: The extra is not installed.
        ValueError: There is no DICOM image, or there are several series; or the slices make no volume: one is missing
            or there twice, they differ in size, orientation or spacing, or lie askew. The message names the path and
            the slices' numbers.
    """
    import pydicom

    several = not isinstance(source, (str, os.PathLike))
    path, choice = (Path(source[0]).parent, None) if several else split_choice(source)
    files = [_file_at(one) for one in source] if several else _list_files(path)
    name = str(path) if choice is None else f"{path}#{choice}"
    groups, strange, cut = defaultdict(list), [], []
    for number, file in enumerate(files, 1):
        with _reading(name, f"file {number} in the order of names"), file.open() as stream:
            if stream.read(132)[128:] != b"DICM":
                strange.append((number, file))
                continue
            stream.seek(0)
            header = pydicom.dcmread(stream, stop_before_pixels=True, specific_tags=_LISTED)
            kind = header.get("SOPClassUID") or header.file_meta.get("MediaStorageSOPClassUID", pydicom.uid.UID(""))
            if header.get("Rows") and not kind.startswith(_DERIVED):
                groups[str(header.get("SeriesInstanceUID", ""))].append(_list(file, header))
            elif kind.name.endswith("Image Storage") or (not kind and file.is_slice):
                cut.append((number, file))
    if not groups:
        raise ValueError(
            f"{path} holds no scan: of {len(files)} files, {len(files) - len(strange)} begin as those of DICOM do, and"
            " none of these is an image of a scanner."
        )
    chosen = [listed.file for listed in _choose(path, choice, groups)]
    folders = {file.folder for file in chosen}
    damaged = [(number, file) for number, file in strange if file.is_slice] + cut
    damaged = [str(number) for number, file in sorted(damaged, key=lambda one: one[0]) if file.folder in folders]
    if damaged:
        raise ValueError(
            f"{name}: {len(damaged)} of its files hold no whole DICOM, in the order of names {', '.join(damaged[:10])}"
            f" of {len(files)}. They may be damaged or never have been fetched: get them again, or move them away."
        )
    datasets = []
    for file in chosen:
        with _reading(name, "a file"), file.open() as stream:
            wanted = [*_REQUIRED, *_READ, *PATIENT_AND_STUDY]
            datasets.append(pydicom.Dataset())  # what is read holds the open file
            datasets[-1].update(pydicom.dcmread(stream, stop_before_pixels=True, specific_tags=wanted))
    return _assemble(name, datasets, [file.open for file in chosen])


def _file_at(path: Path) -> _File:
    return _File(str(path.parent), path.name, partial(open, path, "rb"))


def _list_files(path: Path) -> list[_File]:
    """Returns the files of a folder, or of those below it if it holds none of DICOM itself, or of an archive, sorted
    by name, without hidden ones."""
    if path.is_dir():
        own = sorted(file for file in path.iterdir() if not file.is_dir() and not file.name.startswith("."))
        if not holds_dicom(path):
            own, seen = [], {os.path.realpath(path)}
            for folder, below, names in os.walk(path, followlinks=True):
                own += [Path(folder, name) for name in names if not name.startswith(".")]
                real = {name: os.path.realpath(os.path.join(folder, name)) for name in below}
                # A link may lead upwards, or to a folder that is there already.
                below[:] = [name for name in below if not name.startswith(".") and real[name] not in seen]
                seen |= {real[name] for name in below}
            own.sort()
        lost = sum(not file.exists() for file in own)
        if lost:
            raise FileNotFoundError(
                f"{path} holds {lost} links to files that are not there. Fetch their content, or remove the links."
            )
        return [_file_at(file) for file in own]
    if path.suffix.lower() != ".zip":
        return [_file_at(path)]
    with _reading(str(path), "the archive"):
        archive = zipfile.ZipFile(path)
        entries = sorted(archive.infolist(), key=lambda entry: entry.filename)
    if any(entry.flag_bits & 1 for entry in entries):
        raise ValueError(f"{path} is locked by a password. Unpack it, and give the folder.")
    places = [(Path(entry.filename), entry) for entry in entries if not entry.is_dir()]
    return [
        _File(str(place.parent), place.name, partial(archive.open, entry))
        for place, entry in places
        if not any(part.startswith(".") or part == "__MACOSX" for part in place.parts)
    ]


def _list(file: _File, header) -> _Listed:
    number, modality = header.get("SeriesNumber"), str(header.get("Modality"))
    facts = [
        modality if re.fullmatch("[A-Z]{2,4}", modality) else "unknown modality",
        f"{int(header.get('Columns', 0))} x {int(header.Rows)}",
    ]
    times = (("TR", "RepetitionTime"), ("TE", "EchoTime"), ("TI", "InversionTime"))
    facts += [f"{short} {float(header[name].value):g} ms" for short, name in times if header.get(name)]
    number = "none" if number is None else str(int(number))
    return _Listed(file, number, int(header.get("NumberOfFrames") or 1), ", ".join(facts))


def _choose(path: Path, choice: str | None, groups: dict[str, list[_Listed]]) -> list[_Listed]:
    """Returns the files of the chosen series, or of the only one. Series of one number are told apart by a second."""
    if choice is None and len(groups) == 1:
        return next(iter(groups.values()))
    numbers = {uid: files[0].number for uid, files in groups.items()}
    count, seen, labels = Counter(numbers.values()), Counter(), {}
    for uid in sorted(groups, key=lambda uid: (len(numbers[uid]), numbers[uid], uid)):
        seen[numbers[uid]] += 1
        labels[uid] = numbers[uid] if count[numbers[uid]] == 1 else f"{numbers[uid]}.{seen[numbers[uid]]}"
    for uid, files in groups.items():
        if choice is not None and choice in (uid, labels[uid]):
            return files
    listed = "; ".join(
        f"{label} ({sum(one.images for one in groups[uid])} images, {groups[uid][0].facts})"
        for uid, label in labels.items()
    )
    what = f"{path} holds {len(groups)} series" if choice is None else f"{path} holds no series {choice}, but"
    raise ValueError(f"{what}: {listed}. Choose one by its number: {path}#{next(iter(labels.values()))}.")


def _assemble(name: str, datasets: list, openers: list) -> DicomSeries:
    """Checks that slices make one volume, and puts them in order."""
    several = [dataset for dataset in datasets if "PerFrameFunctionalGroupsSequence" in dataset]
    if several and len(datasets) > 1:
        raise ValueError(
            f"{name}: the series is {len(datasets)} files that hold several slices each. Give one of them."
        )
    frames = [
        frame for number, dataset in enumerate(datasets) for frame in _frames(name, number, dataset, len(several) > 0)
    ]
    first = frames[0]
    for what, values in (
        ("size", [frame.size for frame in frames]),
        ("orientation", [frame.orientation for frame in frames]),
        ("pixel spacing", [frame.spacing for frame in frames]),
    ):
        for frame, value in zip(frames, values, strict=True):
            if not np.allclose(value, values[0], rtol=_DIRECTION, atol=_DIRECTION):
                raise ValueError(
                    f"{name}: {first.label} and {frame.label} differ in {what}, as those of a localizer. A volume"
                    " needs parallel slices of one size: leave the others out, or choose another series."
                )
    if len({dataset.FrameOfReferenceUID for dataset in datasets}) > 1:
        raise ValueError(
            f"{name}: its images differ in FrameOfReferenceUID: the patient was placed anew between them. Give those"
            " of one as a folder of their own."
        )
    along, down = first.orientation[:3], first.orientation[3:]
    if not np.allclose([along @ along, down @ down, along @ down], [1, 1, 0], atol=1e-3):
        raise ValueError(f"{name}: ImageOrientationPatient of {first.label} is no pair of perpendicular unit vectors.")
    normal = np.cross(along, down)
    frames.sort(key=lambda frame: float(frame.position @ normal))
    affine = np.eye(4)
    affine[:3, 0], affine[:3, 1] = along * first.spacing[1], down * first.spacing[0]
    affine[:3, 2], affine[:3, 3] = _step(name, frames, normal, datasets), frames[0].position
    return DicomSeries(
        name,
        tuple(datasets[frame.dataset] for frame in frames) if not several else tuple(datasets),
        tuple(frames),
        (*first.size, len(frames)),
        _LPS_TO_RAS @ affine,
        tuple(openers),
    )


def _step(name: str, frames: list[_Frame], normal: np.ndarray, datasets: list) -> np.ndarray:
    """Returns the vector from one slice to the next (mm, LPS), if it is one and the same."""
    positions = np.stack([frame.position for frame in frames])
    if len(frames) == 1:
        dataset = datasets[0]
        with _reading(name, frames[0].label):
            several = "PerFrameFunctionalGroupsSequence" in dataset
            measures = _groups(dataset, 0)("PixelMeasuresSequence") if several else dataset
            sizes = [one.get(key) for key in ("SpacingBetweenSlices", "SliceThickness") for one in (measures, dataset)]
            size = next((float(size) for size in sizes if size), 0.0)
        if not (math.isfinite(size) and size > 0):
            raise ValueError(f"{name}: neither SpacingBetweenSlices nor SliceThickness says how thick its slice is.")
        return normal * size
    steps = np.diff(positions @ normal)
    for step, (one, other) in zip(steps, itertools.pairwise(frames), strict=True):
        if step < _SAME:
            raise ValueError(
                f"{name}: {one.label} and {other.label} lie at the same place. Remove the copy; of a series with"
                " several echoes, diffusion weights or times, give the files of one as a folder of their own."
            )
    usual = float(np.median(steps))
    wrong = [
        f"{one.label} and {other.label} ({step:.3f} mm)"
        for step, (one, other) in zip(steps, itertools.pairwise(frames), strict=True)
        if abs(step - usual) > _STEP * usual + _ROUNDED
    ]
    if wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise ValueError(
            f"{name}: slices are missing or unequally spaced; {usual:.3f} mm are usual, but not between"
            f" {', '.join(wrong[:5])}{more}. Complete the series, or resample it to equal steps."
        )
    step = (positions[-1] - positions[0]) / (len(frames) - 1)
    straight = positions[0] + np.arange(len(frames))[:, None] * step
    shift = np.linalg.norm(step - (step @ normal) * normal)
    if shift > _SHIFT * usual or np.abs(positions - straight).max() > _SHIFT * usual + _ROUNDED:
        raise ValueError(
            f"{name}: its slices do not lie straight above each other, as of a tilted gantry. Resample it to a grid"
            " without shear first."
        )
    return step


def _frames(name: str, number: int, dataset, several: bool) -> Iterator[_Frame]:
    """Yields the slices of a file, if it holds grey images with a place."""
    image = f"file {number + 1}"
    with _reading(name, image):
        image = f"image {int(dataset.get('InstanceNumber') or 0) or f'of {image}'}"
        missing = [key for key in _REQUIRED if not dataset.get(key)]
        is_grey = dataset.get("PhotometricInterpretation") == "MONOCHROME2" and dataset.get("SamplesPerPixel", 1) == 1
        count = int(dataset.get("NumberOfFrames") or 1)
    if missing:
        raise ValueError(f"{name}: {image} has no {', '.join(missing)}, which every image of a scanner has.")
    if not is_grey:
        raise ValueError(f"{name}: {image} must be grey (MONOCHROME2), as scans are.")
    if "ModalityLUTSequence" in dataset:
        raise ValueError(f"{name}: {image} has a table of values (ModalityLUTSequence), which is not read.")
    if "MOSAIC" in (dataset.get("ImageType") or ()):
        raise ValueError(
            f"{name}: {image} is a mosaic of several slices. Convert it to NIfTI, with dcm2niix for instance."
        )
    if count > 1 and not several:
        raise ValueError(f"{name}: {image} holds {count} slices, and does not say where they lie.")
    for index in range(count):
        label = f"frame {index + 1}" if several else image
        with _reading(name, label):
            group = _groups(dataset, index) if several else lambda _: dataset
            values = group("PixelValueTransformationSequence")
            slope, intercept = values.get("RescaleSlope", 1), values.get("RescaleIntercept", 0)
            if slope is None or intercept is None:
                raise ValueError("RescaleSlope and RescaleIntercept must be numbers, or left out")
            yield _Frame(
                number,
                index,
                label,
                (int(dataset.Columns), int(dataset.Rows)),
                _numbers(group("PlanePositionSequence"), "ImagePositionPatient", 3),
                _numbers(group("PlaneOrientationSequence"), "ImageOrientationPatient", 6),
                _numbers(group("PixelMeasuresSequence"), "PixelSpacing", 2),
                float(slope),
                float(intercept),
            )


def _groups(dataset, index: int) -> Callable:
    """Returns what finds a functional group of a frame: its own, or the one that all share."""
    own = dataset.PerFrameFunctionalGroupsSequence[index]
    shared = dataset.SharedFunctionalGroupsSequence[0] if dataset.get("SharedFunctionalGroupsSequence") else {}

    def find(name: str):
        found = own.get(name) or shared.get(name)
        return found[0] if found else {}

    return find


def _numbers(dataset, keyword: str, count: int) -> np.ndarray:
    numbers = np.array([float(value) for value in dataset.get(keyword) or ()])
    if len(numbers) != count or not np.isfinite(numbers).all():
        raise ValueError(f"{keyword} must be {count} numbers, got {len(numbers)}")
    if keyword == "PixelSpacing" and not (numbers > 0).all():
        raise ValueError(f"PixelSpacing must be above 0, got {numbers.tolist()}")
    return numbers


def _decode(dataset) -> np.ndarray:
    """Returns the stored pixels `(frames, rows, columns)` of a file."""
    from pydicom import Dataset
    from pydicom.uid import JPEGTransferSyntaxes

    syntax = dataset.file_meta.TransferSyntaxUID
    if syntax not in JPEGTransferSyntaxes:
        stored = dataset.pixel_array
    else:
        # Lossless JPEG, which many archives use, and JPEG of 12 bits are decoded by GDCM, which reads files. This one
        # holds nothing but pixels: neither whose they are, nor a slope, which GDCM would apply.
        import SimpleITK

        bare = Dataset()
        for keyword in _PIXELS:
            if keyword in dataset:
                bare[keyword] = dataset[keyword]
        bare.SOPClassUID, bare.SOPInstanceUID = _SECONDARY_CAPTURE, "1.2.3"
        bare.file_meta = type(dataset.file_meta)()
        bare.file_meta.TransferSyntaxUID = syntax
        bare.file_meta.MediaStorageSOPClassUID, bare.file_meta.MediaStorageSOPInstanceUID = _SECONDARY_CAPTURE, "1.2.3"
        with tempfile.TemporaryDirectory() as folder:
            file = os.path.join(folder, "pixels.dcm")
            bare.save_as(file, enforce_file_format=True)
            stored = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(file, imageIO="GDCMImageIO"))
    return stored.reshape(-1, *stored.shape[-2:])


@contextmanager
def _reading(name: str, what: str) -> Iterator[None]:
    """Turns what libraries raise on a damaged file into one error that names the path that was given."""
    try:
        yield
    except OSError as error:
        raise ValueError(f"{name}: {what} cannot be read: {error.strerror or 'it is no such file'}.") from None
    except zipfile.BadZipFile:  # it would name the file in the archive
        raise ValueError(f"{name}: {what} cannot be read: the archive is damaged, or is none.") from None
    except Exception as error:
        reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        raise ValueError(f"{name}: {what} cannot be read: {reason}.") from None
