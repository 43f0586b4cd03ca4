"""AnoFPDM's evaluation and data against recorded arrays, through the functions that `eval.py` and `preprocess.py` call: from cases to every
number of a table, from volumes to slices, and the division of the patients.

Left out: `running_auprc_ano` and `running_auc_ano`, means of AUPRC and AUROC over random batches, where ours are of all slices together;
`running_*_ano` of Dice and IoU are means over slices and equal to ours. `num_ano_*` are counts of labels. The original calls precision
what everybody calls recall, and the other way round.
"""

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from anodiff import AnoFPDMScheduler, DDIBPipeline
from anodiff.data.prepare import prepare, read_recipe
from anodiff.data.prepared import load_prepared
from anodiff.data.readers.subjects import Subject
from anodiff.data.rules import SliceRule, SplitRule
from anodiff.evaluation.cases import Case
from anodiff.evaluation.metrics import dice, iou
from anodiff.evaluation.options import EvalOptions
from anodiff.evaluation.protocols import anofpdm, pooled
from anodiff.evaluation.protocols.anofpdm import SliceScores, best_threshold, foreground_of, image_metrics
from anodiff.evaluation.scoring import sweep_thresholds
from anodiff.pipelines.postprocessing import median_filter, remove_small_components
from anodiff.volumes.processor import VolumeProcessor

from .recordings import ToyUNet, load, read


METRICS = {"rtol": 0, "atol": 1e-6}
SWAPPED = {
    "dice": "dice",
    "iou": "iou",
    "precision": "recall",
    "recall": "precision",
    "AUC": "auroc",
    "AUPRC": "auprc",
}
LPS = np.diag([-1.0, -1.0, 1.0, 1.0])


def save_case(folder, maps, mask, labels, name="all", **own):
    """A case as `eval.py` writes it; every pixel in the brain because the original knows none."""
    brain = np.ones(mask.shape, bool)
    Case(name, maps, brain, mask.astype(bool), labels, np.zeros(len(maps)), 0.0, **own).save(folder)
    return [folder / f"{name}.npz"]


def check_values(metrics, golden, prefix, setting):
    for name, expected in zip(golden["metric_names"], golden[f"{prefix}values"], strict=True):
        ours = SWAPPED[str(name)]
        key = f"anofpdm_{ours}_{setting}" + ("_own" if ours not in ("auroc", "auprc") else "")
        assert metrics[key] == pytest.approx(expected, abs=1e-6), key


def test_metrics(tmp_path):
    golden = read("anofpdm/metrics.npz")
    maps, prediction = golden["amap_median"][:, 0], golden["pred"][:, 0].astype(bool)
    np.testing.assert_array_equal(median_filter(golden["amap"][:, 0], 5, 2, border="mirror"), maps)
    # Labels that let every mask pass: the recording scores one mask in both settings.
    own = {"own_mask": prediction, "own_labels": np.ones(len(maps), int)}
    foreground = foreground_of(golden["source"], None, (-1.0, 1.0))
    files = save_case(tmp_path, maps, golden["gt"][:, 0], golden["lab"], foreground=foreground, **own)
    metrics = anofpdm.score({}, {"test": files}, np.array([0.5]), EvalOptions()).metrics
    check_values(metrics, golden, "mixed__", "mixed")
    check_values(metrics, golden, "unhealthy__", "unhealthy")
    unfiltered = SliceScores(0)
    unfiltered.update(prediction, golden["gt"][:, 0].astype(bool))
    own_metrics = {f"anofpdm_{name}_mixed_own": value for name, value in unfiltered.metrics().items()}
    check_values(metrics | own_metrics, golden, "nocc__", "mixed")
    for name in ("dice", "iou"):
        expected = golden[f"running_{name}_ano"]
        assert metrics[f"anofpdm_{name}_unhealthy_own"] == pytest.approx(expected, abs=1e-6)
    assert metrics["anofpdm_dice_mixed_validation"] is None and metrics["anofpdm_dice_mixed_healthy"] is None

    pairs = list(zip(prediction, golden["gt"][:, 0].astype(bool), strict=True))
    np.testing.assert_allclose([dice(*pair) for pair in pairs], golden["dice_per_slice"], **METRICS)
    np.testing.assert_allclose([iou(*pair) for pair in pairs], golden["iou_per_slice"], **METRICS)
    # The original's running value of all slices is the mean of the batches' means.
    kept, running = remove_small_components(prediction, 41, 2), []
    for batch in np.split(np.arange(len(maps)), np.cumsum(golden["running_split"])[:-1]):
        scores = SliceScores()
        scores.update(kept[batch], golden["gt"][batch, 0].astype(bool))
        running.append(scores.metrics()["dice"])
    assert np.mean(running) == pytest.approx(float(golden["running_dice"]), abs=1e-6)


def test_empty_slices_count_one():
    scores = SliceScores()
    scores.update(np.zeros((2, 8, 8), bool), np.zeros((2, 8, 8), bool))
    assert scores.metrics() == {"dice": 1.0, "iou": 1.0, "precision": None, "recall": None}
    assert SliceScores().metrics()["dice"] is None


def test_components():
    golden = read("anofpdm/metrics.npz")
    prediction = golden["pred"][:, 0]
    for source, prefix in ((prediction, "cc_thr"), (golden["cc_in"][:, 0], "cc_out")):
        areas = [int(name.removeprefix(prefix)) for name in golden if name.startswith(prefix)]
        assert areas
        for area in areas:
            kept = remove_small_components(source, area + 1, 2)
            np.testing.assert_array_equal(kept, golden[f"{prefix}{area}"][:, 0])


def test_image_labels():
    golden = read("anofpdm/metrics.npz")
    expected = dict(zip(golden["cls_names"].tolist(), golden["cls_values"], strict=True))
    metrics = image_metrics(golden["cls_pred"], golden["cls_y"])
    assert metrics["accuracy"] == pytest.approx(expected["acc"], abs=1e-6)
    assert metrics["recall"] == pytest.approx(expected["precision"], abs=1e-6)
    assert metrics["precision"] == pytest.approx(expected["recall"], abs=1e-6)
    assert (golden["cls_y"] == 1).sum() == expected["num_ano_total"]
    # Unknown labels do not count.
    more = np.append(golden["cls_pred"], 1), np.append(golden["cls_y"], -1)
    assert image_metrics(*more) == metrics


def test_whole_chain(tmp_path):
    golden = read("anofpdm/fpdm_end_to_end.npz")
    own = {"own_mask": golden["mask_all"][:, 0].astype(bool), "own_labels": golden["pred_lab"]}
    own["foreground"] = foreground_of(golden["x0"], None, (-1.0, 1.0))
    files = save_case(tmp_path, golden["amap"][:, 0], golden["gt"][:, 0], golden["lab"], **own)
    metrics = anofpdm.score({}, {"test": files}, None, EvalOptions()).metrics
    check_values(metrics, golden, "mixed_", "mixed")
    check_values(metrics, golden, "unhealthy_", "unhealthy")
    accuracy = (golden["pred_lab"] == golden["lab"]).mean()
    assert metrics["anofpdm_image_accuracy_own"] == pytest.approx(accuracy)

    # Our own columns take the same masks, of the slices that the method calls anomalous.
    row = {"settings": {"min_component_size": 0}}
    ours, records, *_ = pooled.score(row, {"test": files}, None, EvalOptions())
    gated, reference = golden["mask"][:, 0].astype(bool), golden["gt"][:, 0].astype(bool)
    assert ours["dice_own"] == pytest.approx(dice(gated, reference)) == pytest.approx(records[0]["dice_own"])
    plain = save_case(tmp_path, golden["amap"][:, 0], reference, golden["lab"], "plain")
    assert "dice_own" not in pooled.score(row, {"test": plain}, None, EvalOptions()).metrics


def test_threshold_of_a_grid_of_validation_masks(tmp_path):
    """DDIB's threshold, from the maps of our pipeline."""
    golden = load("anofpdm/ddib.npz")
    names = tuple(f"m{number}" for number in range(golden["val_x"].shape[2]))
    pipe = DDIBPipeline(
        ToyUNet(golden),
        AnoFPDMScheduler(int(golden["T"])),
        VolumeProcessor(modalities=names),
        forward_steps=int(golden["sample_steps"]),
        guidance_scale=float(golden["w"]),
        modalities=tuple(names[channel] for channel in golden["modality"]),
    )
    pipe.set_progress_bar_config(disable=True)
    files = []
    for number, (images, masks) in enumerate(zip(golden["val_x"], golden["val_mask"], strict=True)):
        maps = pipe.compute_maps(images, list(range(len(images))), batch_size=4, **pipe.default_settings()).maps
        filtered = median_filter(maps.numpy(), 5, 2, border="mirror")
        masks = masks[:, 0].numpy().astype(bool)
        files += save_case(tmp_path, filtered, masks, masks.any((1, 2)).astype(int), f"v{number}")
    threshold, value = best_threshold(files, sweep_thresholds(anofpdm.SWEEP))
    assert threshold == pytest.approx(float(golden["val_thr_opt"]), abs=1e-9)
    assert value == pytest.approx(float(golden["val_dice_max"]), abs=1e-5)


def test_volume_to_slices(tmp_path):
    golden = read("anofpdm/preprocess.npz")
    recipe = read_recipe("brats21_anofpdm")
    modalities = golden["modalities"].tolist()
    assert recipe["processor"]["modalities"] == modalities
    # The recorded program reads the voxel axes of the file as (H, W), so the network sees the transposed image.
    files = {}
    for name in modalities:
        files[name] = tmp_path / f"{name}.nii.gz"
        nib.save(nib.Nifti1Image(golden[f"vol_{name}"].transpose(1, 0, 2), LPS), files[name])
    nib.save(nib.Nifti1Image(golden["seg"].transpose(1, 0, 2), LPS), tmp_path / "seg.nii.gz")
    subject = Subject("s", files, (tmp_path / "seg.nii.gz",), split="test")
    rules = SliceRule(**recipe["slices"])
    processor = VolumeProcessor.from_dict(recipe["processor"])
    prepare([subject], processor, tmp_path / "set", recipe={}, slices=rules, progress=False)
    split = load_prepared(tmp_path / "set", "test")
    np.testing.assert_array_equal(split.slices, golden["slice_indices"])
    np.testing.assert_array_equal(split.labels, golden["labels_all"])

    unscaled = VolumeProcessor.from_dict({**recipe["processor"], "intensity": "percentile", "clip": False})
    before = (unscaled.preprocess(files).slices.numpy() + 1) / 2
    item = split.read_subject("s")
    recorded = [name.removeprefix("loader_x_") for name in golden if name.startswith("loader_x_")]
    assert recorded
    for z in recorded:
        np.testing.assert_allclose(before[int(z), :, ::2, ::2], golden[f"saved_x_{z}"][0], rtol=0, atol=1e-5)
        row = item["slice"].tolist().index(int(z))
        image, mask = item["image"][row], item["mask"][row]
        np.testing.assert_allclose(image[:, ::2, ::2], golden[f"loader_x_{z}"], rtol=0, atol=1e-5)
        for statistic in ("min", "max", "mean"):
            expected = golden[f"loader_chan_{statistic}_{z}"]
            np.testing.assert_allclose(getattr(image, statistic)((1, 2)), expected, rtol=0, atol=1e-5)
        np.testing.assert_array_equal(mask[:, ::2, ::2], golden[f"loader_gt_{z}"])
        assert mask.sum() == golden[f"loader_gt_sum_{z}"]
        assert item["label"][row] == golden[f"loader_lab_{z}"]


@pytest.mark.parametrize("recipe", ["brats21_anofpdm", "atlas_anofpdm"])
def test_division_of_the_patients(recipe):
    golden = read("anofpdm/preprocess.npz")
    rule = SplitRule(**read_recipe(recipe)["split"])
    counts = [name.removeprefix("split_order_") for name in golden if name.startswith("split_order_")]
    assert counts
    for count in counts:
        names = [f"patient_{number:05d}" for number in range(int(count))]
        split_of = rule.assign([Subject(name, Path("x")) for name in reversed(names)])
        order = golden[f"split_order_{count}"]
        sizes = golden[f"split_counts_{count}"]
        expected = np.repeat(["train", "validation", "test"], sizes)
        assert [split_of[names[index]] for index in order] == expected.tolist()
