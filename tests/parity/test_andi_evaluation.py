"""Evaluation and data of ANDi and UAD-IMAG against recorded arrays: from the stored maps to every number of their tables, through
the functions that `eval.py` calls; post-processing; preparation of a volume.

Left out: `map_mf_raw` and `map_mf_norm` beyond `eval_andi_a` and `eval_anoddpm`, which are all the recordings hold. In the original's
means a volume without lesion counts 0, or makes them `nan` where nothing is predicted either; in ours it does not take part.
"""

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

from anodiff.data.prepare import prepare
from anodiff.data.prepared import load_prepared
from anodiff.data.readers.subjects import Subject
from anodiff.data.rules import SliceRule
from anodiff.evaluation.baselines import equalise, equalised_map
from anodiff.evaluation.cases import Case
from anodiff.evaluation.metrics import average_precision, dice
from anodiff.evaluation.options import EvalOptions
from anodiff.evaluation.protocols import andi, uad_imag
from anodiff.evaluation.protocols.andi import EQUALISED, scale_to_range
from anodiff.evaluation.protocols.uad_imag import evaluate_threshold, threshold_below_fpr
from anodiff.evaluation.scoring import dice_curve
from anodiff.evaluation.thresholds import yen_threshold
from anodiff.pipelines.postprocessing import PostProcessing, median_filter
from anodiff.volumes.processor import VolumeProcessor

from .recordings import read


METRICS = {"rtol": 0, "atol": 1e-7}
LPS = np.diag([-1.0, -1.0, 1.0, 1.0])  # as BraTS files: array order is the network's


def slices_first(volumes):
    """(volume, H, W, slice) to (volume, slice, H, W)."""
    return np.moveaxis(volumes, -1, 1)


def save_cases(folder, maps, labels, median_size=0):
    """Cases as `eval.py` writes them, every voxel in the brain because the original scores the background."""
    postprocessing = PostProcessing(median_size=median_size, median_dimensions=3)
    files = []
    for number, (volume, mask) in enumerate(zip(slices_first(maps), slices_first(labels), strict=True)):
        brain = np.ones(volume.shape, bool)
        case = Case(
            f"s{number}", postprocessing.filter(volume, brain), brain, mask, mask.any((1, 2)), np.zeros(1), 0.0
        )
        case.save(folder)
        files.append(folder / f"s{number}.npz")
    return files


def check_mean_dice(means, recorded, labels):
    """Means over the volumes with a lesion against recorded ones over all volumes."""
    expected = recorded / labels.any((1, 2, 3)).mean()
    defined = np.isfinite(expected)
    np.testing.assert_allclose(np.asarray(means)[defined], expected[defined], **METRICS)


@pytest.mark.parametrize("branch", ["", "_mf"])
@pytest.mark.parametrize("name", ["eval_andi_a", "eval_anoddpm", "eval_autoddpm", "dae", "eval_thresholding"])
def test_andi_protocol(tmp_path, name, branch):
    golden = read(f"andi/{name}.npz")
    equalised = name == "eval_thresholding"
    labels = golden["eval_labels"] if name == "dae" else read("andi/eval_andi_a.npz")["labels"]
    raw = golden["hist_equalised_flair"] if equalised else golden["eval_map_raw" if name == "dae" else "map_raw"]
    files = save_cases(tmp_path, raw, labels, median_size=int(golden["kernel_size"]) if branch else 0)
    row = {"name": EQUALISED if equalised else name}
    metrics, records, more, _ = andi.score(row, {"test": files}, golden["thresholds"], EvalOptions())
    sweep = more["sweep"]

    check_mean_dice(sweep["dice"], golden["dice" + branch], labels)
    assert metrics["andi_dice_oracle"] == max(sweep["dice"])
    assert metrics["andi_threshold_oracle"] == golden["thresholds"][np.argmax(sweep["dice"])]
    np.testing.assert_allclose(
        [record["andi_threshold_yen"] for record in records], golden["yen_thr" + branch], **METRICS
    )
    check_mean_dice(metrics["andi_dice_yen"], golden["yen_dice" + branch], labels)
    np.testing.assert_allclose(metrics["andi_average_precision"], golden["auprc" + branch], rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["eval_andi_a", "eval_anoddpm", "eval_autoddpm", "dae"])
def test_scaled_and_filtered_maps(name):
    golden = read(f"andi/{name}.npz")
    prefix = "eval_" if name == "dae" else ""
    raw = golden[prefix + "map_raw"]
    np.testing.assert_allclose(
        scale_to_range(raw, raw.min(), raw.max()), golden[prefix + "map_norm"], rtol=0, atol=1e-6
    )
    filtered = np.stack([median_filter(volume, int(golden["kernel_size"]), 3) for volume in raw])
    if "map_mf_raw" in golden:
        np.testing.assert_array_equal(filtered, golden["map_mf_raw"])
    if "map_mf_norm" in golden:
        scaled = scale_to_range(filtered, filtered.min(), filtered.max())
        np.testing.assert_allclose(scaled, golden["map_mf_norm"], rtol=0, atol=1e-6)


def test_postprocessing():
    golden = read("andi/postproc.npz")
    volume, label = golden["volume"][0], golden["label"][0]
    for name in (name for name in golden if name.startswith("median")):
        np.testing.assert_array_equal(median_filter(volume, int(name.removeprefix("median")), 3), golden[name][0])
    scaled = scale_to_range(volume, volume.min(), volume.max())
    np.testing.assert_allclose(scaled, golden["minmax"][0], rtol=0, atol=1e-6)
    threshold = yen_threshold(scaled)
    np.testing.assert_allclose(threshold, golden["yen_thr_of_minmax"], **METRICS)
    binary = scaled > threshold
    np.testing.assert_array_equal(binary, golden["binary"][0])
    dilated = ndimage.binary_dilation(binary)
    np.testing.assert_array_equal(dilated, golden["dilated"][0])
    np.testing.assert_allclose(dice(binary, label), golden["dice_binary"][0], **METRICS)
    np.testing.assert_allclose(dice(dilated, label), golden["dice_dilated"][0], **METRICS)
    # Stitched: all volumes as one, and there is one.
    np.testing.assert_allclose(dice(binary, label), golden["dice_stitched"], **METRICS)


@pytest.mark.parametrize("branch", ["", "_mf"])
def test_uad_imag_protocol(tmp_path, branch):
    golden = read("andi/uadimag_eval.npz")
    maps, labels = golden["maps"].copy(), golden["labels"]
    # Some recorded scores equal a threshold of the grid, and each other, in the float32 of the file only: in the recording they were
    # different and above it. A float between each two of them, and a grid just below them, brings that back.
    for number, index in enumerate(np.argwhere(np.isin(maps, golden["grid"].astype(np.float32)))):
        maps[tuple(index)] *= np.float32(1 - number * 1e-7)
    grid = golden["grid"] * (1 - 1e-6)
    # Where a lesion voxel and another one got equal scores, the recorded precision says which one was higher.
    for score in np.intersect1d(maps[labels], maps[~labels]):
        tied = labels & (maps == score)
        errors = {}
        for side in (np.inf, -np.inf):
            separated = np.where(tied, np.nextafter(maps, np.float32(side)), maps)
            errors[average_precision(separated, labels) - golden["ap"]] = separated
        maps = errors[min(errors, key=abs)]
    files = save_cases(tmp_path, maps, labels, median_size=4 if branch else 0)
    if branch:
        filtered = np.stack([Case.load(path).maps for path in files])
        np.testing.assert_allclose(filtered, slices_first(golden["maps_mf"]), rtol=1e-6)
    metrics, _, more, _ = uad_imag.score({}, {"test": files}, grid, EvalOptions())
    sweep = more["sweep"]
    name = "dice_mf_grid" if branch else "dice_grid"
    check_mean_dice(sweep["dice"], golden[name], labels)
    assert metrics["uad_imag_dice_oracle"] == max(sweep["dice"])
    np.testing.assert_allclose(metrics["uad_imag_average_precision"], golden["ap" + branch], rtol=0, atol=1e-12)
    if branch:
        return
    for threshold, dice_value, rate in zip(
        golden["fixed_thr"], golden["dice_fixed"], golden["fpr_fixed"], strict=True
    ):
        measured = evaluate_threshold(files, threshold)
        check_mean_dice(measured[0], dice_value, labels)
        assert round(measured[1], 5) == pytest.approx(rate, abs=1e-9)  # the original rounds to 5 decimals
    healthy = maps[~labels]
    for target, threshold in zip(golden["target_fpr"], golden["thr_for_fpr"], strict=True):
        assert threshold_below_fpr(healthy, target, thinned=True) == pytest.approx(threshold, abs=1e-12)
        exact = threshold_below_fpr(healthy, target)
        rate = (healthy >= exact).mean()
        assert rate < target <= rate + 2 / healthy.size, "one score more would pass the target"


def test_uad_imag_thresholds_come_from_validation(tmp_path):
    golden = read("andi/uadimag_eval.npz")
    test = save_cases(tmp_path / "test", golden["maps"][1:], golden["labels"][1:])
    # The lower half of the validation volume's slices is healthy.
    labels = golden["labels"][:1].copy()
    labels[..., :4] = False
    validation = save_cases(tmp_path / "validation", golden["maps"][:1], labels)
    files, options = {"test": test, "validation": validation}, EvalOptions(healthy_fpr=0.05)
    metrics = uad_imag.score({}, files, golden["grid"], options).metrics
    curve = dice_curve(golden["maps"][0], labels[0], golden["grid"])
    assert metrics["uad_imag_threshold_validation"] == golden["grid"][curve.argmax()]
    healthy = golden["maps"][0][..., ~labels[0].any((0, 1))]
    assert metrics["uad_imag_threshold_healthy"] == threshold_below_fpr(healthy, 0.05)
    assert metrics["uad_imag_dice_healthy"] == evaluate_threshold(test, metrics["uad_imag_threshold_healthy"])[0]
    # Without a grid, thresholds are scores: doubled maps give doubled thresholds and the same Dice.
    own = uad_imag.score({}, files, None, options).metrics
    doubled_test = save_cases(tmp_path / "test2", 2 * golden["maps"][1:], golden["labels"][1:])
    doubled_validation = save_cases(tmp_path / "validation2", 2 * golden["maps"][:1], labels)
    files = {"test": doubled_test, "validation": doubled_validation}
    doubled = uad_imag.score({}, files, None, options).metrics
    assert doubled["uad_imag_dice_oracle"] == own["uad_imag_dice_oracle"] >= metrics["uad_imag_dice_oracle"] - 0.02
    assert doubled["uad_imag_threshold_oracle"] == pytest.approx(2 * own["uad_imag_threshold_oracle"], rel=1e-6)


def test_equalised_flair():
    golden = read("andi/eval_thresholding.npz")
    images = read("andi/eval_andi_a.npz")["images"]  # (volume, C, H, W, slice) in [0, 1]
    for volume, expected in zip(images, golden["hist_equalised_flair"], strict=True):
        slices = np.moveaxis(volume, -1, 0) * 2 - 1  # (N, C, H, W) in [-1, 1]
        equalised = equalised_map(slices, np.ones((len(slices), *slices.shape[2:]), bool), 0, (-1.0, 1.0))
        np.testing.assert_allclose(equalised, np.moveaxis(expected, -1, 0), rtol=0, atol=2e-6)


def processor(size):
    return VolumeProcessor(modalities=("flair", "t1", "t1ce", "t2"), size=(size, size), clip=False)


def test_volume_to_slices(tmp_path):
    golden = read("andi/preprocess.npz")
    size = int(golden["out_size"])
    own = processor(size)
    files = {}
    for name, array in zip(own.config.modalities, golden["raw"], strict=True):
        files[name] = tmp_path / f"{name}.nii.gz"
        nib.save(nib.Nifti1Image(array, LPS), files[name])
    nib.save(nib.Nifti1Image(golden["seg"], LPS), tmp_path / "seg.nii.gz")
    processed = own.preprocess(files)
    values = (processed.slices.numpy() + 1) / 2  # (N, C, H, W); H and W are y and x
    np.testing.assert_allclose(values.transpose(1, 3, 2, 0), golden["resized"], rtol=0, atol=2e-6)
    np.testing.assert_allclose(2 * processed.units_scale[0], golden["p99"], rtol=1e-6)
    mask = own.preprocess_mask(nib.Nifti1Image((golden["seg"] > 0.5).astype(np.float32), LPS), processed.geometry)
    np.testing.assert_array_equal(mask.transpose(2, 1, 0) > 0, golden["mask_resized"])

    for modality, expected in zip(golden["raw"], golden["hist_resized"], strict=True):
        equalised = processed.geometry.to_network(equalise(modality))
        np.testing.assert_allclose(equalised.transpose(2, 1, 0), expected, rtol=0, atol=2e-6)

    # What the training split keeps: slices with brain and without lesion.
    subjects = [Subject("a", files, masks=(tmp_path / "seg.nii.gz",), split="train")]
    prepare(subjects, own, tmp_path / "set", recipe={}, slices=SliceRule(train="healthy_by_mask"), progress=False)
    kept = load_prepared(tmp_path / "set", "train").read_subject("a")["slice"]
    np.testing.assert_array_equal(kept, golden["healthy_slice_idx"])
