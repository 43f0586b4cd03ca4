"""`eval.py` through `accelerate launch` with one and with two processes."""

import json

import numpy as np
import pytest

from anodiff.data.prepared import load_prepared
from anodiff.evaluation.cases import Case
from anodiff.evaluation.metrics import average_precision
from anodiff.hub.model_card import PROTOCOL_FIELDS


@pytest.fixture(scope="module")
def reports(workplace, trained):
    made = {}
    for processes in (1, 2):
        workplace.run(
            "eval",
            *["--model", f"{trained}/pipeline", "--data", "prepared", "--output_dir", f"eval{processes}"],
            *["--keep_maps", "--batch_size", 5],
            processes=processes,
        )
        made[processes] = json.loads((workplace.folder / f"eval{processes}" / "report.json").read_text())
    return made


def test_report(workplace, reports):
    report = reports[1]
    assert set(report["protocol"]) == set(PROTOCOL_FIELDS) and all(report["protocol"].values())
    assert report["data"]["subjects"] == 3 and report["data"]["anomalous_slices"] > 0
    rows = {row["name"]: row for row in report["results"]}
    assert list(rows) == [
        "AnoDDPM (one)",
        "intensity of flair",
        "intensity of flair over its median",
        "inverted intensity of flair",
        "intensity of t1",
        "intensity of t1 over its median",
        "inverted intensity of t1",
        "brain area",
        "mean intensity",
        "mean absolute Laplacian",
    ]
    metrics = rows["AnoDDPM (one)"]["metrics"]
    for name in (
        "voxel_average_precision",
        "voxel_auroc",
        "dice_oracle",
        "dice_validation",
        "dice_healthy",
        "dice_yen",
    ):
        assert 0 <= metrics[name] <= 1, name
    assert metrics["dice_oracle"] >= metrics["dice_validation"] - 1e-9
    assert 0 <= metrics["slice_auroc"] <= 1 and 0 <= metrics["subject_auroc"] <= 1
    # FLAIR lesions are bright: the threshold baseline must be far above chance.
    assert rows["intensity of flair"]["metrics"]["voxel_auroc"] > 0.8
    assert rows["intensity of flair"]["settings"]["median_size"] == 3
    assert rows["AnoDDPM (one)"]["seconds_per_slice"] > 0
    table = (workplace.folder / "eval1" / "report.md").read_text()
    assert (
        "| AnoDDPM (one) |" in table and "**training population**: AnoDDPM (one): healthy training subjects" in table
    )
    assert (workplace.folder / "eval1" / "cases.png").stat().st_size > 20_000


def test_metrics_are_those_of_the_maps(workplace, reports):
    cases = [Case.load(path) for path in sorted((workplace.folder / "eval1" / "maps" / "00" / "test").glob("*.npz"))]
    assert len(cases) == 3
    scores = np.concatenate([case.maps[case.brain] for case in cases])
    labels = np.concatenate([case.mask[case.brain] for case in cases])
    metrics = reports[1]["results"][0]["metrics"]
    assert metrics["voxel_average_precision"] == pytest.approx(average_precision(scores, labels))
    predicted = scores > np.float32(metrics["threshold_validation"])
    dice = 2 * (predicted & labels).sum() / (predicted.sum() + labels.sum())
    assert metrics["dice_validation"] == pytest.approx(dice)


def test_maps_are_those_of_a_call_with_the_volume(workplace, trained, reports):
    from anodiff import AnomalyPipeline

    pipe = AnomalyPipeline.from_pretrained(workplace.folder / trained / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    raw = workplace.folder / "raw" / "test_1"
    processed = pipe.processor.preprocess({name: raw / f"{name}.nii.gz" for name in ("flair", "t1", "brain")})
    whole = pipe(processed.slices, brain_mask=processed.brain, threshold=None)
    case = Case.load(workplace.folder / "eval1" / "maps" / "00" / "test" / "test_1.npz")
    kept = load_prepared(workplace.folder / "prepared", "test").read_subject("test_1")["slice"]
    # The filter is two-dimensional, so leaving slices out changes nothing.
    expected = whole.anomaly_map.numpy()[kept]
    np.testing.assert_allclose(case.maps, expected, rtol=0, atol=1e-5 * expected.max())


def test_a_set_without_validation_split(workplace, trained):
    workplace.run(
        "eval",
        *["--model", f"{trained}/pipeline", "--data", "prepared", "--validation_split", "none"],
        *["--output_dir", "alone", "--mixed_precision", "bf16", "--inference.mode", "one_shot"],
    )
    report = json.loads((workplace.folder / "alone" / "report.json").read_text())
    metrics = report["results"][0]["metrics"]
    assert metrics["dice_validation"] is None and metrics["dice_healthy"] is None
    assert metrics["dice_oracle"] is not None and metrics["dice_yen"] is not None
    assert "healthy training subjects" in report["protocol"]["training_population"]


def test_a_threshold_for_the_checkpoint(workplace, trained):
    import shutil

    from anodiff import AnomalyPipeline

    shutil.copytree(workplace.folder / trained / "pipeline", workplace.folder / "calibrated")
    options = ["--model", "calibrated", "--data", "prepared", "--baselines", "false", "--set_threshold", "healthy"]
    workplace.run("eval", *options, "--output_dir", "set")
    report = json.loads((workplace.folder / "set" / "report.json").read_text())
    pipe = AnomalyPipeline.from_pretrained(workplace.folder / "calibrated")
    assert pipe.config.threshold == report["results"][0]["metrics"]["threshold_healthy"] != 0.2
    wrong = workplace.run("eval", *options, "--output_dir", "set2", "--erosion", 1, check=False)
    assert wrong.returncode != 0 and "needs the checkpoint's own settings" in wrong.stderr


def test_two_processes_equal_one(workplace, reports):
    one, two = reports[1], reports[2]
    assert two["processes"] == 2
    for row, other in zip(one["results"], two["results"], strict=True):
        assert row["name"] == other["name"]
        for name, value in row["metrics"].items():
            if value is None:
                assert other["metrics"][name] is None
            else:
                assert other["metrics"][name] == pytest.approx(value, rel=1e-3, abs=1e-3), (row["name"], name)
    for split in ("validation", "test"):
        for path in (workplace.folder / "eval1" / "maps" / "00" / split).glob("*.npz"):
            case = Case.load(path)
            other = Case.load(workplace.folder / "eval2" / "maps" / "00" / split / path.name)
            np.testing.assert_allclose(other.maps, case.maps, rtol=0, atol=1e-5 * case.maps.max())


def test_overrides_two_models_and_refusals(workplace, trained, reports):
    workplace.run(
        "eval",
        *["--model", f"{trained}/pipeline", "--model", f"{trained}/pipeline", "--data", "prepared"],
        *["--output_dir", "again", "--median_size", 0, "--inference.mode", "one_shot", "--baselines", "false"],
    )
    report = json.loads((workplace.folder / "again" / "report.json").read_text())
    assert len(report["results"]) == 2 and report["results"][0]["metrics"] == report["results"][1]["metrics"]
    assert report["results"][0]["settings"]["median_size"] == 0
    assert report["results"][0]["settings"]["mode"] == "one_shot"
    assert not (workplace.folder / "again" / "maps").exists()

    taken = workplace.run("eval", "--data", "prepared", "--output_dir", "again", check=False)
    assert taken.returncode != 0 and "already holds a report" in taken.stderr
    recipe = (workplace.folder / "recipe.yaml").read_text().replace("- 16\n  - 16", "- 12\n  - 12")
    (workplace.folder / "recipe12.yaml").write_text(recipe)
    workplace.run("preprocess", "--recipe", "recipe12.yaml", "--root", "raw", "--out", "prepared12")
    other = workplace.run(
        "eval", "--model", f"{trained}/pipeline", "--data", "prepared12", "--output_dir", "x", check=False
    )
    assert other.returncode != 0 and "`size` is [16, 16] there and [12, 12] here" in other.stderr


def test_protocols_of_others(workplace):
    """The baselines under ANDi's and UAD-IMAG's protocols, against their maps."""
    from scipy import ndimage

    from anodiff.evaluation.thresholds import yen_threshold

    common = ["--data", "prepared", "--keep_maps", "--median_size", 0]
    workplace.run("eval", *common, "--protocol", "andi", "--output_dir", "eval_andi")
    folder = workplace.folder / "eval_andi"
    report = json.loads((folder / "report.json").read_text())
    rows = {row["name"]: row for row in report["results"]}
    cases = [Case.load(folder / "maps" / "intensity-of-flair" / "test" / f"test_{number}.npz") for number in range(3)]
    low, high = min(case.maps.min() for case in cases), max(case.maps.max() for case in cases)
    maps, masks = [(case.maps - low) / (high - low) for case in cases], [case.mask for case in cases]
    assert not masks[0].any() and masks[1].any() and masks[2].any()
    dices = [
        2 * (predicted & mask).sum() / (predicted.sum() + mask.sum())
        for predicted, mask in zip((ndimage.binary_dilation(m > yen_threshold(m)) for m in maps), masks, strict=True)
        if mask.any()
    ]
    row = rows["intensity of flair"]
    assert row["metrics"]["andi_dice_yen"] == pytest.approx(np.mean(dices))
    scores, labels = (np.concatenate([array.ravel() for array in arrays]) for arrays in (maps, masks))
    assert row["metrics"]["andi_average_precision"] == pytest.approx(average_precision(scores, labels))
    assert len(row["sweep"]["dice"]) == 290 and row["metrics"]["andi_dice_oracle"] == max(row["sweep"]["dice"])
    assert rows["equalised flair"]["sweep"]["thresholds"][0] == 0.8
    assert rows["equalised flair"]["metrics"]["voxel_auroc"] > 0.8
    assert set(report["protocol"]) == set(PROTOCOL_FIELDS) and "Yen" in report["protocol"]["threshold_policy"]
    assert "Dice, Yen (ANDi)" in (folder / "report.md").read_text()

    sweep = ["--protocol", "uad_imag", "--sweep", "[0.1, 1.5, 0.05]", "--healthy_fpr", 0.01]
    workplace.run("eval", *common, *sweep, "--output_dir", "eval_uad_imag")
    report = json.loads((workplace.folder / "eval_uad_imag" / "report.json").read_text())
    metrics = report["results"][0]["metrics"]
    threshold = np.float32(metrics["uad_imag_threshold_validation"])
    healthy = np.concatenate([case.maps[case.brain & ~case.mask] for case in cases])
    assert metrics["uad_imag_fpr_validation"] == pytest.approx((healthy > threshold).mean())
    assert metrics["uad_imag_dice_oracle"] >= metrics["uad_imag_dice_validation"] > 0
    assert "FPR, validation (UAD-IMAG)" in (workplace.folder / "eval_uad_imag" / "report.md").read_text()
    for options, message in (
        (["--protocol", "best"], "`protocol` must be one of pooled, andi, uad_imag, anofpdm"),
        (["--sweep", "[0.1, 0.2, 0.01]"], "`sweep` needs one of the protocols andi, uad_imag, anofpdm"),
    ):
        wrong = workplace.run("eval", "--data", "prepared", "--output_dir", "x", *options, check=False)
        assert wrong.returncode != 0 and message in wrong.stderr
