"""Metrics of ensembles against recorded values, and the layout, label rules and metrics of real cases.

The leftover script of the original cuts its two arguments at different values. On masks coded +-1 it is the same distance up to its
smoothing (`orig_ged_pm1`); on raw samples it is not (`raw01.orig_ged`), which is shown and not reproduced.
"""

import os
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from anodiff.data.prepare import prepare_recipe, read_recipe
from anodiff.data.prepared import load_prepared
from anodiff.data.readers.subjects import read_annotated_folders
from anodiff.evaluation.ensemble_metrics import (
    DIVERSITY_READINGS,
    collective_insight,
    combined_sensitivity,
    diversity_agreement,
    generalized_energy_distance,
    hungarian_iou,
    maximum_dice_matching,
    pairwise_dice,
    pairwise_iou,
    sample_diversity,
    score_ensemble,
)
from anodiff.volumes.volume import read_volume

from .recordings import read


DEFINITION = {"rtol": 0, "atol": 1e-12}
SMOOTHED = {"rtol": 0, "atol": 1e-6}

# Ending of the recorded arrays to our name of the reading.
READINGS = {"": "pairs", "_absvar": "variances", "_withdiag": "pairs_with_self"}


@pytest.fixture(scope="module")
def arrays():
    return read("cimd/metrics.npz")


CASES = sorted(name.removesuffix(".ged") for name in read("cimd/metrics.npz") if name.endswith(".ged"))


@pytest.mark.parametrize("case", CASES)
def test_definitions(arrays, case):
    expected = {name.partition(".")[2]: value for name, value in arrays.items() if name.startswith(f"{case}.")}
    pred, gt = expected.pop("pred"), expected.pop("gt")
    found = {
        "iou": pairwise_iou(pred, gt),
        "dice": pairwise_dice(gt, pred),
        "ged": generalized_energy_distance(pred, gt),
        "div_pred": sample_diversity(pred),
        "div_gt": sample_diversity(gt),
        "hm_iou": hungarian_iou(pred, gt),
        "s_c": combined_sensitivity(pred, gt),
        "d_max": maximum_dice_matching(pred, gt),
    }
    assert set(READINGS.values()) == set(DIVERSITY_READINGS)
    for ending, reading in READINGS.items():
        found[f"d_a{ending}"] = diversity_agreement(pred, gt, reading)
        found[f"ci{ending}"] = collective_insight(pred, gt, reading)
    for name, value in found.items():
        np.testing.assert_allclose(value, expected.pop(name), **DEFINITION, err_msg=name)

    together = score_ensemble(pred, gt)
    np.testing.assert_allclose(together["collective_insight_variances"], found["ci_absvar"], **DEFINITION)
    np.testing.assert_allclose(together["diversity_agreement"], found["d_a"], **DEFINITION)

    # The original's own program: masks coded +-, smoothing 1e-5. Its IoU is of the first pair.
    np.testing.assert_allclose(found["ged"], expected.pop("orig_ged_pm1"), **SMOOTHED)
    np.testing.assert_allclose(found["iou"][0, 0], expected.pop("orig_iou00_pm1"), **SMOOTHED)
    # Not the paper's CI; left out.
    assert list(expected) == ["ci_true_harmonic_mean"]


def test_the_original_cuts_its_arguments_at_different_values(arrays):
    pred, gt = arrays["raw01.pred"], arrays["raw01.gt"] > 0.5
    np.testing.assert_allclose(generalized_energy_distance(pred > 0, gt), arrays["raw01.ged_cut0"], **DEFINITION)
    # Its first argument at 0, its second at 0.5.
    first, second = pred > 0, pred > 0.5
    original = (
        2 * (1 - pairwise_iou(first, gt)).mean() - (1 - pairwise_iou(first, second)).mean() - sample_diversity(gt)
    )
    np.testing.assert_allclose(original, arrays["raw01.orig_ged"], rtol=0, atol=1e-4)
    assert abs(original - arrays["raw01.ged_cut0"]) > 0.1


@pytest.fixture
def lidc():
    if "ANODIFF_TEST_DATA" not in os.environ:
        pytest.skip("ANODIFF_TEST_DATA is not set: no real data")
    data = Path(os.environ["ANODIFF_TEST_DATA"])
    # It holds real images and stays where they are.
    reference = data.parent / "golden" / "cimd" / "lidc_reference.npz"
    if not reference.is_file():
        pytest.skip(f"{reference} is not there: no recorded values of the real data")
    with np.load(reference, allow_pickle=False) as file:
        return data / "lidc_sample", dict(file)


def test_real_cases_are_read_by_both_label_rules(lidc):
    root, reference = lidc
    pattern = {"image": "image_*"}
    columns = reference["columns"].tolist()
    table = dict(zip(reference["case"].tolist(), reference["table"], strict=True))
    for threshold, prefix in ((0.5, "gt127"), (0.0, "gt0")):
        subjects = read_annotated_folders(root, pattern, ["label*"], label_threshold=threshold)
        assert {subject.name for subject in subjects} == set(table)
        assert [subject.split for subject in subjects] == [
            "train" if subject.name.startswith("training") else "test" for subject in subjects
        ]
        for subject in subjects:
            row = dict(zip(columns, table[subject.name], strict=True))
            marked = [read_volume(path).arrays[""] > subject.mask_above for path in subject.masks]
            assert [mask.sum() for mask in marked] == [row[f"{prefix}_l{k}"] for k in range(len(marked))]
            image = read_volume(subject.volume).arrays["image"]
            found = (image.mean(dtype=np.float64), image.min(), image.max())
            np.testing.assert_allclose(found, [row[f"img_{name}"] for name in ("mean", "min", "max")], rtol=1e-9)
            if threshold:
                masks = np.stack(marked)[..., 0].swapaxes(1, 2)  # (A, rows, columns)
                pred = np.roll(masks, (1, 1), (1, 2))
                scores = score_ensemble(pred, masks)
                for name, own in {
                    "div_gt": "annotation_diversity",
                    "ged": "ged",
                    "hm_iou": "hm_iou",
                    "s_c": "combined_sensitivity",
                    "d_max": "maximum_dice",
                    "d_a": "diversity_agreement",
                    "ci": "collective_insight",
                }.items():
                    np.testing.assert_allclose(scores[own], row[name], **DEFINITION, err_msg=f"{subject.name} {name}")


def test_the_prepared_set_is_what_the_original_loads(lidc, tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    root, reference = lidc
    case = str(reference["loader.case"])
    for threshold in (0.5, 0.0):
        settings = read_recipe("cimd_lidc")
        settings["reader_options"]["label_threshold"] = threshold
        assert prepare_recipe(settings, root, tmp_path / f"set{threshold}", progress=False) == {}
        split = load_prepared(tmp_path / f"set{threshold}", "train")
        found = split.read_subject(case)
        # It repeats the image to four channels; one is the same to a network.
        assert tuple(reference["loader.image_shape"][1:]) == found["image"].shape[2:]
        np.testing.assert_allclose(found["image"][0, 0] * 255, reference["loader.image"], rtol=0, atol=1e-4)
        for label, index in zip(reference["loader.label"], reference["loader.label_index"], strict=False):
            np.testing.assert_array_equal(found["mask"][0, index], label / 255 > threshold)
            with PIL.Image.open(root / case / f"label{index}_.jpg") as picture:
                np.testing.assert_array_equal(np.asarray(picture), label)
    assert split.annotations.tolist() == [reference["loader.label"].shape[0]] * len(split)
