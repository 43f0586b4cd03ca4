"""What a calibrated checkpoint says of a result: how rare its scores are among healthy scans, and how probable a lesion
is.

The configuration holds the record as `calibration`; [`~evaluation.conformal.calibrate_conformal`] makes it. Nothing
here changes a map, a score or a mask."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict

import numpy as np
import torch

from ..checks import check_choice, check_keys
from ..hub.configuration import plain


# N slices of one volume, H x W pixels.

# What a promise is about: the score of a scan, or the share of a scan's slices or of its voxels that are marked.
UNITS = ("scan", "slice", "voxel")
RECORD = ("alpha", "data", "split", "settings", "slices", "guarantees", "left_out", "probability")
# Which slices of a scan were counted, of the recipe of the prepared set.
COUNTED = {"min_brain": 0.0, "first": None, "last": None, "step": 1, "min_sum": 0.0}


def check_calibration(record: Mapping | None) -> None:
    """Raises a `ValueError` unless `record` is one of a calibration, or `None`."""
    if record is None:
        return
    if not isinstance(record, Mapping) or set(RECORD) - set(record):
        raise ValueError(
            "`calibration` must be the record that `eval.py --calibrate conformal` stores, with"
            f" {', '.join(RECORD)}, got {str(record):.100}."
        )
    check_keys("calibration", record, RECORD, "the record of a calibration")
    for unit in record["guarantees"]:
        check_choice("calibration.guarantees", unit, UNITS)


def describe_scoring(pipeline, settings: Mapping, seed: int | None) -> dict:
    """Returns what scores depend on besides the scan and the weights, as JSON has it: the settings of `compute_maps`, the
    post-processing but for what only masks depend on, scheduler and processor, the type of the weights, and the seed."""
    postprocessing = asdict(pipeline.postprocessing)
    del postprocessing["min_component_size"]
    described = {
        **postprocessing,
        **settings,
        "scheduler": {name: value for name, value in pipeline.scheduler.config.items() if not name.startswith("_")},
        "processor": pipeline.processor.settings(),
        "dtype": str(next(pipeline.unet.parameters()).dtype).removeprefix("torch."),
        "seed": None if pipeline.deterministic else seed,
    }
    # A function, such as AutoDDPM's `perceptual_distance`, is never what a calibration has recorded.
    return json.loads(json.dumps(plain(described), default=repr))


def find_changes(record: Mapping, scoring: Mapping) -> list[str]:
    """Returns the names of what differs between the calibration and a call, as of [`describe_scoring`]."""
    there = json.loads(json.dumps(plain(record["settings"])))
    return sorted(name for name in {*there, *scoring} if there.get(name) != scoring.get(name))


def p_values(guarantee: Mapping, scores: np.ndarray) -> np.ndarray:
    """
    Returns the conformal p-values of scores, float64 in [1/(n+1), 1], of the shape of `scores`: 1 more than the number
    of healthy subjects with a score that is as high, over n + 1; of slices and voxels the sum of the subjects' shares
    instead of the number. A score is above the threshold of a level alpha where its p-value is at most alpha.

    Args:
        guarantee (`dict`): Of one unit: rising `scores`, and the p-values `p_values` of what lies above each of them.
    """
    steps = np.concatenate([[1.0], guarantee["p_values"]])
    return steps[np.searchsorted(np.asarray(guarantee["scores"], np.float64), scores, side="left")]


def lesion_probability(probability: Mapping, scores: np.ndarray) -> np.ndarray:
    """Returns P(lesion | score) of voxels, float64 in [0, 1], of the shape of `scores`: linear between the rising
    `scores` of the table, constant beyond them, and never falling."""
    return np.interp(scores, probability["scores"], probability["probabilities"])


def counted_slices(record: Mapping, brain: np.ndarray, *, across: bool) -> tuple[np.ndarray | None, str | None]:
    """
    Returns the numbers of the slices of a whole scan that the calibration would have counted, or `None` and why that
    cannot be said.

    Args:
        brain (`np.ndarray` of shape `(N, H, W)`, bool): Of all its slices, on the network's grid.
        across (`bool`): Whether a map depends on other slices of its scan.
    """
    rule = COUNTED | dict(record["slices"])
    if rule["min_sum"] or rule["step"] != 1:
        return None, "the calibration took slices by `min_sum` or `step`, which are not known of a scan"
    share = brain.mean((1, 2))
    numbers = np.arange(len(brain))
    last = len(brain) - 1 if rule["last"] is None else rule["last"]
    inside = (numbers >= (rule["first"] or 0)) & (numbers <= last)
    kept = np.flatnonzero((share > 0) & (share >= rule["min_brain"]) & inside)
    if across and len(kept) < np.count_nonzero(share):
        return None, "maps depend on neighbouring slices, and the calibration did not see all slices with brain"
    if not len(kept):
        return None, "the calibration counts no slice of this scan"
    return kept, None


def add_claims(output, pipeline, prepared, maps: torch.Tensor, settings: Mapping, seed: int | None) -> None:
    """
    Adds to a result what the calibration of its pipeline says of it: `guarantee`, as of [`make_claims`], and where that
    holds the maps of [`make_maps`].

    Args:
        output ([`AnomalyOutput`]): Of a call; its other values stay as they are.
        prepared ([`~pipelines.slices.PreparedSlices`]): Its slices.
        maps (`torch.Tensor` of shape `(N, H, W)`): Their filtered maps.
        settings, seed: Of the call; the seed is `None` if the noise was given.
    """
    brain, processed = prepared.brain.cpu().numpy(), prepared.processed
    if prepared.brain_origin == "none" and pipeline.processor.config.brain_mask != "none":
        reason = "calibrated within brains, and no brain mask was given: all of the slices counts"
        output.guarantee = {"holds": False, "reason": reason}
    else:
        output.guarantee = make_claims(pipeline, maps.numpy(), brain, settings, seed)
    if not output.guarantee["holds"]:
        return
    if processed is not None:
        brain = processed.source.as_given(processed.geometry.to_input(brain.astype(np.uint8), nearest=True)) > 0
    for name, values in make_maps(pipeline.config.calibration, output.anomaly_map, brain).items():
        setattr(output, name, values)


def make_claims(pipeline, maps: np.ndarray, brain: np.ndarray, settings: Mapping, seed: int | None) -> dict:
    """
    Returns what the calibration says of a scan, for `AnomalyOutput.guarantee`: `holds`, and `reason` where it does not
    hold for this call; else `alpha`, and for every unit that was calibrated its `threshold`, `n`, `population`, and of
    the scan `score`, `p_value`, `healthy_rank` (share of the healthy scans with a lower score) and `above`, of slices and
    voxels the `share_above`.

    Args:
        maps (`np.ndarray` of shape `(N, H, W)`): Filtered, on the network's grid.
        brain (`np.ndarray` of shape `(N, H, W)`, bool): Where there is brain.
        settings, seed: Of the call; the seed is `None` if the noise was given.
    """
    record = pipeline.config.calibration
    changes = find_changes(record, describe_scoring(pipeline, settings, seed))
    if changes:
        reason = f"calibrated with other values of {', '.join(changes)}"
    else:
        chosen = pipeline.postprocessing
        filtered_across = chosen.median_size > 1 and chosen.median_dimensions == 3
        context = pipeline.processor.config.context > 0
        across = filtered_across or context or pipeline.looks_across_slices(**settings)
        kept, reason = counted_slices(record, brain, across=across)
    if reason is not None:
        return {"holds": False, "reason": reason}
    maps, brain = maps[kept], brain[kept]
    claims = {"holds": True, "alpha": record["alpha"], "data": record["data"], "split": record["split"]}
    for unit, guarantee in record["guarantees"].items():
        claim = {name: guarantee[name] for name in ("n", "population", "threshold")}
        if unit == "scan":
            score, n = pipeline.postprocessing.score(maps, brain), guarantee["n"]
            p_value = float(p_values(guarantee, np.array(score)))
            claim |= {"score": score, "p_value": p_value, "above": score > guarantee["threshold"]}
            # p (n + 1) - 1 healthy scans have a score that is as high.
            claim["healthy_rank"] = min(max(1.0 - (p_value * (n + 1) - 1) / n, 0.0), 1.0)
        else:
            scores = maps[brain] if unit == "voxel" else pipeline.postprocessing.score_slices(maps, brain)
            claim["share_above"] = float((scores > guarantee["threshold"]).mean())
        claims[unit] = claim
    if record["probability"] is not None:
        claims["probability"] = {name: record["probability"][name] for name in ("prevalence", "subjects")}
    return claims


def make_maps(record: Mapping, anomaly_map, brain) -> dict:
    """
    Returns the maps that the calibration makes of an anomaly map, float32 in [0, 1], 0 outside the brain:
    `probability_map`, P(lesion | score), and `healthy_rank_map`, 1 - p-value of the voxel among healthy voxels, which is no
    probability of a lesion; each only if it was calibrated.

    Args:
        anomaly_map (`np.ndarray` or `torch.Tensor`): Raw scores; the results are of its kind and shape.
        brain (`np.ndarray` of that shape, bool): Where there is brain.
    """
    scores, made = np.asarray(anomaly_map), {}
    if record["probability"] is not None:
        made["probability_map"] = lesion_probability(record["probability"], scores)
    if "voxel" in record["guarantees"]:
        made["healthy_rank_map"] = 1.0 - p_values(record["guarantees"]["voxel"], scores)
    made = {name: np.where(brain, values, 0.0).astype(np.float32) for name, values in made.items()}
    return {name: torch.from_numpy(array) for name, array in made.items()} if torch.is_tensor(anomaly_map) else made


def describe_claims(claims: Mapping) -> str:
    """Returns what [`make_claims`] says of a scan in a few words."""
    if not claims["holds"]:
        return f"no guarantee: {claims['reason']}"
    if "scan" not in claims:
        return f"guarantee for {' and '.join(f'{unit}s' for unit in UNITS if unit in claims)} at alpha {claims['alpha']:g}"
    scan = claims["scan"]
    return (
        f"score above {scan['healthy_rank']:.0%} of the {scan['n']} healthy subjects of the calibration,"
        f" p = {scan['p_value']:.2g},"
        f" {'above' if scan['above'] else 'not above'} the threshold of alpha {claims['alpha']:g}"
    )
