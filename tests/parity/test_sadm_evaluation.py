"""Post-processing, thresholds and metrics of cDDPM and SADM against recorded arrays, through the functions that `eval.py` calls.

Left out: `TP`, `FP`, `TN` and `FN`, which the recording exchanges, are tested under their right names; `FPR` (the false discovery rate),
`Specificity` (FP / (FP + FN)), `TPR` (the recall) and everything per slice, along the sagittal axis, are not ours; `healthy_t*` are all the
smallest score. `l2reco*` is no metric of a table.
"""

import numpy as np
import pytest
import torch

from anodiff.evaluation.cases import Case
from anodiff.evaluation.metrics import auroc, average_precision, dice
from anodiff.evaluation.options import EvalOptions
from anodiff.evaluation.protocols import sadm
from anodiff.evaluation.protocols.sadm import find_best_val, reconstruction_metrics, volume_metrics
from anodiff.evaluation.thresholds import threshold_for_dice, threshold_for_fpr
from anodiff.pipelines.postprocessing import PostProcessing, erode_brain, median_filter, remove_small_components
from anodiff.pipelines.ssim import ssim_map

from .recordings import read, recordings


SPLITS = ("val", "test")


def volumes(golden, split):
    """Number of each volume of a split, and its arrays (N, H, W): the last axis of the recording is that of the slices."""
    names = sorted(name.removesuffix("_map") for name in golden if name.startswith(split) and name.endswith("_map"))
    names = [name for name in names if name[len(split) :].isdigit()]
    assert names
    # The volumes lie in one file, whichever methods it is of.
    images = read("sadm/eval_cddpm.npz")
    for number, name in enumerate(names):
        arrays = {key: images[f"{name}_{key}"] for key in ("img", "rec", "seg", "mask")}
        arrays |= {key: golden[f"{name}_{key}"] for key in ("map", "cam") if f"{name}_{key}" in golden}
        arrays = {key: np.moveaxis(array, -1, 0) for key, array in arrays.items()}
        yield (
            number,
            name,
            {key: array.astype(bool if key in ("seg", "mask") else np.float32) for key, array in arrays.items()},
        )


def only(golden, prefix):
    """The array whose name begins so and ends with the distance of its slices."""
    [name] = [name for name in golden if name.startswith(prefix) and name.removeprefix(prefix).isdigit()]
    return golden[name]


def test_maps_of_cddpm():
    for golden in map(read, recordings("sadm/eval_cddpm*.npz")):
        erosion = int(golden["erode_iterations"])
        for split in SPLITS:
            for _, name, volume in volumes(golden, split):
                residual, eroded = np.abs(volume["img"] - volume["rec"]), erode_brain(volume["mask"], erosion)
                inside = np.where(eroded, residual, np.float32(0))
                expected = median_filter(inside, 5, 3)
                np.testing.assert_allclose(expected, volume["map"], rtol=0, atol=1e-6)
                # What the median carries out of the brain, the original keeps, and we do not.
                options = PostProcessing(median_size=5, median_dimensions=3, erosion=erosion)
                filtered = options.filter(residual, volume["mask"])
                np.testing.assert_array_equal(filtered, np.where(eroded, expected, 0))
                paper = PostProcessing(
                    median_size=5, median_dimensions=3, erosion=erosion, filter_order="median_first"
                ).filter(residual, volume["mask"])
                in_brain = np.where(volume["mask"], residual, np.float32(0))
                np.testing.assert_array_equal(paper, np.where(eroded, median_filter(in_brain, 5, 3), 0))
                assert (paper != filtered).any()
                if name == "val0":
                    stages = golden["stage_slices"]
                    np.testing.assert_array_equal(np.moveaxis(inside[stages], 0, -1), golden["stage_eroded_val0"])
                    np.testing.assert_array_equal(
                        np.moveaxis(expected[stages], 0, -1), only(golden, "stage_median_val0_s")
                    )
        np.testing.assert_array_equal(
            remove_small_components(np.moveaxis(golden["cc_in"], -1, 0), 8, 3), np.moveaxis(golden["cc_out"], -1, 0)
        )


def test_maps_of_sadm():
    for golden in map(read, recordings("sadm/eval_sadm*.npz")):
        postprocessing = PostProcessing(median_size=5, median_dimensions=3)
        for split in SPLITS:
            for _, name, volume in volumes(golden, split):
                # In the axes of the recording, since variances in float32 round differently in others, by up to 3e-4.
                pair = [torch.from_numpy(volume[key].copy()) for key in ("rec", "img")]
                similarity = ssim_map(*(values.permute(1, 2, 0) for values in pair)).permute(2, 0, 1).numpy()
                np.testing.assert_allclose(ssim_map(*pair), similarity, rtol=0, atol=1e-3)
                maps = postprocessing.filter(1 - similarity, volume["mask"], volume["cam"])
                np.testing.assert_allclose(maps, volume["map"], rtol=0, atol=1e-5)
                if name != "val0":
                    continue
                chosen = golden["ssim_slices"]
                np.testing.assert_allclose(
                    np.moveaxis(similarity[chosen], 0, -1), only(golden, "ssim_val0_s"), rtol=0, atol=1e-5
                )
                # lambda03 is 0.3.
                [prefix] = {key.partition("_")[0] for key in golden if key.startswith("lambda")}
                weight = int(prefix.removeprefix("lambda")) / 10
                weighted = postprocessing.filter(
                    weight * (1 - similarity), volume["mask"], (1 - weight) * volume["cam"]
                )
                np.testing.assert_allclose(
                    np.moveaxis(weighted[chosen], 0, -1), only(golden, f"{prefix}_val0_map_s"), rtol=0, atol=1e-5
                )
                best, _ = find_best_val([weighted], [volume["seg"]])
                assert best == pytest.approx(golden[f"{prefix}_val_BestDice"][0], abs=1e-6)


@pytest.mark.parametrize("pattern", ["sadm/eval_cddpm*.npz", "sadm/eval_sadm*.npz"])
def test_metrics(pattern, tmp_path):
    for golden in map(read, recordings(pattern)):
        # Only cDDPM's program removes components.
        min_component_size = 8 if "erode_iterations" in golden else 0
        files = {}
        for split in SPLITS:
            for _, name, volume in volumes(golden, split):
                maps, mask = volume["map"], volume["seg"]
                case = Case(
                    subject=name,
                    maps=maps,
                    brain=volume["mask"],
                    mask=mask,
                    labels=mask.any((1, 2)).astype(int),
                    slice_scores=np.zeros(len(maps)),
                    volume_score=float(maps[volume["mask"]].mean()),
                    error=np.abs(volume["img"] - volume["rec"]),
                )
                case.save(tmp_path)
                files.setdefault(split, []).append(tmp_path / f"{name}.npz")
        row = {"settings": {"min_component_size": min_component_size}}
        metrics, records, *_ = sadm.score(row, {**files, "validation": files["val"]}, None, EvalOptions())
        assert metrics["sadm_threshold_search"] == pytest.approx(float(golden["threshold_total"]), rel=1e-6)
        for ours, theirs in (
            ("dice_search", "DiceScore"),
            ("best_dice", "BestDice"),
            ("auroc", "AUC"),
            ("auprc", "AUPRC"),
            ("precision_search", "Precision"),
            ("recall_search", "Recall"),
            ("accuracy_search", "Accuracy"),
            ("hausdorff_search", "Haus"),
            ("l1", "l1recoErrorAll"),
            ("l1_lesion", "l1recoErrorUnhealthy"),
            ("l1_healthy", "l1recoErrorHealthy"),
            ("tn", "TP"),
            ("fn", "FP"),
            ("fp", "TN"),
            ("tp", "FN"),
            ("lesion_voxels", "lesionSize"),
        ):
            name = f"test_{theirs}" if f"test_{theirs}" in golden else f"test_{theirs}PerVol"
            np.testing.assert_allclose(
                [record[f"sadm_{ours}"] for record in records], golden[name], rtol=0, atol=1e-6, err_msg=ours
            )
        assert metrics["sadm_dice_search"] == pytest.approx(float(golden["test_DicePerVolMean"]), abs=1e-12)
        assert metrics["sadm_dice_search_std"] == pytest.approx(float(golden["test_DicePerVolStd"]), abs=1e-12)
        assert metrics["sadm_best_dice"] == pytest.approx(float(golden["test_BestDicePerVolMean"]), abs=1e-12)
        assert metrics["sadm_auprc"] == pytest.approx(float(golden["test_AUPRCPerVolMean"]), abs=1e-6)

        # The original evaluates each validation volume at its own best threshold.
        for number, path in enumerate(files["val"]):
            case = Case.load(path)
            best, threshold = find_best_val([case.maps], [case.mask])
            assert best == pytest.approx(golden["val_BestDicePerVol"][number], abs=1e-12)
            assert threshold == pytest.approx(golden["val_BestThresholdPerVol"][number], rel=1e-6)
            predicted = remove_small_components(case.maps > np.float32(threshold), min_component_size, 3)
            values = volume_metrics(predicted, case.mask)
            for ours, theirs in (
                ("dice", "DiceScore"),
                ("precision", "Precision"),
                ("recall", "Recall"),
                ("hausdorff", "Haus"),
            ):
                assert values[ours] == pytest.approx(golden[f"val_{theirs}PerVol"][number], abs=1e-6), ours
            errors = reconstruction_metrics(case.error, case.mask)
            assert errors["l1_lesion"] == pytest.approx(golden["val_l1recoErrorUnhealthy"][number], abs=1e-6)
            assert errors["l1_ratio"] == pytest.approx(errors["l1_lesion"] / errors["l1_healthy"])
            assert case.volume_score == pytest.approx(golden["val_AnomalyScoreRecoPerVol"][number], abs=1e-6)


def test_threshold_search():
    for golden in map(read, recordings("sadm/threshold*.npz")):
        numbers = [name[1:] for name in golden if name[0] == "x" and name[1:].isdigit()]
        assert numbers
        for number in numbers:
            scores, labels = golden[f"x{number}"], golden[f"y{number}"]
            best, threshold = find_best_val([scores], [labels])
            assert best == float(golden[f"best_dice{number}"]) == float(golden[f"dice_at_best{number}"])
            assert threshold == pytest.approx(float(golden[f"best_thr{number}"]), rel=1e-12)
            assert dice(scores > threshold, labels) == best
            # Several volumes are searched together.
            half = len(scores) // 2
            halves = find_best_val([scores[:half], scores[half:]], [labels[:half], labels[half:]])
            assert halves == (best, threshold)
            exact = dice(scores.astype(np.float32) > np.float32(threshold_for_dice([scores], [labels])), labels)
            assert exact >= float(golden[f"exhaustive_best_dice{number}"]) - 1e-12 >= best - 2e-12
            assert average_precision(scores, labels) == pytest.approx(float(golden[f"ap{number}"]), abs=1e-6)
            assert auroc(scores, labels) == pytest.approx(float(golden[f"auroc{number}"]), abs=1e-6)
        healthy = golden["healthy_x"]
        for share in (0.01, 0.05, 0.1):
            threshold = threshold_for_fpr(healthy, share)
            # The lowest threshold that keeps to the share: the next lower score would not.
            above = np.count_nonzero(healthy.astype(np.float32) > np.float32(threshold))
            assert above <= share * healthy.size < above + 2


def test_filters():
    for golden in map(read, recordings("sadm/postproc*.npz")):

        def to_slices(name, golden=golden):
            array = golden[name]
            return np.moveaxis(array, -1, 0) if array.ndim == 3 else array[None]

        np.testing.assert_array_equal(remove_small_components(to_slices("cc_in"), 8, 3), to_slices("cc_out"))
        np.testing.assert_array_equal(
            median_filter(to_slices("median_in"), 5, 3), to_slices("median5").astype(np.float32)
        )
        np.testing.assert_array_equal(
            median_filter(to_slices("slice"), 5, 2), to_slices("median2d5").astype(np.float32)
        )
        iterations = [int(name.removeprefix("eroded_it")) for name in golden if name.startswith("eroded_it")]
        assert iterations
        for number in iterations:
            eroded = np.where(erode_brain(to_slices("mask"), number), to_slices("slice"), 0)
            np.testing.assert_array_equal(eroded, to_slices(f"eroded_it{number}"))
