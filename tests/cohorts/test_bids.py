"""`anodiff bids`: a data set of derivatives, which the validator of BIDS accepts."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from anodiff.bids import main
from anodiff.cohorts import prediction
from anodiff.cohorts.bids import write_derivatives
from anodiff.cohorts.options import PredictOptions
from anodiff.files import read_json, read_text, sha256
from anodiff.pipelines.output import AnomalyOutput
from anodiff.volumes.bids import find_bids_scans, write_description
from anodiff.volumes.volume import read_volume

from ..tiny import make_pipeline, make_volume


SHAPE = (16, 16, 3)
AFFINE = np.array([[-2.0, 0, 0, 9], [0, 1.8, -0.6, -7], [0, 0.6, 1.8, 3], [0, 0, 0, 1]])
IMAGES = [
    "sub-01/anat/sub-01_FLAIR.nii.gz",
    "sub-01/anat/sub-01_T1w.nii.gz",
    "sub-02/ses-1/anat/sub-02_ses-1_run-1_FLAIR.nii.gz",
    "sub-02/ses-1/anat/sub-02_ses-1_run-2_FLAIR.nii.gz",
    "sub-02/ses-2/anat/sub-02_ses-2_FLAIR.nii.gz",
    "sub-03/anat/sub-03_T1w.nii.gz",
]
SCANS = ["sub-01", "sub-02_ses-1_run-1", "sub-02_ses-1_run-2", "sub-02_ses-2"]
TOP = (".bidsignore", "README.md", "dataset_description.json")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("model")
    make_pipeline("AnoDDPMPipeline", ("flair",), threshold=1e-4).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """The working directory, with a BIDS data set in `data`."""
    monkeypatch.chdir(tmp_path)
    for number, name in enumerate(IMAGES):
        image = nib.Nifti1Image(make_volume(SHAPE, seed=number), AFFINE)
        image.header.set_xyzt_units("mm", "sec")
        path = tmp_path / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        nib.save(image, path)
    description = {"Name": "Made", "BIDSVersion": "1.10.0", "DatasetType": "raw", "License": "CC0"}
    (tmp_path / "data" / "dataset_description.json").write_text(json.dumps(description))
    (tmp_path / "data" / "README.md").write_text("Images of random numbers. " * 10)
    return tmp_path


def errors_of(folder: Path) -> list[tuple]:
    """What the validator of BIDS finds wrong in a data set."""
    validator = Path(sys.executable).with_name("bids-validator-deno")
    done = subprocess.run([validator, folder, "--format", "json"], text=True, capture_output=True)
    report = json.loads(done.stdout)
    assert report["summary"]["subjects"]
    issues = [issue for issue in report["issues"]["issues"] if issue["severity"] == "error"]
    return [(issue["code"], issue.get("subCode"), issue.get("location")) for issue in issues]


def table_of(folder: Path) -> dict[str, dict[str, str]]:
    head, *lines = [line.split("\t") for line in read_text(folder / "cohort.tsv").splitlines()]
    assert set(read_json(folder / "cohort.json")) == set(head)
    return {cells[0]: dict(zip(head, cells, strict=True)) for cells in lines}


def test_derivatives_of_participants_and_the_table_of_the_group(place, model, capsys):
    """One session, several sessions, two runs, and a participant without the modality."""
    assert errors_of(place / "data") == []
    assert main(["data", "out", "participant", "--participant_label", "01", "--model", model]) == 0
    top = {name: (place / "out" / name).read_bytes() for name in TOP}
    assert main(["data", "out", "participant", "--participant_label", "02", "sub-03", "--model", model]) == 1
    assert capsys.readouterr().err.splitlines()[-1] == (
        "FAILED sub-03: has no image for flair among those chosen; its images: sub-03_T1w.nii.gz."
    )
    assert top == {name: (place / "out" / name).read_bytes() for name in TOP}
    assert errors_of(place / "out") == []

    anat = place / "out" / "sub-02" / "ses-1" / "anat"
    ends = ["desc-anomalyscore_map", "desc-pseudohealthy_FLAIR", "label-L_mask"]
    made = sorted(path.name for path in anat.iterdir() if path.name != ".run.lock")
    assert made == sorted(
        f"sub-02_ses-1_run-{run}_space-orig_{end}{ending}"
        for run in "12"
        for end in ends
        for ending in (".nii.gz", ".json")
    )
    source = nib.load(place / "data" / IMAGES[3])
    images = {end: nib.load(anat / f"sub-02_ses-1_run-2_space-orig_{end}.nii.gz") for end in ends}
    for image in images.values():
        assert image.shape == SHAPE
        np.testing.assert_array_equal(image.affine, source.affine)
    score, _, mask = (image.get_fdata() for image in images.values())
    assert 0 < mask.mean() < 1
    np.testing.assert_array_equal(mask, score > 1e-4)
    sidecar = read_json(anat / "sub-02_ses-1_run-2_space-orig_label-L_mask.json")
    uri = "bids:raw:sub-02/ses-1/anat/sub-02_ses-1_run-2_FLAIR.nii.gz"
    assert (sidecar["Sources"], sidecar["SpatialReference"]) == ([uri], uri)
    assert (sidecar["Type"], sidecar["Threshold"]) == ("Lesion", 1e-4)
    assert read_json(place / "out" / "dataset_description.json")["GeneratedBy"][0]["Name"] == "anodiff"

    assert main(["data", "out", "group"]) == 1
    rows = table_of(place / "out")
    assert [*rows] == [*SCANS, "sub-03"]
    assert rows["sub-03"]["status"] == "failed" and "no image for flair" in rows["sub-03"]["reason"]
    row = rows["sub-02_ses-1_run-2"]
    assert (row["participant_id"], row["session_id"], row["status"]) == ("sub-02", "ses-1", "done")
    assert rows["sub-01"]["session_id"] == "n/a"
    assert float(row["seconds"]) > 0 and row["source"] == IMAGES[3]
    log = read_json(place / "out" / "logs" / "sub-02_ses-1_run-2.json")
    assert log["inputs"] == {IMAGES[3]: sha256(place / "data" / IMAGES[3])}
    assert int(row["marked_voxels"]) == mask.sum()
    assert float(row["marked_ml"]) == pytest.approx(mask.sum() * abs(np.linalg.det(AFFINE)) / 1000)
    page = read_text(place / "out" / "report.html")
    assert all(name in page for name in rows)
    assert errors_of(place / "out") == []
    (place / "out" / ".bidsignore").unlink()  # the validator looks
    assert any("anomalyscore" in location for _, _, location in errors_of(place / "out"))


def test_what_is_done_is_skipped_or_replaced_as_a_whole(place, model, capsys):
    command = ["data", "out", "participant", "--model", model, "--participant_label", "01"]
    (place / "data" / IMAGES[3]).write_bytes(b"no image")
    assert main([*command, "02"]) == 1
    assert "FAILED sub-02_ses-1_run-2: ValueError: data/sub-02/ses-1" in capsys.readouterr().err
    record = place / "out/sub-01/anat/sub-01_space-orig_desc-anomalyscore_map.json"
    first = record.read_bytes()
    assert main(command) == 1
    assert "`--overwrite` replaces the result" in capsys.readouterr().err
    assert main([*command, "--skip_existing", "--seed", "1"]) == 0 and record.read_bytes() == first
    assert "0 scan(s) done, 1 finished before" in capsys.readouterr().out
    assert main([*command, "--overwrite", "--seed", "1"]) == 0 and record.read_bytes() != first
    # Why it failed is in the table, and goes with the failure; what was never predicted is there as well.
    shutil.rmtree(place / "out" / "sub-01")
    assert main(["data", "out", "group"]) == 1
    rows = table_of(place / "out")
    assert "cannot be read" in rows["sub-02_ses-1_run-2"]["reason"]
    assert "never predicted" in rows["sub-01"]["reason"]
    shutil.copy(place / "data" / IMAGES[2], place / "data" / IMAGES[3])
    assert main([*command, "02", "--skip_existing"]) == 0
    assert "2 scan(s) done, 2 finished before" in capsys.readouterr().out
    # A result without one of its files is none.
    (place / "out/sub-01/anat/sub-01_space-orig_label-L_mask.nii.gz").unlink()
    assert main(["data", "out", "group", "--participant_label", "01", "02"]) == 1
    rows = table_of(place / "out")
    assert [name for name, row in rows.items() if row["status"] == "failed"] == ["sub-01"]
    assert "not whole" in rows["sub-01"]["reason"]


@pytest.mark.parametrize(
    ("option", "message"), [([], "`--overwrite` replaces the result"), (["--skip_existing"], "is of another command")]
)
def test_a_result_that_another_command_has_written_meanwhile_stays(place, model, monkeypatch, capsys, option, message):
    command = ["data", "out", "participant", "--model", model, "--participant_label", "01", *option]
    record = place / "out/sub-01/anat/sub-01_space-orig_desc-anomalyscore_map.json"
    written, compute = [], prediction.compute_scan

    def compute_slowly(*arguments):
        monkeypatch.setattr(prediction, "compute_scan", compute)
        assert main([*command, "--seed", "1"]) == 0
        written.append(record.read_bytes())
        return compute(*arguments)

    monkeypatch.setattr(prediction, "compute_scan", compute_slowly)
    assert main(command) == 1
    assert message in capsys.readouterr().err
    assert [record.read_bytes()] == written


def test_a_result_of_another_data_set_does_not_count(place, model, capsys):
    command = ["out", "participant", "--model", model, "--participant_label", "01", "--skip_existing"]
    assert main(["data", *command]) == 0
    shutil.copytree(place / "data", place / "moved")
    assert main(["moved", *command]) == 0 and "1 finished before" in capsys.readouterr().out
    shutil.copy(place / "data" / IMAGES[2], place / "moved" / IMAGES[0])
    assert main(["moved", *command]) == 1
    said = capsys.readouterr()
    assert "0 finished before" in said.out
    assert "FAILED sub-01: out/sub-01/anat/sub-01_space-orig_desc-anomalyscore_map.json is of other images" in said.err


def test_every_array_of_a_result_is_a_derivative(place):
    """Of several modalities, calibrated and with an extracted brain."""
    root, out = place / "data", place / "data" / "derivatives" / "anodiff"
    (scan,), _ = find_bids_scans(root, ["flair", "T1w"], participants=["01"])
    entry = {"Name": "anodiff", "Version": "1", "Checkpoint": "x", "Modalities": ["flair", "T1w"], "Plane": "axial"}
    write_description(out, root, entry)
    maps = {name: np.full(SHAPE, 0.25, np.float32) for name in ("anomaly_map", "probability_map", "healthy_rank_map")}
    masks = {name: np.ones(SHAPE, np.uint8) for name in ("pred_mask", "brain_mask")}
    result = AnomalyOutput(
        **maps,
        **masks,
        pred_score=np.zeros(3),
        volume_score=0.0,
        reconstruction=np.stack([np.full(SHAPE, 7.0), np.full(SHAPE, 8.0)], -1).astype(np.float32),
        settings={"threshold": 0.1, "brain": "extracted"},
        source=read_volume(scan.volume),
    )
    pipeline, options = make_pipeline("AnoDDPMPipeline", ("flair", "T1w")), PredictOptions(output=str(out))
    assert write_derivatives(root, pipeline, scan, options, result, None) == "brain mask: extracted"
    assert errors_of(out) == []
    values = {
        path.name.removesuffix(".nii.gz"): np.unique(nib.load(path).get_fdata()).tolist()
        for path in (out / "sub-01" / "anat").glob("*.nii.gz")
    }
    assert values == {
        "sub-01_space-orig_desc-anomalyscore_map": [0.25],
        "sub-01_space-orig_desc-healthyrank_map": [0.25],
        "sub-01_space-orig_label-L_probseg": [0.25],
        "sub-01_space-orig_label-L_mask": [1],
        "sub-01_space-orig_desc-brain_mask": [1],
        "sub-01_space-orig_desc-pseudohealthy_FLAIR": [7],
        "sub-01_space-orig_desc-pseudohealthy_T1w": [8],
    }
    sidecar = read_json(out / "sub-01/anat/sub-01_space-orig_desc-pseudohealthy_T1w.json")
    assert sidecar["SkullStripped"] is True and len(sidecar["Sources"]) == 2
    assert main([str(root), str(out), "group", "--participant_label", "01"]) == 0
    assert table_of(out)["sub-01"]["marked_voxels"] == str(np.prod(SHAPE))


def test_sessions_that_lack_an_optional_modality(place, capsys):
    pipe = make_pipeline("AnoDDPMPipeline", ("flair", "T1w", "T2w"), optional_modalities=["flair", "T2w"])
    pipe.save_pretrained(place / "several")
    given = ["data", "out", "participant", "--model", "several", "--participant_label"]
    assert main([*given, "01", "03"]) == 0
    told = capsys.readouterr().out
    assert "Without T2w: the map is made of flair, T1w alone." in told
    assert "Without flair, T2w: the map is made of T1w alone." in told
    made = {path.name for path in (place / "out").glob("sub-0*/anat/*pseudohealthy*.nii.gz")}
    assert made == {
        f"sub-{number}_space-orig_desc-pseudohealthy_{name}.nii.gz"
        for number, name in (("01", "FLAIR"), ("01", "T1w"), ("03", "T1w"))
    }
    files = {"flair": "FLAIR", "T1w": "T1w"}
    anat = "sub-01/anat/sub-01"
    expected = pipe({name: place / "data" / f"{anat}_{file}.nii.gz" for name, file in files.items()}).reconstruction
    for channel, file in enumerate(files.values()):
        written = nib.load(place / "out" / f"{anat}_space-orig_desc-pseudohealthy_{file}.nii.gz").get_fdata()
        np.testing.assert_allclose(written, expected[..., channel], rtol=0, atol=1e-5)
    assert main([*given, "02"]) == 1
    assert "FAILED" in capsys.readouterr().err


def test_masks_of_the_brain_are_read(place, model, capsys):
    """From derivatives; of one scan there is none."""
    mask = place / "masks/sub-01/anat/sub-01_desc-brain_mask.nii.gz"
    mask.parent.mkdir(parents=True)
    brain = np.zeros(SHAPE, np.uint8)
    brain[4:12, 4:12] = 1
    nib.save(nib.Nifti1Image(brain, AFFINE), mask)
    assert main(["data", "out", "participant", "--model", model, "--brain", "masks"]) == 1
    said = capsys.readouterr()
    assert "sub-01: brain mask: given" in said.out
    assert "There is no file masks/sub-02/ses-2/anat/sub-02_ses-2_desc-brain_mask.nii.gz" in said.err
    scores = nib.load(place / "out/sub-01/anat/sub-01_space-orig_desc-anomalyscore_map.nii.gz").get_fdata()
    assert scores.any() and not scores[brain == 0].any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["data", "out"], "BIDS_DIR, OUT, and participant or group are needed"),
        (["data", "out", "session"], "`level` must be one of participant, group"),
        (["out", "out", "participant"], "out is no BIDS data set"),
        (["data", "out", "group"], "out is no BIDS data set"),
        (["data", "out", "participant"], r"of 2 modalities \(flair, t1\): say by `--modality`"),
        (["data", "data", "participant", "--model", "MODEL"], "must go into a folder of their own"),
        (
            ["data", "out", "participant", "--model", "MODEL", "--modality", "T1w"],
            "`--modality` is t1, and .* is for flair",
        ),
        (["data", "out", "participant", "--overwrite", "--skip_existing"], "give one of them"),
        (["data", "out", "group", "--model", "MODEL"], "`--model`: for `participant` only"),
        (["data", "out", "group", "--threshold", "0", "--fast"], "`--threshold`, `--fast`: for `participant` only"),
    ],
)
def test_wrong_commands_are_refused_before_anything_is_written(place, model, arguments, message):
    with pytest.raises((ValueError, OSError), match=message):
        main([model if argument == "MODEL" else argument for argument in arguments])
    assert sorted(path.name for path in place.iterdir()) == ["data"]


def test_an_ensemble_of_segmentations_is_refused(place, tmp_path):
    make_pipeline("CIMDPipeline", ("flair",)).save_pretrained(tmp_path / "cimd")
    with pytest.raises(ValueError, match="cimd makes segmentations"):
        main(["data", "out", "participant", "--model", str(tmp_path / "cimd")])
