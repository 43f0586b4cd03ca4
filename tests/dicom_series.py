"""Generated series of DICOM, with a patient whose name, number and dates nothing but DICOM may hold."""

import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import EnhancedMRImageStorage, ExplicitVRLittleEndian, MRImageStorage, generate_uid


NAME, IDENTITY, BIRTH = "ZZUNIQUE", "ID-77-SECRET", "19510203"
PERSONAL = (NAME, IDENTITY, BIRTH, "20240102", "OPERATOR", "A-9", "FLAIR ")
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
    for keyword in (
        "ImageOrientationPatient",
        "ImagePositionPatient",
        "PixelSpacing",
        "RescaleSlope",
        "RescaleIntercept",
    ):
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
    affine[:3] = np.stack([along * SPACING[0], down * SPACING[1], np.cross(along, down) * SPACING[2], ORIGIN], axis=-1)
    return np.diag([-1, -1, 1, 1]) @ affine
