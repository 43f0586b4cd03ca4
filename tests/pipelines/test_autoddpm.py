"""Properties of `AutoDDPMPipeline` with real, tiny components."""

import sys

import pytest
import torch

from anodiff import AutoDDPMPipeline, VolumeProcessor

from ..tiny import SIZE, make_slices, make_volume
from ..tiny import make_pipeline as make


# Of a noise level of 4, an inpainting level of 4, and 2 repetitions.
DRAWS = 3 + 1 + 2 * (2 * 2 + 1)


def make_pipeline(modalities=("image",), **settings) -> AutoDDPMPipeline:
    return make("AutoDDPMPipeline", modalities, **settings)


def distance(images, others):
    return (images - others).square().mean(1, keepdim=True)


def test_a_slice_does_not_depend_on_its_neighbours():
    pipe = make_pipeline()
    whole = make_slices(5)
    maps = pipe(whole).anomaly_map
    single = pipe.compute_maps(whole[3:4], [3], seed=0, batch_size=1, **pipe.default_settings()).maps
    torch.testing.assert_close(single[0], maps[3], rtol=0, atol=1e-5 * maps.max().item())


def test_noise_may_be_a_callable_and_every_draw_is_used():
    pipe = make_pipeline()
    slices = make_slices(3)
    noise = torch.randn(DRAWS, 3, 1, SIZE, SIZE)
    expected = pipe(slices, noise=noise).anomaly_map
    asked = set()

    def draw(draws, indices, shape):
        asked.update(zip(draws, indices, strict=True))
        return noise[draws, indices].reshape(shape)

    torch.testing.assert_close(pipe(slices, noise=draw, batch_size=2).anomaly_map, expected, rtol=0, atol=1e-5)
    assert asked == {(number, item) for number in range(DRAWS) for item in range(3)}
    other = noise.clone()
    other[-1] += 1
    assert (pipe(slices, noise=other).anomaly_map - expected).abs().max() > 1e-4


def test_nothing_outside_the_mask_changes_and_slices_without_mask_are_not_inpainted():
    pipe = make_pipeline()
    slices = make_slices(3)
    evaluated = []
    forward = pipe.unet.forward

    def counting(sample, *args, **kwargs):
        evaluated.append(len(sample))
        return forward(sample, *args, **kwargs)

    pipe.unet.forward = counting
    result = pipe(slices)
    assert sum(evaluated) == 3 * (3 + 2 * 2)
    changed = result.reconstruction != slices
    assert 0 < changed.float().mean() < 1
    assert (result.anomaly_map[~changed[:, 0]] == 0).all()

    evaluated.clear()
    empty = pipe(slices, masking_threshold=1.0)  # nothing exceeds 1
    assert sum(evaluated) == 3 * 3
    torch.testing.assert_close(empty.reconstruction, slices, rtol=0, atol=0)
    assert (empty.anomaly_map == 0).all()


def test_perfect_reconstruction_gives_an_empty_mask():
    images = torch.rand(2, 2, SIZE, SIZE)
    mask_map, mask = AutoDDPMPipeline.make_mask(images, images.clone(), 0.1, 0.99)
    assert (mask_map == 0).all() and not mask.any()
    # Fewer different pixels than the quantile leaves: the quantile is 0.
    other = images.clone()
    other[0, 1, 5, 5] += 0.1
    mask_map, mask = AutoDDPMPipeline.make_mask(images, other, 0.1, 0.9)
    assert mask_map[0, 1, 5, 5] == 1 and mask_map.sum() == 1
    assert mask[0, 1, 4:7, 4:7].all() and mask.sum() == 9


def test_perceptual_distance_is_called_with_grey_pictures_of_each_modality():
    pipe = make_pipeline(("flair", "t1"), mask_distance="lpips", masking_threshold=0.01)
    slices = make_slices(2, 2)
    seen = []

    def recording(images, others):
        seen.append(images)
        return distance(images, others)

    result = pipe(slices, perceptual_distance=recording)
    assert len(seen) == 2
    for channel, images in enumerate(seen):
        torch.testing.assert_close(images, slices[:, channel : channel + 1].expand(-1, 3, -1, -1))
    doubled = pipe(slices, perceptual_distance=lambda a, b: 2 * distance(a, b), masking_threshold=0.02)
    torch.testing.assert_close(doubled.anomaly_map, 2 * result.anomaly_map, rtol=1e-5, atol=1e-6)


def test_without_the_package_lpips_the_error_says_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "lpips", None)
    pipe = make_pipeline(mask_distance="lpips")
    with pytest.raises(ImportError, match=r'pip install "anodiff\[autoddpm\]"'):
        pipe(make_volume())


def test_progress_bar_is_silent_when_asked(capfd):
    pipe = make_pipeline()
    pipe(make_volume())
    assert capfd.readouterr().err == ""
    pipe.set_progress_bar_config(disable=False)
    pipe(make_volume())
    shown = capfd.readouterr().err
    assert "3/3" in shown and "4/4" in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"noise_level": 1}, "`noise_level` must be an integer between 2 and 999"),
        ({"noise_level": 1000}, "`noise_level` must be an integer between 2 and 999"),
        ({"inpainting_level": 2}, "`inpainting_level` must be an integer between 3 and 999"),
        ({"resample": 0}, "`resample` must be an integer of at least 1"),
        ({"masking_threshold": -0.1}, "`masking_threshold` must be a finite number and at least 0"),
        ({"quantile": 0.0}, "`quantile` must be a finite number and above 0 and at most 1"),
        ({"mask_distance": "ssim"}, "`mask_distance` must be one of lpips, residual"),
        ({"perceptual_distance": distance}, "`perceptual_distance` is not used with `mask_distance` 'residual'"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_pipeline()(make_volume(), **arguments)


def test_wrong_components():
    pipe = make_pipeline()
    with pytest.raises(ValueError, match=r"`processor` must have the `value_range` \(-1, 1\)"):
        AutoDDPMPipeline(pipe.unet, pipe.scheduler, VolumeProcessor(value_range=(0.0, 1.0)))
