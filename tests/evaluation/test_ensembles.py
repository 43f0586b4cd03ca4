"""`eval.py` on ensembles of segmentations: a tiny CIMD on a small phantom with several raters."""

import dataclasses
import json
import shutil

import datasets
import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import UNet2DModel

from anodiff import CIMDPipeline, CIMDScheduler, VolumeProcessor
from anodiff.data.phantoms.nodules import RATER_SETS
from anodiff.data.phantoms.sets import prepare_phantom
from anodiff.data.prepared import load_prepared
from anodiff.eval import main
from anodiff.evaluation.candidates import choose_protocol
from anodiff.evaluation.cases import EnsembleCase
from anodiff.evaluation.ensemble_metrics import score_ensemble
from anodiff.evaluation.options import EvalOptions
from anodiff.evaluation.protocols import ensemble, pooled
from anodiff.evaluation.run import evaluate
from anodiff.hub.model_card import PROTOCOL_FIELDS, add_evaluation, make_card
from anodiff.hub.shipped import add_samples

from ..test_docs import find_undefined


RECIPE = {
    "reader": "annotated_folders",
    "reader_options": {
        "modalities": {"image": "image.png"},
        "annotations": ["label*.png"],
        "groups": "patients.csv",
        "group_column": "patient",
    },
    "processor": {
        "modalities": ["image"],
        "size": [16, 16],
        "intensity": "given",
        "value_range": [0, 1],
        "brain_mask": "none",
    },
    "split": {"fractions": {"train": 0.5, "test": 0.5}},
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A prepared set `data` and a checkpoint `model`, in one folder."""
    folder = tmp_path_factory.mktemp("ensembles")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
        patch.setitem(RATER_SETS, "phantom-raters", (6, 2))
        assert prepare_phantom("phantom-raters", folder / "data", recipe=RECIPE, progress=False) == {}
        torch.manual_seed(0)
        unet = UNet2DModel(
            sample_size=16,
            in_channels=2,
            out_channels=2,
            block_out_channels=(4, 8),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "UpBlock2D"),
            norm_num_groups=4,
        )
        processor = VolumeProcessor.from_pretrained(folder / "data" / "processor")
        pipe = CIMDPipeline(unet, CIMDScheduler(), processor, num_ensemble=3, num_inference_steps=4, threshold=0.45)
        pipe.save_pretrained(folder / "model")
        yield folder


@pytest.fixture(scope="module")
def report(place):
    options = ["--model", str(place / "model"), "--data", str(place / "data"), "--validation_split", "none"]
    assert main([*options, "--output_dir", str(place / "eval"), "--keep_maps", "--batch_size", "5"]) == 0
    return json.loads((place / "eval" / "report.json").read_text())


def test_report(place, report):
    assert set(report["protocol"]) == set(PROTOCOL_FIELDS) and all(report["protocol"].values())
    assert report["data"]["slices"] == 6 and report["data"]["subjects"] == 6
    assert "3 groups, 6 images" in report["protocol"]["samples"] and "CIMD (model): 3" in report["protocol"]["samples"]
    rows = {row["name"]: row for row in report["results"]}
    assert list(rows) == ["CIMD (model)", "mean annotation rate", "random training annotation"]
    split = load_prepared(place / "data", "test")
    for row in rows.values():
        metrics = row["metrics"]
        assert not find_undefined(metrics, "metrics.md")
        assert metrics["num_samples"] == 3 == row["settings"]["num_ensemble"]
        for name in ("ged", "hm_iou", "collective_insight", "sample_diversity", "combined_sensitivity"):
            assert metrics[f"{name}_low"] - 1e-9 <= metrics[name] <= metrics[f"{name}_high"] + 1e-9
        assert 0 < metrics["expected_calibration_error"] < 1 and 0 < metrics["expected_calibration_error_marked"] < 1
        pixels = {region: curve["pixels"] for region, curve in row["reliability"].items()}
        assert pixels["marked"] == pixels["all"][1:]  # all but those that no sample marks
        for name in ("hm_iou", "collective_insight", "maximum_dice", "combined_sensitivity", "dice_majority"):
            assert 0 <= metrics[name] <= 1
        assert metrics["ged"] == pytest.approx(np.mean([image["ged"] for image in row["subjects"]]))
        assert len(row["subjects"]) == 6
        assert sum(row["reliability"]["all"]["pixels"]) == 6 * 16 * 16
    assert rows["CIMD (model)"]["seconds_per_slice"] > 0
    text = (place / "eval" / "report.md").read_text()
    assert (
        "| CIMD (model) | 3 | " in text
        and "## Reliability of CIMD (model)" in text
        and "ECE, marked (3 samples)" in text
    )
    assert "| GED (3 samples) |" in text and "| diversity of raters |" in text
    with PIL.Image.open(place / "eval" / "cases.png") as picture:
        assert picture.width > 800
    with PIL.Image.open(place / "eval" / "reliability.png") as picture:
        assert picture.width > 800
    # Members are those of one call with all pictures, each with noise of its own, whatever the batch, and scores those of the members.
    pipe = CIMDPipeline.from_pretrained(place / "model")
    pipe.set_progress_bar_config(disable=True)
    items = [split.read_subject(subject) for subject in split.subjects]
    members = pipe(torch.from_numpy(np.concatenate([item["image"] for item in items]))).member_masks.numpy()
    records = rows["CIMD (model)"]["subjects"]
    assert [image["subject"] for image in records] == split.subjects
    for number, (image, item) in enumerate(zip(records, items, strict=True)):
        for name, value in score_ensemble(members[:, number], item["mask"][0]).items():
            assert image[name] == pytest.approx(value, abs=1e-9), name
        assert image["group"] == image["subject"][:-2]


@pytest.mark.parametrize("name", ["group", "slices", "annotations"])
def test_an_evaluation_of_other_annotations_is_not_merged(place, report, tmp_path, name):
    data = EvalOptions(data=str(place / "data"), protocol="ensemble", validation_split="none", report="none")
    merging = dataclasses.replace(data, merge=[str(tmp_path / "earlier")], output_dir=str(tmp_path / "out"))
    shutil.copytree(place / "eval", tmp_path / "earlier")
    assert evaluate(merging)["results"][0]["metrics"] == report["results"][0]["metrics"]
    folder = tmp_path / "earlier" / "maps" / "00" / "test"
    subject = load_prepared(place / "data", "test").subjects[-1]
    case = EnsembleCase.load(folder / f"{subject}.npz")
    changed = {"group": "other", "slices": case.slices + 1, "annotations": ~case.annotations}
    dataclasses.replace(case, **{name: changed[name]}).save(folder)
    with pytest.raises(
        ValueError, match=rf"`merge`: in .*earlier/maps/00 {name} of the subject {subject} \(test\) dif"
    ):
        evaluate(dataclasses.replace(merging, output_dir=str(tmp_path / "refused")))
    with pytest.raises(ValueError, match=r"is of \{.*'task': .*, this evaluation of \{"):
        evaluate(dataclasses.replace(merging, protocol="andi", output_dir=str(tmp_path / "refused")))


def test_the_model_is_compared_with_the_baselines(place, report):
    compared = {(one["metric"], one["second"]): one for one in report["comparisons"]}
    assert len(compared) == 4 * 2 and all(one["first"] == "CIMD (model)" for one in compared.values())
    model, other = (report["results"][number]["metrics"]["ged"] for number in (0, 1))
    one = compared["ged", "mean annotation rate"]
    assert one["low"] - 1e-9 <= one["difference"] == model - other <= one["high"] + 1e-9
    text = (place / "eval" / "report.md").read_text()
    assert "## The best model against the others" in text and "|  | GED (3 samples) | HM-IoU (3 samples) |" in text


def test_baselines(place, report):
    training, test = (load_prepared(place / "data", name) for name in ("train", "test"))
    rate = training[:]["mask"].mean((0, 1))
    drawn = []
    for subject in test.subjects:
        with np.load(place / "eval/maps/mean-annotation-rate/test" / f"{subject}.npz") as arrays:
            masks = arrays["masks"]
        # Level sets, whose mean is the rate as nearly as three masks can say it.
        assert np.abs(masks[0].mean(0) - rate).max() <= 0.5 / 3 + 1e-9
        with np.load(place / "eval/maps/random-training-annotation/test" / f"{subject}.npz") as arrays:
            drawn.append(arrays["masks"][0])
    annotations = {mask.tobytes() for masks in training[:]["mask"] > 0 for mask in masks}
    drawn = np.concatenate(drawn)
    assert all(mask.tobytes() in annotations for mask in drawn)
    assert len({mask.tobytes() for mask in drawn}) > 6


def test_the_card_takes_the_report(place, report):
    card = add_evaluation(make_card(CIMDPipeline.from_pretrained(place / "model")), report)
    results = {result.metric_type: result for result in card.data.eval_results}
    metrics = report["results"][0]["metrics"]
    assert results["ged"].metric_value == metrics["ged"] and results["ged"].task_name == "Ambiguous segmentation"
    assert results["ged"].metric_name == "ged (3 samples)"
    assert "num_samples" not in results and "ged_low" not in results
    assert "| num samples | 3 | 3 | 3 |" in card.text and "| hm iou (3 samples) |" in card.text


def test_every_number_says_of_how_many_samples_it_is(report):
    one, other = report["results"][0], {"metrics": {"num_samples": 16}}
    assert add_samples("ged", "GED", [one]) == "GED (3 samples)"
    assert add_samples("ged", "GED", [other, one]) == "GED (3, 16 samples: do not compare)"
    assert add_samples("annotation_diversity", "diversity of raters", [one, other]) == "diversity of raters"
    assert add_samples("ap", "AP", [{"metrics": {"ap": 0.5}}]) == "AP"


def test_other_settings_and_baselines_alone(place):
    common = {"data": str(place / "data"), "validation_split": "none"}
    inference = {"num_ensemble": 2, "num_inference_steps": 2}
    options = EvalOptions(
        model=[str(place / "model")], output_dir=str(place / "few"), inference=inference, baselines=False, **common
    )
    report = evaluate(options)
    assert [row["settings"]["num_ensemble"] for row in report["results"]] == [2]
    assert report["results"][0]["settings"]["num_inference_steps"] == 2
    assert not (place / "few" / "maps").exists()
    with pytest.raises(FileExistsError, match="already holds a report"):
        evaluate(options)
    assert choose_protocol(EvalOptions(**common)) is pooled
    assert main(["--protocol", "ensemble", "--data", str(place / "data"), "--output_dir", str(place / "alone")]) == 0
    report = json.loads((place / "alone" / "report.json").read_text())
    assert [row["metrics"]["num_samples"] for row in report["results"]] == [16, 16]
    assert report["protocol"]["training_population"] == "no model was evaluated"


def test_refusals(place, tmp_path):
    model, other, foreign = str(place / "model"), tmp_path / "other", tmp_path / "foreign"
    index = json.loads((place / "model" / "model_index.json").read_text())
    for folder, name in ((other, "ANDiPipeline"), (foreign, "StableDiffusionPipeline")):
        folder.mkdir()
        (folder / "model_index.json").write_text(json.dumps(index | {"_class_name": name}))
    assert choose_protocol(EvalOptions(model=[model])) is ensemble
    assert choose_protocol(EvalOptions(model=[str(other)])) is pooled
    for options, message in (
        ({"model": [model, str(other)]}, r"different tasks are evaluated apart, got .*other \(anomaly-detection\)"),
        (
            {"model": [str(other)], "protocol": "ensemble"},
            "`protocol` must be one of pooled, .* for models of the task",
        ),
        (
            {"model": [model], "protocol": "andi"},
            "`protocol` must be one of ensemble for models of the task segmentation",
        ),
        ({"protocol": "best"}, "`protocol` must be one of pooled, andi, .*, ensemble, got 'best'"),
        ({"sweep": (0.1, 0.2, 0.01)}, "`sweep` needs one of the protocols andi, uad_imag, anofpdm"),
        (
            {"model": [str(foreign)]},
            r"`model` must name pipelines of anodiff, got .*foreign \(StableDiffusionPipeline\)",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            choose_protocol(EvalOptions(**options))
    common = {"model": [model], "data": str(place / "data"), "output_dir": str(tmp_path / "out")}
    for options, message in (
        ({"calibrate": "yen", "erosion": 1}, "have no `calibrate`, `erosion`: leave it out"),
        ({"model": [], "baselines": False}, "nothing to evaluate"),
        ({"inference": {"noise_level": 3}}, "`inference` has no key noise_level; CIMDPipeline takes num_ensemble"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluate(EvalOptions(**common | options))
