"""Properties of `AutoDDPMPipeline` with real, tiny components."""

import json
import sys

import nibabel as nib
import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import UNet2DModel

from anodiff import AnoDDPMScheduler, AnomalyPipeline, AutoDDPMPipeline, VolumeProcessor


SIZE = 16
LEVELS = {"noise_level": 4, "inpainting_level": 4, "resample": 2}
DRAWS = 3 + 1 + 2 * (2 * 2 + 1)


def make_pipeline(modalities=("image",), **settings) -> AutoDDPMPipeline:
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=SIZE,
        in_channels=len(modalities),
        out_channels=len(modalities),
        layers_per_block=1,
        block_out_channels=(4, 8),
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        add_attention=False,
    ).eval()
    scheduler = AnoDDPMScheduler(noise_type="gaussian", variance_type="fixed_small")
    processor = VolumeProcessor(modalities=modalities, size=(SIZE, SIZE))
    settings = {**LEVELS, "mask_distance": "residual", "masking_threshold": 0.8, "median_size": 0, **settings}
    pipe = AutoDDPMPipeline(unet, scheduler, processor, **settings)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def make_volume(shape=(18, 20, 5), seed=0) -> np.ndarray:
    volume = np.random.default_rng(seed).random(shape).astype(np.float32) + 0.1
    volume[:3] = 0
    return volume


def distance(images, others):
    return (images - others).square().mean(1, keepdim=True)


def assert_same_map(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5 * float(np.abs(expected).max()))


def test_batch_size_does_not_matter():
    pipe = make_pipeline(("flair", "t1"))
    volume = {"flair": make_volume(seed=1), "t1": make_volume(seed=2)}
    maps = [pipe(volume, batch_size=size).anomaly_map for size in (1, 2, 16)]
    assert maps[0].max() > 0
    for other in maps[1:]:
        assert_same_map(other, maps[0])


def test_a_slice_does_not_depend_on_its_neighbours():
    pipe = make_pipeline()
    whole = torch.rand(5, 1, SIZE, SIZE) * 2 - 1
    maps = pipe(whole).anomaly_map
    single = pipe.compute_maps(whole[3:4], [3], seed=0, batch_size=1, **pipe.default_settings()).maps
    torch.testing.assert_close(single[0], maps[3], rtol=0, atol=1e-5 * maps.max().item())


def test_seed_decides():
    pipe = make_pipeline()
    default = pipe(make_volume()).anomaly_map
    np.testing.assert_array_equal(pipe(make_volume(), generator=0).anomaly_map, default)
    assert np.abs(pipe(make_volume(), generator=1).anomaly_map - default).max() > 1e-4


def test_noise_may_be_a_callable_and_every_draw_is_used():
    pipe = make_pipeline()
    slices = torch.rand(3, 1, SIZE, SIZE) * 2 - 1
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


def test_save_and_load_gives_the_same_map(tmp_path):
    pipe = make_pipeline(threshold=0.3, median_size=3)
    expected = pipe(make_volume())
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["scheduler"] == ["anodiff", "AnoDDPMScheduler"]
    for loaded in (AutoDDPMPipeline.from_pretrained(tmp_path), AnomalyPipeline.from_pretrained(tmp_path)):
        assert type(loaded) is AutoDDPMPipeline
        loaded.set_progress_bar_config(disable=True)
        assert_same_map(loaded(make_volume()).anomaly_map, expected.anomaly_map)
        settings = [key for key in pipe.config if not key.startswith("_") and key not in pipe.components]
        assert settings and all(loaded.config[key] == pipe.config[key] for key in settings)


def test_every_kind_of_volume_gives_the_same_map(tmp_path):
    pipe = make_pipeline()
    array = make_volume()
    image = nib.Nifti1Image(array, np.eye(4))
    nib.save(image, tmp_path / "scan.nii.gz")
    expected = pipe(array).anomaly_map
    assert expected.shape == array.shape and expected.dtype == np.float32 and expected.max() > 0
    for volume in (image, tmp_path / "scan.nii.gz", {"image": image}):
        np.testing.assert_allclose(pipe(volume).anomaly_map, expected, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(pipe([array, image])[1].anomaly_map, expected)
    picture = PIL.Image.fromarray((array[..., 0] * 200).astype(np.uint8))
    assert pipe(picture).anomaly_map.shape == array.shape[:2]
    assert isinstance(pipe(array, return_dict=False), tuple)


def test_nothing_outside_the_mask_changes_and_slices_without_mask_are_not_inpainted():
    pipe = make_pipeline()
    slices = torch.rand(3, 1, SIZE, SIZE) * 2 - 1
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
    slices = torch.rand(2, 2, SIZE, SIZE) * 2 - 1
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
        ({"batch_size": 0}, "`batch_size` must be an integer of at least 1"),
        ({"masking_threshold": -0.1}, "`masking_threshold` must be a finite number and at least 0"),
        ({"quantile": 0.0}, "`quantile` must be a finite number and above 0 and at most 1"),
        ({"mask_distance": "ssim"}, "`mask_distance` must be one of lpips, residual"),
        ({"perceptual_distance": distance}, "`perceptual_distance` is not used with `mask_distance` 'residual'"),
        ({"noise": torch.zeros(DRAWS, 5, 1, SIZE, SIZE), "generator": 1}, "either `noise` or `generator`"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_pipeline()(make_volume(), **arguments)


def test_wrong_components_and_volumes():
    pipe = make_pipeline()
    with pytest.raises(ValueError, match=r"`processor` must have the `value_range` \(-1, 1\)"):
        AutoDDPMPipeline(pipe.unet, pipe.scheduler, VolumeProcessor(value_range=(0.0, 1.0)))
    with pytest.raises(ValueError, match="under the key 'brain'"):
        pipe([make_volume()], brain_mask=make_volume())
    with pytest.raises(ValueError, match=r"shape \(N, 1, H, W\)"):
        pipe(torch.zeros(1, 2, SIZE, SIZE))
