"""Properties of `AnoDDPMPipeline` with real, tiny components."""

import nibabel as nib
import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

from anodiff import AnoDDPMPipeline, AnoDDPMScheduler, AnomalyPipeline, UNet2DHeadsModel, VolumeProcessor

from ..tiny import SIZE, assert_same_map, make_slices, make_volume
from ..tiny import make_pipeline as make


def make_pipeline(modalities=("image",), **settings) -> AnoDDPMPipeline:
    return make("AnoDDPMPipeline", modalities, **settings)


@pytest.mark.parametrize("mode", ["partial", "partial_offset", "one_shot"])
@pytest.mark.parametrize("noise_type", ["simplex", "gaussian"])
def test_batch_size_does_not_matter(mode, noise_type):
    pipe = make_pipeline(scheduler=AnoDDPMScheduler(noise_type=noise_type), mode=mode, noise_level=[3, 5], num_draws=2)
    maps = [pipe(make_volume(), batch_size=size).anomaly_map for size in (1, 3, 16, 100)]
    for other in maps[1:]:
        assert_same_map(other, maps[0])


@pytest.mark.parametrize("noise_type", ["simplex", "gaussian"])
def test_draws_are_bit_identical_for_any_batch_size(noise_type):
    pipe = make_pipeline(scheduler=AnoDDPMScheduler(noise_type=noise_type), num_draws=2)
    original = pipe.scheduler.draw_noise
    drawn = {}
    for batch_size in (1, 4, 100):
        seen = {}

        def recording(keys, seen=seen, **arguments):
            noise = original(keys, **arguments)
            for key, image in zip(keys.tolist(), noise, strict=True):
                assert tuple(key) not in seen
                seen[tuple(key)] = image.numpy().tobytes()
            return noise

        pipe.scheduler.draw_noise = recording
        pipe(make_volume(), batch_size=batch_size)
        drawn[batch_size] = seen
    # Two members of five slices, each with the noise of the start and of three steps, no two alike.
    assert len(drawn[1]) == len(set(drawn[1].values())) == 2 * 5 * 4
    assert drawn[1] == drawn[4] == drawn[100]


def test_a_slice_does_not_depend_on_its_neighbours():
    pipe = make_pipeline()
    whole = make_slices(5)
    maps = pipe(whole).anomaly_map
    single = pipe.compute_maps(whole[3:4], [3], seed=0, batch_size=1, **pipe.default_settings()).maps
    torch.testing.assert_close(single[0], maps[3], rtol=0, atol=1e-5 * maps.max().item())


def test_base_class_refuses_other_pipelines(tmp_path):
    DDPMPipeline(make_pipeline().unet, DDPMScheduler()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds a DDPMPipeline, which is no pipeline of anodiff"):
        AnomalyPipeline.from_pretrained(tmp_path)


def test_modalities_as_a_4d_file():
    pipe = make_pipeline(("flair", "t1"))
    flair, t1 = make_volume(seed=1), make_volume(seed=2)
    expected = pipe({"flair": flair, "t1": t1})
    assert expected.reconstruction.shape == (*flair.shape, 2)
    stacked = nib.Nifti1Image(np.stack([flair, t1], axis=-1), np.eye(4))
    np.testing.assert_array_equal(pipe(stacked).anomaly_map, expected.anomaly_map)
    with pytest.raises(ValueError, match="missing: t1"):
        pipe({"flair": flair})
    with pytest.raises(ValueError, match="has 1 channel"):
        pipe(flair)


def test_slices_without_brain_are_not_computed_and_are_zero():
    pipe = make_pipeline()
    volume = make_volume()
    volume[..., 2] = 0
    evaluated = []
    forward = pipe.unet.forward

    def counting(sample, *args, **kwargs):
        evaluated.append(len(sample))
        return forward(sample, *args, **kwargs)

    pipe.unet.forward = counting
    result = pipe(volume)
    assert sum(evaluated) == 4 * pipe.config.noise_level
    assert (result.anomaly_map[..., 2] == 0).all() and result.pred_score[2] == 0
    assert (result.pred_score[[0, 1, 3, 4]] > 0).all()


def test_scores_and_reconstruction_follow_the_input_grid():
    pipe = make_pipeline()
    volume = make_volume((16, 16, 5))
    upside_down = np.diag([1.0, 1.0, -1.0, 1.0])
    upside_down[2, 3] = 4
    straight = pipe(nib.Nifti1Image(volume, np.eye(4)))
    flipped = pipe(nib.Nifti1Image(volume[..., ::-1].copy(), upside_down))
    np.testing.assert_allclose(flipped.pred_score[::-1], straight.pred_score, rtol=1e-5)
    np.testing.assert_allclose(flipped.anomaly_map[..., ::-1], straight.anomaly_map, rtol=0, atol=1e-6)


def test_a_perfect_reconstruction_is_the_input_in_its_own_units():
    # x_0's estimate is exact where the network predicts the noise that was drawn: nothing at all here.
    pipe = make_pipeline()
    pipe.processor = VolumeProcessor(size=(SIZE, SIZE), quantile=1.0)
    for parameter in pipe.unet.conv_out.parameters():
        torch.nn.init.zeros_(parameter)
    volume = make_volume((16, 16, 5)) * 300
    result = pipe(volume, noise_level=300, mode="one_shot", noise=torch.zeros(1, 5, 1, SIZE, SIZE))
    np.testing.assert_allclose(result.reconstruction, volume, rtol=0, atol=1e-3)
    assert result.anomaly_map.max() < 1e-9


def test_map_is_the_squared_difference_and_mask_is_above_the_threshold():
    pipe = make_pipeline()
    slices = make_slices(3)
    threshold = pipe(slices).anomaly_map.median().item()
    result = pipe(slices, threshold=threshold)
    torch.testing.assert_close(result.anomaly_map, (slices - result.reconstruction).square()[:, 0])
    assert (result.pred_mask.bool() == (result.anomaly_map > threshold)).all() and result.pred_mask.any()
    assert pipe(slices).pred_mask is None
    torch.testing.assert_close(result.pred_score, result.anomaly_map.double().mean((1, 2)))
    assert result.volume_score == pytest.approx(result.anomaly_map.double().mean().item())


def test_modalities_are_reduced_as_asked():
    pipe = make_pipeline(("flair", "t1"))
    slices = make_slices(3, 2)
    for reduction, reduce in (("mean", torch.mean), ("max", torch.amax)):
        result = pipe(slices, modality_reduction=reduction)
        expected = reduce((slices - result.reconstruction).square(), 1)
        torch.testing.assert_close(result.anomaly_map, expected)


def test_draws_are_averaged_before_the_difference():
    pipe = make_pipeline(mode="one_shot", noise_level=30)
    slices = make_slices(2)
    noise = torch.randn(3, 2, 1, SIZE, SIZE)
    together = pipe(slices, num_draws=3, noise=noise).reconstruction
    single = [pipe(slices, noise=noise[draw : draw + 1]).reconstruction for draw in range(3)]
    torch.testing.assert_close(together, torch.stack(single).mean(0), rtol=0, atol=1e-5)


def distances_of(values, members) -> np.ndarray:
    """Mahalanobis distances `(P,)` of P values from members `(K, P)`, by the inverse of a whole matrix."""
    difference = values - members.mean(0)
    products = difference * (np.linalg.inv(np.cov(members.T) + 0.01 * np.eye(len(values))) @ difference)
    return np.sqrt(products.clip(min=0))


@pytest.mark.parametrize("settings", [{"num_draws": 3}, {"noise_level": [20, 30, 60]}], ids=str)
@pytest.mark.parametrize("map_type, reduction", [("mahalanobis", "mean"), ("mahalanobis_pixel", "max")])
def test_mahalanobis_maps_are_distances_from_the_distribution_of_the_members(settings, map_type, reduction):
    pipe = make_pipeline(("flair", "t1"), mode="one_shot", noise_level=30, modality_reduction=reduction)
    with torch.no_grad():
        pipe.unet.conv_out.weight.mul_(20)  # reconstructions that vary
    slices, noise = make_slices(2, 2), torch.randn(3, 2, 2, SIZE, SIZE)
    levels = settings.get("noise_level", [30] * 3)
    members = torch.stack(
        [pipe(slices, noise=noise[k : k + 1], noise_level=levels[k]).reconstruction for k in range(3)]
    )
    images, parts = (((values + 1) / 2).double().numpy() for values in (slices, members))
    distances = np.empty_like(images)
    for row, (image, own) in enumerate(zip(images, parts.swapaxes(0, 1), strict=True)):
        if map_type == "mahalanobis":
            distances[row] = distances_of(image.ravel(), own.reshape(3, -1)).reshape(image.shape)
        else:
            for y, x in np.ndindex(SIZE, SIZE):
                distances[row, :, y, x] = distances_of(image[:, y, x], own[:, :, y, x])
    expected = getattr(distances, reduction)(1)
    for batch_size in (16, 1):
        output = pipe(slices, noise=noise, map_type=map_type, batch_size=batch_size, **settings)
        assert_same_map(output.anomaly_map, expected, 1e-4)
    torch.testing.assert_close(output.reconstruction, members.mean(0), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("mode", "starts"), [("partial", [0, 5, 10, 15]), ("partial_offset", [0, 4, 8, 12]), ("one_shot", [0, 1, 2, 3])]
)
def test_draws_of_members_are_numbered_one_after_the_other(mode, starts):
    pipe = make_pipeline(mode=mode)
    slices = make_slices(3)
    noise = torch.randn(starts[-1] + 5, 3, 1, SIZE, SIZE)
    asked = set()

    def draw(draws, indices, shape):
        asked.update(draws)
        assert shape == (len(draws), 1, SIZE, SIZE)
        return noise[draws, indices]

    result = pipe(slices, noise=draw, noise_level=[3, 5], num_draws=2, batch_size=2)
    # Chains of different lengths: each member has as many numbers as the longest chain, and uses the first of them.
    shorter = {"partial": 3, "partial_offset": 2, "one_shot": 1}[mode]
    lengths = [shorter, shorter, starts[1], starts[1]]
    assert asked == {start + step for start, length in zip(starts, lengths, strict=True) for step in range(length)}
    members = [
        pipe(slices, noise=noise[start:], noise_level=level).reconstruction
        for level, start in zip((3, 3, 5, 5), starts, strict=True)
    ]
    torch.testing.assert_close(result.reconstruction, torch.stack(members).mean(0), rtol=0, atol=1e-5)


def test_speed_options_change_little():
    pipe = make_pipeline(mode="one_shot", noise_level=100)
    expected = pipe(make_volume()).anomaly_map
    pipe.enable_fast_inference(channels_last=True)
    assert_same_map(pipe(make_volume()).anomaly_map, expected)
    pipe.enable_fast_inference(mixed_precision="bf16")
    coarse = pipe(make_volume()).anomaly_map
    assert coarse.dtype == np.float32
    assert 0 < np.abs(coarse - expected).max() < 0.1 * expected.max()


def test_compiled_network_gives_the_same_map():
    pipe = make_pipeline(noise_level=3)
    # One level without attention: the smallest network there is, since compiling takes its time.
    pipe.unet = UNet2DModel(
        sample_size=SIZE,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(4,),
        norm_num_groups=4,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        add_attention=False,
    ).eval()
    expected = pipe(make_volume()).anomaly_map
    pipe.enable_fast_inference(compile=True)
    assert_same_map(pipe(make_volume()).anomaly_map, expected)
    pipe(make_volume((18, 20, 3), seed=3))


def test_progress_bar_is_silent_when_asked(capfd):
    pipe = make_pipeline()
    pipe(make_volume())
    assert capfd.readouterr().err == ""
    pipe.set_progress_bar_config(disable=False)
    pipe(make_volume())
    assert "4/4" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"noise_level": 0}, "`noise_level` must be an integer between 1 and 1000"),
        ({"noise_level": 1001}, "`noise_level` must be an integer between 1 and 1000"),
        ({"noise_level": []}, "`noise_level` must be an integer between 1 and 1000"),
        ({"noise_level": 2.5}, "`noise_level` must be an integer between 1 and 1000"),
        ({"noise_level": 1, "mode": "partial_offset"}, "`noise_level` must be an integer between 2 and 999"),
        ({"noise_level": 1000, "mode": "partial_offset"}, "`noise_level` must be an integer between 2 and 999"),
        ({"mode": "two_shot"}, "`mode` must be one of partial, one_shot"),
        ({"modality_reduction": "median"}, "`modality_reduction` must be one of mean, max"),
        ({"num_draws": 0}, "`num_draws` must be an integer of at least 1"),
        ({"map_type": "ssim"}, "`map_type` must be one of squared, mahalanobis, mahalanobis_pixel, got 'ssim'"),
        (
            {"map_type": "mahalanobis"},
            "`map_type` mahalanobis needs several reconstructions of a slice: give `num_draws`",
        ),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_pipeline()(make_volume(), **arguments)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"slice_score": "median"}, "`slice_score` must be one of mean, max, p99"),
        ({"median_size": -1}, "`median_size` must be an integer of at least 0"),
        ({"median_dimensions": 4}, "`median_dimensions` must be one of 2, 3"),
        ({"erosion": -1}, "`erosion` must be an integer of at least 0"),
        ({"mode": "both"}, "`mode` must be one of"),
    ],
)
def test_wrong_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        make_pipeline(**settings)


def test_heads_model_keeps_its_heads(tmp_path):
    torch.manual_seed(0)
    model = UNet2DHeadsModel(
        sample_size=SIZE,
        block_out_channels=(32, 32),
        down_block_types=("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
        num_attention_heads=4,
    )
    sample = torch.randn(2, 1, SIZE, SIZE)
    assert (model(sample, 3).sample == 0).all()  # zero-initialised output
    torch.nn.init.normal_(model.conv_out.weight)
    for name, parameter in model.named_parameters():
        if name.endswith(("to_out.0.weight", "conv2.weight")):
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(tmp_path)
    loaded = UNet2DHeadsModel.from_pretrained(tmp_path)
    assert {module.heads for module in loaded.modules() if hasattr(module, "heads")} == {4}
    torch.testing.assert_close(loaded(sample, 3).sample, model(sample, 3).sample, rtol=1e-4, atol=1e-4)
    one_head = UNet2DHeadsModel.from_config({**model.config, "num_attention_heads": 1})
    one_head.load_state_dict(model.state_dict())
    assert (one_head(sample, 3).sample - model(sample, 3).sample).abs().max() > 1e-2
    with pytest.raises(ValueError, match="`num_attention_heads` must divide"):
        UNet2DHeadsModel.from_config({**model.config, "num_attention_heads": 5})


def test_heads_model_is_as_large_as_the_original():
    with torch.device("meta"):
        model = UNet2DHeadsModel()
    assert sum(parameter.numel() for parameter in model.parameters()) == 131_649_793
