"""Series of DICOM become volumes at the right place, or one error; masks and maps go back to where they came from."""

import importlib.util
import logging
import pickle
import re
import warnings
import zipfile

import highdicom
import numpy as np
import pydicom
import pytest
import SimpleITK
from pydicom.uid import JPEGLosslessSV1, JPEGLSLossless, RLELossless, generate_uid

from anodiff.volumes.dicom import find_series
from anodiff.volumes.dicom_output import write_parametric_map, write_segmentation
from anodiff.volumes.scans import find_modality, find_scans
from anodiff.volumes.volume import read_volume

from ..dicom_series import (
    NAME,
    PERSONAL,
    PLANES,
    SHAPE,
    SPACING,
    expected_affine,
    make_enhanced,
    make_slices,
    stored_values,
    write,
)


@pytest.mark.parametrize("plane", PLANES)
def test_a_series_is_read_with_its_values_at_its_place(tmp_path, plane):
    slices = make_slices(plane)
    volume = read_volume(write(tmp_path / "series", slices))
    np.testing.assert_array_equal(volume.arrays[""], stored_values(slices).astype(np.float32))
    np.testing.assert_allclose(volume.affine, expected_affine(plane), atol=1e-5)
    # Another library's reader agrees.
    files = SimpleITK.ImageSeriesReader.GetGDCMSeriesFileNames(str(tmp_path / "series"))
    other = SimpleITK.ReadImage(files)
    np.testing.assert_allclose(np.array(other.GetOrigin()) * (-1, -1, 1), volume.affine[:3, 3], atol=1e-5)
    axes = np.reshape(other.GetDirection(), (3, 3)) * other.GetSpacing() * np.array([[-1], [-1], [1]])
    np.testing.assert_allclose(axes, volume.affine[:3, :3], atol=1e-5)
    np.testing.assert_array_equal(SimpleITK.GetArrayFromImage(other).T, volume.arrays[""])
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
    shown = {
        "mask.dcm": read.get_volume(combine_segments=True),
        "map.dcm": highdicom.imread(tmp_path / "map.dcm").get_volume(),
    }
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
        referred = {
            one.ReferencedSOPInstanceUID for one in written.ReferencedSeriesSequence[0].ReferencedInstanceSequence
        }
        assert written.ReferencedSeriesSequence[0].SeriesInstanceUID == source.SeriesInstanceUID
        assert referred == {one.SOPInstanceUID for one in volume.series.datasets}
    kind = read.get_segment_description(1)
    assert kind.algorithm_type.value == "AUTOMATIC"
    assert kind.segmented_property_type.value == "52988006"
    assert kind.segmented_property_category.value == "49755003"
    assert kind.algorithm_identification.name == "anodiff"


def test_frames_of_one_object_have_a_slope_each(tmp_path):
    make_enhanced().save_as(tmp_path / "IM", enforce_file_format=True)
    stored = (stored_values(make_slices()) + 100) / 2
    expected = stored * (2.0 + np.arange(SHAPE[2])[::-1]) - 100
    np.testing.assert_array_equal(read_volume(tmp_path / "IM").arrays[""], expected.astype(np.float32))


# --- where a series is


@pytest.mark.parametrize("kind", ["zip", "below", "choice in zip", "other files"])
def test_a_series_lies_in_a_folder_or_an_archive(tmp_path, kind):
    slices = make_slices()
    folder = write(tmp_path / "series" / "ST0" if kind == "below" else tmp_path / "series", slices)
    path = tmp_path / "series"
    if kind == "below":
        (folder / "again").symlink_to(tmp_path / "series")  # to a folder above
    if kind == "other files":  # as on discs and in folders of macOS; a segmentation of the series is no scan
        (folder / "DICOMDIR").write_bytes(bytes(128) + b"DICM")
        for name in ("README.TXT", "._IM0001", "viewer.exe", "VERSION"):
            (folder / name).write_bytes(b"text")
        series = find_series(folder)
        write_segmentation(folder / "mask.dcm", series, np.ones(SHAPE, np.uint8), "mask")
        write_parametric_map(folder / "map", series, np.ones(SHAPE, np.float32), "map")
    if "zip" in kind:
        other = write(tmp_path / "other", make_slices(number=12)) if "choice" in kind else folder
        with zipfile.ZipFile(tmp_path / "scan.ZIP", "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("__MACOSX/._IM0000", b"")
            for file in sorted({*folder.iterdir(), *other.iterdir()}):
                archive.write(file, file.relative_to(tmp_path))
        path = f"{tmp_path}/scan.ZIP#3" if "choice" in kind else tmp_path / "scan.ZIP"
    volume = read_volume(path)
    np.testing.assert_array_equal(volume.arrays[""], stored_values(slices).astype(np.float32))
    assert pickle.loads(pickle.dumps(volume)).series.shape == SHAPE  # no file stays open


def test_several_series_are_listed_and_one_is_chosen(tmp_path):
    first, second, third = make_slices(number=3), make_slices(number=12, shape=(6, 5, 3)), make_slices(number=12)
    for slices, name in ((first, "a"), (second, "b"), (third, "c")):
        write(tmp_path / "all" / name, slices)
    pattern = (
        r"all holds 3 series: 3 \(4 images, MR, 7 x 5, TR 9000 ms, TE 120 ms\); 12.1 \(.*\); 12.2 \(.*\)."
        r" Choose one by its number: .*all#3\.$"
    )
    with pytest.raises(ValueError, match=pattern):
        read_volume(tmp_path / "all")
    with pytest.raises(ValueError, match="all holds no series 12, but: 3 "):
        read_volume(tmp_path / "all#12")
    assert read_volume(f"{tmp_path}/all#3").series.name == f"{tmp_path}/all#3"
    assert {read_volume(tmp_path / f"all#12.{number}").shape for number in (1, 2)} == {(6, 5, 3), SHAPE}
    assert read_volume(tmp_path / f"all#{second[0].SeriesInstanceUID}").shape == (6, 5, 3)
    (tmp_path / "all#3").mkdir()  # what exists is no choice
    write(tmp_path / "all#3", second)
    assert read_volume(tmp_path / "all#3").shape == (6, 5, 3)


# --- what makes no volume


def change(**values):
    def apply(slices):
        for keyword, value in values.items():
            if value is None:
                delattr(slices[2], keyword)
            else:
                setattr(slices[2], keyword, value)

    return apply


def drop(number):
    return lambda slices: slices.pop(number)


def copy_position(slices):
    slices[2].ImagePositionPatient = slices[1].ImagePositionPatient


def tilt(slices):
    for index, one in enumerate(slices):
        one.ImagePositionPatient[1] += 0.3 * index


def shift(slices):
    slices[2].ImagePositionPatient[2] += 0.5


@pytest.mark.parametrize(
    ("alter", "message"),
    [
        (drop(1), r"missing or unequally spaced; .* between image 1 and image 3 \(5.000 mm\)"),
        (shift, r"missing or unequally spaced; .* between image 2 and image 3 \(3.000 mm\)"),
        (copy_position, "image 2 and image 3 lie at the same place. Remove the copy"),
        (tilt, "as of a tilted gantry. Resample it"),
        (change(Rows=4, Columns=7), "image 1 and image 3 differ in size"),
        (change(ImageOrientationPatient=[0, 1, 0, 0, 0, -1]), "differ in orientation, as those of a localizer"),
        (change(PixelSpacing=[1, 1]), "differ in pixel spacing"),
        (change(FrameOfReferenceUID="1.2.3"), "differ in FrameOfReferenceUID: .* Give those of one as a folder"),
        (change(FrameOfReferenceUID=None), "image 3 has no FrameOfReferenceUID"),
        (change(ImagePositionPatient=None), "image 3 cannot be read: ImagePositionPatient must be 3 numbers, got 0"),
        (change(PixelSpacing=[0, 1]), "image 3 cannot be read: PixelSpacing must be above 0"),
        (change(PhotometricInterpretation="MONOCHROME1"), "image 3 must be grey"),
        (change(ModalityLUTSequence=[]), "image 3 has a table of values"),
        (
            lambda slices: setattr(slices[2], "RescaleSlope", None),
            "image 3 cannot be read: RescaleSlope and RescaleIntercept must be numbers",
        ),
        (change(ImageType=["ORIGINAL", "PRIMARY", "M", "MOSAIC"]), "image 3 is a mosaic of several slices. Convert"),
        (change(NumberOfFrames=2), "image 3 holds 2 slices, and does not say where they lie"),
        (change(PixelData=b"12"), "image 3 cannot be read: "),
    ],
)
def test_slices_that_make_no_volume_are_named_by_number(tmp_path, alter, message, caplog, recwarn):
    slices = make_slices()
    alter(slices)
    folder = write(tmp_path / "series", slices)
    with pytest.raises(ValueError, match=f"series: .*{message}") as raised:
        read_volume(folder)
    said = [str(raised.value), caplog.text, *(str(warning.message) for warning in recwarn)]
    assert not re.search("|".join([*PERSONAL, "IM0"]), "\n".join(said))


@pytest.mark.parametrize(
    ("keyword", "message"),
    [
        ("SeriesNumber", r"series: file 4 in the order of names cannot be read: .*777x"),
        ("InstanceNumber", r"series: file 4 cannot be read: .*777x"),
        ("PixelSpacing", r"series: image 4 cannot be read: .*777x"),
    ],
)
def test_numbers_that_are_none(tmp_path, keyword, message, recwarn):
    slices = make_slices()
    setattr(slices[3], keyword, [7777, 7777] if keyword == "PixelSpacing" else 7777)
    folder = write(tmp_path / "series", slices, order=range(4))
    content = (folder / "IM0003").read_bytes()
    wrong = re.sub(rb"((?:IS|DS)..)7777", rb"\g<1>777x", content, flags=re.DOTALL)
    (folder / "IM0003").write_bytes(wrong)
    assert wrong != content
    with pytest.raises(ValueError, match=message):
        read_volume(folder)
    assert not recwarn.list  # pydicom's quote values


def test_rounded_positions_are_a_volume(tmp_path):
    slices = make_slices("oblique")
    for one in slices:
        one.ImagePositionPatient = [round(float(value), 2) for value in one.ImagePositionPatient]
    volume = read_volume(write(tmp_path / "series", slices))
    np.testing.assert_allclose(volume.affine, expected_affine("oblique"), atol=0.01)


def test_a_single_slice_is_as_thick_as_it_says(tmp_path):
    slices = make_slices("sagittal")[:1]
    volume = read_volume(write(tmp_path / "one", slices))
    assert volume.shape == (*SHAPE[:2], 1)
    np.testing.assert_allclose(np.linalg.norm(volume.affine[:3, :3], axis=0), [*SPACING[:2], 2.0])
    slices[0].SliceThickness = None
    with pytest.raises(ValueError, match="neither SpacingBetweenSlices nor SliceThickness"):
        read_volume(write(tmp_path / "one", slices))


@pytest.mark.parametrize("length", [200, 400, 700])
def test_slices_whose_end_is_missing_are_not_passed_over(tmp_path, length):
    folder = write(tmp_path / "series", make_slices(), order=range(4))
    whole = (folder / "IM0003").read_bytes()
    assert length < len(whole)
    (folder / "IM0003").write_bytes(whole[:length])  # the last slice, which leaves no gap
    with pytest.raises(
        ValueError, match="series: (1 of its files hold no whole DICOM, in the order of names 4|file 4)"
    ):
        read_volume(folder)


@pytest.mark.parametrize("content", [b"", b"version https://git-lfs.github.com/spec/v1"])
@pytest.mark.parametrize("name", ["IM9999", "x.dcm", "1.2.840.99"])
def test_damaged_slices_are_not_passed_over(tmp_path, name, content):
    folder = write(tmp_path / "series", make_slices())
    (folder / name).write_bytes(content)
    with pytest.raises(
        ValueError, match=r"series: 1 of its files hold no whole DICOM, in the order of names [15] of 5"
    ):
        read_volume(folder)


def test_what_holds_no_series(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty holds no scan: of 0 files, 0 begin as"):
        read_volume(tmp_path / "empty")
    (tmp_path / "no.zip").write_bytes(b"text")
    with pytest.raises(ValueError, match=r"no.zip: the archive cannot be read: the archive is damaged, or is none"):
        read_volume(tmp_path / "no.zip")
    with pytest.raises(FileNotFoundError, match=r"There is no file .*gone.dcm"):
        read_volume(tmp_path / "gone.dcm")
    (tmp_path / "empty" / "IM1").symlink_to(".git/annex/objects/x")
    with pytest.raises(FileNotFoundError, match="empty holds 1 links to files that are not there"):
        read_volume(tmp_path / "empty")


@pytest.mark.parametrize("missing", ["pydicom", "highdicom", "SimpleITK"])
def test_an_extra_that_is_missing_is_named(tmp_path, monkeypatch, missing):
    folder = write(tmp_path / "series", make_slices())
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else find(name))
    with pytest.raises(ImportError, match=r"pip install anodiff\[dicom\]"):
        read_volume(folder)


# --- compressed pixels


@pytest.mark.parametrize("syntax", [RLELossless, JPEGLSLossless, JPEGLosslessSV1])
def test_compressed_slices_hold_the_same_values(tmp_path, syntax):
    slices = make_slices(slope=2.5, intercept=-7)
    expected = stored_values(slices).astype(np.float32)
    for one in slices:
        if syntax == JPEGLosslessSV1:
            one.PixelData, encoded = _jpeg_lossless(one, tmp_path)
            one.file_meta.TransferSyntaxUID = encoded
            one["PixelData"].is_undefined_length = True
        else:
            one.compress(syntax)
    assert slices[0].file_meta.TransferSyntaxUID == syntax
    np.testing.assert_array_equal(read_volume(write(tmp_path / "series", slices)).arrays[""], expected)


def _jpeg_lossless(data, folder):
    """The pixels as SimpleITK compresses them, which nothing else here can."""
    writer = SimpleITK.ImageFileWriter()
    writer.SetFileName(str(folder / "jpeg.dcm"))
    writer.SetImageIO("GDCMImageIO")
    writer.SetCompressor("JPEG")
    writer.UseCompressionOn()
    writer.Execute(SimpleITK.GetImageFromArray(data.pixel_array[None]))
    written = pydicom.dcmread(folder / "jpeg.dcm")
    return written.PixelData, written.file_meta.TransferSyntaxUID


# --- nothing personal


def test_what_is_personal_goes_into_the_objects_as_it_was_and_nowhere_else(tmp_path, caplog, recwarn):
    with pydicom.config.disable_value_validation():
        slices = make_slices()
        for one in slices:
            one.PatientName, one.PatientBirthDate = "Doe", "1951-2-3, about"  # what libraries find odd, they quote
        folder = write(tmp_path / "series", slices)
    with caplog.at_level(logging.WARNING), warnings.catch_warnings():
        warnings.simplefilter("always")
        series = find_series(folder)
        write_segmentation(tmp_path / "mask.dcm", series, np.zeros(SHAPE, np.uint8), "mask")
        write_parametric_map(tmp_path / "map.dcm", series, np.zeros(SHAPE, np.float32), "map")
    said = [caplog.text, repr(series), *(str(warning.message) for warning in recwarn)]
    assert not re.search("|".join([*PERSONAL, "Doe", "1951"]), "\n".join(said))
    for name in ("mask.dcm", "map.dcm"):
        with pydicom.config.disable_value_validation():
            written = pydicom.dcmread(tmp_path / name)
            assert (written.PatientName, written.PatientBirthDate) == ("Doe", "1951-2-3, about")
            assert (written.PatientID, written.StudyDate) == (slices[0].PatientID, "20240102")
            assert not {"OperatorsName", "InstitutionName", "ContentCreatorName"} & set(written.dir())
            # Its description is free text of the source, and what is written has one of its own.
            assert "FLAIR" not in written.SeriesDescription


def test_a_damaged_archive_is_an_error_without_names_of_its_files(tmp_path):
    folder = write(tmp_path / "series", make_slices())
    with zipfile.ZipFile(tmp_path / "export.zip", "w") as archive:
        for file in folder.iterdir():
            archive.write(file, f"{NAME}/{file.name}")
    content = bytearray((tmp_path / "export.zip").read_bytes())
    content[600] ^= 255
    (tmp_path / "export.zip").write_bytes(content)
    with pytest.raises(
        ValueError, match="export.zip: file . in the order of names cannot be read: the archive"
    ) as raised:
        read_volume(tmp_path / "export.zip")
    assert NAME not in str(raised.value) and "IM0" not in str(raised.value)


@pytest.mark.parametrize(("number", "written"), [(3, 301), (0, 1), (-3, 1), (2**31 - 1, 1)])
def test_numbers_of_series_are_ones_that_dicom_has(tmp_path, number, written):
    series = find_series(write(tmp_path / "series", make_slices(number=number)))
    write_segmentation(tmp_path / "mask.dcm", series, np.zeros(SHAPE, np.uint8), "mask")
    assert pydicom.dcmread(tmp_path / "mask.dcm").SeriesNumber == written


@pytest.mark.parametrize("encoding", ["ISO_IR 100", "ISO_IR 192", ["", "ISO 2022 IR 87"]])
def test_names_keep_their_letters(tmp_path, encoding):
    slices = make_slices()
    name = "Yamada^Tarou=山田^太郎" if "ISO_IR 100" != encoding else "Müller^Jörg"
    for one in slices:
        one.SpecificCharacterSet, one.PatientName = encoding, name
    series = find_series(write(tmp_path / "series", slices))
    write_segmentation(tmp_path / "mask.dcm", series, np.zeros(SHAPE, np.uint8), "mask")
    assert pydicom.dcmread(tmp_path / "mask.dcm").PatientName == name


def test_a_series_without_a_patient_gets_none(tmp_path):
    slices = make_slices()
    for one in slices:
        for keyword in (
            "PatientName",
            "PatientID",
            "PatientBirthDate",
            "PatientSex",
            "StudyDate",
            "StudyTime",
            "StudyID",
        ):
            delattr(one, keyword)
    series = find_series(write(tmp_path / "series", slices))
    write_segmentation(tmp_path / "mask.dcm", series, np.zeros(SHAPE, np.uint8), "mask")
    written = pydicom.dcmread(tmp_path / "mask.dcm")
    assert [written[keyword].value for keyword in ("PatientName", "PatientID", "StudyDate")] == ["", "", ""]


# --- among scans


def find(modalities, *paths, **options):
    """Scans by name: their paths as text; and what is not taken, with the reasons."""
    scans, failed = find_scans([str(path) for path in paths], modalities.split(), **options)
    return {scan.name: scan.volume for scan in scans}, dict(failed)


def test_series_are_scans_by_their_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("raw/p1", "raw/p2/flair", "raw/p2/t1", "raw/p3/SE0", "raw/p3/SE1", "raw/p4/SE0"):
        write(tmp_path / name, make_slices()[:1])
    write(tmp_path / "study/SE0", slices := make_slices()[:1])
    slices[0].SeriesInstanceUID = generate_uid()
    write(tmp_path / "study/SE1", slices)
    found, failed = find("flair", "raw")
    assert {name: str(volume) for name, volume in found.items()} == {
        "p1": "raw/p1",
        "p2": str({"flair": (tmp_path / "raw/p2/flair").relative_to(tmp_path)}),
        "p4": "raw/p4/SE0",
    }
    assert list(failed) == ["raw/p3"] and "holds several series, SE0, SE1" in failed["raw/p3"]
    assert "choose it by its number: raw/p3#4" in failed["raw/p3"]
    # Of one examination all are no scans of one kind; of several each may be.
    assert find("flair", "study")[0] == {}
    assert "holds several series, SE0, SE1" in find("flair", "study")[1]["study"]
    assert set(find("flair", "raw/p3")[0]) == {"SE0", "SE1"}
    assert set(find("flair t1", "raw")[0]) == {"p1", "p2", "p4"}
    assert set(find("flair", "study#3", "raw/p3/#3", "raw/p1")[0]) == {"study_3", "p3_3", "p1"}


def test_files_and_archives_are_scans(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "p1", make_slices())
    write(tmp_path / "p2", make_slices("sagittal"))
    (tmp_path / "p3.zip").touch()
    files = sorted((tmp_path / "p1").iterdir())
    found, failed = find("flair", *(file.relative_to(tmp_path) for file in files), "p2/IM0000", "p3.zip", "p2")
    assert not failed and set(found) == {"p1", "IM0000", "p3", "p2"}
    np.testing.assert_array_equal(read_volume(found["p1"]).arrays[""], read_volume("p1").arrays[""])
    assert read_volume(found["p2/IM0000" if "p2/IM0000" in found else "IM0000"]).shape[2] == 1
    # Where a checkpoint does without the others, a name says what it is, as of any file.
    (tmp_path / "p2").rename(tmp_path / "t1")
    slices = [f"t1/{file.name}" for file in sorted((tmp_path / "t1").iterdir())]
    found, failed = find("flair t1", *slices, optional=["flair", "t1"])
    assert not failed and list(found["t1"]) == ["t1"] and str(found["t1"]["t1"]) == "t1"
    assert find_modality(slices) == find_modality(["t1"]) == "t1"
    # Beside other scans it is left out, and said; beside a mask it is the scan.
    (tmp_path / "p1" / "brain_mask.nii.gz").touch()
    assert find("flair", "p1") == ({"p1": (tmp_path / "p1").relative_to(tmp_path)}, find("flair", "p1")[1])
    (tmp_path / "p1" / "x_flair.nii.gz").touch()
    found, failed = find("flair", "p1")
    assert set(found) == {"p1"} and "holds DICOM beside other scans, which is left out" in failed["p1"]
