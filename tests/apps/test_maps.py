"""What the page of anomaly maps computes, and what it keeps of its visitors."""

import importlib
import os
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest

from anodiff.apps.heads import generate_head
from anodiff.apps.maps import find_anomalies

from ..tiny import make_pipeline, make_volume


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """Folder of tiny pipelines: `one` modality, `two`, `fewer` than two if need be, and `several` segmentations."""
    folder = tmp_path_factory.mktemp("models")
    make_pipeline("AnoDDPMPipeline", ("flair",), noise_level=2, threshold=0.5).save_pretrained(folder / "one")
    make_pipeline("AnoDDPMPipeline", ("flair", "t1"), noise_level=2).save_pretrained(folder / "two")
    make_pipeline("AnoDDPMPipeline", ("flair", "t1"), noise_level=2, optional_modalities=["t1"]).save_pretrained(
        folder / "fewer"
    )
    make_pipeline("CIMDPipeline", ("t1",)).save_pretrained(folder / "several")
    return folder


def write_scan(path: Path, seed: int = 0) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(make_volume(seed=seed), np.diag([2.0, 2.0, 5.0, 1.0])), path)
    return str(path)


def test_a_scan_gets_a_map_numbers_and_an_archive(models, tmp_path):
    scan = write_scan(tmp_path / "upload" / "scan.nii.gz")
    found = find_anomalies([scan], str(models / "one"), tmp_path / "session", seed=1)
    with zipfile.ZipFile(found.archive) as archive:
        archive.extractall(tmp_path / "taken")
    assert {"report.html", "scan/anomaly_map.nii.gz", "scan/result.json", "scan/overview.png"} <= set(
        archive.namelist()
    )
    pipe = make_pipeline("AnoDDPMPipeline", ("flair",), noise_level=2, threshold=0.5)
    wanted = pipe(scan, generator=1)
    there = np.asarray(nib.load(tmp_path / "taken" / "scan" / "anomaly_map.nii.gz").dataobj)
    np.testing.assert_allclose(there, wanted.anomaly_map, rtol=1e-4, atol=1e-5)
    # Voxels of 2 x 2 x 5 mm.
    assert found.facts["Above the threshold"] == f"{wanted.pred_mask.sum() * 0.02:.2f} ml"
    assert found.facts["Threshold"] == "0.5" and float(found.facts["Score of the scan"]) > 0
    assert found.page == (tmp_path / "taken" / "report.html").read_text(encoding="utf-8")
    assert not (tmp_path / "session" / "given").exists()


def test_modalities_by_their_names_and_segmentations(models, tmp_path):
    files = [write_scan(tmp_path / folder / f"p1_{name}.nii.gz", 1) for folder, name in (("a", "t1"), ("b", "FLAIR"))]
    found = find_anomalies(files, str(models / "two"), tmp_path / "two")
    assert found.facts["Threshold"] == "none in the checkpoint" and "Above the threshold" not in found.facts
    found = find_anomalies(files[1:], str(models / "fewer"), tmp_path / "fewer")
    assert found.facts["Warnings"] == "Without t1: the map is made of flair alone."
    found = find_anomalies(files[:1], str(models / "several"), tmp_path / "several")
    assert found.facts["In most of 3 members"].endswith(" ml")


def test_files_that_are_no_scan_for_the_checkpoint(models, tmp_path):
    t1, flair = (write_scan(tmp_path / name / f"{name}.nii.gz") for name in ("t1", "flair"))
    text = tmp_path / "notes.nii.gz"
    text.write_text("no scan at all")
    other = write_scan(tmp_path / "again" / "t1.nii.gz")
    for number, (files, model, message) in enumerate(
        [
            ([], "one", "No scan is there yet"),
            ([str(text)], "one", "notes.nii.gz"),
            ([t1], "one", "its name says t1, and this checkpoint needs flair"),
            ([flair], "two", "t1"),
            ([flair, write_scan(tmp_path / "more" / "p2_flair.nii.gz")], "one", "flair"),
            ([t1, other], "two", "Two files are called t1.nii.gz"),
        ]
    ):
        with pytest.raises((ValueError, OSError), match=message):
            find_anomalies(files, str(models / model), tmp_path / f"session {number}")


def test_a_generated_head_is_the_same_again_in_every_contrast():
    head, other = generate_head("flair", "tumour"), generate_head("t1", "tumour")
    brain, lesion = (np.asarray(image.dataobj) > 0 for image in (head.brain, head.lesion))
    assert lesion.any() and not (lesion & ~brain).any() and lesion[..., head.middle].any()
    np.testing.assert_array_equal(np.asarray(other.brain.dataobj) > 0, brain)
    assert np.asarray(head.image.dataobj)[lesion].mean() > np.asarray(head.image.dataobj)[brain & ~lesion].mean()
    assert (
        not np.asarray(head.image.dataobj)[~brain].any() and not np.asarray(generate_head("t1").lesion.dataobj).any()
    )


def test_what_visitors_brought_goes_with_the_last_of_them(tmp_path):
    from anodiff.apps.pages import Sessions

    sessions, (first, second) = Sessions(), [SimpleNamespace(session_hash=name) for name in ("first", "second")]
    shared, own = write_scan(tmp_path / "shared" / "scan.nii.gz"), write_scan(tmp_path / "own" / "scan.nii.gz")
    sessions.keep([shared, own], first)
    sessions.keep(shared, second)
    results = sessions.new_folder(first)
    results.mkdir()
    sessions.forget(first)
    assert Path(shared).exists() and not Path(own).exists() and not results.exists()
    sessions.forget(second)
    assert not Path(shared).exists()
    sessions.forget(second)  # a page that is closed twice


def test_without_gradio_the_extra_is_named(monkeypatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", os.environ.get("GRADIO_TEMP_DIR", ""))  # is as it was afterwards
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "anodiff.apps.pages", raising=False)
    with pytest.raises(ImportError, match=r"need gradio: `pip install anodiff\[app\]`"):
        importlib.import_module("anodiff.apps.pages")
