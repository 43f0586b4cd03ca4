"""`predict.py` and `convert.py`, in processes of their own or in this one."""

import base64
import gzip
import hashlib
import json
import os
import re
import signal
import warnings
from pathlib import Path

import highdicom
import nibabel as nib
import numpy as np
import pandas
import PIL.Image
import pytest
import torch
import yaml
from diffusers import UNet2DModel

from anodiff import AnomalyPipeline
from anodiff.cohorts import prediction
from anodiff.evaluation import overview
from anodiff.files import read_json, read_text
from anodiff.hub import shipped
from anodiff.predict import GO_ON, main
from anodiff.running import run_script
from anodiff.ship import main as ship
from anodiff.strip import main as strip

from ..dicom_series import PERSONAL, make_slices
from ..dicom_series import write as write_slices
from ..tiny import make_extractor, make_pipeline, make_raw_scan, make_volume


def test_maps_of_several_scans_one_of_them_broken(workplace, trained):
    raw = workplace.folder / "raw"
    broken = workplace.folder / "broken"
    for name in ("flair", "t1", "brain"):
        content = (raw / "test_0" / f"{name}.nii.gz").read_bytes()
        broken.mkdir(exist_ok=True)
        (broken / f"{name}.nii.gz").write_bytes(content[: len(content) // 2] if name == "flair" else content)
    done = workplace.run(
        "predict",
        *[
            "--model",
            f"{trained}/pipeline",
            "raw/test_1",
            "broken",
            "raw/test_2",
            "-o",
            "maps",
            "--brain",
            "brain.nii.gz",
        ],
        check=False,
    )
    assert done.returncode == 1
    assert "2 scan(s) done" in done.stdout
    assert "FAILED broken" in done.stderr and "flair.nii.gz cannot be read" in done.stderr
    written = {path.name for path in (workplace.folder / "maps").iterdir()}
    assert written == {"report.html", "test_1", "test_2", *TABLE}

    out = workplace.folder / "maps" / "test_1"
    source = nib.load(raw / "test_1" / "flair.nii.gz")
    anomaly_map, mask = nib.load(out / "anomaly_map.nii.gz"), nib.load(out / "pred_mask.nii.gz")
    assert anomaly_map.get_data_dtype() == np.float32 and mask.get_data_dtype() == np.uint8
    for image in (anomaly_map, mask):
        assert image.shape == source.shape
        np.testing.assert_allclose(image.affine, source.affine)
    assert nib.load(out / "reconstruction.nii.gz").shape == (*source.shape, 2)
    assert (out / "overview.png").stat().st_size > 10_000
    record = json.loads((out / "result.json").read_text())
    assert record["settings"]["noise_level"] == 3 and len(record["pred_score"]) == source.shape[2]

    # The same call in Python gives the same map.
    pipe = AnomalyPipeline.from_pretrained(workplace.folder / trained / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    volume = {name: raw / "test_1" / f"{name}.nii.gz" for name in ("flair", "t1", "brain")}
    expected = pipe(volume).anomaly_map
    np.testing.assert_allclose(anomaly_map.get_fdata(), expected, rtol=0, atol=1e-5 * expected.max())

    again = workplace.run(
        "predict",
        *["--model", f"{trained}/pipeline", "raw/test_1", "-o", "maps", "--brain", "brain.nii.gz"],
        check=False,
    )
    assert again.returncode == 1 and "`--overwrite` replaces it" in again.stderr


def test_two_processes_do_what_one_does(workplace, monkeypatch, capsys):
    """Of three scans one is broken."""
    make_pipeline("AnoDDPMPipeline", ("flair",)).save_pretrained(workplace.folder / "untrained")
    for number, name in enumerate("abc"):
        image = nib.Nifti1Image(make_volume((16, 16, 2), seed=number), np.eye(4))
        (workplace.folder / "scans").mkdir(exist_ok=True)
        nib.save(image, workplace.folder / "scans" / f"{name}.nii.gz")
    (workplace.folder / "scans" / "b.nii.gz").write_bytes(b"no scan")
    command = ["--model", "untrained", "scans"]
    done = workplace.run("predict", *command, "-o", "by-two", processes=2, check=False)
    assert done.returncode == 1
    assert done.stdout.count("scan(s) done") == 1 and "2 scan(s) done, results in by-two" in done.stdout
    (failed,) = [line for line in done.stderr.splitlines() if line.startswith("FAILED")]
    assert failed.startswith("FAILED scans/b.nii.gz: ValueError: scans/b.nii.gz cannot be read")
    monkeypatch.chdir(workplace.folder)
    assert main([*command, "-o", "by-one"]) == 1
    assert capsys.readouterr().err.splitlines()[-1] == failed
    assert files(workplace.folder / "by-two") == files(workplace.folder / "by-one")
    for name in files(workplace.folder / "by-one"):
        contents = [(workplace.folder / folder / name).read_bytes() for folder in ("by-one", "by-two")]
        first, second = map(gzip.decompress, contents) if name.endswith(".gz") else contents
        assert first == second, name
    tables = [table_of(workplace.folder / folder).drop(columns="seconds") for folder in ("by-one", "by-two")]
    pandas.testing.assert_frame_equal(*tables)
    records = [read_json(workplace.folder / folder / "run.json") for folder in ("by-one", "by-two")]
    assert [record["hardware"].pop("processes") for record in records] == [1, 2]
    for record in records:
        assert record["scans"] == {"named": 3, "done": 2, "skipped": 0, "failed": 1}
        assert [len(paths) for paths in record["inputs"].values()] == [1, 0, 1]


def test_a_folder_of_subjects(workplace, trained):
    done = workplace.run(
        "predict",
        *["--model", f"{trained}/pipeline", "raw", "-o", "all", "--brain", "brain.nii.gz"],
        *["--inference.noise_level", 1, "--inference.mode", "one_shot", "--threshold", 0.5],
    )
    assert "8 scan(s) done" in done.stdout
    record = json.loads((workplace.folder / "all" / "train_0" / "result.json").read_text())
    assert record["settings"]["mode"] == "one_shot" and record["settings"]["threshold"] == 0.5


def test_nothing_to_predict(workplace, trained):
    assert "no scan given" in workplace.run("predict", "--model", f"{trained}/pipeline", check=False).stderr
    done = workplace.run("predict", "--model", f"{trained}/pipeline", "nowhere.nii.gz", check=False)
    assert done.returncode == 1 and "There is no file nowhere.nii.gz" in done.stderr


def test_convert_brain_damage(workplace):
    # The notebook saves the state dict of its UNet2DModel; a few channels stand in for 92 million parameters.
    config = yaml.safe_load((workplace.folder / "tiny.yaml").read_text())["unet"]
    from anodiff.configs import config_path

    original = yaml.safe_load(config_path("brain_damage.yaml").read_text())["unet"]
    torch.manual_seed(0)
    torch.save(
        {"model": UNet2DModel(**original | {"in_channels": 1, "out_channels": 1}).state_dict()},
        workplace.folder / "bd.pth",
    )
    done = workplace.run("convert", "brain_damage", "bd.pth", "converted", "--key", "model")
    assert "Pipeline folder written" in done.stdout
    pipe = AnomalyPipeline.from_pretrained(workplace.folder / "converted")
    assert pipe.config.mode == "one_shot" and pipe.scheduler.config.beta_schedule == "cosine_clipped"
    state = torch.load(workplace.folder / "bd.pth", weights_only=True)["model"]
    for name, tensor in pipe.unet.state_dict().items():
        torch.testing.assert_close(tensor, state[name], rtol=0, atol=0)

    torch.save(
        UNet2DModel(sample_size=16, in_channels=1, out_channels=1, **config).state_dict(),
        workplace.folder / "other.pth",
    )
    wrong = workplace.run("convert", "brain_damage", "other.pth", "wrong", check=False)
    assert wrong.returncode == 1 and "does not fit the network of brain_damage" in wrong.stderr
    assert not (workplace.folder / "wrong").exists()


# --- in this process, with a checkpoint for FLAIR in the folder `model`


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("model")
    make_pipeline("AnoDDPMPipeline", ("flair",)).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """The working directory, in which `place(name, ...)` writes scans."""
    monkeypatch.chdir(tmp_path)

    def write(*names):
        for name in names:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            nib.save(nib.Nifti1Image(make_volume((16, 16, 2)), np.eye(4)), tmp_path / name)
        return tmp_path

    return write


def files(folder, *without):
    """Files below a folder but for those that mark a run, and its tables and record."""
    of_run = re.compile(r"\.run\.lock|\.cohort\.lock|(cohort|regions)\.(tsv|json)|run(_.+)?\.json")
    paths = (path for path in folder.rglob("*") if path.is_file() and not of_run.fullmatch(path.name))
    return {path.relative_to(folder).as_posix() for path in paths} - set(without)


TABLE = {".cohort.lock", "cohort.json", "cohort.tsv", "run.json"}
RESULT = {"anomaly_map.nii.gz", "reconstruction.nii.gz", "overview.png", "result.json"}


def test_results_beside_the_scans_take_nothing_from_the_user(place, model, capsys):
    folder = place("p1/flair.nii.gz", "p1/mean_map.nii.gz", "p1/dispersion.nii.gz", "p2/flair.nii.gz")
    mine = folder / "p2" / "anomaly_map.nii.gz"
    mine.write_bytes(b"the user's")
    before = {name: (folder / name).read_bytes() for name in files(folder)}
    assert main(["--model", model, "p1", "p2", "-o", "."]) == 1
    assert "p2 holds anomaly_map.nii.gz, which no earlier result wrote" in capsys.readouterr().err
    assert files(folder) - set(before) == {"report.html", *(f"p1/{name}" for name in RESULT)}
    # Again: what the first call wrote is replaced, and nothing else.
    assert main(["--model", model, "p1", "-o", "."]) == 1
    assert "already holds a result; `--overwrite` replaces it" in capsys.readouterr().err
    first = (folder / "p1" / "result.json").read_bytes()
    assert main(["--model", model, ".", "-o", ".", "--overwrite", "--seed", "5"]) == 1
    assert capsys.readouterr().err.count("FAILED") == 1
    assert files(folder) - set(before) == {"report.html", *(f"p1/{name}" for name in RESULT)}
    assert (folder / "p1" / "result.json").read_bytes() != first
    assert before == {name: (folder / name).read_bytes() for name in before}


def test_a_call_without_dispersion_removes_an_earlier_one(place, model):
    folder = place("p1.nii.gz")
    assert main(["--model", model, "p1.nii.gz", "-o", "out", "--dispersion", "2"]) == 0
    spread = {"member_maps.nii.gz", "mean_map.nii.gz", "dispersion.nii.gz", "dispersion.png", "dispersion.json"}
    assert files(folder / "out", "report.html") == {f"p1/{name}" for name in RESULT | spread}
    assert main(["--model", model, "p1.nii.gz", "-o", "out", "--overwrite"]) == 0
    assert files(folder / "out", "report.html") == {f"p1/{name}" for name in RESULT}
    record = json.loads((folder / "out" / "p1" / "result.json").read_text())
    assert record["files"] == sorted(RESULT - {"result.json"})


def test_a_series_of_dicom_comes_back_as_dicom_and_nothing_else_says_whose_it_is(place, model, capsys):
    folder = place()
    write_slices(folder / "raw" / "p1", make_slices("oblique", (16, 17, 3)))
    write_slices(folder / "raw" / "p2", make_slices("axial", (16, 17, 3))[::2])
    write_slices(folder / "raw" / "p3", [*make_slices(), *make_slices(number=7)])
    assert main(["--model", model, "raw", "-o", "out", "--threshold", "5e-4"]) == 1
    said = capsys.readouterr()
    assert (
        "FAILED raw/p3: ValueError: raw/p3 holds 2 series: 3 (4 images, MR" in said.err
        and said.err.count("FAILED") == 1
    )
    written = {"pred_mask.nii.gz", "pred_mask_seg.dcm", "anomaly_map_pm.dcm"}
    assert files(folder / "out", "report.html") == {
        f"{scan}/{one}" for scan in ("p1", "p2") for one in RESULT | written
    }
    mask = nib.load(folder / "out" / "p1" / "pred_mask.nii.gz")
    marked = np.argwhere(np.asarray(mask.dataobj))
    assert 0 < len(marked) < np.prod(mask.shape)
    back = highdicom.seg.segread(folder / "out" / "p1" / "pred_mask_seg.dcm").get_volume(combine_segments=True)
    place_of = np.diag([-1, -1, 1, 1]) @ back.affine
    there = nib.affines.apply_affine(np.linalg.inv(mask.affine) @ place_of, np.argwhere(back.array))
    np.testing.assert_allclose(there, there.round(), atol=1e-3)
    assert sorted(map(tuple, there.round().astype(int))) == sorted(map(tuple, marked))
    texts = [said.out, said.err, *(str(path) for path in (folder / "out").rglob("*"))]
    texts += [read_text(path) for path in (folder / "out").rglob("*") if path.suffix in (".json", ".tsv", ".html")]
    assert not re.search("|".join([*PERSONAL, "IM000"]), "\n".join(texts))
    assert set(read_json(folder / "out" / "run.json")["inputs"]["p1"]) == {"raw/p1"}
    # What is not wanted is not written, and what an earlier call wrote of it is removed.
    options = ["-o", "out", "--overwrite", "--dicom_output", "false"]
    assert main(["--model", model, "raw/p1#3", "raw/p1", *options]) == 0
    assert not list((folder / "out" / "p1").glob("*.dcm")) and not list((folder / "out" / "p1_3").glob("*.dcm"))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], None),
        (["--fast"], {"mixed_precision": "no", "channels_last": True, "compile": False}),
        (["--mixed_precision", "bf16"], {"mixed_precision": "bf16", "channels_last": False, "compile": False}),
        (
            ["--fast", "--mixed_precision", "bf16"],
            {"mixed_precision": "bf16", "channels_last": True, "compile": False},
        ),
    ],
)
def test_what_is_fast_is_recorded(place, model, options, expected):
    folder = place("p1.nii.gz")
    assert main(["--model", model, "p1.nii.gz", "-o", "out", "--device", "cpu", *options]) == 0
    settings = json.loads((folder / "out" / "p1" / "result.json").read_text())["settings"]
    assert settings.get("fast") == expected


def test_a_scan_that_lacks_modalities_is_predicted_and_said_to(place, tmp_path, capsys):
    optional = {"threshold": 0.5, "optional_modalities": ["flair", "t1"]}
    make_pipeline("AnoDDPMPipeline", ("flair", "t1", "t2"), **optional).save_pretrained(tmp_path / "model")
    folder = place("in/p1/flair.nii.gz", "in/p1/t1.nii.gz", "in/p1/t2.nii.gz", "in/p2/t2.nii.gz", "in/p3/t1.nii.gz")
    place("x_t2.nii.gz")
    assert main(["--model", "model", "in", "x_t2.nii.gz", "-o", "out"]) == 1
    told = capsys.readouterr()
    without = "Without flair, t1: the map is made of t2 alone. The threshold 0.5 was set with all modalities: "
    assert f"p2: brain taken as what is above the background. {without}" in told.out
    assert f"x_t2: brain taken as what is above the background. {without}" in told.out
    assert "p1: brain taken as what is above the background\n" in told.out
    assert re.search(r"FAILED in.p3: has no file for t2; its files are t1.nii.gz.", told.err)
    records = {name: read_json(folder / "out" / name / "result.json") for name in ("p1", "p2", "x_t2")}
    assert "warnings" not in records["p1"] and records["p1"]["settings"]["present_modalities"] is None
    for name in ("p2", "x_t2"):
        assert " ".join(records[name]["warnings"]).startswith(without)
        assert records[name]["settings"]["present_modalities"] == ["t2"]
    assert nib.load(folder / "out" / "p2" / "reconstruction.nii.gz").shape == (16, 16, 2)
    table = [line.split("\t") for line in read_text(folder / "out" / "cohort.tsv").splitlines()]
    warned = {row[0]: row[table[0].index("warnings")] for row in table[1:]}
    assert warned["p1"] == "n/a" and warned["p2"] == warned["x_t2"] == " | ".join(records["p2"]["warnings"])
    assert read_text(folder / "out" / "report.html").count("Without flair, t1: the map is made of t2 alone.") == 2


def test_what_is_not_predicted_is_listed_and_the_status_says_so(place, model, capsys):
    folder = place("raw/a_FLAIR.nii.gz", "raw/b_flair.nii.gz", "raw/a_T1w.nii.gz", "raw/a_seg.nii.gz", "raw/p1/t1.nii")
    os.symlink(".git/annex/objects/x", folder / "raw" / "c_flair.nii.gz")
    assert main(["--model", model, "raw", "-o", "out"]) == 1
    said = capsys.readouterr()
    assert "2 scan(s) done" in said.out
    for name, reason in {
        "a_T1w.nii.gz": "its name says t1, not flair",
        "a_seg.nii.gz": "a mask",
        "p1": "no file for flair; its files are t1.nii",
        "c_flair.nii.gz": "was never fetched: run `datalad get`",
    }.items():
        (line,) = [line for line in said.err.splitlines() if line.startswith(f"FAILED raw/{name}: ")]
        assert reason in line
    assert {path.name for path in (folder / "out").iterdir()} == {"a_FLAIR", "b_flair", "report.html", *TABLE}


def test_a_brain_mask_that_is_missing_is_said_of_each_scan(place, model, capsys):
    folder = place("raw/p1/flair.nii.gz", "raw/p1/BRAIN.nii.gz", "raw/p2/flair.nii.gz", "raw/p3/flair.nii.gz")
    assert main(["--model", model, "raw", "-o", "out", "--brain", "brain.nii.gz"]) == 1
    said = capsys.readouterr().err
    for name in ("p2", "p3"):
        assert f"FAILED raw/{name}: FileNotFoundError: There is no file raw/{name}/brain.nii.gz." in said
    assert {path.name for path in (folder / "out").iterdir()} == {"p1", "report.html", *TABLE}


@pytest.mark.parametrize("scan", ["..", ".", "../in/", "/"])
def test_nothing_is_written_outside_of_the_output(place, model, monkeypatch, scan, tmp_path):
    place("flair.nii.gz", "in/flair.nii.gz", "in/p1/flair.nii.gz")
    monkeypatch.chdir(tmp_path / "in")
    before = files(tmp_path)
    main(["--model", model, scan, "-o", "out"])
    new = files(tmp_path) - before
    new -= {"in/out/report.html"}
    assert all(name.startswith("in/out/") and name.count("/") == 3 for name in new) and bool(new) == (scan != "/")


def test_the_report_holds_every_result_that_the_command_names(place, model, capsys):
    folder = place("raw/a.nii.gz", "raw/b.nii.gz", "raw/a_seg.nii.gz", "other.nii.gz")
    page = folder / "out" / "report.html"
    assert main(["--model", model, "raw/a.nii.gz", "-o", "out"]) == 0
    assert "Report: out/report.html" in capsys.readouterr().out
    before = read_text(page)
    assert main(["--model", model, "other.nii.gz", "-o", "out", "--report", "none"]) == 0
    assert "Report" not in capsys.readouterr().out and read_text(page) == before
    assert main(["--model", model, "raw", "-o", "out", "--skip_existing"]) == 1
    text = read_text(page)
    scans = json.loads(re.search(r'id="data">(.*?)</script>', text)[1])
    records = {name: read_json(folder / "out" / name / "result.json") for name in "ab"}
    assert sorted(scan["name"] for scan in scans) == ["a", "b"]
    for scan in scans:
        assert scan["score"] == records[scan["name"]]["volume_score"]
        assert scan["slice_scores"] == records[scan["name"]]["pred_score"]
        assert [layer["kind"] for layer in scan["layers"]] == ["scan", "map", "reconstruction"]
    assert "raw/a_seg.nii.gz" in text and "a mask" in text  # what was not predicted, and why
    assert str(folder) not in text

    page.write_text("my notes")
    with pytest.raises(FileExistsError, match="out/report.html is no report of this library"):
        main(["--model", model, "raw", "-o", "out", "--overwrite"])
    assert page.read_text() == "my notes"
    with pytest.raises(ValueError, match="`report` must be one of html, none, got 'pdf'"):
        main(["--model", model, "raw", "-o", "out", "--report", "pdf"])


def test_the_report_of_a_scan_that_went_away_names_it(place, model, capsys):
    folder = place("raw/a.nii.gz", "raw/b.nii.gz")
    assert main(["--model", model, "raw", "-o", "out"]) == 0
    (folder / "raw" / "a.nii.gz").write_bytes(b"damaged")
    assert main(["--model", model, "raw", "-o", "out", "--skip_existing"]) == 1
    assert "FAILED raw/a.nii.gz: out/a/result.json is of other images (by SHA-256)" in capsys.readouterr().err
    text = read_text(folder / "out" / "report.html")
    assert "out/a/result.json is of other images" in text and '"name": "b"' in text


def test_the_report_of_a_damaged_map_names_it(place, model, capsys):
    folder = place("raw/a.nii.gz", "raw/b.nii.gz")
    assert main(["--model", model, "raw", "-o", "out"]) == 0
    path = folder / "out" / "a" / "anomaly_map.nii.gz"
    path.write_bytes(path.read_bytes()[:-8])  # all voxels are there, not their checksum
    assert main(["--model", model, "raw", "-o", "out", "--skip_existing"]) == 1
    assert "FAILED raw/a.nii.gz: its result is there, but not in the report: " in capsys.readouterr().err
    assert "anomaly_map.nii.gz cannot be read" in read_text(folder / "out" / "report.html")


def test_a_report_that_cannot_be_written_is_listed_with_what_failed(place, model, monkeypatch, capsys):
    folder = place("raw/a.nii.gz", "raw/b.nii.gz", "raw/a_seg.nii.gz")
    monkeypatch.setattr("anodiff.reports.page.MOST_SCANS", 1)
    (folder / "out" / "report_scans").mkdir(parents=True)
    for name in "ab":
        (folder / "out" / "report_scans" / f"0001_{name}.html").write_text("mine")
    assert main(["--model", model, "raw", "-o", "out"]) == 1
    said = capsys.readouterr()
    assert "2 scan(s) done" in said.out and "Report" not in said.out
    assert "FAILED raw/a_seg.nii.gz: " in said.err
    assert re.search(
        r"FAILED out/report.html: FileExistsError: out/report_scans/0001_[ab].html is no report", said.err
    )
    assert not (folder / "out" / "report.html").exists()


def test_the_report_of_a_picture_counts_pixels(place, model):
    folder = place()
    grey = (make_volume((16, 12)) * 200).astype(np.uint8)
    PIL.Image.fromarray(grey.T).save(folder / "picture.png")
    command = ["--model", model, "picture.png", "-o", "out", "--threshold", "0.1", "--dispersion", "2"]
    assert main(command) == 0
    text = read_text(folder / "out" / "report.html")
    (scan,) = json.loads(re.search(r'id="data">(.*?)</script>', text)[1])
    with PIL.Image.open(folder / "out" / "picture" / "pred_mask.png") as mask:
        assert f"{np.count_nonzero(mask)} pixels" in text and scan["is_picture"] and scan["shape"] == [16, 12, 1]
    names = [layer["name"] for layer in scan["layers"]]
    spread = ["Mean of the draws", "Draws", "Deviation of the draws"]
    assert names == ["Scan", "Anomaly map", "Mask", "Reconstruction", *spread]
    assert scan["layers"][5]["shape"] == [16, 12, 1, 2]
    layer = re.search(r'id="layer-0-1">(.*?)<', text)[1]
    stored = nib.Nifti1Image.from_bytes(gzip.decompress(base64.b64decode(layer))).get_fdata()[..., 0].T
    record = read_json(folder / "out" / "picture" / "result.json")
    with PIL.Image.open(folder / "out" / "picture" / "anomaly_map.png") as scores:
        expected = np.asarray(scores) * record["anomaly_map_per_grey_level"]
    np.testing.assert_allclose(stored, expected, rtol=0, atol=2 * record["anomaly_map_per_grey_level"])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_whole_results_and_one_line(place, model, monkeypatch, capsys, number):
    folder = place("raw/a.nii.gz", "raw/b.nii.gz", "raw/c.nii.gz")
    draw = overview.draw_overview

    def draw_until_stopped(output, path, title, **options):
        draw(output, path, title, **options)
        if title == "b":
            os.kill(os.getpid(), number)

    monkeypatch.setattr(overview, "draw_overview", draw_until_stopped)
    assert run_script(lambda: main(["--model", model, "raw", "-o", "out"]), GO_ON) == 128 + number
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"stopped by {number.name}: what is finished is kept") and last.endswith(GO_ON)
    # What was being written at that moment is written to its end.
    assert files(folder / "out") == {f"{scan}/{name}" for scan in "ab" for name in RESULT}


def test_finished_scans_are_skipped_and_half_results_are_not(place, model, capsys):
    folder = place("raw/a.nii.gz", "raw/b.nii.gz", "raw/c.nii.gz", "raw/d.nii.gz")
    assert main(["--model", model, "raw", "-o", "out"]) == 0
    whole = {name: (folder / "out" / name).read_bytes() for name in files(folder / "out")}
    capsys.readouterr()
    # b has lost its map, the record of c is torn, d was stopped while its result was replaced.
    (folder / "out" / "b" / "anomaly_map.nii.gz").unlink()
    (folder / "out" / "c" / "result.json").write_bytes(whole["c/result.json"][:50])
    names = sorted(files(folder / "out" / "d"))
    (folder / "out" / "d" / "result.json").rename(folder / "out" / "d" / ".result.unfinished.json")
    (folder / "out" / "d" / ".result.unfinished.json").write_text(json.dumps({"files": names}))
    kept = (folder / "out" / "a" / "result.json").stat().st_mtime_ns
    command = ["--model", model, "raw", "-o", "out", "--skip_existing"]
    assert main(command) == 1
    said = capsys.readouterr()
    assert "2 scan(s) done, 1 finished before, results in out" in said.out
    # A record that cannot be read may be the user's file.
    assert said.err.count("FAILED") == 1 and "c holds anomaly_map.nii.gz, overview.png, reconstruct" in said.err
    (folder / "out" / "c" / "result.json").write_bytes(whole["c/result.json"])
    assert main(command) == 0
    assert "0 scan(s) done, 4 finished before" in capsys.readouterr().out
    again = {name: (folder / "out" / name).read_bytes() for name in files(folder / "out")}
    assert set(again) == set(whole) and (folder / "out" / "a" / "result.json").stat().st_mtime_ns == kept
    for name in whole:
        if name.endswith(".nii.gz"):
            first, second = (gzip.decompress(content[name]) for content in (whole, again))
            assert first == second
    # A result without a dispersion is not finished where one is wanted.
    assert main(["--model", model, "raw/a.nii.gz", "-o", "out", "--dispersion", "2", "--skip_existing"]) == 0
    assert "1 scan(s) done, 0 finished before" in capsys.readouterr().out
    assert main(["--model", model, "raw/a.nii.gz", "-o", "out", "--dispersion", "2", "--skip_existing"]) == 0
    assert "0 scan(s) done, 1 finished before" in capsys.readouterr().out


def test_a_result_of_another_scan_of_this_name_does_not_count(place, model, monkeypatch, capsys):
    folder = place("c/a/flair.nii.gz", "c/b/flair.nii.gz", "c/b/c/a/flair.nii.gz")
    other = nib.Nifti1Image(make_volume((16, 16, 2), seed=1), np.eye(4))
    for path in ("c/b/flair.nii.gz", "c/b/c/a/flair.nii.gz"):
        nib.save(other, path)
    command = ["--model", model, "-o", str(folder / "out"), "--skip_existing", "--report", "none"]

    def finished() -> int:
        return int(re.search(r"(\d+) finished before", capsys.readouterr().out)[1])

    assert main([*command, "c/a/flair.nii.gz"]) == 0 and finished() == 0
    written = (folder / "out" / "flair" / "result.json").read_bytes()
    first = table_of(folder / "out").set_index("scan").loc["flair"]
    assert main([*command, "c/b/flair.nii.gz"]) == 1
    said = capsys.readouterr()
    assert "0 finished before" in said.out
    assert re.search(r"FAILED c/b/flair.nii.gz: .*out/flair/result.json is of other images .* `--overwrite`", said.err)
    # Also where the earlier result would not count as whole, and be replaced.
    assert main([*command, "c/b/flair.nii.gz", "--dispersion", "2"]) == 1
    # The same path means another scan from another working directory.
    monkeypatch.chdir(folder / "c" / "b")
    assert main([*command, "c/a/flair.nii.gz"]) == 1
    monkeypatch.chdir(folder)
    assert main(["--model", model, "-o", "out", "--report", "none", "c/b/flair.nii.gz"]) == 1  # FileExistsError
    assert (folder / "out" / "flair" / "result.json").read_bytes() == written
    rows = table_of(folder / "out")
    assert dict(rows.set_index("scan").loc["flair"].dropna()) == dict(first.dropna())
    failure = rows.set_index("source").loc["c/b/flair.nii.gz"]
    assert failure["status"] == "failed" and failure.isna()[["scan", "volume_score"]].all()
    capsys.readouterr()
    # One that was moved, or is named in another way, is the same.
    (folder / "c" / "a").rename(folder / "flair")
    for path in ("flair/flair.nii.gz", "flair", str(folder / "flair")):
        assert main([*command, path]) == 0 and finished() == 1
    assert table_of(folder / "out").set_index("scan").loc["flair", "source"] == str(folder / "flair")


@pytest.mark.parametrize(
    ("option", "message"), [([], "already holds a result"), (["--skip_existing"], "is of another command")]
)
def test_a_result_that_another_command_has_written_meanwhile_stays(place, model, monkeypatch, capsys, option, message):
    folder, compute = place("one/a.nii.gz", "two/a.nii.gz"), prediction.compute_scan
    command = ["--model", model, "-o", "out", *option, "--report", "none"]

    def compute_slowly(*arguments):
        monkeypatch.setattr(prediction, "compute_scan", compute)
        assert main([*command, "--seed", "1", "two/a.nii.gz"]) == 0
        written.append((folder / "out" / "a" / "result.json").read_bytes())
        return compute(*arguments)

    written = []
    monkeypatch.setattr(prediction, "compute_scan", compute_slowly)
    assert main([*command, "one/a.nii.gz"]) == 1
    assert message in capsys.readouterr().err
    assert [(folder / "out" / "a" / "result.json").read_bytes()] == written
    assert main(["--model", model, "--overwrite", "-o", "out", "one/a.nii.gz"]) == 0
    assert (folder / "out" / "a" / "result.json").read_bytes() != written[0]


def test_what_reading_computing_and_writing_raise_is_said_of_its_scan(place, model, monkeypatch, capsys):
    """The scan before it, behind it, and after it are done."""
    folder = place(*(f"raw/{name}.nii.gz" for name in "abcde"))
    original = overview.draw_overview

    def draw(output, path, title, **options):
        if title == "b":
            raise OSError(28, "No space left on device")
        original(output, path, title, **options)

    (folder / "raw" / "d.nii.gz").write_bytes(b"no scan")
    monkeypatch.setattr(overview, "draw_overview", draw)
    assert main(["--model", model, "raw", "-o", "out"]) == 1
    said = capsys.readouterr()
    assert "3 scan(s) done" in said.out
    failed = [line for line in said.err.splitlines() if line.startswith("FAILED")]
    assert [line.split(": ")[0] for line in failed] == ["FAILED raw/b.nii.gz", "FAILED raw/d.nii.gz"]
    assert failed[0].endswith("OSError: [Errno 28] No space left on device")
    assert "raw/d.nii.gz cannot be read" in failed[1]
    assert files(folder / "out", "report.html") == {f"{scan}/{name}" for scan in "ace" for name in RESULT}


@pytest.mark.parametrize(
    "device", ["foo", "cuda:7", "cuda:x", "meta", "cpu:x", "mps" if not torch.backends.mps.is_available() else "xpu"]
)
def test_a_device_that_is_not_there_is_one_line_before_the_model_is_loaded(place, monkeypatch, capsys, device):
    monkeypatch.setattr(AnomalyPipeline, "from_pretrained", None)
    assert run_script(lambda: main(["--model", "m", "scan.nii.gz", "--device", device])) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: `--device` must be one that this computer has, cpu") and f"got '{device}'" in line


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_where_there_is_none(place, capsys):
    assert run_script(lambda: main(["--model", "m", "scan.nii.gz", "--device", "cuda"])) == 1
    assert capsys.readouterr().err == "error: `--device` must be one that this computer has, cpu, got 'cuda'.\n"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "m", "--modality", "t1", "s.nii"], "`--modality` chooses a model where none is named"),
        (["--modality", "x-ray", "s.nii"], "`modality` must be one of t1, t1ce, t2, flair, "),
        (["--model", "m"], "no scan given"),
        (
            ["--model", "m", "s.nii", "--shard", "3/2"],
            "`--shard` must be NUMBER/COUNT, from 1/COUNT to COUNT/COUNT, got",
        ),
        (
            ["--model", "m", "s.nii", "--atlas_names", "n.tsv"],
            "`--atlas_names` names the regions of `--atlas`: give b",
        ),
        (["--model", "m", "s.nii", "--overwrite", "--skip_existing"], "`--overwrite` replaces results, and `--skip_e"),
        (
            ["--model", "m", "s.nii", "--mixed_precision", "int8"],
            "`mixed_precision` must be one of no, bf16, fp16, got",
        ),
        (["--model", "no/such/folder", "s.nii"], "no/such/folder cannot be loaded: There is no folder no/such/folder"),
        (
            ["--model", "m", "scan.nii.gz", "--dispersion", "1"],
            "`--dispersion` must be 0, for none, or at least 2, got 1",
        ),
    ],
)
def test_wrong_options_are_one_line(place, capsys, options, message):
    assert run_script(lambda: main(options)) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {message}")


# --- the tables and the record of a cohort


def table_of(folder, name="cohort.tsv"):
    return pandas.read_csv(folder / name, sep="\t")


def test_the_table_says_what_became_of_every_scan(place, model, capsys):
    folder = place("raw/a.nii.gz", "raw/b.nii.gz", "raw/c.nii.gz", "raw/d_seg.nii.gz")
    (folder / "raw" / "b.nii.gz").write_bytes(b"no scan")
    labels = (np.indices((16, 16, 2))[0] > 7).astype(np.int16)
    (folder / "atlas").mkdir()
    nib.save(nib.Nifti1Image(labels, np.eye(4)), folder / "atlas" / "halves.nii.gz")
    (folder / "names.tsv").write_text("index\tname\n1\tleft half\n")
    command = ["--model", model, "raw", "-o", "out", "--threshold", "0.001"]
    assert main([*command, "--atlas", "atlas/halves.nii.gz", "--atlas_names", "names.tsv"]) == 1

    frame = table_of(folder / "out")
    assert frame["scan"].fillna("").tolist() == ["a", "b", "c", ""]
    assert frame["status"].tolist() == ["done", "failed", "done", "failed"]
    assert frame["source"].tolist() == [f"raw/{name}.nii.gz" for name in ("a", "b", "c", "d_seg")]
    assert "raw/b.nii.gz cannot be read" in frame["reason"][1] and "a mask" in frame["reason"][3]
    assert set(frame["checkpoint"][[0, 2]]) == {model}
    digest = hashlib.sha256(Path(model, "model_index.json").read_bytes()).hexdigest()
    assert set(frame["revision"][[0, 2]]) == {f"sha256:{digest}"}
    for row in (0, 2):
        scan = folder / "out" / frame["scan"][row]
        record, mask = read_json(scan / "result.json"), nib.load(scan / "pred_mask.nii.gz").get_fdata() > 0
        assert frame["volume_score"][row] == pytest.approx(record["volume_score"])
        assert frame["max_slice_score"][row] == pytest.approx(max(record["pred_score"]))
        assert frame["threshold"][row] == 0.001 and frame["marked_voxels"][row] == mask.sum() > 0
        assert frame["marked_ml"][row] == pytest.approx(mask.sum() / 1000)
        assert 0 < frame["largest_component_ml"][row] <= frame["marked_ml"][row] and frame["components"][row] >= 1
        assert frame["seconds"][row] > 0 and frame["atlas"][row] == "atlas/halves.nii.gz"
    assert frame.loc[1, "checkpoint":"largest_component_ml"].isna().all()
    regions = table_of(folder / "out", "regions.tsv")
    assert (
        regions["scan"].tolist() == ["a", "a", "c", "c"] and regions["name"].tolist() == ["outside", "left half"] * 2
    )
    mask = nib.load(folder / "out" / "a" / "pred_mask.nii.gz").get_fdata() > 0
    assert regions["marked_voxels"].tolist()[:2] == [mask[:8].sum(), mask[8:].sum()]
    assert regions["region_ml"].tolist()[:2] == [0.256, 0.256]

    # The table has no values of a result: it is measured again.
    text = read_text(folder / "out" / "cohort.tsv")
    header, first, failed = text.splitlines()[:3]
    (folder / "out" / "regions.tsv").unlink()
    lines = [header, first, failed.replace("b\t", "c\t", 1), ""]
    (folder / "out" / "cohort.tsv").write_text("\n".join(lines))
    capsys.readouterr()
    assert main([*command, "--skip_existing"]) == 1
    assert "0 scan(s) done, 2 finished before" in capsys.readouterr().out
    again = table_of(folder / "out")
    assert again["status"].tolist() == ["skipped", "failed", "skipped", "failed"]
    assert again["reason"].isna().tolist() == [True, False, True, False]
    values = ["volume_score", "max_slice_score", "threshold", "marked_voxels", "marked_ml", "components"]
    pandas.testing.assert_frame_equal(again[values], frame[values])
    assert again["seconds"][0] == frame["seconds"][0] and again["checkpoint"].isna().tolist() == [
        False,
        True,
        True,
        True,
    ]
    named = ["--atlas", "atlas/halves.nii.gz", "--atlas_names", "names.tsv"]
    (folder / "names.tsv").write_text("index\tname\n1\tright half\n")
    (folder / "atlas" / "others.nii.gz").write_bytes((folder / "atlas" / "halves.nii.gz").read_bytes())
    assert main([*command, "--skip_existing", *named[:1], "atlas/others.nii.gz", *named[2:]]) == 1
    assert table_of(folder / "out", "regions.tsv")["name"].tolist() == ["outside", "right half"] * 2
    assert table_of(folder / "out")["checkpoint"].tolist()[0] == model


def test_an_atlas_on_another_grid_fails_before_anything_is_computed(place, model, capsys):
    folder = place("raw/p1/flair.nii.gz", "raw/p2/flair.nii.gz")
    for name, affine in (("p1", np.eye(4)), ("p2", np.diag([1, 1, 2, 1]))):
        nib.save(nib.Nifti1Image(np.ones((16, 16, 2), np.uint8), affine), folder / "raw" / name / "parcels.nii.gz")
    assert main(["--model", model, "raw", "-o", "out", "--atlas", "parcels.nii.gz"]) == 1
    assert "FAILED raw/p2: ValueError: The atlas raw/p2/parcels.nii.gz must lie on the grid" in capsys.readouterr().err
    assert not (folder / "out" / "p2").exists() and not (folder / "out" / "regions.tsv").exists()
    assert "nothing is measured by region, as there is no mask" in table_of(folder / "out")["warnings"][0]


def test_warnings_stand_beside_their_scan(place, model):
    folder = place("raw/b.nii.gz")
    image = nib.MGHImage(make_volume((16, 16, 2)), np.eye(4))
    image.header["goodRASFlag"] = 0
    for name in "ac":
        nib.save(image, folder / "raw" / f"{name}.mgz")
    for _ in range(2):
        with warnings.catch_warnings(record=True):
            assert main(["--model", model, "raw", "-o", "out", "--overwrite"]) == 0
        frame = table_of(folder / "out")
        for row, name in ((0, "a"), (2, "c")):
            assert frame["warnings"][row].startswith(f"raw/{name}.mgz has no usable affine")
            assert frame["warnings"][row].count("has no usable affine") == 1
        assert frame["warnings"].isna().tolist() == [False, True, False]


def test_the_record_says_how_the_results_came_about(place, model):
    folder = place("raw/a.nii.gz", "raw/b.nii.gz", "raw/c.nii.gz")
    (folder / "raw" / "b.nii.gz").write_bytes(b"no scan")
    command = ["--model", model, "raw", "-o", "out", "--inference.noise_level", "2", "--device", "cpu"]
    assert main(command) == 1
    record = read_json(folder / "out" / "run.json")
    assert record["command"] == ["anodiff", "predict", *command] and record["status"] == 1
    assert record["scans"] == {"named": 3, "done": 2, "skipped": 0, "failed": 1}
    assert record["settings"]["noise_level"] == 2 and record["options"]["inference"] == {"noise_level": 2}
    assert record["checkpoint"] == model and record["revision"].startswith("sha256:")
    assert record["hardware"]["processes"] == 1 and record["hardware"]["memory_gb"] > 0
    paths = [folder / "raw" / "a.nii.gz", folder / "raw" / "c.nii.gz"]
    sums = {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}
    assert record["inputs"]["a"] | record["inputs"]["c"] == sums and record["inputs"]["b"] == {}
    assert record["started"] < record["ended"] and str(folder) not in json.dumps(record)
    # That of an earlier command is kept.
    assert main([*command, "--skip_existing"]) == 1
    older, newer = sorted(
        (read_json(path) for path in (folder / "out").glob("run*.json")), key=lambda one: one["started"]
    )
    assert older == record and newer["scans"] == {"named": 3, "done": 0, "skipped": 2, "failed": 1}


def test_a_table_of_the_user_in_the_output_stays(place, model):
    folder = place("a.nii.gz")
    (folder / "cohort.tsv").write_text("subject\tflair\na\ta.nii.gz\n")
    with pytest.raises(FileExistsError, match="cohort.tsv is no table of this command"):
        main(["--model", model, "cohort.tsv", "-o", "."])
    assert {path.name for path in folder.iterdir()} == {"cohort.tsv", "a.nii.gz"}
    assert main(["--model", model, "cohort.tsv", "-o", "out"]) == 0
    assert table_of(folder / "out")["source"].tolist() == ["cohort.tsv, line 2"]


def test_parts_fill_one_table_and_each_has_its_status(place, model, capsys):
    folder = place(*(f"raw/{name}.nii.gz" for name in "abcde"), "raw/f_seg.nii.gz")
    (folder / "raw" / "b.nii.gz").write_bytes(b"no scan")
    command = ["--model", model, "raw", "-o", "out"]
    # a, d and what is no scan; b, e; c.
    assert [main([*command, "--shard", f"{number}/3"]) for number in (3, 1, 2)] == [0, 1, 1]
    said = capsys.readouterr()
    assert [line.split(": ")[0] for line in said.err.splitlines() if line.startswith("FAILED")] == [
        "FAILED raw/f_seg.nii.gz",
        "FAILED raw/b.nii.gz",
    ]
    frame = table_of(folder / "out")
    assert frame["scan"].fillna("").tolist() == ["a", "b", "c", "d", "e", ""]
    assert frame["status"].tolist() == ["done", "failed", "done", "done", "done", "failed"]
    assert {path.name for path in (folder / "out").glob("run*")} == {f"run_{number}-of-3.json" for number in (1, 2, 3)}
    assert not (folder / "out" / "report.html").exists()
    # A part that is started again does what is missing.
    nib.save(nib.Nifti1Image(make_volume((16, 16, 2)), np.eye(4)), folder / "raw" / "b.nii.gz")
    assert main([*command, "--shard", "2/3", "--skip_existing"]) == 0
    assert "1 scan(s) done, 1 finished before" in capsys.readouterr().out
    # In the end one command says whether all is there, and makes the page.
    assert main([*command, "--skip_existing"]) == 1
    said = capsys.readouterr()
    assert "0 scan(s) done, 5 finished before" in said.out and said.err.count("FAILED") == 1
    assert (folder / "out" / "report.html").exists()
    assert table_of(folder / "out")["status"].tolist() == ["skipped"] * 5 + ["failed"]


def test_the_revision_of_a_checkpoint_on_the_hub_is_its_commit(place, model, near_hub):
    folder = place("a.nii.gz")
    content = {
        path.relative_to(model).as_posix(): path.read_bytes() for path in Path(model).rglob("*") if path.is_file()
    }
    commit = near_hub.put("owner/tiny", content)
    assert main(["--model", "owner/tiny", "a.nii.gz", "-o", "out"]) == 0
    assert table_of(folder / "out")["revision"].tolist() == [commit]
    assert read_json(folder / "out" / "run.json")["revision"] == commit


# --- without `--model`, with checkpoints that come with the package


@pytest.fixture
def checkpoints(tmp_path_factory, monkeypatch):
    """Shipped checkpoints for FLAIR and for any contrast."""
    folder = tmp_path_factory.mktemp("shipped")
    monkeypatch.setattr(shipped, "SHIPPED", folder / "checkpoints")
    for modality in ("flair", "image"):
        make_pipeline("AnoDDPMPipeline", (modality,)).save_pretrained(folder / modality)
        given = ["--model", str(folder / modality), "--name", f"tiny-{modality}", "--purpose", "Lesions"]
        ship([*given, "--default", "true", "--output", str(folder / "checkpoints")])


@pytest.mark.parametrize(
    ("scans", "options", "model", "reason"),
    [
        (["p1_FLAIR.nii.gz"], [], "tiny-flair", "the name of the scan says flair: it is the default for flair"),
        (
            ["p1_T1w.nii.gz"],
            [],
            "tiny-image",
            "the name of the scan says t1: it takes any contrast, and none is for t1",
        ),
        (
            ["p1.nii.gz"],
            [],
            "tiny-image",
            "no name of a scan says a modality: it takes any contrast, and the modality",
        ),
        (["p1.nii.gz"], ["--modality", "FLAIR"], "tiny-flair", "`--modality` says flair: it is the default for flair"),
        (
            ["p1/flair.nii.gz", "p1/t2.nii.gz"],
            ["--modality", "t2"],
            "tiny-image",
            "`--modality` says t2: it takes any",
        ),
    ],
)
def test_without_a_model_the_one_that_fits_is_taken(
    place, checkpoints, near_hub, capsys, scans, options, model, reason
):
    folder = place(*scans)
    # A folder of the same name is not meant: nobody has named it.
    (folder / "tiny-flair").mkdir()
    assert main([scans[0].split("/")[0], "-o", "out", *options]) == 0
    assert f"Model: {model}, as {reason}" in capsys.readouterr().out
    name = scans[0].split("/")[0].removesuffix(".nii.gz")
    settings = json.loads((folder / "out" / name / "result.json").read_text())["settings"]
    assert settings["model"] == model and settings["model_chosen"].startswith(reason)
    assert files(folder / "out") == {"report.html", *(f"{name}/{file}" for file in RESULT)}
    assert near_hub.requests == []


def test_a_raw_scan_needs_neither_a_model_nor_a_mask(tmp_path, monkeypatch, near_hub, capsys):
    """The network and the brain extractor lie in the folders of other checkpoints."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(shipped, "SHIPPED", tmp_path / "checkpoints")
    torch.manual_seed(0)
    make_extractor().half().save_pretrained("trained/extractor")
    for name in ("flair", "t1"):
        settings = {"brain_mask": "given"}
        make_pipeline("AnoDDPMPipeline", (name,), processor_settings=settings).save_pretrained(f"trained/{name}")
    for name, shares in (
        ("extractor", "{}"),
        ("flair", "{brain_extractor: extractor}"),
        ("t1", "{unet: flair, brain_extractor: extractor}"),
    ):
        given = ["--model", f"trained/{name}", "--name", name, "--purpose", "Lesions", "--shares", shares]
        assert ship([*given, "--default", str(name != "extractor").lower()]) == 0
    assert {path.name for path in (tmp_path / "checkpoints" / "t1").iterdir() if path.is_dir()} == {
        *("scheduler", "processor"),
    }

    values, _, affine = make_raw_scan()
    nib.save(nib.Nifti1Image(values, affine), "raw_T1w.nii.gz")
    assert main(["raw_T1w.nii.gz", "-o", "out"]) == 0
    assert files(tmp_path / "out", "report.html") == {f"raw_T1w/{name}" for name in RESULT | {"brain_mask.nii.gz"}}
    settings = json.loads((tmp_path / "out" / "raw_T1w" / "result.json").read_text())["settings"]
    assert settings["model"] == "t1" and settings["brain"] == "extracted"
    # The same extractor, by its name.
    assert strip(["raw_T1w.nii.gz", "-o", "stripped", "--model", "extractor"]) == 0
    masks = [
        nib.load(path).get_fdata() for path in ("out/raw_T1w/brain_mask.nii.gz", "stripped/raw_T1w_brain_mask.nii.gz")
    ]
    assert masks[0].any()
    np.testing.assert_array_equal(*masks)
    # What is saved of it is whole.
    AnomalyPipeline.from_pretrained("t1").save_pretrained("whole")
    assert AnomalyPipeline.from_pretrained("whole").brain_extractor is not None
    assert near_hub.requests == []


@pytest.mark.parametrize(
    ("scans", "message"),
    [
        (["p1/flair.nii.gz", "p1/t1.nii.gz"], "The scans are of several modalities, by their names: flair (p1/flair"),
        (
            ["p1_ct.nii.gz"],
            "No checkpoint that comes with anodiff fits ct: their modalities are flair, image. Name a model",
        ),
    ],
)
def test_without_a_model_that_fits_nothing_is_done(place, checkpoints, capsys, scans, message):
    folder = place(*scans)
    assert run_script(lambda: main([scans[0].split("/")[0], "-o", "out"])) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {message}") and not (folder / "out").exists()


def test_the_name_of_a_shipped_checkpoint_is_a_model(place, checkpoints, capsys):
    folder = place("p1_T1w.nii.gz", "p2.nii.gz")
    assert main(["--model", "tiny-flair", "p1_T1w.nii.gz", "p2.nii.gz", "-o", "out"]) == 1
    said = capsys.readouterr()
    assert "Model:" not in said.out and "its name says t1, and this checkpoint needs flair" in said.err
    assert "model" not in json.loads((folder / "out" / "p2" / "result.json").read_text())["settings"]


def test_damaged_weights_are_one_line(place, model, capsys, tmp_path):
    damaged = tmp_path / "damaged"
    AnomalyPipeline.from_pretrained(model).save_pretrained(damaged)
    weights = damaged / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert run_script(lambda: main(["--model", "damaged", "scan.nii.gz"])) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: damaged cannot be loaded: ")


def test_whatever_stops_a_download_is_one_line(place, monkeypatch, capsys):
    def cut(*_, **__):
        try:
            raise ConnectionError("peer closed connection\nwithout a word")
        except ConnectionError as error:
            raise RuntimeError("Data processing error") from error

    monkeypatch.setattr(AnomalyPipeline, "from_pretrained", cut)
    assert run_script(lambda: main(["--model", "owner/m", "scan.nii.gz", "--device", "cpu"])) == 1
    assert capsys.readouterr().err == "error: owner/m cannot be loaded: Data processing error\n"
