"""Writes masks and maps of a DICOM series as DICOM objects that refer to it. Needs the extra `dicom`; no torch."""

from __future__ import annotations

import os

import numpy as np

from .. import __version__
from .dicom import PATIENT_AND_STUDY, DicomSeries, quoting_nothing


_HEADER = (
    "SOPClassUID SOPInstanceUID StudyInstanceUID SeriesInstanceUID FrameOfReferenceUID PositionReferenceIndicator"
    " Modality Rows Columns NumberOfFrames ImagePositionPatient SliceThickness LossyImageCompression"
    " LossyImageCompressionRatio LossyImageCompressionMethod"
).split()
# Attributes that every object has, empty where nothing is known.
_EMPTY = "PatientName PatientID PatientBirthDate PatientSex StudyDate StudyTime StudyID AccessionNumber".split()


def write_segmentation(path: str | os.PathLike, series: DicomSeries, array: np.ndarray, label: str) -> None:
    """
    Writes a mask as a DICOM segmentation with one segment, a lesion, in a new series in the study of its source.

    Args:
        path: File to write.
        series: Source of the mask; the segmentation refers to each of its slices, and lies where they lie.
        array (`np.ndarray` of shape `(columns, rows, slices)`): 0 or 1.
        label: What the mask is, 64 characters at most.
    """
    import highdicom
    from pydicom.sr.codedict import codes

    algorithm = highdicom.AlgorithmIdentificationSequence(
        name="anodiff", family=codes.DCM.ArtificialIntelligence, version=__version__
    )
    segment = highdicom.seg.SegmentDescription(
        segment_number=1,
        segment_label=label,
        segmented_property_category=codes.SCT.MorphologicallyAbnormalStructure,
        segmented_property_type=codes.SCT.Lesion,
        algorithm_type=highdicom.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
        algorithm_identification=algorithm,
    )
    with quoting_nothing():
        segmentation = highdicom.seg.Segmentation(
            pixel_array=_in_file_order(series, array).astype(np.uint8),
            segmentation_type=highdicom.seg.SegmentationTypeValues.BINARY,
            segment_descriptions=[segment],
            omit_empty_frames=False,  # it covers the whole series, also where nothing is marked
            **_common(series, label, 1),
        )
        _save(path, series, segmentation)


def write_parametric_map(path: str | os.PathLike, series: DicomSeries, array: np.ndarray, label: str) -> None:
    """
    Writes scores as a DICOM parametric map of float32, without unit, in a new series in the study of its source.

    Args:
        path, series, label: As of [`write_segmentation`].
        array (`np.ndarray` of shape `(columns, rows, slices)`): Finite numbers.
    """
    import highdicom
    from pydicom.sr.codedict import codes

    scores = _in_file_order(series, array).astype(np.float32)
    least, most = float(scores.min()), float(scores.max())
    mapping = highdicom.pm.RealWorldValueMapping(
        lut_label="SCORE",
        lut_explanation=label,
        unit=codes.UCUM.NoUnits,
        value_range=(least, most),
        slope=1,
        intercept=0,
    )
    window = highdicom.VOILUTTransformation(window_center=(least + most) / 2, window_width=max(most - least, 1e-6))
    with quoting_nothing():
        parametric_map = highdicom.pm.ParametricMap(
            pixel_array=scores,
            contains_recognizable_visual_features=False,
            real_world_value_mappings=[mapping],
            voi_lut_transformations=[window],
            **_common(series, label, 2),
        )
        _save(path, series, parametric_map)


def _in_file_order(series: DicomSeries, array: np.ndarray) -> np.ndarray:
    """Returns an array `(columns, rows, slices)` as `(frames, rows, columns)` in the order of the headers."""
    frames = np.moveaxis(array, -1, 0).transpose(0, 2, 1)
    if len(series.datasets) == 1:
        frames = frames[np.argsort([frame.index for frame in series.frames])]
    return np.ascontiguousarray(frames)


def _common(series: DicomSeries, label: str, number: int) -> dict:
    """Returns what constructors of all objects are given. The headers of the source hold no more than they need: what
    these libraries find odd in a name or a date, they quote."""
    import highdicom
    from pydicom.dataset import Dataset

    source = []
    orientation = series.frames[0].orientation.tolist()
    thickness = float(np.linalg.norm(series.affine[:3, 2]))
    measures = Dataset()
    measures.PixelSpacing, measures.SliceThickness = series.frames[0].spacing.tolist(), thickness
    for dataset in series.datasets:
        header = Dataset()
        for keyword in _HEADER:
            if keyword in dataset:
                header[keyword] = dataset[keyword]
        for keyword in _EMPTY:
            setattr(header, keyword, "")
        if "PerFrameFunctionalGroupsSequence" in dataset:
            header.SharedFunctionalGroupsSequence = [Dataset()]
            shared = header.SharedFunctionalGroupsSequence[0]
            shared.PixelMeasuresSequence, shared.PlaneOrientationSequence = [measures], [Dataset()]
            shared.PlaneOrientationSequence[0].ImageOrientationPatient = orientation
            header.PerFrameFunctionalGroupsSequence = []
            for groups in dataset.PerFrameFunctionalGroupsSequence:
                own = Dataset()
                own.PlanePositionSequence = groups.PlanePositionSequence
                header.PerFrameFunctionalGroupsSequence.append(own)
        else:
            header.PixelSpacing, header.ImageOrientationPatient = measures.PixelSpacing, orientation
            header.SliceThickness = header.get("SliceThickness") or thickness
        source.append(header)
    first = int(series.datasets[0].get("SeriesNumber") or 0)
    first = first if 0 <= first < 2**31 // 100 else 0  # a number of DICOM has 31 bits
    return dict(
        source_images=source,
        series_instance_uid=highdicom.UID(),
        series_number=100 * first + number,
        sop_instance_uid=highdicom.UID(),
        instance_number=1,
        manufacturer="anodiff",
        manufacturer_model_name="anodiff",
        software_versions=__version__,
        device_serial_number="none",
        content_description=label,
        series_description=f"anodiff {label}, research use",
    )


def _save(path: str | os.PathLike, series: DicomSeries, result) -> None:
    """Adds patient and study as they stand in the source, and writes an object."""
    for keyword in ("SpecificCharacterSet", *PATIENT_AND_STUDY):  # highdicom does not know every character set
        if keyword in series.datasets[0]:
            result[keyword] = series.datasets[0][keyword]
    result.save_as(path)
