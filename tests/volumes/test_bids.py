"""Scans of BIDS data sets, by their names alone."""

import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from anodiff.files import read_json
from anodiff.volumes.bids import (
    derivative_name,
    find_bids_scans,
    find_modalities,
    pseudohealthy_name,
    read_entry,
    split_name,
    write_description,
)


@pytest.fixture
def dataset(tmp_path):
    """Makes a data set of empty images by their names, `01/1/run-1_FLAIR` (session 1) or `01/FLAIR`."""

    def make(*names: str) -> Path:
        root = tmp_path / "data"
        root.mkdir(exist_ok=True)
        (root / "dataset_description.json").write_text(json.dumps({"Name": "Made", "BIDSVersion": "1.10.0"}))
        for name in names:
            participant, *session, rest = name.split("/")
            parts = [f"sub-{participant}", *(f"ses-{label}" for label in session)]
            path = root.joinpath(*parts, "anat", "_".join([*parts, rest]) + ("" if "." in rest else ".nii.gz"))
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"")
        return root

    return make


def found(root, modalities=("flair",), **options) -> tuple[dict, dict]:
    """Scans with the names of their images, and reasons by name."""
    scans, failed = find_bids_scans(root, modalities, **options)
    assert len({scan.name for scan in scans}) == len(scans)
    names = {scan.name: {modality: path.name for modality, path in scan.volume.items()} for scan in scans}
    return {name: list(images.values()) if len(modalities) == 1 else images for name, images in names.items()}, dict(
        failed
    )


def test_each_image_is_a_scan_of_a_checkpoint_for_one_modality(dataset):
    root = dataset("01/FLAIR", "01/T1w", "01/label-L_mask", "02/1/run-1_FLAIR", "02/1/run-2_FLAIR.nii", "02/b/FLAIR")
    dataset("03/acq-space_rec-norm_FLAIR", "04/T1w", "05/1/T2w", "05/2/FLAIR")
    scans, failed = found(root)
    assert scans == {
        "sub-01": ["sub-01_FLAIR.nii.gz"],
        "sub-02_ses-1_run-1": ["sub-02_ses-1_run-1_FLAIR.nii.gz"],
        "sub-02_ses-1_run-2": ["sub-02_ses-1_run-2_FLAIR.nii"],
        "sub-02_ses-b": ["sub-02_ses-b_FLAIR.nii.gz"],
        "sub-03_acq-space_rec-norm": ["sub-03_acq-space_rec-norm_FLAIR.nii.gz"],
        "sub-05_ses-2": ["sub-05_ses-2_FLAIR.nii.gz"],
    }
    assert failed == {
        "sub-04": "has no image for flair among those chosen; its images: sub-04_T1w.nii.gz.",
        "sub-05_ses-1": "has no image for flair among those chosen; its images: sub-05_ses-1_T2w.nii.gz.",
    }
    assert find_modalities(root) == ["flair", "t1", "t2"]


def test_labels_choose(dataset):
    root = dataset(
        "01/1/run-01_FLAIR", "01/1/run-2_FLAIR", "01/2/FLAIR", "02/1/acq-a_FLAIR", "02/1/acq-b_FLAIR", "3/FLAIR"
    )
    assert [*found(root, participants=["01", "sub-3"])[0]] == [
        "sub-01_ses-1_run-01",
        "sub-01_ses-1_run-2",
        "sub-01_ses-2",
        "sub-3",
    ]
    scans, failed = found(root, participants=["01", "9"], sessions=["ses-2"])
    assert [*scans] == ["sub-01_ses-2"] and failed == {"sub-9": f"{root} has no folder sub-9."}
    scans, failed = found(root, sessions=["2"])
    assert failed == {
        "sub-02": "has no session ses-2; its sessions: ses-1.",
        "sub-3": "has no session ses-2; its sessions: there are none.",
    }
    # Of several the one that is missing is named.
    scans, failed = found(root, participants=["01"], sessions=["2", "3"])
    assert [*scans] == ["sub-01_ses-2"] and failed == {"sub-01": "has no session ses-3; its sessions: ses-1, ses-2."}
    assert [*found(root, labels={"run": ["1"]})[0]] == [
        "sub-01_ses-1_run-01",
        "sub-01_ses-2",
        "sub-02_ses-1_acq-a",
        "sub-02_ses-1_acq-b",
        "sub-3",
    ]
    assert "sub-02_ses-1_acq-a" not in found(root, labels={"acq": ["b"]})[0]


@pytest.mark.parametrize(
    ("images", "options", "scans"),
    [
        # The only ones of a session belong together, whatever else their names say.
        (["acq-mprage_T1w", "FLAIR"], {}, {"sub-01": {"T1w": "acq-mprage_T1w", "flair": "FLAIR"}}),
        (["run-1_T1w", "run-1_FLAIR"], {}, {"sub-01_run-1": {"T1w": "run-1_T1w", "flair": "run-1_FLAIR"}}),
        (
            ["run-1_T1w", "run-1_FLAIR", "run-2_FLAIR", "run-2_T1w"],
            {},
            {f"sub-01_run-{n}": {"T1w": f"run-{n}_T1w", "flair": f"run-{n}_FLAIR"} for n in (1, 2)},
        ),
        (
            ["T1w", "run-1_FLAIR", "run-2_FLAIR"],
            {"labels": {"run": ["2"]}},
            {"sub-01": {"T1w": "T1w", "flair": "run-2_FLAIR"}},
        ),
        # With a contrast agent it is another modality.
        (["ce-gd_T1w", "T1w", "FLAIR"], {}, {"sub-01": {"T1w": "T1w", "flair": "FLAIR"}}),
        (["FLAIR"], {"optional": ["T1w"]}, {"sub-01": {"flair": "FLAIR"}}),
    ],
)
def test_images_of_several_modalities(dataset, images, options, scans):
    actual, failed = found(dataset(*(f"01/{image}" for image in images)), ("T1w", "flair"), **options)
    assert failed == {}
    full = {name: {key: f"sub-01_{image}.nii.gz" for key, image in volume.items()} for name, volume in scans.items()}
    assert actual == full


@pytest.mark.parametrize(
    ("images", "reason"),
    [
        (["T1w"], "has no image for flair among those chosen; its images: sub-01_T1w.nii.gz."),
        (["ce-gd_T1w", "FLAIR"], "has no image for T1w among those"),
        (
            ["T1w", "run-1_FLAIR", "run-2_FLAIR"],
            "no image for T1w with the entities .*run-2.* Choose by `--run_label`",
        ),
        (["T1w", "T1w.nii", "FLAIR"], "several files with equal entities: sub-01_T1w.nii, sub-01_T1w.nii.gz"),
    ],
)
def test_images_that_make_no_scan(dataset, images, reason):
    scans, failed = find_bids_scans(dataset(*(f"01/{image}" for image in images)), ("T1w", "flair"))
    assert scans == [] and {name for name, _ in failed} == {"sub-01"}
    assert re.search(reason, failed[-1][1])


def test_names_that_are_none(dataset):
    root = dataset("01/FLAIR", "01/side-left_FLAIR")
    (root / "sub-01" / "anat" / "sub-02_FLAIR.nii.gz").write_bytes(b"")
    scans, failed = found(root)
    assert [*scans] == ["sub-01"]
    assert "side-left is no entity" in failed["sub-01/anat/sub-01_side-left_FLAIR.nii.gz"]
    assert "another participant" in failed["sub-01/anat/sub-02_FLAIR.nii.gz"]
    with pytest.raises(ValueError, match="no name of BIDS"):
        split_name("sub-01_sub-02_T1w")


def test_a_copy_of_an_image_is_named(dataset):
    root = dataset("01/FLAIR", "01/FLAIR (copy).nii.gz", "01/T1map", "01/FLAIR_mask")
    scans, failed = found(root)
    assert [*scans] == ["sub-01"] and [*failed] == ["sub-01/anat/sub-01_FLAIR (copy).nii.gz"]


@pytest.mark.parametrize(
    ("name", "entities"),
    [
        ("space-MNI152NLin2009cAsym_T1w", "space"),
        ("desc-preproc_T1w", "desc"),
        ("label-WM_T1w", "label"),
        ("space-orig_desc-preproc_T1w", "space and desc"),
    ],
)
def test_images_whose_derivatives_would_have_one_name_are_named(dataset, name, entities):
    root = dataset("01/T1w", f"01/{name}")
    scans, failed = found(root, ["t1"])
    assert scans == {"sub-01": ["sub-01_T1w.nii.gz"]}
    assert failed == {
        f"sub-01/anat/sub-01_{name}.nii.gz": f"has the entity {entities}: images of derivatives are not read, only raw"
        " ones."
    }
    (root / "sub-01" / "anat" / "sub-01_T1w.nii.gz").unlink()
    assert find_modalities(root) == []


def test_a_data_set_without_participants_is_named(dataset):
    root = dataset()
    assert found(root) == ({}, {str(root): "has no participant, a folder such as sub-01."})


def test_masks_of_the_brain(dataset, tmp_path):
    masks = tmp_path / "masks"
    folder = masks / "sub-01" / "ses-1" / "anat"
    folder.mkdir(parents=True)
    (folder / "sub-01_ses-1_run-2_space-orig_desc-brain_mask.nii.gz").write_bytes(b"")
    scans, _ = find_bids_scans(dataset("01/1/run-1_FLAIR", "01/1/run-2_FLAIR"), ["flair"], brain=masks)
    assert [scan.brain.relative_to(masks).as_posix() for scan in scans] == [
        "sub-01/ses-1/anat/sub-01_ses-1_run-1_desc-brain_mask.nii.gz",  # not there: reading says so
        "sub-01/ses-1/anat/sub-01_ses-1_run-2_space-orig_desc-brain_mask.nii.gz",
    ]


def test_names_of_derivatives():
    assert derivative_name("sub-01_run-2", "pred_mask") == "sub-01_run-2_space-orig_label-L_mask"
    assert derivative_name("sub-01_ses-2", "probability_map") == "sub-01_ses-2_space-orig_label-L_probseg"
    # What BIDS puts behind the space stays behind it.
    assert derivative_name("sub-01_chunk-2", "anomaly_map") == "sub-01_space-orig_chunk-2_desc-anomalyscore_map"
    assert pseudohealthy_name(Path("sub-01_acq-a_T1w.nii")) == "sub-01_acq-a_space-orig_desc-pseudohealthy_T1w"


def test_runs_that_begin_together_describe_the_results_alike(dataset, tmp_path):
    root, out = dataset("01/FLAIR"), tmp_path / "a folder" / "out"
    entry = {"Name": "anodiff", "Checkpoint": "one", "Modalities": ["flair"], "Plane": "axial"}
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: write_description(out, root, entry), range(16)))
    files = sorted(path.name for path in out.iterdir())
    assert files == [".bidsignore", "README.md", "dataset_description.json"]
    contents = [(out / name).read_bytes() for name in files]
    # What the user adds stays.
    (out / ".bidsignore").write_text("mine/\n" + (out / ".bidsignore").read_text().split("\n", 1)[1])
    (out / "README.md").write_text("Mine")
    write_description(out, root, entry)
    assert sorted((out / ".bidsignore").read_bytes().split()) == sorted([b"mine/", *contents[0].split()])
    assert (out / "README.md").read_text() == "Mine" and (out / files[2]).read_bytes() == contents[2]
    description = read_json(out / "dataset_description.json")
    assert description["DatasetType"] == "derivative" and description["DatasetLinks"] == {"raw": "../../data"}
    assert read_entry(out) == entry


@pytest.mark.parametrize("changed", ["Checkpoint", "Version"])
def test_results_of_another_kind_stay_apart(dataset, tmp_path, changed):
    entry = {"Name": "anodiff", "Version": "1", "Checkpoint": "1", "Modalities": ["flair"], "Plane": "axial"}
    root = dataset("01/FLAIR")
    write_description(tmp_path / "out", root, entry)
    with pytest.raises(ValueError, match=f"results of another kind: {changed} 1, now 2"):
        write_description(tmp_path / "out", root, entry | {changed: "2"})
    with pytest.raises(ValueError, match="folder of their own"):
        write_description(root, root, entry)
    (tmp_path / "out" / "dataset_description.json").write_text('{"GeneratedBy": [{"Name": "fmriprep"}]}')
    with pytest.raises(ValueError, match="something else than anodiff"):
        write_description(tmp_path / "out", root, entry)
    (root / "dataset_description.json").unlink()
    with pytest.raises(FileNotFoundError, match="no BIDS data set"):
        write_description(tmp_path / "out", root, entry)
