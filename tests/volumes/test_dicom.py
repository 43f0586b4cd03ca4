"""Series of DICOM become volumes at the right place, or one error; masks and maps go back to where they came from."""

import io
import logging
import re
import warnings
import zipfile

import highdicom
import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, EnhancedMRImageStorage, ExplicitVRLittleEndian, MRImageStorage, generate_uid

from anodiff.volumes.dicom import find_series
from anodiff.volumes.dicom_output import write_parametric_map, write_segmentation
from anodiff.volumes.volume import read_volume


NAME, IDENTITY, BIRTH = "ZZUNIQUE", "ID-77-SECRET", "19510203"
# Directions of columns and rows in DICOM's axes (left, posterior, superior).
PLANES = {
    "axial": ([1, 0, 0], [0, 1, 0]),
    "sagittal": ([0, 1, 0], [0, 0, -1]),
    "coronal": ([1, 0, 0], [0, 0, -1]),
    "oblique": ([0.8, 0.6, 0], [-0.48, 0.64, -0.6]),
}
SHAPE, SPACING, ORIGIN = (7, 5, 4), (0.9, 1.3, 2.5), np.array([-31.25, 12.5, 40.0])


def make_slices(plane="axial", shape=SHAPE, slope=2.0, intercept=-100.0, number=3, sop_class=MRImageStorage, seed=0):
    """Data sets of a series: stored values, and headers with a patient; in the order of the slices."""
    along, down = map(np.array, PLANES[plane])
    normal = np.cross(along, down)
    stored = np.random.default_rng(seed).integers(0, 4000, shape[::-1], dtype=np.uint16)
    uids = [generate_uid() for _ in range(3)]
    made = []
    for index in range(shape[2]):
        data = Dataset()
        data.file_meta = FileMetaDataset()
        data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        data.SOPClassUID, data.SOPInstanceUID = sop_class, generate_uid()
        data.file_meta.MediaStorageSOPClassUID = data.SOPClassUID
        data.file_meta.MediaStorageSOPInstanceUID = data.SOPInstanceUID
        data.StudyInstanceUID, data.SeriesInstanceUID, data.FrameOfReferenceUID = uids
        data.PatientName, data.PatientID, data.PatientBirthDate, data.PatientSex = NAME, IDENTITY, BIRTH, "O"
        data.StudyDate, data.StudyTime, data.StudyID, data.AccessionNumber = "20240102", "101112", "S1", "A-9"
        data.SeriesDescription = f"FLAIR {NAME}"
        data.OperatorsName = "OPERATOR^O"
        data.Modality, data.SeriesNumber, data.InstanceNumber = "MR", number, index + 1
        data.RepetitionTime, data.EchoTime = 9000, 120
        data.Rows, data.Columns = shape[1], shape[0]
        data.ImageOrientationPatient = [*along.tolist(), *down.tolist()]
        data.ImagePositionPatient = (ORIGIN + index * SPACING[2] * normal).round(6).tolist()
        data.PixelSpacing, data.SliceThickness = [SPACING[1], SPACING[0]], 2.0
        data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
        data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 16, 12, 11, 0
        data.RescaleSlope, data.RescaleIntercept = slope, intercept
        data.PixelData = stored[index].tobytes()
        made.append(data)
    return made


def make_enhanced(plane="axial"):
    """The same slices as one object, its frames in the opposite order, and with a slope of their own each."""
    slices = make_slices(plane)
    data = Dataset()
    data.update(slices[0])
    data.file_meta = slices[0].file_meta
    for keyword in ("ImageOrientationPatient", "ImagePositionPatient", "PixelSpacing", "RescaleSlope", "RescaleIntercept"):
        delattr(data, keyword)
    data.SOPClassUID = data.file_meta.MediaStorageSOPClassUID = EnhancedMRImageStorage
    data.NumberOfFrames = len(slices)
    data.SharedFunctionalGroupsSequence = [Dataset()]
    measures = Dataset()
    measures.PixelSpacing, measures.SliceThickness = slices[0].PixelSpacing, 2.0
    data.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence = [measures]
    data.PerFrameFunctionalGroupsSequence = []
    for index, one in enumerate(reversed(slices)):
        groups, position, orientation, values = Dataset(), Dataset(), Dataset(), Dataset()
        position.ImagePositionPatient = one.ImagePositionPatient
        orientation.ImageOrientationPatient = one.ImageOrientationPatient
        values.RescaleSlope, values.RescaleIntercept, values.RescaleType = 2.0 + index, -100.0, "US"
        groups.PlanePositionSequence, groups.PlaneOrientationSequence = [position], [orientation]
        groups.PixelValueTransformationSequence = [values]
        data.PerFrameFunctionalGroupsSequence.append(groups)
    data.PixelData = b"".join(one.PixelData for one in reversed(slices))
    return data


def write(folder, slices, order=None):
    """Writes slices into files whose names say nothing of their order."""
    folder.mkdir(parents=True, exist_ok=True)
    order = np.random.default_rng(1).permutation(len(slices)) if order is None else order
    for name, index in enumerate(order):
        slices[index].save_as(folder / f"IM{name:04d}", enforce_file_format=True)
    return folder


def stored_values(slices):
    """The values `(columns, rows, slices)` that slices hold, after slope and intercept."""
    arrays = [one.pixel_array.T * float(one.RescaleSlope) + float(one.RescaleIntercept) for one in slices]
    return np.stack(arrays, -1)


def expected_affine(plane):
    """From voxel indices to RAS, by the definition of the standard (C.7.6.2.1.1)."""
    along, down = map(np.array, PLANES[plane])
    affine = np.eye(4)
    affine[:3] = np.stack(
        [along * SPACING[0], down * SPACING[1], np.cross(along, down) * SPACING[2], ORIGIN], axis=-1
    )
    return np.diag([-1, -1, 1, 1]) @ affine


@pytest.mark.parametrize("plane", PLANES)
def test_a_series_is_read_with_its_values_at_its_place(tmp_path, plane):
    slices = make_slices(plane)
    volume = read_volume(write(tmp_path / "series", slices))
    np.testing.assert_array_equal(volume.arrays[""], stored_values(slices).astype(np.float32))
    np.testing.assert_allclose(volume.affine, expected_affine(plane), atol=1e-5)
    image = volume.image(volume.arrays[""])
    np.testing.assert_allclose(image.affine, expected_affine(plane), atol=1e-5)


@pytest.mark.parametrize("plane", PLANES)
@pytest.mark.parametrize("enhanced", [False, True])
def test_masks_and_maps_go_back_to_where_they_came_from(tmp_path, plane, enhanced):
    slices = make_slices(plane)
    if enhanced:
        (tmp_path / "series").mkdir()
        make_enhanced(plane).save_as(tmp_path / "series" / "IM", enforce_file_format=True)
    else:
        write(tmp_path / "series", slices)
    volume = read_volume(tmp_path / "series")
    mask = np.zeros(volume.shape, np.uint8)
    mask[1, 2, 0] = mask[4:6, 1, 2] = 1  # no symmetry hides a turned axis; slices without it are there, too
    scores = np.random.default_rng(3).random(volume.shape, dtype=np.float32)
    write_segmentation(tmp_path / "mask.dcm", volume.series, mask, "anomaly mask")
    write_parametric_map(tmp_path / "map.dcm", volume.series, scores, "anomaly scores")

    read = highdicom.seg.segread(tmp_path / "mask.dcm")
    shown = {"mask.dcm": read.get_volume(combine_segments=True), "map.dcm": highdicom.imread(tmp_path / "map.dcm").get_volume()}
    for (name, back), array in zip(shown.items(), (mask, scores), strict=True):
        # Voxel by voxel: where the written object says that a value lies, our grid has the same value.
        indices = np.stack(np.meshgrid(*map(np.arange, back.spatial_shape), indexing="ij"), -1).reshape(-1, 3)
        world = np.diag([-1, -1, 1, 1]) @ back.affine @ np.c_[indices, np.ones(len(indices))].T
        ours = (np.linalg.inv(volume.affine) @ world)[:3].T
        np.testing.assert_allclose(ours, ours.round(), atol=1e-4)
        assert sorted(map(tuple, ours.round().astype(int))) == sorted(np.ndindex(*volume.shape)), name
        np.testing.assert_array_equal(back.array[tuple(indices.T)], array[tuple(ours.round().astype(int).T)])
        written = pydicom.dcmread(tmp_path / name)
        source = volume.series.datasets[0]
        assert written.StudyInstanceUID == source.StudyInstanceUID
        assert written.FrameOfReferenceUID == source.FrameOfReferenceUID
        assert written.SeriesInstanceUID != source.SeriesInstanceUID
        referred = {one.ReferencedSOPInstanceUID for one in written.ReferencedSeriesSequence[0].ReferencedInstanceSequence}
        assert written.ReferencedSeriesSequence[0].SeriesInstanceUID == source.SeriesInstanceUID
        assert referred == {one.SOPInstanceUID for one in volume.series.datasets}
    kind = read.get_segment_description(1)
    assert kind.algorithm_type.value == "AUTOMATIC"
    assert kind.segmented_property_type.value == "52988006"
    assert kind.segmented_property_category.value == "49755003"
    assert kind.algorithm_identification.name == "anodiff"
