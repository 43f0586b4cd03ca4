"""Properties of `CDDPMPipeline`, with and without encoder, of the similarity map and of its network."""

import json

import numpy as np
import PIL.Image
import pytest
import torch
from transformers import ResNetConfig, ResNetForImageClassification

from anodiff import AnoDDPMScheduler, CDDPMPipeline, ConditionedUNet2DModel
from anodiff.pipelines import ssim
from anodiff.pipelines.mahalanobis import mahalanobis_distance
from anodiff.pipelines.one_step import draw_fields
from anodiff.pipelines.ssim import ssim_map

from .. import tiny
from ..tiny import SIZE, assert_same_map, make_conditioned_unet, make_volume


def make_pipeline(modalities=("image",), conditioned=True, value_range=(-1.0, 1.0), **settings):
    if not conditioned:
        torch.manual_seed(0)
        settings |= {"unet": make_conditioned_unet(len(modalities), None), "encoder": None}
    return tiny.make_pipeline("CDDPMPipeline", modalities, processor_settings={"value_range": value_range}, **settings)


@pytest.mark.parametrize("settings", [{"map_type": "ssim"}, {"shared_noise": True}, {"conditioned": False}], ids=str)
def test_batch_size_does_not_matter_and_the_seed_does(settings):
    pipe = make_pipeline(("flair", "t1"), **settings)
    volume = {"flair": make_volume(seed=1), "t1": make_volume(seed=2)}
    maps = [pipe(volume, batch_size=size).anomaly_map for size in (1, 2, 64)]
    for other in maps[1:]:
        assert_same_map(other, maps[0])
    assert np.abs(pipe(volume, generator=1).anomaly_map - maps[0]).max() > 1e-3


def test_save_and_load_without_an_encoder(tmp_path):
    pipe = make_pipeline(conditioned=False, threshold=0.3, median_size=3, map_type="ssim")
    expected = pipe(make_volume())
    pipe.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["encoder"] == [None, None]
    loaded = CDDPMPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert loaded.encoder is None and loaded.scheduler.config.z is None
    assert_same_map(loaded(make_volume()).anomaly_map, expected.anomaly_map)


def test_the_map_is_that_of_the_mean_reconstruction():
    pipe = make_pipeline(("flair", "t1"), value_range=(0.0, 1.0))
    slices = torch.rand(4, 2, SIZE, SIZE)
    result = pipe(slices)
    torch.testing.assert_close(result.anomaly_map, (slices - result.reconstruction).abs().mean(1))
    noise, steps = torch.randn(3, 4, 2, SIZE, SIZE), (20, 50, 80)
    parts = [pipe(slices, timesteps=[t], noise=noise[k : k + 1]).reconstruction for k, t in enumerate(steps)]
    whole = pipe(slices, noise=noise, batch_size=5).reconstruction
    torch.testing.assert_close(whole, sum(parts) / 3, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("map_type", ["mahalanobis", "mahalanobis_pixel"])
def test_mahalanobis_maps_are_distances_from_the_reconstructions_of_all_timesteps(map_type):
    pipe = make_pipeline(("flair", "t1"))
    slices, noise, steps = torch.rand(2, 2, SIZE, SIZE) * 2 - 1, torch.randn(3, 2, 2, SIZE, SIZE), (20, 50, 80)
    parts = [pipe(slices, timesteps=[t], noise=noise[k : k + 1]).reconstruction for k, t in enumerate(steps)]
    expected = mahalanobis_distance((slices + 1) / 2, (torch.stack(parts) + 1) / 2, map_type).mean(1)
    for size in (5, 64):
        assert_same_map(pipe(slices, map_type=map_type, noise=noise, batch_size=size).anomaly_map, expected, 1e-4)
    with pytest.raises(ValueError, match=rf"`map_type` {map_type} needs several `timesteps`, got \[20\]"):
        pipe(slices, map_type=map_type, timesteps=[20])


def test_the_networks_see_what_they_are_promised():
    pipe = make_pipeline(value_range=(-1.0, 1.0))
    slices = torch.rand(3, 1, SIZE, SIZE) * 2 - 1
    clean, noised = [], []
    encoder, unet = pipe.encoder.forward, pipe.unet.forward
    pipe.encoder.forward = lambda images, **more: (clean.append(images), encoder(images, **more))[1]
    pipe.unet.forward = lambda sample, *more: (noised.append((sample, *more)), unet(sample, *more))[1]
    noise = torch.randn(3, 3, 1, SIZE, SIZE)
    pipe(slices, noise=noise, batch_size=64)
    torch.testing.assert_close(torch.cat(clean), (slices + 1) / 2)  # each slice once
    [(sample, timesteps, codes)] = noised
    assert timesteps.tolist() == [20] * 3 + [50] * 3 + [80] * 3
    expected = pipe.scheduler.add_noise(slices.repeat(3, 1, 1, 1), noise.flatten(0, 1), timesteps)
    torch.testing.assert_close(sample, expected)
    torch.testing.assert_close(codes, codes[:3].repeat(3, 1))
    assert (codes[0] - codes[1]).abs().max() > 1e-4
    noised.clear()
    pipe(slices, noise=noise, batch_size=5)
    assert [len(batch) for batch, *_ in noised] == [5, 4]


def test_shared_noise_is_the_same_for_all_slices():
    pipe = make_pipeline(conditioned=False)
    slices = torch.rand(1, 1, SIZE, SIZE).repeat(3, 1, 1, 1)
    shared, own = (pipe(slices, shared_noise=value).reconstruction for value in (True, False))
    torch.testing.assert_close(shared[0], shared[2])
    assert (own[0] - own[2]).abs().max() > 1e-3
    torch.testing.assert_close(shared[0], own[0])


def test_each_slice_and_timestep_has_noise_of_its_own():
    scheduler, like = AnoDDPMScheduler(beta_schedule="cosine", z=None, wavelength=8.0), torch.zeros(1, 1, 16, 16)
    numbers, draws, timesteps = torch.tensor([5, 5, 6, 5]), torch.tensor([0, 1, 0, 0]), torch.tensor([249, 749])
    drawn, draw_noise = [], scheduler.draw_noise
    scheduler.draw_noise = lambda keys, **more: (drawn.append(len(keys)), draw_noise(keys, **more))[1]
    fields = draw_fields(scheduler, 0, None, numbers, draws, timesteps, like)
    assert drawn == [3]  # equal ones once
    assert fields[0].equal(fields[3]) and len({field.numpy().tobytes() for field in fields}) == 3
    for index, field in enumerate(fields):
        alone = draw_fields(scheduler, 0, None, numbers[index : index + 1], draws[index : index + 1], timesteps, like)
        assert alone[0].equal(field)


def test_the_value_range_of_the_processor_does_not_matter():
    slices = torch.rand(3, 1, SIZE, SIZE)
    unit, signed = make_pipeline(value_range=(0.0, 1.0)), make_pipeline(value_range=(-1.0, 1.0))
    expected, result = unit(slices), signed(slices * 2 - 1)
    torch.testing.assert_close(result.anomaly_map, expected.anomaly_map, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(result.reconstruction, expected.reconstruction * 2 - 1, atol=1e-5, rtol=1e-4)


def test_similarity_is_computed_across_slices():
    pipe = make_pipeline(map_type="ssim")
    slices = torch.rand(6, 1, SIZE, SIZE) * 2 - 1
    # Two volumes at once are compared each for itself, also where a call asks for the similarity.
    brain = torch.ones(6, SIZE, SIZE, dtype=torch.bool)
    together = make_pipeline().map_slices(slices, brain, [0, 1, 2, 0, 1, 2], volumes=[3, 3], map_type="ssim").maps
    torch.testing.assert_close(together[3:], pipe(slices[3:]).anomaly_map, atol=1e-5, rtol=1e-4)
    result = pipe(slices)
    first, second = ((images[:, 0] + 1) / 2 for images in (slices, result.reconstruction))
    torch.testing.assert_close(result.anomaly_map, 1 - ssim_map(first, second), atol=1e-5, rtol=1e-4)
    assert (result.anomaly_map >= 0).all() and result.anomaly_map.max() <= 2
    picture = PIL.Image.fromarray((make_volume()[..., 0] * 200).astype(np.uint8))
    assert pipe(picture).anomaly_map.shape == (18, 20)


def test_similarity_by_hand():
    torch.manual_seed(0)
    first, second = torch.rand(3, 7, 12), torch.rand(3, 7, 12)
    torch.testing.assert_close(ssim_map(first, first), torch.ones(3, 7, 12))
    torch.testing.assert_close(ssim_map(torch.ones(2, 5, 5), torch.ones(2, 5, 5)), torch.ones(2, 5, 5))
    assert ssim_map(torch.zeros(0, 5, 5), torch.zeros(0, 5, 5)).shape == (0, 5, 5)
    # The weighted moments around one voxel; axes shorter than the window are mirrored more than once.
    values = np.stack([np.pad(one.double().numpy(), 4, mode="reflect")[1:10, 2:11, 5:14] for one in (first, second)])
    weight = np.exp(-(np.arange(-4, 5) ** 2) / 2)
    weight = weight[:, None, None] * weight[None, :, None] * weight
    weight /= weight.sum()
    mean = (values * weight).sum((1, 2, 3))
    deviation = values - mean[:, None, None, None]
    (variance, covariance), (_, other) = np.einsum("axyz,bxyz,xyz->ab", deviation, deviation, weight)
    span = max(float(np.ptp(one.numpy())) for one in (first, second))
    c1, c2 = (0.01 * span) ** 2, (0.03 * span) ** 2
    expected = (2 * mean.prod() + c1) * (2 * covariance + c2) / (((mean**2).sum() + c1) * (variance + other + c2))
    assert ssim_map(first, second)[1, 2, 5].item() == pytest.approx(expected, abs=1e-4)
    # A slice alone is a picture: nothing beside it.
    alone = ssim_map(first[:1], second[:1])
    torch.testing.assert_close(alone[0], ssim_map(first[:1].repeat(20, 1, 1), second[:1].repeat(20, 1, 1))[10])
    with pytest.raises(ValueError, match=r"same shape \(N, H, W\), got \(3, 7, 12\) and \(3, 7\)"):
        ssim_map(first, second[..., 0])


def test_constant_volumes_are_similar_where_they_are_equal():
    for value in (0.0, 0.3, 1.7):
        assert (ssim_map(torch.full((3, 7, 9), value), torch.full((3, 7, 9), value)) == 1).all()
        assert (ssim_map(torch.full((3, 7, 9), value), torch.full((3, 7, 9), 2.9)) == 0).all()


def test_windows_by_axes_are_those_in_three_dimensions():
    moments = torch.rand(2, 9, 13, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(ssim._smooth_by_axis(moments), ssim._smooth(moments), rtol=1e-12, atol=0)


@pytest.mark.gpu
def test_similarity_on_a_gpu_is_not_rounded():
    generator = torch.Generator().manual_seed(0)
    first = 0.9 + 0.1 * torch.rand(11, 40, 36, generator=generator)
    second = (first + 0.05 * torch.randn(first.shape, generator=generator)).clamp(0, 1)
    similarity = ssim_map(first.cuda(), second.cuda())
    assert similarity.is_cuda and similarity.dtype == torch.float32
    torch.testing.assert_close(similarity.cpu(), ssim_map(first, second), rtol=0, atol=2e-3)


def test_the_condition_changes_the_prediction_and_begins_with_nothing():
    torch.manual_seed(0)
    unet = make_conditioned_unet()
    sample, timesteps, codes = torch.randn(2, 1, SIZE, SIZE), torch.tensor([3, 70]), torch.randn(2, 6)
    with torch.no_grad():
        assert (unet(sample, timesteps, codes).sample - unet(sample, timesteps, 2 * codes).sample).abs().max() > 1e-3
        with pytest.raises(ValueError, match="class_labels should be provided"):
            unet(sample, timesteps)
    fresh = ConditionedUNet2DModel(
        block_out_channels=(32, 64),
        down_block_types=unet.config.down_block_types,
        up_block_types=unet.config.up_block_types,
    )
    assert fresh(torch.randn(1, 1, SIZE, SIZE), 3, torch.randn(1, 512)).sample.abs().max() == 0


def test_networks_are_as_large_as_the_card_says():
    with torch.device("meta"):
        sizes = [sum(p.numel() for p in ConditionedUNet2DModel(condition_dim=dim).parameters()) for dim in (512, None)]
        encoder = ResNetForImageClassification(ResNetConfig(num_channels=1, num_labels=512))
    assert [round(size / 1e6, 2) for size in sizes] == [44.07, 37.51]
    assert round(sum(p.numel() for p in encoder.parameters()) / 1e6, 1) == 24.6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"timesteps": [100]}, "`timesteps` must be a list of different integers from 0 to 99"),
        ({"timesteps": []}, "`timesteps` must be a list"),
        ({"timesteps": [3, 3]}, "`timesteps` must be a list of different"),
        ({"timesteps": 50}, "`timesteps` must be a list"),
        ({"map_type": "l2"}, "`map_type` must be one of residual, ssim"),
        ({"shared_noise": 2}, "`shared_noise` must be one of False, True"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_pipeline(conditioned=False)(make_volume(), **arguments)


def test_wrong_components():
    pipe = make_pipeline()
    parts = {"scheduler": pipe.scheduler, "processor": pipe.processor, "timesteps": (50,)}
    with pytest.raises(
        ValueError, match="`encoder` must give as many values as `unet.condition_dim` says, 6; it gives none"
    ):
        CDDPMPipeline(pipe.unet, **parts)
    with pytest.raises(TypeError, match="`encoder` must be a PreTrainedModel or None, got VolumeProcessor"):
        CDDPMPipeline(pipe.unet, **parts, encoder=pipe.processor)
    with pytest.raises(ValueError, match="`unet` must have 1 `in_channels` for the modalities image, got 2"):
        CDDPMPipeline(make_conditioned_unet(2), **parts, encoder=pipe.encoder)
    with pytest.raises(ValueError, match="says, none; it gives 6"):
        CDDPMPipeline(make_conditioned_unet(condition_dim=None), encoder=pipe.encoder, **parts)
    with pytest.raises(ValueError, match="`condition_dim` must be at least 1"):
        ConditionedUNet2DModel(condition_dim=0)
    with pytest.raises(
        ValueError, match="`attention_head_dim` must divide the channels of every attention layer, 32, got 64"
    ):
        ConditionedUNet2DModel(block_out_channels=(32, 32, 32))
    with pytest.raises(ValueError, match="`class_embed_type` must be None"):
        ConditionedUNet2DModel(class_embed_type="timestep")
