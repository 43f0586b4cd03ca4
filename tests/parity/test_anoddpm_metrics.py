"""Metrics of AnoDDPM's program against recorded arrays. Its `precision` is the recall, its `recall` the precision and
its `FPR` the false omission rate FN / (FN + TN); the arrays carry its names, and the right values are checked beside
them."""

import numpy as np
import pytest
from sklearn.metrics import confusion_matrix

from anodiff.evaluation.metrics import (
    PooledScores,
    auroc,
    dice,
    false_positive_rate,
    iou,
    precision,
    psnr,
    recall,
    ssim,
)

from .recordings import read, recordings


TOLERANCE = {"rtol": 0, "atol": 1e-5}  # float32 sums and epsilons of 1e-6 in the denominators of the original


@pytest.fixture(params=recordings("anoddpm/metrics*.npz"), ids=lambda path: path.stem)
def golden(request):
    return read(request.param)


def per_image(function, *arrays, **kwargs):
    return np.array([function(*items, **kwargs) for items in zip(*arrays, strict=True)])


def test_masks_under_the_original_names(golden):
    pred, gt = golden["square_error"] > golden["threshold"], golden["mask"] > 0
    np.testing.assert_array_equal(pred, golden["prediction"] > 0)
    np.testing.assert_allclose(per_image(dice, pred, gt), golden["orig_dice"], **TOLERANCE)
    np.testing.assert_allclose(per_image(iou, pred, gt, empty=0.0), golden["orig_iou"], **TOLERANCE)
    # The epsilon of the original makes 0 of a recall without lesion, and of a precision without prediction.
    np.testing.assert_allclose(np.nan_to_num(per_image(recall, pred, gt)), golden["orig_precision"], **TOLERANCE)
    np.testing.assert_allclose(np.nan_to_num(per_image(precision, pred, gt)), golden["orig_recall"], **TOLERANCE)
    np.testing.assert_allclose(per_image(precision, ~pred, gt), golden["orig_fpr"], **TOLERANCE)


def test_masks_under_the_right_names(golden):
    pred, gt = golden["prediction"] > 0, golden["mask"] > 0
    counts = [
        confusion_matrix(g.ravel(), p.ravel(), labels=[False, True]).ravel() for p, g in zip(pred, gt, strict=True)
    ]
    tn, fp, fn, tp = np.array(counts, dtype=np.float64).T
    with np.errstate(invalid="ignore"):
        np.testing.assert_allclose(per_image(precision, pred, gt), tp / (tp + fp), rtol=1e-12)
        np.testing.assert_allclose(per_image(recall, pred, gt), tp / (tp + fn), rtol=1e-12)
        np.testing.assert_allclose(per_image(false_positive_rate, pred, gt), fp / (fp + tn), rtol=1e-12)


def test_auroc_per_image_and_pooled(golden):
    scores, gt = golden["square_error"], golden["mask"] > 0
    np.testing.assert_allclose(per_image(auroc, scores, gt), golden["orig_auc"], **TOLERANCE)
    pooled = PooledScores()
    for image, mask in zip(scores, gt, strict=True):
        pooled.update(image, mask)
    np.testing.assert_allclose(pooled.auroc(), golden["orig_auc_pooled"], **TOLERANCE)
    np.testing.assert_allclose(pooled.dice_at(golden["threshold"]), dice(scores > golden["threshold"], gt), rtol=1e-12)


def test_image_quality(golden):
    real, recon = golden["real"][:, 0], golden["recon"][:, 0]
    peaks = real.max(axis=(1, 2))
    values = [psnr(x, y, data_range=peak) for x, y, peak in zip(real, recon, peaks, strict=True)]
    np.testing.assert_allclose(values, golden["orig_psnr"], **TOLERANCE)
    np.testing.assert_allclose(per_image(ssim, real, recon, data_range=2.0), golden["orig_ssim"], **TOLERANCE)


def test_row_of_the_table(golden):
    pred, gt = golden["prediction"] > 0, golden["mask"] > 0
    columns = [
        per_image(dice, pred, gt),
        per_image(iou, pred, gt, empty=0.0),
        np.nan_to_num(per_image(recall, pred, gt)),
        np.nan_to_num(per_image(precision, pred, gt)),
        per_image(precision, ~pred, gt),
        per_image(auroc, golden["square_error"], gt),
    ]
    np.testing.assert_allclose(np.nanmean(columns, axis=1), golden["mean_row"], **TOLERANCE)
    np.testing.assert_allclose(np.nanstd(columns, axis=1), golden["std_row"], **TOLERANCE)
