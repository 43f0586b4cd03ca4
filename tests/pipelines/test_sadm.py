"""Properties of `SADMPipeline`, its segmentation network and its training objectives."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from accelerate.utils import convert_outputs_to_fp32

from anodiff import (
    AnoDDPMScheduler,
    CDDPMPipeline,
    SADMPipeline,
    SiameseUNet2DModel,
    VolumeProcessor,
)
from anodiff.schedulers.draws import make_keys
from anodiff.training.objective_sadm import LabelledSADMObjective, SADMObjective

from ..tiny import SIZE, assert_same_map, make_conditioned_unet, make_encoder, make_volume


def make_parts(modalities=("image",), value_range=(0.0, 1.0), condition_dim=6, **network):
    torch.manual_seed(0)
    unet = make_conditioned_unet(len(modalities), condition_dim)
    encoder = None if condition_dim is None else make_encoder(len(modalities), condition_dim)
    model = SiameseUNet2DModel(len(modalities), (4, 8), **network).eval()
    scheduler = AnoDDPMScheduler(beta_schedule="cosine", z=None, wavelength=8.0)
    processor = VolumeProcessor(modalities=modalities, size=(SIZE, SIZE), value_range=value_range)
    return unet, model, scheduler, processor, encoder


def make_pipeline(modalities=("image",), value_range=(0.0, 1.0), condition_dim=6, **settings) -> SADMPipeline:
    parts = make_parts(modalities, value_range, condition_dim)
    pipe = SADMPipeline(*parts, **{"median_size": 0, **settings})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def keys(count):
    return make_keys(0, range(count))


def test_save_and_load_without_an_encoder(tmp_path):
    pipe = make_pipeline(condition_dim=None, threshold=0.5, median_size=3, residual_weight=0.25)
    expected = pipe(make_volume())
    assert expected.settings["residual_weight"] == 0.25 and expected.pred_mask.any()
    pipe.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["encoder"] == [None, None]
    loaded = SADMPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert_same_map(loaded(make_volume()).anomaly_map, expected.anomaly_map)


def test_the_value_range_of_the_processor_does_not_matter():
    slices = torch.rand(3, 1, SIZE, SIZE, generator=torch.manual_seed(1))
    expected = make_pipeline()(slices)
    result = make_pipeline(value_range=(-1.0, 1.0))(slices * 2 - 1)
    torch.testing.assert_close(result.anomaly_map, expected.anomaly_map, atol=1e-4, rtol=0)
    torch.testing.assert_close(result.reconstruction, expected.reconstruction * 2 - 1, atol=1e-5, rtol=0)


def test_the_median_is_of_the_residual_alone_and_the_probability_of_the_brain():
    pipe = make_pipeline(median_size=3)
    slices = torch.rand(4, 1, SIZE, SIZE, generator=torch.manual_seed(1))
    brain = torch.zeros(4, SIZE, SIZE, dtype=torch.bool)
    brain[:, 3:13, 3:13] = True
    raw = pipe.compute_maps(slices, [0, 1, 2, 3], seed=0, batch_size=8, **pipe.default_settings())
    assert raw.added.min() > 0 and raw.added.max() < 1
    result = pipe(slices, brain_mask=brain).anomaly_map
    reference = CDDPMPipeline(
        pipe.unet,
        pipe.scheduler,
        pipe.processor,
        pipe.encoder,
        map_type="ssim",
        median_size=3,
        erosion=0,
    )
    reference.set_progress_bar_config(disable=True)
    expected = reference(slices, brain_mask=brain).anomaly_map + torch.where(brain, raw.added, 0)
    torch.testing.assert_close(result, expected, atol=1e-5, rtol=0)
    assert (result[~brain] == 0).all()


def test_network_is_as_large_as_the_card_says():
    with torch.device("meta"):
        model = SiameseUNet2DModel()
        output = model(torch.zeros(2, 1, 96, 96, device="meta"), torch.zeros(2, 1, 96, 96, device="meta"))
    assert round(sum(parameter.numel() for parameter in model.parameters()) / 1e6, 1) == 16.7
    assert output.logits.shape == (2, 1, 96, 96) and output.decoder_logits is None


@pytest.mark.parametrize("deep_supervision", [False, True])
def test_accelerate_can_convert_the_output(deep_supervision):
    model = SiameseUNet2DModel(1, (4, 8), deep_supervision=deep_supervision).bfloat16()
    pair = torch.rand(2, 1, 1, SIZE, SIZE, dtype=torch.bfloat16)
    output = convert_outputs_to_fp32(model)(*pair)
    assert output.logits.dtype == torch.float32 and (output.decoder_logits is not None) == deep_supervision
    assert all(logits.dtype == torch.float32 for logits in output.decoder_logits or ())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"residual_weight": 1.5}, "`residual_weight` must be a finite number and between 0 and 1, got 1.5"),
        ({"timesteps": [1000]}, "`timesteps` must be a list of different integers from 0 to 999"),
        ({"map_type": "l2"}, "`map_type` must be one of residual, ssim"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_pipeline()(make_volume(), **arguments)


def test_wrong_components():
    unet, model, scheduler, processor, encoder = make_parts()
    with pytest.raises(ValueError, match="`segmentation_network.in_channels` must be 1"):
        SADMPipeline(unet, SiameseUNet2DModel(2, (4, 8)), scheduler, processor, encoder)
    with pytest.raises(ValueError, match="`residual_weight` must be a finite number and between 0 and 1"):
        make_pipeline(residual_weight=-1)
    with pytest.raises(ValueError, match="`residual` must be one of signed, squared"):
        SiameseUNet2DModel(1, (4, 8), residual="absolute")
    with pytest.raises(ValueError, match="at least two levels"):
        SiameseUNet2DModel(1, (4,))
    with pytest.raises(ValueError, match="`image` must have sides divisible by 2"):
        model(torch.zeros(1, 1, 15, 16), torch.zeros(1, 1, 15, 16))
    reconstruction = CDDPMPipeline(unet, scheduler, processor, encoder)
    with pytest.raises(ValueError, match="`loss` must be one of bce, dice, bce_dice"):
        SADMObjective(model, reconstruction, loss="focal")


@pytest.mark.parametrize("value_range", [(0.0, 1.0), (-1.0, 1.0)])
def test_training_moves_the_segmentation_network_alone(value_range):
    unet, model, scheduler, processor, encoder = make_parts(value_range=value_range, deep_supervision=True)
    # Running statistics that are not those of any batch: batch norm must use them.
    reconstruction = CDDPMPipeline(unet.train(), scheduler, processor, encoder.train())
    objective = SADMObjective(model, reconstruction, loss="bce_dice")
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    low, high = value_range
    batch = {"image": torch.rand(3, 1, SIZE, SIZE, generator=torch.manual_seed(2)) * (high - low) + low}
    losses = objective.loss(model.train(), batch, keys(3))
    assert losses.shape == (3,) and torch.isfinite(losses).all()
    losses.mean().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    for component in (unet, encoder):
        assert not component.training and all(parameter.grad is None for parameter in component.parameters())
    assert all(value.equal(before[name]) for name, value in encoder.state_dict().items())

    # A sample's loss depends on the sample alone.
    with torch.no_grad():
        alone = objective.loss(model, {"image": batch["image"][1:2]}, keys(3)[1:2])
    torch.testing.assert_close(alone[0], losses[1].detach(), atol=1e-4, rtol=0)
    rows = objective.preview(model.eval(), batch, keys(3))
    assert [row.shape for row in rows.values()] == [batch["image"].shape] * 5


def test_shared_noise_is_that_of_the_first_slice():
    unet, model, scheduler, processor, encoder = make_parts()
    reconstruction = CDDPMPipeline(unet, scheduler, processor, encoder)
    batch = {"image": torch.rand(3, 1, SIZE, SIZE)}
    own, shared = (
        SADMObjective(model, reconstruction, shared_noise=value)._draw(batch, keys(3))[3] for value in (False, True)
    )
    assert own.shape == (3, 1, SIZE, SIZE) and shared.shape == (1, 1, SIZE, SIZE)
    torch.testing.assert_close(own[:1], shared, rtol=0, atol=0)


def test_masks_of_several_annotators_are_those_of_the_majority():
    unet, model, scheduler, processor, encoder = make_parts()
    objective = LabelledSADMObjective(model, CDDPMPipeline(unet, scheduler, processor, encoder))
    masks = torch.zeros(3, 3, SIZE, SIZE, dtype=torch.uint8)
    masks[0, 0, 2:4] = 1  # the only annotation
    masks[1, :2, 5] = 1  # two of three
    masks[1, 0, 8] = 1  # one of three
    batch = {
        "image": torch.rand(3, 1, SIZE, SIZE),
        "mask": masks,
        "annotations": torch.tensor([1, 3, 0]),
        "label": torch.tensor([1, 1, 0]),
    }
    images, lesions = objective.anomalies(batch, batch["image"], [])
    torch.testing.assert_close(images, batch["image"], rtol=0, atol=0)
    assert lesions.shape == (3, 1, SIZE, SIZE) and lesions.sum((1, 2, 3)).tolist() == [2 * SIZE, SIZE, 0]
    assert lesions[0, 0, 2:4].all() and lesions[1, 0, 5].all()
    assert torch.isfinite(objective.loss(model, batch, keys(3))).all()
    for label in (1, -1):
        batch["label"][2] = label
        with pytest.raises(ValueError, match="`mask` must be there for every slice that is not known to be healthy"):
            objective.loss(model, batch, keys(3))


def test_order_of_erosion_and_median():
    pipe = make_pipeline(median_size=3, erosion=1, filter_order="median_first")
    assert pipe.postprocessing.filter_order == "median_first"
    maps = np.random.default_rng(0).random((3, 8, 8)).astype(np.float32)
    brain = np.ones((3, 8, 8), bool)
    paper, code = (replace(pipe.postprocessing, filter_order=order) for order in ("median_first", "erosion_first"))
    assert np.abs(paper.filter(maps, brain) - code.filter(maps, brain)).max() > 0
    np.testing.assert_array_equal(
        replace(paper, erosion=0).filter(maps, brain), replace(code, erosion=0).filter(maps, brain)
    )
    with pytest.raises(ValueError, match="`filter_order` must be one of erosion_first, median_first"):
        make_pipeline(filter_order="none")


def test_what_is_exported_has_the_timesteps_of_its_cddpm(tmp_path):
    unet, model, _, processor, encoder = make_parts()
    scheduler = AnoDDPMScheduler(100, beta_schedule="cosine", z=None, wavelength=8.0)
    reconstruction = CDDPMPipeline(unet, scheduler, processor, encoder, timesteps=[24, 49], shared_noise=True)
    pipe = SADMObjective(model, reconstruction).export(model, tmp_path)
    assert list(pipe.config.timesteps) == [24, 49] and pipe.config.shared_noise
    pipe = SADMObjective(model, reconstruction, {"timesteps": [9]}).make_pipeline(model)
    assert list(pipe.config.timesteps) == [9] and pipe.config.shared_noise
