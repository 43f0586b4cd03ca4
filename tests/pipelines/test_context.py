"""Networks that see the neighbours of a slice."""

import numpy as np
import PIL.Image
import pytest
import torch

import anodiff
from anodiff import AnoDDPMScheduler, AnomalyPipeline
from anodiff.pipelines.guarantee import describe_scoring, find_changes, make_claims

from ..tiny import SIZE, assert_same_map, make_components, make_pipeline, make_slices, make_volume
from .test_contract import PIPELINES


SEEING = [name for name in PIPELINES if getattr(anodiff, name).sees_neighbours]
MODALITIES = ("flair", "t1")


def test_methods_that_predict_noise_see_neighbours():
    expected = ["ANDiPipeline", "AnoDDPMPipeline", "AnoFPDMPipeline", "AutoDDPMPipeline", "DDIBPipeline"]
    assert sorted(SEEING) == expected


@pytest.mark.parametrize("name", SEEING)
def test_a_network_that_ignores_neighbours_makes_the_maps_of_one_that_has_none(name):
    """Inputs and outputs of the neighbours have no weight, and the slice itself has the same noise."""
    alone = make_pipeline(name, MODALITIES, median_size=0)
    unet = make_components(name, 6)["unet"]
    own, weights = slice(2, 4), unet.state_dict()
    for key, value in alone.unet.state_dict().items():
        if key == "conv_in.weight":
            weights[key] = torch.zeros_like(weights[key])
            weights[key][:, own] = value
        elif key.startswith("conv_out."):
            weights[key] = torch.full_like(weights[key], 0.05)
            weights[key][own] = value
        else:
            weights[key] = value
    unet.load_state_dict(weights)
    wide = make_pipeline(name, MODALITIES, processor_settings={"context": 1}, unet=unet, median_size=0)
    slices = make_slices(4, 2)

    def noise(draws, indices, shape):
        drawn = torch.randn(50, 4, 6, SIZE, SIZE, generator=torch.Generator().manual_seed(2))[draws, indices]
        return drawn if shape[1] == 6 else drawn[:, own]

    given = {} if alone.deterministic else {"noise": noise}
    results, expected = wide(slices, **given), alone(slices, **given)
    assert_same_map(results.anomaly_map, expected.anomaly_map, 1e-4)
    assert (results.reconstruction is None) == (expected.reconstruction is None)
    if expected.reconstruction is not None:
        assert_same_map(results.reconstruction, expected.reconstruction, 1e-4)


def test_the_network_sees_slices_in_their_order_and_no_other_volume():
    pipe = make_pipeline("AnoDDPMPipeline", MODALITIES, processor_settings={"context": 1}, noise_level=1)
    seen = []
    pipe.unet.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    slices, brain = make_slices(7, 2), torch.ones(7, SIZE, SIZE, dtype=torch.bool)
    brain[2] = False
    # The second volume lacks slice 7.
    results = pipe.map_slices(
        slices, brain, [0, 1, 2, 5, 6, 8, 9], volumes=[3, 4], noise=lambda draws, indices, shape: torch.zeros(shape)
    )
    # Slice 2 of the first volume holds no brain, and is no neighbour.
    near = [(0, 0, 1), (0, 1, 1), (3, 3, 4), (3, 4, 4), (5, 5, 6), (5, 6, 6)]
    expected = torch.stack([torch.cat([slices[row] for row in rows]) for rows in near])
    scale = float(pipe.scheduler.alphas_cumprod[0]) ** 0.5
    torch.testing.assert_close(torch.cat(seen) / scale, expected, rtol=0, atol=1e-6)
    assert results.maps.shape == (7, SIZE, SIZE) and results.reconstruction.shape == slices.shape
    assert torch.equal(results.reconstruction[2], slices[2]) and not results.maps[2].any()


def test_an_evaluation_makes_the_maps_of_a_call():
    """It knows the slices with brain alone, and their numbers."""
    pipe = make_pipeline("AnoDDPMPipeline", processor_settings={"context": 1})
    slices, brain = make_slices(6), torch.ones(6, SIZE, SIZE, dtype=torch.bool)
    brain[[0, 1, 5]] = False
    called = pipe(slices, brain_mask=brain).anomaly_map
    evaluated = pipe.map_slices(slices[2:5], brain[2:5], [2, 3, 4], batch_size=2).maps
    assert_same_map(evaluated, called[2:5], 1e-4)
    moved = pipe.map_slices(slices[2:5], brain[2:5], [2, 4, 6], batch_size=2).maps
    assert (moved - evaluated).abs().max() > 1e-3 * evaluated.max()


@pytest.mark.parametrize("name", SEEING)
def test_neighbours_change_a_map_and_a_checkpoint_remembers_them(name, tmp_path):
    pipe = make_pipeline(name, processor_settings={"context": 2})
    volume = make_volume()
    expected = pipe(volume).anomaly_map
    assert expected.shape == volume.shape
    other = volume.copy()
    other[..., 4] = other[::-1, :, 4]
    changed = np.abs(pipe(other).anomaly_map - expected).max((0, 1)) / expected.max()
    assert changed[2] > 1e-4 and changed[3] > 1e-4 and changed[:2].max() < 1e-6
    pipe.save_pretrained(tmp_path)
    loaded = AnomalyPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert loaded.processor.config.context == 2
    assert_same_map(loaded(volume).anomaly_map, expected, 1e-6)


def test_a_slice_alone_is_its_own_neighbour():
    pipe = make_pipeline("AnoDDPMPipeline", processor_settings={"context": 1})
    nothing = {"noise": lambda draws, indices, shape: torch.zeros(shape)}
    alone, copies = make_slices(1), make_slices(1).repeat(3, 1, 1, 1)
    assert_same_map(pipe(alone, **nothing).anomaly_map[0], pipe(copies, **nothing).anomaly_map[1], 1e-5)
    picture = PIL.Image.fromarray((make_volume((20, 18)) * 200).astype(np.uint8))
    assert pipe(picture).anomaly_map.shape == (20, 18)


@pytest.mark.parametrize("context", [0, 1])
def test_a_guarantee_needs_a_calibration_that_saw_all_neighbours(context):
    pipe = make_pipeline("AnoDDPMPipeline", MODALITIES, processor_settings={"context": context})
    settings = pipe.default_settings()
    record = {"settings": describe_scoring(pipe, settings, 0), "slices": {"min_brain": 0.5}, "guarantees": {}}
    pipe.register_to_config(calibration={**record, "alpha": 0.1, "data": "a", "split": "b", "probability": None})
    brain = np.ones((3, SIZE, SIZE), bool)
    brain[0, 2:] = False  # a slice with brain that the calibration left out
    claims = make_claims(pipe, np.zeros(brain.shape, np.float32), brain, settings, 0)
    assert claims["holds"] == (context == 0)
    assert context == 0 or "neighbouring slices" in claims["reason"]


@pytest.mark.parametrize("name", [name for name in PIPELINES if name not in SEEING])
def test_other_methods_see_slices_one_by_one(name):
    with pytest.raises(ValueError, match=f"`context` 0 for a {name}, which sees slices one by one, got 1"):
        make_pipeline(name, processor_settings={"context": 1})


def test_a_network_without_channels_for_neighbours_is_refused():
    unet = make_pipeline("AnoDDPMPipeline").unet
    with pytest.raises(
        ValueError, match="`unet` must have 3 `in_channels` for the modalities image of 3 slices, got 1"
    ):
        make_pipeline("AnoDDPMPipeline", processor_settings={"context": 1}, unet=unet)


def calibrated(**changes) -> AnomalyPipeline:
    """A pipeline with a guarantee for its scans."""
    pipe = make_pipeline("AnoDDPMPipeline", mode="one_shot", **changes)
    guarantee = {"n": 9, "population": "healthy", "threshold": 1.0, "scores": [0.5, 1.0], "p_values": [0.5, 0.1]}
    record = {"alpha": 0.1, "data": "a", "split": "b", "slices": {}, "left_out": {}, "probability": None}
    settings = describe_scoring(pipe, pipe.default_settings(), 0)
    pipe.register_to_config(calibration={**record, "settings": settings, "guarantees": {"scan": guarantee}})
    return pipe


def test_a_guarantee_is_of_one_scheduler(tmp_path):
    pipe = calibrated()
    assert pipe(make_volume()).guarantee["holds"]
    pipe.save_pretrained(tmp_path)
    assert AnomalyPipeline.from_pretrained(tmp_path)(make_volume()).guarantee["holds"]
    other = AnoDDPMScheduler(noise_type="gaussian", beta_schedule="cosine")
    changed = AnomalyPipeline.from_pretrained(tmp_path, scheduler=other)(make_volume()).guarantee
    assert changed == {"holds": False, "reason": "calibrated with other values of scheduler"}
    pipe.scheduler = other
    assert not pipe(make_volume()).guarantee["holds"]


def test_a_guarantee_within_brains_needs_a_mask():
    pipe = calibrated()
    prepared = pipe.prepare_volume(make_volume())
    assert pipe(prepared).guarantee["holds"]
    assert pipe(prepared.slices, brain_mask=prepared.brain).guarantee["holds"]
    found = pipe(prepared.slices)
    assert not found.guarantee["holds"] and "no brain mask was given" in found.guarantee["reason"]
    # Where the calibration counted whole slices there is nothing to be given.
    whole = calibrated(processor_settings={"brain_mask": "none"})
    assert whole(whole.prepare_volume(make_volume()).slices).guarantee["holds"]


def test_a_setting_that_is_no_value_ends_a_guarantee_and_not_the_call():
    pipe = make_pipeline("AutoDDPMPipeline")
    described = describe_scoring(pipe, {**pipe.default_settings(), "perceptual_distance": len}, 0)
    record = {"settings": describe_scoring(pipe, pipe.default_settings(), 0)}
    assert find_changes(record, described) == ["perceptual_distance"]
