"""The protocols of ANDi and UAD-IMAG: what the recorded arrays do not hold."""

import numpy as np
import pytest

from anodiff.evaluation.cases import Case
from anodiff.evaluation.options import EvalOptions
from anodiff.evaluation.protocols import andi, uad_imag


THRESHOLDS = np.linspace(0.05, 0.95, 19)


def save(folder, name, *, lesion, false_positives=0.0, seed=0):
    """A volume with scores below 0.6 and, if it has a lesion, about 0.8 in there; `false_positives` is the highest score elsewhere."""
    generator = np.random.default_rng(seed)
    maps = generator.random((4, 10, 10)).astype(np.float32) * 0.6
    mask = np.zeros(maps.shape, bool)
    if lesion:
        mask[1:3, 2:6, 2:6] = True
        maps[mask] = generator.normal(0.75, 0.1, mask.sum()).clip(0.3, 0.95)
    maps[0, 0] = np.linspace(0, false_positives or 0.6, 10)
    maps[3, 9, 9] = 0.0
    brain = np.ones(maps.shape, bool)
    Case(name, maps, brain, mask, mask.any((1, 2)).astype(int), np.zeros(4), 0.0).save(folder)
    return folder / f"{name}.npz"


def score(protocol, files):
    metrics, records, more, _ = protocol.score(
        {"name": "any"}, {"test": files, "validation": files}, THRESHOLDS, EvalOptions()
    )
    return metrics, more["sweep"], records


@pytest.mark.parametrize(("protocol", "prefix"), [(andi, "andi"), (uad_imag, "uad_imag")])
def test_dice_is_averaged_over_the_same_volumes_at_every_threshold(tmp_path, protocol, prefix):
    """Volumes without a lesion, with scores up to 0.85, have a Dice of 0 below that and none above: were they part of the mean, the
    best threshold would be where they are not."""
    # The same range of scores with and without them, so that ANDi's scaling is the same.
    lesions = [save(tmp_path, f"l{seed}", lesion=True, false_positives=1.0, seed=seed) for seed in range(3)]
    healthy = [save(tmp_path, f"h{seed}", lesion=False, false_positives=0.85, seed=10 + seed) for seed in range(2)]
    alone, sweep, _ = score(protocol, lesions)
    together, sweep_together, _ = score(protocol, lesions + healthy)
    assert alone[f"{prefix}_threshold_oracle"] < 0.85
    for name in ("dice_oracle", "threshold_oracle"):
        assert together[f"{prefix}_{name}"] == alone[f"{prefix}_{name}"]
    assert sweep_together == sweep
    # They count where all voxels are pooled.
    assert together[f"{prefix}_average_precision"] < alone[f"{prefix}_average_precision"]


def test_without_any_lesion_there_is_no_dice(tmp_path):
    files = [save(tmp_path, "h", lesion=False)]
    metrics, sweep, records = score(andi, files)
    assert metrics == dict.fromkeys(metrics) and sweep["dice"] == [None] * len(THRESHOLDS)
    assert records[0].keys() == {"andi_threshold_yen"}
