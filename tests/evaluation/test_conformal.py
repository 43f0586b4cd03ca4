"""Conformal calibration: what is promised, that it is kept, where it is stored, and that a changed call claims nothing."""

import json
import math
import shutil

import nibabel as nib
import numpy as np
import pytest
import torch

from anodiff import AnomalyPipeline
from anodiff.data.prepare import prepare
from anodiff.data.readers.subjects import Subject
from anodiff.data.rules import SliceRule
from anodiff.evaluation.cases import Case
from anodiff.evaluation.conformal import (
    HEALTHY,
    NUM_KNOTS,
    PATIENTS,
    calibrate_conformal,
    conformal_threshold,
    measure_promises,
)
from anodiff.evaluation.options import EvalOptions
from anodiff.evaluation.run import evaluate
from anodiff.evaluation.sections import guarantee_section
from anodiff.pipelines.guarantee import counted_slices, lesion_probability, p_values
from anodiff.predict import main as predict

from ..tiny import SIZE, make_pipeline, make_volume


def make_case(name, rng, label=0, slices=3, lift=0.0, group=None, mask=None):
    """A case of 8 x 8 pixels, all brain; the first slice is anomalous where the label is 1."""
    maps = rng.random((slices, 8, 8)).astype(np.float32) + np.float32(lift)
    labels = np.zeros(slices, np.int64)
    labels[0] = label
    if mask is None and label == 1:
        mask = np.zeros(maps.shape, bool)
        mask[0, :4] = True
    if mask is not None:
        maps[mask] += np.float32(1)
    means = maps.astype(np.float64).mean((1, 2))
    return Case(name, maps, np.ones(maps.shape, bool), mask, labels, means, float(maps.mean(dtype=np.float64)), group)


def test_threshold_of_scans_is_the_order_statistic():
    rng = np.random.default_rng(0)
    for n, alpha in ((19, 0.05), (20, 0.1), (24, 0.05), (99, 0.07), (30, 0.5)):
        scores = rng.random(n)
        rank = math.ceil(round((n + 1) * (1 - alpha), 9))
        assert conformal_threshold(list(scores[:, None]), alpha) == np.sort(scores)[rank - 1], (n, alpha)


@pytest.mark.parametrize(("n", "alpha"), [(19, 0.05), (24, 0.05), (50, 0.1)])
def test_new_scans_exceed_the_threshold_as_often_as_promised(n, alpha):
    """Of continuous scores the share above the k-th smallest of n has the mean 1 - k / (n + 1) over calibrations."""
    scores = np.random.default_rng(n).exponential(size=(20000, n + 1))
    rank = math.ceil(round((n + 1) * (1 - alpha), 9))
    thresholds = np.sort(scores[:, :n], 1)[:, rank - 1]
    assert [conformal_threshold(list(row[:n, None]), alpha) for row in scores[:50]] == thresholds[:50].tolist()
    rate = (scores[:, n] > thresholds).mean()
    expected = 1 - rank / (n + 1)
    assert alpha - 1 / (n + 1) < expected <= alpha + 1e-12
    assert abs(rate - expected) < 4 * math.sqrt(expected / 20000)


def test_share_of_slices_is_kept_over_subjects():
    """Slices of a subject are alike and their number differs: a quantile of all slices together would promise too much."""
    rng, alpha, shares = np.random.default_rng(0), 0.1, []
    for _ in range(400):
        units = [rng.normal() + 0.3 * rng.normal(size=rng.integers(1, 9)) for _ in range(20)]
        threshold = conformal_threshold(units[:19], alpha)
        assert threshold in np.concatenate(units[:19])
        risk = sum((unit > threshold).mean() for unit in units[:19])
        assert (risk + 1) / 20 <= alpha + 1e-9
        lower = max(score for score in np.concatenate(units[:19]) if score < threshold)
        assert (sum((unit > lower).mean() for unit in units[:19]) + 1) / 20 > alpha
        shares.append((units[19] > threshold).mean())
    assert np.mean(shares) < alpha + 3 * np.std(shares) / 20


def test_ties_are_not_above():
    # Of 19 equal scores none is above, and any other one is.
    assert conformal_threshold([np.array([0.5])] * 19, 0.05) == 0.5
    assert conformal_threshold([np.array([0.0])] * 30 + [np.array([1.0])] * 9, 0.25) == 0.0  # 10 / 40
    assert conformal_threshold([np.array([0.0])] * 29 + [np.array([1.0])] * 10, 0.25) == 1.0
    # Shares of thirds add up to wholes.
    assert conformal_threshold([np.array([0.0, 0.0, 1.0])] * 3 + [np.zeros(1)] * 16, 0.1) == 0.0


@pytest.mark.parametrize(
    ("n", "alpha", "message"),
    [
        (18, 0.05, r"`alpha` must be at least 1/\(n\+1\) = 0.0526 with n = 18"),
        (0, 0.5, "= 1 with n = 0"),
        (5, 1.0, "below 1"),
        (5, 0.0, "above 0"),
    ],
)
def test_too_few_subjects(n, alpha, message):
    with pytest.raises(ValueError, match=message):
        conformal_threshold([np.zeros(1)] * n, alpha)


def test_p_values_are_those_of_ranks():
    rng = np.random.default_rng(1)
    cases = [make_case(f"h{number}", rng, lift=number / 10) for number in range(9)]
    record = calibrate_conformal(cases, 0.2)
    scan = record["guarantees"]["scan"]
    scores = np.array([case.volume_score for case in cases])
    for new in (*scores, *(scores + 1e-6), 0.0, 99.0):
        assert p_values(scan, np.array(new)) == pytest.approx((1 + (scores >= new).sum()) / 10)
    # Of a large table only some steps are kept: they say at most too much, and keep the threshold.
    voxel = record["guarantees"]["voxel"]
    maps = [case.maps.ravel() for case in cases]
    assert len(voxel["scores"]) <= NUM_KNOTS + 2 < sum(map(len, maps))
    for new in np.linspace(0, 2, 40).astype(np.float32):
        exact = (1 + sum((one >= new).mean() for one in maps)) / 10
        assert exact - 1e-9 <= p_values(voxel, new) <= exact * 1.1 + 0.01
        assert (p_values(voxel, new) <= 0.2 + 1e-12) == (new > voxel["threshold"])


def test_populations():
    rng = np.random.default_rng(0)
    healthy = [make_case(f"h{number}", rng) for number in range(4)]
    patients = [make_case(f"p{number}", rng, label=1, lift=1.0) for number in range(5)]
    unknown = make_case("u", rng)
    unknown.labels[1] = -1
    record = calibrate_conformal([*healthy, *patients, unknown], 0.2)
    assert {unit: one["population"] for unit, one in record["guarantees"].items()} == dict.fromkeys(
        ("scan", "slice", "voxel"), HEALTHY
    )
    assert {one["n"] for one in record["guarantees"].values()} == {4}

    record = calibrate_conformal([*healthy, *patients, unknown], 0.1)
    both = f"{HEALTHY} and {PATIENTS}"
    assert {unit: (one["n"], one["population"]) for unit, one in record["guarantees"].items()} == {
        "slice": (9, both),
        "voxel": (9, both),
    }
    assert "n = 4 (healthy subjects), got 0.1" in record["left_out"]["scan"]
    record = calibrate_conformal(patients, 0.2)
    assert record["guarantees"]["slice"]["population"] == PATIENTS
    # Anomalous slices do not count: those of the others are the two of each patient, and all slices scored alike.
    slices = [case.slice_scores[1:] for case in patients]
    assert record["guarantees"]["slice"]["threshold"] == conformal_threshold(slices, 0.2)
    with pytest.raises(ValueError, match=r"`alpha` must be at least 1/\(n\+1\) = 0.167 with n = 5"):
        calibrate_conformal(patients, 0.1)


def test_visits_of_a_patient_are_one_subject():
    rng = np.random.default_rng(0)
    cases = [make_case(f"v{number}", rng, lift=number, group=f"patient{number // 2}") for number in range(8)]
    guarantee = calibrate_conformal(cases, 0.2)["guarantees"]["scan"]
    assert guarantee["n"] == 4 and guarantee["threshold"] == cases[-1].volume_score
    # A patient with a lesion at one visit is no healthy subject.
    cases[6] = make_case("v6", rng, label=1, group="patient3")
    assert calibrate_conformal(cases, 0.25)["guarantees"]["scan"]["n"] == 3


def test_probability_is_monotone_calibrated_and_of_the_prevalence():
    rng = np.random.default_rng(0)
    cases = [make_case(f"p{number}", rng, label=1, slices=6, mask=rng.random((6, 8, 8)) < 0.1) for number in range(12)]
    maps, masks = (np.concatenate([getattr(case, name).ravel() for case in cases]) for name in ("maps", "mask"))
    maps -= masks * 0.7  # scores overlap
    cases = [
        Case(**{**vars(case), "maps": part.reshape(6, 8, 8)})
        for case, part in zip(cases, np.split(maps, 12), strict=True)
    ]
    table = calibrate_conformal(cases, 0.2)["probability"]
    assert table["prevalence"] == masks.mean() and table["subjects"] == 12
    assert (np.diff(table["scores"]) > 0).all() and (np.diff(table["probabilities"]) >= 0).all()
    found = lesion_probability(table, np.linspace(-1, 3, 500))
    assert found.min() >= 0 and found.max() <= 1 and (np.diff(found) >= 0).all() and found[-1] == 1
    assert lesion_probability(table, maps).mean() == pytest.approx(masks.mean(), rel=0.02)
    for low, high in (
        (0.0, 0.29),
        (0.31, 1.0),
        (1.01, 2.0),
    ):  # lesions have scores from 0.3 to 1.3, the others below 1
        inside = (maps > low) & (maps < high)
        assert lesion_probability(table, maps[inside]).mean() == pytest.approx(masks[inside].mean(), abs=0.01)
    # Without lesion masks there is none.
    assert calibrate_conformal([make_case(f"h{number}", rng) for number in range(9)], 0.2)["probability"] is None


def test_realised_rates():
    rng = np.random.default_rng(0)
    record = calibrate_conformal([make_case(f"h{number}", rng) for number in range(9)], 0.1)
    assert record["guarantees"]["scan"]["threshold"] < 0.6
    low, high = [make_case(f"l{number}", rng, lift=-0.5) for number in range(6)], [make_case("t", rng, lift=5.0)]
    patient = make_case("p", rng, label=1, lift=9.0)
    metrics, told = measure_promises(record, [*low, *high, patient])
    assert metrics["conformal_scan_rate"] == metrics["conformal_voxel_rate"] == pytest.approx(1 / 7)
    # The exact interval of 1 in 7, from tables of the binomial distribution.
    assert metrics["conformal_scan_rate_low"] == pytest.approx(0.0036, abs=5e-5)
    assert metrics["conformal_scan_rate_high"] == pytest.approx(0.5787, abs=5e-5)
    assert told["scan"]["tested"] == 7 and told["scan"]["n"] == 9 and told["scan"]["promised"] == 0.1
    assert metrics["conformal_slice_rate_low"] == 0.0 < metrics["conformal_slice_rate_high"]
    metrics, told = measure_promises(record, [patient])
    assert metrics["conformal_scan_rate"] is None and told["scan"]["tested"] == 0
    row = {"name": "method", "metrics": metrics, "guarantee": {"holds": True, **told}}
    assert "| method | scans | healthy subjects | 9 | 0.1 | no such subject | 0 |" in guarantee_section(
        {"results": [row]}
    )
    assert guarantee_section({"results": [{"name": "intensity", "metrics": {}}]}) == []


def test_slices_of_a_whole_scan_are_those_of_the_calibration():
    brain = np.zeros((6, 4, 4), bool)
    brain[1:5], brain[1, 1:] = True, False  # shares 0, 1/4, 1, 1, 1, 0

    def kept(across=False, **rule):
        numbers, reason = counted_slices({"slices": rule}, brain, across=across)
        return reason if numbers is None else numbers.tolist()

    assert kept() == kept(across=True) == [1, 2, 3, 4] and kept(min_brain=0.5) == [2, 3, 4]
    assert kept(first=2, last=3) == [2, 3]
    assert "neighbouring slices" in kept(across=True, min_brain=0.5)
    assert "`min_sum` or `step`" in kept(step=2) and "no slice" in kept(first=5)


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory):
    """A checkpoint that `evaluate` has calibrated on four healthy scans and a patient, with its report."""
    folder = tmp_path_factory.mktemp("calibrated")
    rng, subjects = np.random.default_rng(0), []
    for split, count in (("validation", 4), ("test", 3)):
        for number in range(count + 1):
            array = rng.uniform(0.3, 0.9, (SIZE, SIZE, 4)).astype(np.float32)
            array[:2] = 0
            mask = np.zeros(array.shape, np.uint8)
            name, masks = f"{split}{number}", ()
            if number == count:
                mask[4:9, 5:10, :2] = 1
                nib.save(nib.Nifti1Image(mask, np.eye(4)), folder / f"{name}_mask.nii.gz")
                masks = (folder / f"{name}_mask.nii.gz",)
            nib.save(nib.Nifti1Image(array + mask, np.eye(4)), folder / f"{name}.nii.gz")
            subjects.append(
                Subject(name, {"image": folder / f"{name}.nii.gz"}, masks, split=split, label=int(bool(masks)))
            )
    pipe = make_pipeline("AnoDDPMPipeline", slice_score="mean")
    rule = SliceRule(min_brain=0.5)
    prepare(
        subjects, pipe.processor, folder / "set", recipe={"slices": {"min_brain": 0.5}}, slices=rule, progress=False
    )
    pipe.save_pretrained(folder / "model")
    card = "| setting | value |\n| --- | --- |\n| `threshold` | null |\n| `erosion` | 0 |\n"
    (folder / "model" / "README.md").write_text(card, encoding="utf-8")
    report = evaluate(
        EvalOptions(
            **{"model": [str(folder / "model")], "data": str(folder / "set"), "output_dir": str(folder / "report")},
            **{"calibrate": "conformal", "alpha": 0.2, "baselines": False, "batch_size": 8},
        )
    )
    return folder, report


def test_evaluation_calibrates_and_measures(calibrated):
    folder, report = calibrated
    (row,) = report["results"]
    index = json.loads((folder / "model" / "model_index.json").read_text(encoding="utf-8"))
    assert index["calibration"] == row["calibration"] and index["threshold"] is None
    record = row["calibration"]
    assert record["guarantees"]["scan"]["n"] == 4 and record["left_out"] == {}
    assert record["slices"]["min_brain"] == 0.5 and record["settings"]["seed"] == 0
    assert record["probability"]["subjects"] == 5
    assert row["guarantee"]["holds"] and row["guarantee"]["scan"]["tested"] == 3
    assert row["metrics"]["probability_brier_score"] >= 0 and row["guarantee"]["probability"]["reliability"]["pixels"]
    text = (folder / "report" / "report.md").read_text(encoding="utf-8")
    assert "## Guarantees" in text and "| scans | healthy subjects | 4 | 0.2 |" in text
    card = (folder / "model" / "README.md").read_text(encoding="utf-8")
    assert "| `threshold` | null |\n| `calibration` | on set, validation: scans at most 0.2 above" in card


def test_a_calibrated_checkpoint_speaks_of_scans(calibrated, tmp_path):
    folder, report = calibrated
    (row,) = report["results"]
    pipe = AnomalyPipeline.from_pretrained(folder / "model")
    pipe.save_pretrained(tmp_path / "again")
    again = AnomalyPipeline.from_pretrained(tmp_path / "again")
    assert json.loads(json.dumps(dict(again.config.calibration))) == row["calibration"]
    again.set_progress_bar_config(disable=True)

    # A scan of the calibration: its own score and rank.
    result = again(folder / "validation0.nii.gz")
    claims = result.guarantee
    scan, guarantee = claims["scan"], row["calibration"]["guarantees"]["scan"]
    assert claims["holds"] and scan["score"] == result.volume_score
    assert min(abs(score - scan["score"]) for score in guarantee["scores"]) < 1e-6 * scan["score"]
    assert scan["above"] == (scan["score"] > guarantee["threshold"]) and 0.2 <= scan["p_value"] <= 1
    for name in ("probability_map", "healthy_rank_map"):
        array = getattr(result, name)
        assert array.dtype == np.float32 and array.shape == result.anomaly_map.shape
        assert 0 <= array.min() and array.max() <= 1 and not array[:2].any()
        order = np.argsort(result.anomaly_map[2:].ravel())
        assert (np.diff(array[2:].ravel()[order]) >= 0).all(), name
    above = result.healthy_rank_map >= 1 - 0.2 - 1e-6
    np.testing.assert_array_equal(
        above[2:], (result.anomaly_map > row["calibration"]["guarantees"]["voxel"]["threshold"])[2:]
    )
    result.save(tmp_path / "out")
    saved = json.loads((tmp_path / "out" / "result.json").read_text(encoding="utf-8"))
    assert saved["guarantee"] == json.loads(json.dumps(claims)) and "probability_map.nii.gz" in saved["files"]
    np.testing.assert_array_equal(
        nib.load(tmp_path / "out" / "probability_map.nii.gz").get_fdata(dtype=np.float32), result.probability_map
    )

    # Maps, scores and masks are those of the pipeline without calibration; slices as tensors with their brain have claims as well.
    plain = make_pipeline("AnoDDPMPipeline", slice_score="mean")(folder / "validation0.nii.gz")
    np.testing.assert_array_equal(plain.anomaly_map, result.anomaly_map)
    assert plain.guarantee is plain.probability_map is plain.healthy_rank_map is None
    tensor = again(torch.zeros(2, 1, SIZE, SIZE), brain_mask=torch.ones(2, SIZE, SIZE, dtype=torch.bool))
    assert torch.is_tensor(tensor.probability_map) and tensor.guarantee["holds"]


@pytest.mark.parametrize(
    ("arguments", "changed"),
    [
        ({"noise_level": 3}, "noise_level"),
        ({"generator": 1}, "seed"),
        ({"noise": torch.zeros(8, 5, 1, SIZE, SIZE)}, "seed"),
    ],
)
def test_a_changed_call_claims_nothing(calibrated, arguments, changed):
    folder, _ = calibrated
    pipe = AnomalyPipeline.from_pretrained(folder / "model")
    pipe.set_progress_bar_config(disable=True)
    result = pipe(make_volume(), **arguments)
    assert result.guarantee == {"holds": False, "reason": f"calibrated with other values of {changed}"}
    assert result.probability_map is result.healthy_rank_map is None
    assert pipe(make_volume(), threshold=0.5).guarantee["holds"]  # of masks only


def test_other_evaluations_of_a_calibrated_checkpoint(calibrated, tmp_path):
    folder, report = calibrated
    shared = {"data": str(folder / "set"), "baselines": False, "batch_size": 8, "model": [str(folder / "model")]}
    (row,) = evaluate(EvalOptions(**shared, output_dir=str(tmp_path / "same")))["results"]
    assert row["guarantee"] == report["results"][0]["guarantee"] and "calibration" not in row
    (row,) = evaluate(EvalOptions(**shared, output_dir=str(tmp_path / "other"), median_size=3))["results"]
    assert row["guarantee"] == {"holds": False, "reason": "calibrated with other values of median_size"}
    assert "conformal_scan_rate" not in row["metrics"]
    with pytest.raises(ValueError, match="`alpha` must be at least .*subjects with healthy slices"):
        evaluate(EvalOptions(**shared, output_dir=str(tmp_path / "no"), calibrate="conformal", alpha=0.01))
    assert not (tmp_path / "no" / "report.json").exists()
    # Masks of this protocol are not those of the checkpoint's settings.
    make_pipeline("AnoFPDMPipeline").save_pretrained(tmp_path / "guided")
    shared |= {"model": [str(tmp_path / "guided")], "protocol": "anofpdm", "calibrate": "conformal", "alpha": 0.2}
    with pytest.raises(ValueError, match="`calibrate conformal` needs a protocol that takes the settings of"):
        evaluate(EvalOptions(**shared, output_dir=str(tmp_path / "guided-report")))


def test_a_damaged_record_is_named(calibrated, tmp_path):
    folder, _ = calibrated
    shutil.copytree(folder / "model", tmp_path / "model")
    index = json.loads((tmp_path / "model" / "model_index.json").read_text(encoding="utf-8"))
    del index["calibration"]["guarantees"]
    (tmp_path / "model" / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    with pytest.raises(ValueError, match="`calibration` must be the record"):
        AnomalyPipeline.from_pretrained(tmp_path / "model")


def test_predictions_say_what_is_promised(calibrated, tmp_path, capsys):
    folder, _ = calibrated
    scan, model = str(folder / "test0.nii.gz"), str(folder / "model")
    for name, options, told in (
        ("same", [], "test0: brain taken as what is above the background; score above "),
        ("other", ["--seed", "1"], "no guarantee: calibrated with other values of seed"),
    ):
        assert predict([scan, "--model", model, "-o", str(tmp_path / name), *options]) == 0
        assert told in capsys.readouterr().out
        record = json.loads((tmp_path / name / "test0" / "result.json").read_text(encoding="utf-8"))
        assert record["guarantee"]["holds"] == (name == "same")
        assert ("probability_map.nii.gz" in record["files"]) == (name == "same")
