"""Properties of `DAEPipeline`, its noise and its network."""

import pytest
import torch

from anodiff import DAEPipeline, DAEScheduler, DAEUNet2DModel, VolumeProcessor
from anodiff.schedulers.draws import make_keys
from anodiff.schedulers.scheduling_dae import coarse_noise

from ..tiny import SIZE, make_volume
from ..tiny import make_pipeline as make


def make_pipeline(modalities=("image",), **settings) -> DAEPipeline:
    return make("DAEPipeline", modalities, **settings)


def test_map_is_the_largest_difference_inside_the_foreground():
    pipe = make_pipeline(("flair", "t1"))
    slices = torch.zeros(1, 2, SIZE, SIZE)
    slices[:, 0, 4:13, 4:13] = 0.5
    result = pipe(slices, rim_window=5)
    inside = torch.zeros(SIZE, SIZE, dtype=torch.bool)
    inside[6:11, 6:11] = True
    # A corner of the foreground's inside lacks nothing; one missing pixel of 25 would still be filled by 96 %.
    assert (result.anomaly_map[0] > 0).equal(inside)
    expected = (slices - result.reconstruction).abs().amax(1)[0]
    torch.testing.assert_close(result.anomaly_map[0][inside], expected[inside])
    with_rim = pipe(slices, rim_window=1)
    assert (with_rim.anomaly_map[0] > 0).equal(slices[0, 0] > 0)


def test_a_slice_is_evaluated_once_and_as_it_is():
    pipe = make_pipeline()
    slices = torch.rand(3, 1, SIZE, SIZE)
    seen = []
    forward = pipe.unet.forward

    def recording(sample, *args, **kwargs):
        seen.append(sample)
        return forward(sample, *args, **kwargs)

    pipe.unet.forward = recording
    pipe(slices, batch_size=2)
    torch.testing.assert_close(torch.cat(seen), slices, rtol=0, atol=0)


def test_noise_is_coarse_shifted_and_of_each_slice_alone():
    scheduler = DAEScheduler(noise_resolution=4, noise_std=0.2, shared_shift=False)
    size, keys = (2, SIZE, 12), make_keys(0, range(3))
    noise = scheduler.draw_noise(keys, size)
    assert noise.shape == (3, *size)
    for number in range(3):
        torch.testing.assert_close(scheduler.draw_noise(keys[number : number + 1], size)[0], noise[number])

    large = scheduler.draw_noise(make_keys(0, range(200)), (2, SIZE, SIZE))
    # Corners meet, so values lie between the draws: variance 0.04 (2/3)^2 in the middle, 0.04 at the draws.
    assert 0.1 < large.std() < 0.2 and large.mean().abs() < 0.01


def test_shift_of_a_batch_is_that_of_its_first_slice():
    size, keys = (1, SIZE, SIZE), make_keys(0, range(3))
    own = DAEScheduler(noise_resolution=4, shared_shift=False).draw_noise(keys, size)
    shared = DAEScheduler(noise_resolution=4).draw_noise(keys, size)
    torch.testing.assert_close(shared[0], own[0], rtol=0, atol=0)
    shifts = [
        [(y, x) for y in range(SIZE) for x in range(SIZE) if torch.roll(shared[i], (y, x), (1, 2)).equal(own[i])]
        for i in (1, 2)
    ]
    assert all(len(found) == 1 for found in shifts) and [(0, 0)] not in shifts


def test_coarse_noise_moves_down_and_right():
    draws = torch.randn(2, 1, 3, 3)
    plain = torch.nn.functional.interpolate(draws, size=(8, 6), mode="bilinear", align_corners=True)
    moved = coarse_noise(draws, torch.tensor([[2, 1], [0, 5]]), (8, 6))
    torch.testing.assert_close(moved[0], torch.roll(plain[0], (2, 1), (1, 2)), rtol=0, atol=0)
    torch.testing.assert_close(moved[1], torch.roll(plain[1], (0, 5), (1, 2)), rtol=0, atol=0)


def test_network_is_as_large_as_the_card_says():
    with torch.device("meta"):
        model = DAEUNet2DModel()
    groups = [block.block[3].num_groups for block in model.down_path]
    assert groups == [8, 16, 16, 32]
    assert model(torch.zeros(1, 4, 128, 128, device="meta")).sample.shape == (1, 4, 128, 128)


def test_network_does_not_see_the_scale_of_its_weights(tmp_path):
    torch.manual_seed(0)
    model = DAEUNet2DModel(1, 1, (4, 8)).eval()
    sample = torch.rand(2, 1, SIZE, SIZE)
    expected = model(sample).sample
    model.save_pretrained(tmp_path)
    loaded = DAEUNet2DModel.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(sample, return_dict=False)[0], expected)
    with torch.no_grad():
        loaded.down_path[0].block[1].weight.mul_(3).add_(0.5)
    torch.testing.assert_close(loaded(sample).sample, expected, rtol=1e-3, atol=1e-4)
    with pytest.raises(ValueError, match="`sample` must have sides divisible by 2, got"):
        model(torch.zeros(1, 1, 15, 16))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rim_window": 4}, "`rim_window` must be odd, got 4"),
        ({"rim_window": 0}, "`rim_window` must be an integer of at least 1, got 0"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_pipeline()(make_volume(), **arguments)


def test_the_value_range_of_the_processor_does_not_matter():
    pipe = make_pipeline()
    slices = torch.rand(3, 1, SIZE, SIZE, generator=torch.manual_seed(1))
    settings = {**pipe.processor.settings(), "value_range": (-1.0, 1.0)}
    other = DAEPipeline(pipe.unet, pipe.scheduler, VolumeProcessor.from_dict(settings), median_size=0)
    other.set_progress_bar_config(disable=True)
    result = other(slices * 2 - 1)
    plain = DAEPipeline(pipe.unet, pipe.scheduler, pipe.processor, median_size=0)
    plain.set_progress_bar_config(disable=True)
    expected = plain(slices)
    assert expected.anomaly_map.max() > 0
    torch.testing.assert_close(result.anomaly_map, expected.anomaly_map, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(result.reconstruction, expected.reconstruction * 2 - 1, atol=1e-6, rtol=1e-5)


def test_wrong_components():
    pipe = make_pipeline()
    with pytest.raises(ValueError, match="`processor` must map the background to the lower end"):
        DAEPipeline(pipe.unet, pipe.scheduler, VolumeProcessor(intensity="mean_std"))
    with pytest.raises(ValueError, match="`noise_resolution` must be an integer of at least 1"):
        DAEScheduler(noise_resolution=0)
    with pytest.raises(ValueError, match="`noise_std` must be a finite number and above 0"):
        DAEScheduler(noise_std=0.0)
    with pytest.raises(ValueError, match="`block_out_channels`"):
        DAEUNet2DModel(block_out_channels=())
