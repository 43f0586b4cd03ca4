"""`strip.py` and the extraction within `predict.py`, in this process."""

from __future__ import annotations

import json

import nibabel as nib
import numpy as np
import pytest

from anodiff.pipelines import brain as brain_module
from anodiff.predict import main as predict
from anodiff.running import run_script
from anodiff.strip import main

from ..dicom_series import make_slices, write
from ..tiny import make_extractor, make_pipeline, make_raw_scan


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("extractor")
    make_extractor().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """The working directory, with a raw scan of two modalities in `raw.nii.gz` and one without skull in `bare.nii`."""
    monkeypatch.chdir(tmp_path)
    image, brain, affine = make_raw_scan()
    pair = np.stack([image, image + 50], -1).astype(np.int16)
    nib.save(nib.Nifti1Image(pair, affine), "raw.nii.gz")
    nib.save(nib.Nifti1Image(make_raw_scan(skull=False)[0], affine), "bare.nii")
    return tmp_path, pair, brain


def read(path) -> np.ndarray:
    return np.asarray(nib.load(path).dataobj)


def test_brains_and_masks_beside_the_scans(place, model, capsys):
    folder, pair, brain = place
    assert main(["raw.nii.gz", "bare.nii", "--model", model]) == 0
    mask, stripped = read("raw_brain_mask.nii.gz"), read("raw_brain.nii.gz")
    assert mask.dtype == np.uint8 and 2 * (mask * brain).sum() / (mask.sum() + brain.sum()) > 0.95
    np.testing.assert_array_equal(stripped, pair * mask[..., None])
    np.testing.assert_allclose(nib.load("raw_brain.nii.gz").affine, nib.load("raw.nii.gz").affine)
    np.testing.assert_array_equal(read("bare_brain.nii.gz"), read("bare.nii"))
    said = capsys.readouterr().out
    assert "raw.nii.gz: brain extracted, " in said and "bare.nii: left as it is, its skull is off already" in said


@pytest.mark.parametrize("background", [-1000, 7])
@pytest.mark.parametrize("modalities", [1, 2])
def test_a_scan_without_skull_keeps_its_background(place, model, capsys, background, modalities):
    image, brain, affine = make_raw_scan(skull=False)
    image = np.where(brain, image, background).astype(np.int16)
    image = image if modalities == 1 else np.stack([image, image + 50], -1)
    nib.save(nib.Nifti1Image(image, affine), "other.nii.gz")
    assert main(["other.nii.gz", "--model", model]) == 0
    assert "other.nii.gz: left as it is, its skull is off already" in capsys.readouterr().out
    np.testing.assert_array_equal(read("other_brain.nii.gz"), image)
    assert not read("other_brain_mask.nii.gz")[~brain].any()


def test_a_folder_of_scans_one_of_them_broken(place, model, capsys):
    folder, *_ = place
    (folder / "in").mkdir()
    for name in ("raw.nii.gz", "bare.nii"):
        (folder / name).rename(folder / "in" / name)
    (folder / "in" / "broken.nii.gz").write_bytes((folder / "in" / "raw.nii.gz").read_bytes()[:2000])
    assert main(["in", "-o", "out", "--model", model]) == 1
    names = ["bare_brain.nii.gz", "bare_brain_mask.nii.gz", "raw_brain.nii.gz", "raw_brain_mask.nii.gz"]
    assert sorted(path.name for path in (folder / "out").iterdir()) == names
    told = capsys.readouterr()
    assert "2 scan(s) done." in told.out and "FAILED in/broken.nii.gz: ValueError: " in told.err


def test_nothing_is_replaced_unless_asked_for(place, model, capsys):
    folder, *_ = place
    (folder / "raw_brain.nii.gz").write_text("mine")
    assert main(["raw.nii.gz", "--model", model]) == 1
    assert (folder / "raw_brain.nii.gz").read_text() == "mine" and not (folder / "raw_brain_mask.nii.gz").exists()
    assert "raw_brain.nii.gz exists; `--overwrite` replaces it." in capsys.readouterr().err
    assert main(["raw.nii.gz", "--model", model, "--overwrite"]) == 0
    assert read("raw_brain.nii.gz").any()


def test_what_another_command_has_written_meanwhile_stays(place, model, monkeypatch, capsys):
    folder, find = place[0], brain_module.find_brain

    def find_slowly(*arguments):
        (folder / "raw_brain_mask.nii.gz").write_text("of another command")
        return find(*arguments)

    monkeypatch.setattr(brain_module, "find_brain", find_slowly)
    assert main(["raw.nii.gz", "--model", model]) == 1
    assert "raw_brain_mask.nii.gz exists; `--overwrite` replaces it." in capsys.readouterr().err
    assert [path.name for path in folder.glob("*raw_*")] == ["raw_brain_mask.nii.gz"]
    assert (folder / "raw_brain_mask.nii.gz").read_text() == "of another command"


def test_every_series_of_dicom_gets_files_of_its_own(place, model, monkeypatch):
    folder, *_ = place
    image = make_raw_scan()[0]
    for name, number in (("1.2.840.1", 3), ("1.2.840.2", 3), ("export", 4), ("export", 5)):
        slices = make_slices(shape=image.shape, slope=1.0, intercept=0.0, number=number)
        for index, one in enumerate(slices):
            one.PixelData, one.PixelSpacing = image[..., index].T.astype(np.uint16).tobytes(), [4.0, 4.0]
            one.ImagePositionPatient = [0.0, 0.0, 6.0 * index]
        write(folder / name, slices)
        if name == "export":
            for file in list((folder / name).glob("IM*")):
                file.rename(file.with_name(f"{number}-{file.name}"))
    assert main(["1.2.840.1", "1.2.840.2", "export#4", "export#5", "--model", model]) == 0
    made = ["1.2.840.1_brain.nii.gz", "1.2.840.2_brain.nii.gz", "export_4_brain.nii.gz", "export_5_brain.nii.gz"]
    assert sorted(path.name for path in folder.glob("*_brain.nii.gz")) == made
    for path in folder.glob("1.2.840.1_*"):
        path.unlink()
    monkeypatch.chdir(folder / "1.2.840.1")
    assert main([".", "--model", model]) == 0 and (folder / made[0]).is_file()


def test_wrong_calls_are_one_line(place, capsys):
    assert run_script(lambda: main([])) == 1
    assert capsys.readouterr().err == "error: no scan given: files, or folders of scans.\n"
    assert run_script(lambda: main(["raw.nii.gz", "--model", "./nothing"])) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: ./nothing cannot be loaded: ")


def test_predict_extracts_and_says_so(place, tmp_path_factory, capsys):
    settings = {"brain_mask": "given", "crop": "brain"}
    pipe = make_pipeline(
        *("AnoDDPMPipeline", ("flair", "t1")),
        processor_settings=settings,
        noise_level=1,
        brain_extractor=make_extractor(),
    )
    with_extractor = tmp_path_factory.mktemp("with")
    pipe.save_pretrained(with_extractor)
    pair = read("raw.nii.gz")
    bare = np.stack([read("bare.nii")] * 2, -1)
    nib.save(nib.Nifti1Image(bare, nib.load("raw.nii.gz").affine), "bare.nii.gz")
    assert predict(["--model", str(with_extractor), "raw.nii.gz", "bare.nii.gz", "-o", "out"]) == 0
    said = capsys.readouterr().out
    assert "raw: brain extracted, its mask is brain_mask.nii.gz" in said
    assert "bare: left as it is: its skull is off already" in said
    assert read("out/raw/brain_mask.nii.gz").shape == pair.shape[:3]
    with open("out/raw/result.json", encoding="utf-8") as file:
        assert json.load(file)["settings"]["brain"] == "extracted"
    with open("out/bare/result.json", encoding="utf-8") as file:
        assert json.load(file)["settings"]["brain"] == "stripped"
