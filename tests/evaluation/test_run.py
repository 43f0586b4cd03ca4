"""The evaluation program on pictures and on volumes, with ANDi: numbers of the draws, times, labels, protocols, what a report holds."""

import dataclasses
import functools
import json
import os
import shutil
import signal
import types

import nibabel as nib
import numpy as np
import PIL.Image
import PIL.PngImagePlugin
import pytest
import torch
from diffusers import UNet2DModel

from anodiff import ANDiPipeline, ANDiScheduler, AnomalyPipeline, VolumeProcessor
from anodiff.data.prepare import prepare
from anodiff.data.prepared import PreparedSplit, load_prepared
from anodiff.data.readers.subjects import Subject
from anodiff.data.rules import SliceRule
from anodiff.eval import main
from anodiff.evaluation import run
from anodiff.evaluation.baselines import inverted_map
from anodiff.evaluation.calibration import LabelledSlices
from anodiff.evaluation.candidates import store_values
from anodiff.evaluation.cases import Case, slice_numbers
from anodiff.evaluation.options import EvalOptions
from anodiff.evaluation.protocols import PROTOCOLS, pooled
from anodiff.evaluation.report import describe_intervals
from anodiff.evaluation.run import evaluate
from anodiff.files import lock_folder, read_json
from anodiff.hub import shipped
from anodiff.hub.model_card import PROTOCOL_FIELDS
from anodiff.hub.publishing import PublishingError
from anodiff.running import run_script
from anodiff.schedulers.draws import DRAWS_VERSION
from anodiff.ship import main as ship

from ..test_docs import find_undefined
from ..tiny import make_pipeline


SIZE = 16
PICTURES = 8
SLICES = 5
TIMESTEPS = 3


def save_model(folder):
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=SIZE,
        in_channels=1,
        out_channels=1,
        block_out_channels=(4, 8),
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
    )
    pipe = ANDiPipeline(unet, ANDiScheduler(50), make_processor(), start=2, stop=2 + TIMESTEPS, median_size=3)
    pipe.save_pretrained(folder)
    return str(folder)


def make_processor():
    return VolumeProcessor(
        modalities=("image",), size=(SIZE, SIZE), intensity="given", value_range=(-1, 1), brain_mask="none"
    )


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Sets `pictures`, all the same picture, and `volumes`, with lesions in some slices, and a checkpoint `model`."""
    folder = tmp_path_factory.mktemp("evaluation")
    random = np.random.default_rng(0)
    picture = random.integers(50, 200, (SIZE, SIZE)).astype(np.uint8)
    pictures, volumes = [], []
    for split in ("validation", "test"):
        for number in range(PICTURES):
            path = folder / f"{split}{number}.png"
            PIL.Image.fromarray(picture).save(path)
            pictures.append(Subject(path.stem, {"image": path}, label=number % 2, split=split))
        for number in range(2):
            files = {name: folder / f"{split}{number}_{name}.nii.gz" for name in ("image", "mask")}
            mask = np.zeros((SIZE, SIZE, SLICES), np.uint8)
            mask[4:9, 5:10, 1 + number :: 2] = 1
            image = random.uniform(0.2, 0.6, mask.shape).astype(np.float32) + 0.4 * mask
            for name, array in (("image", image), ("mask", mask)):
                nib.save(nib.Nifti1Image(array, np.eye(4)), files[name])
            volumes.append(Subject(f"{split}{number}", {"image": files["image"]}, (files["mask"],), split=split))
    for name, subjects in (("pictures", pictures), ("volumes", volumes)):
        rule = SliceRule(min_brain=0.0)
        prepare(subjects, make_processor(), folder / name, recipe={}, slices=rule, progress=False)
    save_model(folder / "model")
    return folder


def options(place, data, out, **others):
    return EvalOptions(model=[str(place / "model")], data=str(place / data), output_dir=str(place / out), **others)


def load_cases(folder):
    return [Case.load(path) for path in sorted(folder.glob("*.npz"))]


def test_models_are_scored_with_some_of_their_modalities(tmp_path):
    random = np.random.default_rng(0)
    mask = np.zeros((SIZE, SIZE, SLICES), np.uint8)
    mask[4:9, 5:10, 1:4] = 1
    files = {name: tmp_path / f"{name}.nii.gz" for name in ("t1", "flair", "mask")}
    for name, array in (("t1", mask + 0.1), ("flair", random.uniform(0.2, 0.6, mask.shape)), ("mask", mask)):
        nib.save(nib.Nifti1Image(array.astype(np.float32 if name != "mask" else np.uint8), np.eye(4)), files[name])
    images = {name: files[name] for name in ("t1", "flair")}
    subjects = [Subject(split, images, (files["mask"],), split=split) for split in ("validation", "test")]
    pipe = make_pipeline(
        "ANDiPipeline",
        ("t1", "flair"),
        processor_settings={"brain_mask": "none"},
        **{"stop": 77, "optional_modalities": ["t1"]},
    )
    pipe.save_pretrained(tmp_path / "model")
    prepare(subjects, pipe.processor, tmp_path / "data", recipe={}, slices=SliceRule(min_brain=0.0), progress=False)
    given = ["--model", str(tmp_path / "model"), "--data", str(tmp_path / "data"), "--report", "none", "--keep_maps"]
    given += ["true", "--baselines", "false", "--output_dir"]
    main([*given, str(tmp_path / "flair"), "--inference.present_modalities", "[flair]"])
    (row,) = read_json(tmp_path / "flair" / "report.json")["results"]
    assert row["settings"]["present_modalities"] == ["flair"]
    (case,) = load_cases(tmp_path / "flair" / "maps" / "00" / "test")
    expected = pipe({"flair": files["flair"]}).anomaly_map
    np.testing.assert_allclose(case.maps, pipe.processor.preprocess(images).geometry.to_network(expected), atol=1e-6)
    with pytest.raises(ValueError, match="`present_modalities` must hold flair, which this checkpoint does not do"):
        main([*given, str(tmp_path / "t1"), "--inference.present_modalities", "[t1]"])


def test_every_picture_has_noise_of_its_own(place):
    split = load_prepared(place / "pictures", "test")
    numbers = [int(slice_numbers(split, name, split.slices[split.subject_rows(name)])[0]) for name in split.subjects]
    assert split.slices.tolist() == [0] * PICTURES and numbers == list(range(PICTURES))
    # Calibration has the same numbers.
    assert [item["slice"].tolist() for item in LabelledSlices(split)] == [[number] for number in numbers]

    report = evaluate(options(place, "pictures", "out-pictures", keep_maps=True, batch_size=3))
    # One picture, eight maps: each as in a call with all of them.
    cases = load_cases(place / "out-pictures" / "maps" / "00" / "test")
    assert len({case.maps.tobytes() for case in cases}) == PICTURES
    pipe = AnomalyPipeline.from_pretrained(place / "model")
    pipe.set_progress_bar_config(disable=True)
    images = torch.from_numpy(np.concatenate([split.read_subject(name)["image"] for name in split.subjects]))
    brain = torch.ones(PICTURES, SIZE, SIZE, dtype=torch.bool)
    expected = pipe.map_slices(images, brain, range(PICTURES), volumes=[1] * PICTURES).maps.numpy()
    for case, maps in zip(cases, expected, strict=True):
        np.testing.assert_allclose(case.maps[0], maps, rtol=0, atol=1e-5 * expected.max())
    assert report["results"][0]["metrics"]["dice_oracle"] is None  # there are no masks


@pytest.fixture(scope="module")
def volumes_report(place):
    return evaluate(options(place, "volumes", "out-volumes", keep_maps=True))


def test_a_checkpoint_of_the_package_is_evaluated_by_its_name_and_shipped_with_the_report(
    place, volumes_report, monkeypatch, near_hub
):
    monkeypatch.setattr(shipped, "SHIPPED", place / "checkpoints")
    given = ["--model", str(place / "model"), "--name", "tiny", "--purpose", "Lesions"]
    threshold = f"{place / 'out-volumes' / 'report.json'}"
    ship([*given, "--output", str(place / "checkpoints"), "--synthetic", threshold])
    report = evaluate(
        EvalOptions(model=["tiny"], data=str(place / "volumes"), output_dir=str(place / "out-tiny"), baselines=False)
    )
    (row,) = report["results"]
    assert row["model"] == "tiny" and row["commit"] is None and near_hub.requests == []
    expected = volumes_report["results"][0]["metrics"]
    assert AnomalyPipeline.from_pretrained("tiny").config.threshold == pytest.approx(expected["threshold_healthy"])
    assert row["metrics"]["voxel_auroc"] == pytest.approx(expected["voxel_auroc"], abs=0.02)
    reports = f"[{place / 'out-tiny' / 'report.json'}]"
    ship([*given, "--output", str(place / "checkpoints"), "--synthetic", threshold, "--reports", reports])
    record = shipped.list_shipped()["tiny"]
    ends = [row["metrics"][f"voxel_average_precision{end}"] for end in ("", "_low", "_high")]
    assert record["figures"][0]["rows"][shipped.THIS]["AP"] == ends and None not in ends
    assert record["thresholds"]["synthetic"]["policy"] == "0.05 of the voxels of healthy validation slices"
    with pytest.raises(ValueError, match="`set_threshold` needs checkpoint folders, got tiny"):
        evaluate(EvalOptions(model=["tiny"], data=str(place / "volumes"), set_threshold="healthy"))


def test_slices_of_a_volume_are_numbered_as_in_a_call(place, volumes_report):
    pipe = AnomalyPipeline.from_pretrained(place / "model")
    pipe.set_progress_bar_config(disable=True)
    cases = load_cases(place / "out-volumes" / "maps" / "00" / "test")
    assert len(cases) == 2
    for case in cases:
        called = pipe(nib.load(place / f"{case.subject}_image.nii.gz"))
        images = pipe.processor.preprocess(nib.load(place / f"{case.subject}_image.nii.gz")).slices
        expected = pipe(images).anomaly_map.numpy()
        np.testing.assert_allclose(case.maps, expected, rtol=0, atol=1e-5 * expected.max())
        assert called.volume_score == pytest.approx(case.volume_score, rel=1e-4)


def test_weighted_maps_are_those_of_a_call_and_baselines_have_none(place, volumes_report):
    weights = {"sign": "brighter", "weighting": "intensity"}
    report = evaluate(options(place, "volumes", "out-weights", keep_maps=True, **weights))
    pipe = AnomalyPipeline.from_pretrained(place / "model", **weights)
    pipe.set_progress_bar_config(disable=True)
    for case in load_cases(place / "out-weights" / "maps" / "00" / "test"):
        images = pipe.processor.preprocess(nib.load(place / f"{case.subject}_image.nii.gz")).slices
        expected = pipe(images).anomaly_map.numpy()
        assert (expected == 0).any() and (expected > 0).any()
        np.testing.assert_allclose(case.maps, expected, rtol=0, atol=1e-5 * expected.max())
    rows = report["results"]
    assert weights.items() <= rows[0]["settings"].items()
    assert rows[1]["name"] == "intensity of image" and rows[1]["settings"]["weighting"] == "none"
    assert rows[1]["metrics"] == volumes_report["results"][1]["metrics"]


def test_report(place, volumes_report):
    assert volumes_report["draws"] == DRAWS_VERSION and "task" not in volumes_report
    assert set(volumes_report["protocol"]) == set(PROTOCOL_FIELDS) and all(volumes_report["protocol"].values())
    assert "healthy: 0.05 of the voxels" in volumes_report["protocol"]["threshold_policy"]
    row = volumes_report["results"][0]
    for name in ("dice", "volume_dice", "lesion_f1"):
        assert all(0 <= row["metrics"][f"{name}_{policy}"] <= 1 for policy in ("oracle", "validation", "yen"))
    assert volumes_report["intervals"].startswith("95 %, percentiles of 2000 bootstrap samples of the 2 subjects;")
    for name in ("voxel_average_precision", "voxel_auroc", "dice_healthy", "volume_dice_yen", "slice_auroc"):
        ends = [row["metrics"][f"{name}{end}"] for end in ("_low", "", "_high")]
        assert ends == sorted(ends) and ends[0] < ends[2], name
    rows = {row["name"]: row["metrics"] for row in volumes_report["results"]}
    assert rows["intensity of image"]["voxel_auroc"] > 0.8 and rows["inverted intensity of image"]["voxel_auroc"] < 0.2
    assert rows["mean intensity"]["slice_auroc_low"] <= rows["mean intensity"]["slice_auroc"]
    text = (place / "out-volumes" / "report.md").read_text()
    plain = rows["intensity of image"]
    ends = "({voxel_average_precision_low:.2f} to {voxel_average_precision_high:.2f})".format(**plain)
    assert f"| intensity of image | {plain['voxel_average_precision']:.3f} {ends} |" in text
    assert f"Intervals in brackets: {volumes_report['intervals']}.\n" in text
    assert f"draws {DRAWS_VERSION}" in (place / "out-volumes" / "report.md").read_text()


def test_the_page_of_a_report_opens_with_its_cases(place, volumes_report):
    """In a real browser, from a file: no complaint, no request but for itself, every row and the chosen cases."""
    from playwright import sync_api

    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("no Chromium is installed")
    path = place / "out-volumes" / "report.html"
    complaints, requests = [], []
    arguments = ["--no-sandbox", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"]
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=arguments)
        page = browser.new_page()
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(path.as_uri())
        page.wait_for_selector("body[data-shown]", timeout=60_000)
        names = page.locator("table").filter(has_text="AP (voxels)").first.locator("tbody tr").all_inner_texts()
        shown = page.locator("article.scan h2").all_inner_texts()
        browser.close()
    assert complaints == [] and [url for url in requests if not url.startswith(("blob:", "data:"))] == [path.as_uri()]
    assert all(f">{title}<" in path.read_text() for title in ("Results", "Figures", "Protocol and settings"))
    expected = [row["name"] for row in volumes_report["results"] if row["kind"] != "statistic"]
    assert [name.split("\t")[0].strip() for name in names][: len(expected)] == expected
    masked = {one["subject"] for one in volumes_report["results"][0]["subjects"] if "dice_validation" in one}
    assert shown and set(shown) <= masked
    assert str(place) not in path.read_text()


def test_no_page_where_none_is_wanted(place):
    evaluate(options(place, "volumes", "out-pageless", baselines=False, report="none"))
    assert not (place / "out-pageless" / "report.html").exists()
    with pytest.raises(ValueError, match="`report` must be one of html, none, got 'pdf'"):
        evaluate(options(place, "volumes", "out-pdf", report="pdf"))


def test_merged_evaluations_are_that_of_all(place, volumes_report, tmp_path):
    """What was computed before is scored beside the rest as if it were computed now, and stays where it lies."""
    earlier = place / "out-volumes"
    before = contents(earlier)

    def merging(folder, out, **others):
        return EvalOptions(data=str(place / "volumes"), output_dir=str(place / out), merge=[str(folder)], **others)

    assert evaluate(merging(earlier, "out-merged")) == volumes_report
    assert contents(earlier) == before and not (place / "out-merged" / "maps").exists()
    with pytest.raises(
        ValueError, match=r"`merge`: .*out-volumes is of \{'seed': 0.*, this evaluation of \{'seed': 1"
    ):
        evaluate(merging(earlier, "out-wrong", seed=1))
    (maps := tmp_path / "none").mkdir()
    shutil.copy(earlier / "report.json", maps)
    with pytest.raises(FileNotFoundError, match="has no maps of .*evaluate there with --keep_maps"):
        evaluate(merging(maps, "out-lacking"))


@pytest.mark.parametrize("name", ["brain", "mask", "labels", "group", "slices"])
@pytest.mark.parametrize("part", ["test", "validation"])
def test_an_evaluation_of_other_data_of_the_same_name_is_not_merged(place, volumes_report, tmp_path, part, name):
    """Methods would be compared against different references; said before a model is computed."""
    shutil.copytree(place / "out-volumes", tmp_path / "earlier")
    folder = tmp_path / "earlier" / "maps" / "00" / part
    case = Case.load(folder / f"{part}1.npz")
    changed = {
        "brain": {"brain": ~case.brain},
        "mask": {"mask": None},
        "labels": {"labels": 1 - case.labels},
        "group": {"group": "other"},
        "slices": {key: getattr(case, key)[1:] for key in ("maps", "brain", "mask", "labels", "slice_scores")},
    }
    dataclasses.replace(case, **changed[name]).save(folder)
    said = "brain, mask, labels" if name == "slices" else name
    with pytest.raises(
        ValueError, match=rf"`merge`: in .*earlier/maps/00 {said} of the subject {part}1 \({part}\) dif"
    ):
        evaluate(options(place, "volumes", tmp_path / "out", merge=[str(tmp_path / "earlier")]))
    assert not (tmp_path / "out").exists()


def test_an_evaluation_of_the_protocol_is_merged_and_no_other(place, volumes_report):
    """Where it needs what other protocols do not store."""
    for name in ("anofpdm", "sadm"):
        computed = options(place, "volumes", f"out-merged-{name}", protocol=name, keep_maps=True, report="none")
        merging = dataclasses.replace(computed, model=[], keep_maps=False)
        with pytest.raises(ValueError, match=f"out-volumes was evaluated without `--protocol {name}`: evaluate it ag"):
            merged, out = [str(place / "out-volumes")], str(place / "out-refused")
            evaluate(dataclasses.replace(computed, merge=merged, output_dir=out))
        assert not (place / "out-refused").exists()
        again = dataclasses.replace(
            merging, merge=[computed.output_dir], output_dir=str(place / f"out-merged-{name}-again")
        )
        assert evaluate(computed) == evaluate(again)
    # A protocol that needs nothing more takes any.
    merged, out = [str(place / "out-merged-anofpdm")], str(place / "out-merged-andi")
    row = evaluate(dataclasses.replace(merging, protocol="andi", merge=merged, output_dir=out))["results"][0]
    assert row["metrics"]["andi_average_precision"] is not None


def test_every_metric_is_defined_and_the_report_can_be_read(place, volumes_report):
    for row in volumes_report["results"]:
        assert not find_undefined(row["metrics"], "metrics.md"), row["name"]
    odd = ["dice_best", "froc_recall_0.125_low", "ged_middle"]
    assert find_undefined(odd, "metrics.md") == ["dice_best", "ged_middle"]
    text = (place / "out-volumes" / "report.md").read_text()
    lines = text.splitlines()
    assert max(len(line) for line in lines if not line.startswith("|")) <= 300
    # Every row of a table has as many cells as its head.
    for above, line in zip(lines, lines[1:], strict=False):
        if above.startswith("|") and line.startswith("|"):
            assert above.count("|") == line.count("|"), line
    assert "## The best model against the others" in text and "## Lesions and surfaces" in text
    plain, inverted = (row for row in volumes_report["results"] if row["name"].endswith("intensity of image"))
    shared, own = volumes_report["protocol"]["postprocessing"].split("; ", 1)
    assert shared.startswith("every row: median_size 3, ") and own.startswith("ANDi (model): ")
    for name, value in plain["settings"].items():
        assert inverted["settings"][name] == value and f"{name} {value}" in shared, name


def test_models_are_compared_with_every_row_of_maps(volumes_report):
    comparisons, rows = volumes_report["comparisons"], volumes_report["results"]
    of_precision = [one for one in comparisons if one["metric"] == "voxel_average_precision"]
    assert [one["rows"] for one in of_precision] == [[0, number] for number in (1, 2, 3)]
    dices = {f"dice_{policy}" for policy in ("oracle", "validation", "healthy", "yen")}
    assert {one["metric"] for one in comparisons} == {"voxel_average_precision", "slice_auroc", *dices}
    for one in comparisons:
        first, second = (rows[number] for number in one["rows"])
        assert (one["first"], one["second"]) == (first["name"], second["name"]) and one["low"] <= one["high"]
        assert one["difference"] == first["metrics"][one["metric"]] - second["metrics"][one["metric"]]
        assert 0.5 <= one["p"] <= one["p_holm"] <= 1  # two subjects can show nothing


def test_strata_of_an_evaluation(place):
    report = evaluate(options(place, "volumes", "out-strata", strata=["size", "rows"]))
    (plain,) = (row for row in report["results"] if row["name"] == "intensity of image")
    # 25 voxels of 1 mm in each of two slices.
    (small,) = plain["strata"]["size"]
    assert (small["stratum"], small["subjects"], small["few"]) == ("< 1 ml", 2, True)
    for name, value in small["metrics"].items():
        assert value == plain["metrics"][name], name
    assert "strata" not in report["results"][-1]  # a statistic
    text = (place / "out-strata" / "report.md").read_text()
    assert "| < 1 ml | ANDi (model) | 2 (few) |" in text and "## By rows" in text
    with pytest.raises(ValueError, match="`strata` must be of size, contrast, split, .*, got scanner"):
        evaluate(options(place, "volumes", "out-no-strata", strata=["scanner"]))
    assert not (place / "out-no-strata").exists()


def test_seconds_per_slice(place, monkeypatch):
    """From slices to filtered maps: what a network and a filter take, nothing of what reading, saving and scoring take."""
    clock = [0.0]

    def taking(seconds, owner, name):
        function = getattr(owner, name)

        def slow(*arguments, **named):
            clock[0] += seconds
            return function(*arguments, **named)

        monkeypatch.setattr(owner, name, slow)

    monkeypatch.setattr(run, "time", types.SimpleNamespace(perf_counter=lambda: clock[0]))
    taking(2.0, UNet2DModel, "forward")
    taking(10.0, AnomalyPipeline, "filter_maps")
    for owner, name in ((PreparedSplit, "read_subject"), (Case, "save"), (pooled, "score")):
        taking(1000.0, owner, name)
    report = evaluate(options(place, "volumes", "out-seconds", batch_size=1, baselines=False))
    # Each subject is a batch of its own: SLICES slices of TIMESTEPS evaluations, and one filter.
    assert clock[0] > 1000
    assert report["results"][0]["seconds_per_slice"] == pytest.approx(TIMESTEPS * 2.0 + 10.0 / SLICES)


@pytest.mark.parametrize(
    ("fast", "mixed_precision", "expected"),
    [
        (False, None, None),
        (True, None, {"mixed_precision": "no", "channels_last": True, "compile": False}),
        (False, "bf16", {"mixed_precision": "bf16", "channels_last": False, "compile": False}),
    ],
)
def test_what_is_fast_is_recorded(place, fast, mixed_precision, expected):
    out = f"out-fast-{fast}-{mixed_precision}"
    chosen = options(place, "volumes", out, baselines=False, fast=fast, mixed_precision=mixed_precision)
    (row,) = evaluate(chosen)["results"]
    assert row.get("fast") == expected and row["metrics"]["voxel_average_precision"] is not None


def test_seconds_of_several_processes_are_added_up(place, monkeypatch):
    monkeypatch.setattr(run, "gather_object", lambda own: [(3.0, 10), (1.0, 20), (2.0, 10)])
    report = evaluate(options(place, "volumes", "out-processes", baselines=False))
    assert report["results"][0]["seconds_per_slice"] == pytest.approx(6 / 40)


def test_a_map_that_is_not_finite_is_named(place, monkeypatch):
    compute_maps = ANDiPipeline.compute_maps

    @functools.wraps(compute_maps)
    def damaged(*arguments, **named):
        results = compute_maps(*arguments, **named)
        return results._replace(maps=results.maps * float("nan"))

    monkeypatch.setattr(ANDiPipeline, "compute_maps", damaged)
    with pytest.raises(ValueError, match=r"model, test, subject\(s\) test0, test1: The network gave NaN"):
        evaluate(options(place, "volumes", "out-nan", baselines=False))


def test_unknown_labels_are_not_healthy(tmp_path):
    """Slices that nobody has looked at take part in no threshold and no AUROC, and make no subject healthy."""
    random = np.random.default_rng(0)
    files = {"validation": [], "test": []}
    labels = {"healthy": [0, 0], "partly": [0, -1], "unknown": [-1, -1], "ill": [1, -1]}
    for split, paths in files.items():
        for name, values in labels.items():
            maps = random.uniform(0, 1, (2, 8, 8)).astype(np.float32)
            maps[np.array(values) == -1] += 10
            brain = np.ones(maps.shape, bool)
            case = Case(name, maps, brain, None, np.array(values), maps.mean((1, 2)), float(maps.mean()))
            case.save(tmp_path / split)
            paths.append(tmp_path / split / f"{name}.npz")
    row = {"name": "any", "settings": {"min_component_size": 0}}
    metrics, records, *_ = pooled.score(row, files, None, EvalOptions(healthy_fpr=0.0))
    assert {record["subject"]: record["label"] for record in records} == {
        "healthy": 0,
        "partly": -1,
        "unknown": -1,
        "ill": 1,
    }
    assert metrics["threshold_healthy"] < 1
    assert metrics["subject_auroc"] == 1.0  # the healthy one against the ill one
    assert 0 <= metrics["slice_auroc"] <= 1
    values = np.array([1.0, 2.0, 9.0, 1.5]), np.array([0, 1, -1, 1]), np.array(["a", "a", "a", "b"])
    statistic = pooled.score_statistic(values, None)
    assert statistic["slice_auroc"] == statistic["slice_auroc_low"] == statistic["slice_auroc_high"] == 1.0


@pytest.mark.parametrize(("groups", "expected"), [("ab", True), ("aa", False), ("a", False)])
def test_visits_of_one_patient_and_one_subject_alone_have_no_interval(tmp_path, groups, expected):
    files = []
    for number, group in enumerate(groups):
        maps = np.random.default_rng(number).uniform(0, 1, (2, 8, 8)).astype(np.float32)
        mask = np.zeros(maps.shape, bool)
        mask[0, 2:5, 2 : 5 + number] = True
        maps[mask] += 0.3
        scores = maps.mean((1, 2)), float(maps.mean())
        Case(f"visit{number}", maps, maps > 0.1, mask, np.array([1, 0]), *scores, group).save(tmp_path)
        files.append(tmp_path / f"visit{number}.npz")
    row = {"name": "any", "settings": {"min_component_size": 0}}
    found = {"test": files, "validation": files}
    for name in ("pooled", "andi", "uad_imag"):
        metrics = PROTOCOLS[name].score(row, found, None, EvalOptions()).metrics
        ends = {key: value for key, value in metrics.items() if key.endswith(("_low", "_high"))}
        dices = [value for key, value in ends.items() if "dice" in key]
        assert len(dices) >= 4 and all((value is not None) == expected for value in dices), name
        assert {key.rpartition("_")[0] for key in ends} <= set(metrics)
    assert describe_intervals(len(groups), len(set(groups))).startswith("95 %" if expected else "none: one ")


def test_inverted_intensity_is_high_where_the_brain_is_dark():
    image = np.array([[[[-1.0, 0.0, 1.0, 1.5], [-1.0, -0.5, 0.5, -1.2]]]], np.float32)
    brain = np.array([[[False, True, True, True], [True, True, True, True]]])
    expected = [[[0.0, 0.5, 0.0, 0.0], [1.0, 0.75, 0.25, 1.1]]]
    np.testing.assert_allclose(inverted_map(image, brain, 0, (-1.0, 1.0)), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", PROTOCOLS)
def test_contract_of_the_protocols(name):
    protocol = PROTOCOLS[name]
    assert set(protocol.TEXT) <= set(PROTOCOL_FIELDS) and all(protocol.COLUMNS.values())
    assert protocol.TASK in run.KINDS and (protocol.SWEEP is None or len(protocol.SWEEP) in (0, 3))
    own = run.KINDS[protocol.TASK].OWN_PROTOCOL
    assert protocol is own or not set(protocol.COLUMNS) & set(own.COLUMNS)


@pytest.mark.parametrize("name", [name for name, protocol in PROTOCOLS.items() if protocol.TASK == pooled.TASK])
def test_protocols_score_the_same_maps(place, volumes_report, name):
    report = evaluate(options(place, "volumes", f"out-{name}", protocol=name))
    columns = PROTOCOLS[name].COLUMNS
    own = [row for row in report["results"] if row["kind"] == "pipeline"]
    theirs = [row for row in volumes_report["results"] if row["kind"] == "pipeline"]
    for one, other in zip(own, theirs, strict=True):
        assert {key: one["metrics"][key] for key in other["metrics"]} == other["metrics"]
        # Of a method that reconstructs nothing and has no masks of its own, what needs them is not there.
        measured = {column for column in columns if one["metrics"].get(column) is not None}
        assert measured, name
    assert not find_undefined(own[0]["metrics"], "metrics.md", "training_and_evaluation.md")
    assert not find_undefined(own[0]["metrics"], "metrics.md", "training_and_evaluation.md")
    text = (place / f"out-{name}" / "report.md").read_text()
    assert all(title in text for column, title in columns.items() if column in own[0]["metrics"])
    assert json.loads((place / f"out-{name}" / "report.json").read_text()) == report
    assert (place / f"out-{name}" / "cases.png").stat().st_size > 10_000 and not (
        place / f"out-{name}" / "maps"
    ).exists()


# What an evaluation leaves, and what it leaves alone


DONE = {".run.lock", "cases.png", "report.json", "report.html", "report.md"}


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", ["maps", "results", "card"])
def test_a_folder_of_the_user_stays(place, tmp_path, name):
    (tmp_path / name / "00" / "test").mkdir(parents=True)
    (tmp_path / name / "00" / "test" / "mine.npz").write_bytes(b"mine")
    evaluate(options(place, "volumes", tmp_path, baselines=False))
    assert (tmp_path / name / "00" / "test" / "mine.npz").read_bytes() == b"mine"
    assert {path.name for path in tmp_path.iterdir()} == DONE | {name}


@pytest.mark.parametrize(
    ("name", "others"),
    [
        ("cases.png", {}),
        ("reliability.png", {}),
        ("report.md", {}),
        ("report.html", {}),
        (".cases", {}),
        ("maps", {"keep_maps": True}),
        ("card", {"push_to_hub": "owner/tiny"}),
        ("former-card.md", {"push_to_hub": "owner/tiny"}),
    ],
)
def test_what_would_be_replaced_is_named_before_the_work(place, tmp_path, name, others):
    (tmp_path / name).write_text("mine")
    with pytest.raises(FileExistsError, match=rf"holds {name} already"):
        evaluate(options(place, "volumes", tmp_path, **others))
    assert contents(tmp_path) == {name: b"mine"}


def test_a_report_is_not_replaced_whole_or_torn(place, tmp_path):
    (tmp_path / "report.json").write_text("{}")
    with pytest.raises(FileExistsError, match="already holds a report"):
        evaluate(options(place, "volumes", tmp_path))
    (tmp_path / "report.json").write_text('{"results": [')
    with pytest.raises(FileExistsError, match="report.json is no whole report: .* Remove it"):
        evaluate(options(place, "volumes", tmp_path))
    assert contents(tmp_path) == {"report.json": b'{"results": ['}


@pytest.mark.parametrize("where", ["load_pipeline", "write_text", "os.rename", "store_values", "read_json"])
def test_the_same_command_again_after_a_stop(place, tmp_path, monkeypatch, capsys, where):
    """At the first map, after the pictures, among the last files, and while the threshold is stored."""
    shutil.copytree(place / "model", tmp_path / "model")
    own = options(place, "volumes", tmp_path / "out", keep_maps=True, baselines=False, set_threshold="validation")
    own.model = [str(tmp_path / "model")]
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")

    def stop(*_, **__):
        os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        if where == "read_json":  # at the very end: this one is finished
            patch.setattr(run, "read_json", stop)
        elif where == "os.rename":
            patch.setattr(os, "rename", stop)
        else:
            patch.setattr(run, where, stop)
        assert run_script(lambda: evaluate(own)) == 128 + signal.SIGTERM
    assert capsys.readouterr().err.splitlines()[-1].startswith("stopped by SIGTERM: what is finished is kept")
    assert (tmp_path / "out" / "report.json").exists() == (where == "read_json")
    if where == "read_json":
        assert json.loads((tmp_path / "out" / "report.json").read_text())["results"]
    else:
        report = evaluate(own)
        index = json.loads((tmp_path / "model" / "model_index.json").read_text())
        assert index["threshold"] == report["results"][0]["metrics"]["threshold_validation"]
    assert {path.name for path in (tmp_path / "out").iterdir()} == DONE | {"maps", "mine.txt"}
    assert AnomalyPipeline.from_pretrained(tmp_path / "model").config.threshold is not None


def test_a_record_removes_nothing_elsewhere(place, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "mine.txt").write_text("mine")
    (tmp_path / "out" / ".evaluation.json").write_text('["../mine.txt", "mine", ".cases", "report.md"]')
    (tmp_path / "out" / "mine").mkdir()
    evaluate(options(place, "volumes", tmp_path / "out", baselines=False))
    assert (tmp_path / "mine.txt").read_text() == "mine"
    assert {path.name for path in (tmp_path / "out").iterdir()} == DONE | {"mine"}


def test_two_evaluations_do_not_share_a_folder(place, tmp_path):
    with lock_folder(tmp_path), pytest.raises(BlockingIOError, match=f"is in use by process {os.getpid()} on"):
        evaluate(options(place, "volumes", tmp_path))
    assert not (tmp_path / ".cases").exists()


def test_a_threshold_that_does_not_exist_leaves_the_report(place, tmp_path):
    shutil.copytree(place / "model", tmp_path / "model")
    own = options(place, "pictures", tmp_path / "out", baselines=False, set_threshold="validation")
    own.model = [str(tmp_path / "model")]
    before = contents(tmp_path / "model")
    with pytest.raises(ValueError, match="does not allow the policy validation; none was stored for ANDi"):
        evaluate(own)
    assert contents(tmp_path / "model") == before and (tmp_path / "out" / "report.json").exists()


@pytest.mark.parametrize("subject", ["../../x", "/tmp/x", "a/../../x", "a\\..\\x", "x\n", "", "x" * 300])
def test_the_name_of_a_subject_is_no_path(tmp_path, subject):
    maps = np.zeros((1, 4, 4), np.float32)
    case = Case(subject, maps, maps > 0, None, np.array([0]), maps.mean((1, 2)), 0.0)
    with pytest.raises(ValueError, match="The name of a subject must be one that a file can have"):
        case.save(tmp_path / "in")
    assert list(tmp_path.iterdir()) == []


def test_the_name_of_a_modality_is_no_path(place, tmp_path, monkeypatch):
    def load(*arguments):
        split = load_prepared(*arguments)
        split.processor_settings["modalities"] = ["x/../../../x"]
        return split

    monkeypatch.setattr(run, "load_prepared", load)
    own = options(place, "volumes", tmp_path / "a" / "out")
    own.model = []
    with pytest.raises(ValueError, match="The name of a row of"):
        evaluate(own)
    assert [path.name for path in tmp_path.iterdir()] == ["a"] and len(list((tmp_path / "a").iterdir())) == 1


@pytest.mark.parametrize("content", ["a:\tb", "[]", "", "slices: {train: no such rule}"])
def test_a_recipe_that_is_none_is_named(place, tmp_path, content):
    shutil.copytree(place / "model", tmp_path / "model")
    (tmp_path / "model" / "recipe.yaml").write_text(content)
    own = options(place, "volumes", tmp_path / "out")
    own.model = [str(tmp_path / "model")]
    with pytest.raises(ValueError, match="recipe.yaml of .* is not that of a prepared data set"):
        evaluate(own)


def test_values_are_stored_whole_or_not_at_all(tmp_path, monkeypatch):
    (tmp_path / "model_index.json").write_text('{"threshold": 1}')
    (tmp_path / "README.md").write_text("| `threshold` | 1 |\nMüller\n", encoding="utf-8")
    before = contents(tmp_path)

    def fail(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        with pytest.raises(OSError, match="No space"):
            store_values(tmp_path, {"threshold": 2})
    assert contents(tmp_path) == before
    store_values(tmp_path, {"threshold": 2})
    assert json.loads((tmp_path / "model_index.json").read_text()) == {"threshold": 2}
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == "| `threshold` | 2 |\nMüller\n"


# What is published


@pytest.mark.parametrize("model", [".", "pipeline", "{}", "../run/pipeline"])
def test_models_are_named_without_their_folders(place, tmp_path, monkeypatch, model):
    folder = tmp_path / "run" / "pipeline"
    shutil.copytree(place / "model", folder)
    monkeypatch.chdir(folder if model == "." else folder.parent)
    own = options(place, "volumes", tmp_path / "out", baselines=False)
    own.model, own.data = [model.format(folder)], os.path.relpath(place / "volumes")
    report = evaluate(own)
    [row] = report["results"]
    assert (row["name"], row["model"], report["data"]["name"]) == ("ANDi (run)", "run", "volumes")
    assert not [name for name, text in contents(tmp_path / "out").items() if str(tmp_path).encode() in text]


CARD = "---\nlicense: mit\n---\n\n# Written by hand\n"


def test_nothing_of_this_machine_is_pushed(place, near_hub, tmp_path):
    pipe = AnomalyPipeline.from_pretrained(place / "model")
    pipe.save_pretrained(tmp_path / "secret" / "model")
    picture = tmp_path / "secret" / "mine.png"
    text = PIL.PngImagePlugin.PngInfo()
    text.add_text("Comment", str(tmp_path))
    PIL.Image.new("L", (4, 4)).save(picture, pnginfo=text)
    own = options(place, "volumes", tmp_path / "secret" / "out", push_to_hub="owner/tiny", hub_picture=str(picture))
    own.model = [str(tmp_path / "secret" / "model")]
    report = evaluate(own)
    pushed = near_hub.files("owner/tiny")
    assert "evaluation-volumes-test.png" in pushed and "### volumes, split `test`" in pushed["README.md"].decode()
    for files in (pushed, contents(tmp_path / "secret" / "out"), contents(tmp_path / "secret" / "model")):
        assert not [name for name, content in files.items() if str(tmp_path).encode() in content]
    assert str(tmp_path) not in json.dumps(report) and not any(name.startswith(".run") for name in pushed)


def test_a_picture_that_is_none_is_named_before_the_work(place, near_hub, tmp_path):
    (tmp_path / "mine.png").write_bytes(b"a picture")
    with pytest.raises(ValueError, match="mine.png is no picture"):
        evaluate(
            options(
                place, "volumes", tmp_path / "out", push_to_hub="owner/tiny", hub_picture=str(tmp_path / "mine.png")
            )
        )
    assert near_hub.requests == []


def test_cards_that_people_wrote_get_the_results(place, near_hub, tmp_path, capsys):
    shutil.copytree(place / "model", tmp_path / "model")
    (tmp_path / "model" / "README.md").write_text(CARD.replace("by hand", "in the folder"))
    near_hub.put("owner/tiny", {"README.md": CARD.encode()})
    own = options(place, "volumes", tmp_path / "out", baselines=False, push_to_hub="owner/tiny")
    own.model = [str(tmp_path / "model")]
    evaluate(own)
    card = near_hub.files("owner/tiny")["README.md"].decode()
    assert "# Written by hand" in card and "### volumes, split `test`" in card
    assert (tmp_path / "model" / "README.md").read_text() == card
    # The folder's own one is not lost, and it is said.
    assert "# Written in the folder" in (tmp_path / "out" / "former-card.md").read_text()
    assert "its own one is kept in" in capsys.readouterr().out

    # While the card cannot be read nothing is pushed over it; the report is there.
    near_hub.fail("HEAD", "README.md", status=503)
    own.output_dir = str(tmp_path / "again")
    with pytest.raises(PublishingError, match="is not to be lost"):
        evaluate(own)
    assert near_hub.files("owner/tiny")["README.md"].decode() == card and (tmp_path / "again" / "report.json").exists()
