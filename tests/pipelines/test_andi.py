"""Properties of `ANDiPipeline` with real, tiny components."""

import json

import nibabel as nib
import numpy as np
import PIL.Image
import pytest
import torch

from anodiff import ANDiPipeline, ANDiScheduler, VolumeProcessor

from ..tiny import SIZE, assert_same_map, make_slices, make_volume
from ..tiny import make_pipeline as make


def make_pipeline(modalities=("image",), **settings) -> ANDiPipeline:
    return make("ANDiPipeline", modalities, **settings)


def evaluated_batches(pipe) -> list[torch.Tensor]:
    """The timesteps of every evaluation from now on."""
    batches, forward = [], pipe.unet.forward

    def counting(sample, timesteps, *args, **kwargs):
        assert len(sample) == len(timesteps)
        batches.append(timesteps.clone())
        return forward(sample, timesteps, *args, **kwargs)

    pipe.unet.forward = counting
    return batches


def test_published_defaults():
    pipe = ANDiPipeline(make_pipeline().unet, ANDiScheduler(), VolumeProcessor())
    assert pipe.config.start == 75 and pipe.config.stop == 200 and pipe.config.num_timesteps is None
    assert pipe.config.noise_type == "gaussian" and pipe.config.aggregation == "geometric"
    assert pipe.config.modality_reduction == "max" and not pipe.config.normative_blocks
    assert pipe.postprocessing.median_size == 5 and pipe.postprocessing.median_dimensions == 3
    assert pipe.scheduler.config.noise_type == "pyramid" and pipe.scheduler.config.discount == 0.8


@pytest.mark.parametrize("aggregation", ["geometric", "arithmetic", "prob"])
@pytest.mark.parametrize("noise_type", ["gaussian", "pyramid"])
def test_batch_size_does_not_matter(aggregation, noise_type):
    pipe = make_pipeline(aggregation=aggregation, noise_type=noise_type)
    maps = [pipe(make_volume(), batch_size=size).anomaly_map for size in (1, 3, 16, 100)]
    for other in maps[1:]:
        assert_same_map(other, maps[0])


@pytest.mark.parametrize("length", [3, 4])
def test_batch_size_does_not_matter_for_blocks(length):
    pipe = make_pipeline(normative_blocks=True, block_length=length)
    maps = [pipe(make_volume(), batch_size=size).anomaly_map for size in (1, 3, 100)]
    for other in maps[1:]:
        assert_same_map(other, maps[0])


@pytest.mark.parametrize("noise_type", ["gaussian", "pyramid"])
def test_draws_are_bit_identical_for_any_batch_size(noise_type):
    pipe = make_pipeline(noise_type=noise_type)
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
    # One draw per slice and timestep, no two alike.
    assert len(drawn[1]) == len(set(drawn[1].values())) == 5 * 4
    assert drawn[1] == drawn[4] == drawn[100]


def test_batches_are_full_across_slices_and_timesteps():
    pipe = make_pipeline()
    batches = evaluated_batches(pipe)
    volume = make_volume()
    volume[..., 2] = 0  # no brain: not computed
    result = pipe(volume, batch_size=6)
    assert [len(batch) for batch in batches] == [6, 6, 4]
    assert torch.cat(batches).bincount().tolist() == [0] * 75 + [4] * 4
    assert (result.anomaly_map[..., 2] == 0).all() and result.pred_score[2] == 0
    assert (result.pred_score[[0, 1, 3, 4]] > 0).all()


def test_a_slice_does_not_depend_on_its_neighbours():
    pipe = make_pipeline(noise_type="pyramid")
    whole = make_slices(5)
    maps = pipe(whole).anomaly_map
    single = pipe.compute_maps(whole[3:4], [3], seed=0, batch_size=1, **pipe.default_settings())
    assert single.reconstruction is None and single.masks is None and not single.details
    torch.testing.assert_close(single.maps[0], maps[3], rtol=0, atol=1e-5 * maps.max().item())


def test_map_is_the_geometric_mean_of_the_deviations():
    pipe = make_pipeline(("flair", "t1"))
    slices, noise = make_slices(3, 2), torch.randn(4, 3, 2, SIZE, SIZE)
    deviations = []
    for t, drawn in zip((78, 77, 76, 75), noise, strict=True):
        sample = pipe.scheduler.add_noise(slices, drawn, t)
        with torch.no_grad():
            model_output = pipe.unet(sample, t).sample
        weight = pipe.scheduler.deviation_weight[t].item()
        deviations.append(weight * (model_output - drawn).square())
    deviations = torch.stack(deviations).clamp(min=1e-10)
    geometric = deviations.log().mean(0).exp()
    assert_same_map(pipe(slices, noise=noise).anomaly_map, geometric.amax(1))
    assert_same_map(pipe(slices, noise=noise, modality_reduction="mean").anomaly_map, geometric.mean(1))
    assert_same_map(pipe(slices, noise=noise, aggregation="arithmetic").anomaly_map, deviations.mean(0).amax(1))
    beta = pipe.scheduler.betas[[78, 77, 76, 75]].float().reshape(-1, 1, 1, 1, 1)
    probability = 1 - (-deviations / (2 * beta)).exp().prod(0)
    assert_same_map(pipe(slices, noise=noise, aggregation="prob").anomaly_map, probability.amax(1))
    assert pipe(slices, noise=noise).reconstruction is None


def test_noise_may_be_a_callable():
    pipe = make_pipeline()
    slices, noise = make_slices(), torch.randn(4, 3, 1, SIZE, SIZE)
    brain = torch.ones(3, SIZE, SIZE, dtype=torch.bool)
    brain[1] = False  # slices keep their numbers

    def draw(draws, items, shape):
        assert len(draws) == len(items) == shape[0] and 1 not in items
        return noise[draws, items]

    expected = pipe(slices, noise=noise, brain_mask=brain).anomaly_map
    assert_same_map(pipe(slices, noise=draw, brain_mask=brain, batch_size=3).anomaly_map, expected)
    assert_same_map(expected[2], pipe(slices, noise=noise).anomaly_map[2])


def test_one_exact_zero_does_not_erase_a_pixel():
    # A network that predicts 0 is exactly right where the noise is 0.
    slices = make_slices()
    noise = torch.randn(4, 3, 1, SIZE, SIZE)
    noise[2, 1, 0, 5, 6] = 0
    maps = {}
    for floor in (1e-10, 0.0):
        pipe = make_pipeline(scheduler=ANDiScheduler(log_floor=floor))
        for parameter in pipe.unet.conv_out.parameters():
            torch.nn.init.zeros_(parameter)
        maps[floor] = pipe(slices, noise=noise).anomaly_map
    assert maps[0.0][1, 5, 6] == 0 and (maps[0.0] == 0).sum() == 1
    others = pipe.scheduler.deviation_weight[[78, 77, 75]] * noise[[0, 1, 3], 1, 0, 5, 6].square()
    expected = (others.log().sum() + np.log(1e-10)) / 4
    torch.testing.assert_close(maps[1e-10][1, 5, 6].double(), expected.exp(), rtol=1e-4, atol=0)
    # Pixels without a deviation below the floor keep their value.
    weights = pipe.scheduler.deviation_weight[[78, 77, 76, 75]].float().reshape(-1, 1, 1, 1)
    untouched = (weights * noise[:, :, 0].square() > 1.01e-10).all(0)
    assert untouched.float().mean() > 0.9
    torch.testing.assert_close(maps[1e-10][untouched], maps[0.0][untouched], rtol=1e-6, atol=0)


def test_fewer_timesteps():
    pipe = make_pipeline(stop=95)
    batches = evaluated_batches(pipe)
    noise = torch.randn(5, 2, 1, SIZE, SIZE)
    thinned = pipe(make_slices(2), num_timesteps=5, noise=noise).anomaly_map
    assert sorted(set(torch.cat(batches).tolist())) == [77, 81, 85, 89, 93]
    assert sum(map(len, batches)) == 10
    # The same timesteps, whoever asks for them, have the same random numbers.
    alone = pipe(make_slices(2), start=85, stop=86).anomaly_map
    np.testing.assert_array_equal(alone, pipe(make_slices(2), num_timesteps=1).anomaly_map)
    assert_same_map(
        pipe(make_slices(2), start=85, stop=86, noise=noise[2:3]).anomaly_map,
        pipe(make_slices(2), num_timesteps=1, noise=noise[2:3]).anomaly_map,
    )
    assert (thinned - alone).abs().max() > 0
    np.testing.assert_array_equal(pipe(make_slices(2), num_timesteps=20).anomaly_map, pipe(make_slices(2)).anomaly_map)


def test_blocks_of_one_step_are_the_timesteps():
    pipe = make_pipeline()
    expected = pipe(make_slices()).anomaly_map
    assert_same_map(pipe(make_slices(), normative_blocks=True, block_length=1).anomaly_map, expected)


@pytest.mark.parametrize(
    ("start", "stop", "length", "chains"),
    [
        (10, 19, 3, [(18, 18), (17, 15), (14, 12)]),  # nothing ends below 12
        (75, 79, 2, [(78, 78), (77, 76)]),
        (75, 79, 25, [(78, 75)]),
        (1, 8, 5, [(7, 5), (4, 1)]),  # t = 1 ends a chain, too
        (1, 4, 25, [(3, 1)]),
    ],
)
def test_blocks_end_at_multiples_of_their_length(start, stop, length, chains):
    pipe = make_pipeline(start=start, stop=stop, normative_blocks=True, block_length=length)
    batches = evaluated_batches(pipe)
    slices = make_slices()
    noise = torch.randn(len(chains), 3, 1, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    result = pipe(slices, noise=noise, aggregation="arithmetic").anomaly_map
    walked = torch.cat([torch.arange(end, top + 1) for top, end in chains])
    assert torch.cat(batches).bincount().equal(3 * walked.bincount())

    # Both chains, walked by the scheduler's own means.
    scheduler, expected = pipe.scheduler, []
    for (top, end), drawn in zip(chains, noise, strict=True):
        true = predicted = scheduler.add_noise(slices, drawn, top)
        for t in range(top, end - 1, -1):
            with torch.no_grad():
                model_output = pipe.unet(predicted, torch.full((3,), t)).sample
            predicted = scheduler.predicted_mean(model_output, t, predicted)
            true = scheduler.posterior_mean(slices, t, true)
        expected.append((true - predicted).square())
    torch.testing.assert_close(result, torch.stack(expected).mean(0)[:, 0], rtol=1e-2, atol=1e-8)


def test_blocks_without_an_end_are_refused():
    with pytest.raises(ValueError, match="`block_length` must have a multiple from `start` to `stop` - 1, 76 to 78"):
        make_pipeline(start=76, stop=79, normative_blocks=True, block_length=25)


def test_background_can_be_zero():
    pipe = make_pipeline(("flair", "t1"), processor_settings={"value_range": (0.0, 1.0)})
    slices = make_slices(3, 2, (0.0, 1.0))
    slices[:, :, :4] = 0
    slices[:, 0, 4:8] = 0
    plain, zeroed = (pipe(slices, zero_background=flag).anomaly_map for flag in (False, True))
    assert (plain[:, :4] > 0).all() and (zeroed[:, :4] == 0).all()
    assert (zeroed[:, 4:8] > 0).all() and (zeroed[:, 4:8] < plain[:, 4:8]).any()
    torch.testing.assert_close(zeroed[:, 8:], plain[:, 8:], rtol=0, atol=0)


def test_sums_do_not_grow_with_the_timesteps():
    pipe = make_pipeline(stop=175)
    largest = []

    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                largest.append(result.numel())
            return result

    numbers = {}
    for count in (4, 100):
        largest.clear()
        with Largest():
            pipe.compute_maps(
                make_slices(), [0, 1, 2], seed=0, batch_size=4, **{**pipe.default_settings(), "num_timesteps": count}
            )
        numbers[count] = max(largest)
    assert numbers[4] == numbers[100]


def test_results_without_a_reconstruction_are_saved(tmp_path):
    pipe = make_pipeline()
    volume = make_volume()
    result = pipe(nib.Nifti1Image(volume, np.eye(4)), threshold=1e-6)
    assert result.reconstruction is None and result.pred_mask.any()
    result.save(tmp_path / "volume")
    names = sorted(path.name for path in (tmp_path / "volume").iterdir())
    assert names == ["anomaly_map.nii.gz", "pred_mask.nii.gz", "result.json"]
    assert json.loads((tmp_path / "volume" / "result.json").read_text())["settings"]["start"] == 75
    picture = PIL.Image.fromarray((volume[..., 0] * 200).astype(np.uint8))
    pipe(picture).save(tmp_path / "picture")
    assert sorted(path.name for path in (tmp_path / "picture").iterdir()) == ["anomaly_map.png", "result.json"]


def test_median_is_that_of_the_checkpoint():
    from scipy import ndimage

    slices = make_slices(6)
    raw = make_pipeline()(slices).anomaly_map
    filtered = make_pipeline(median_size=5, median_dimensions=3)(slices).anomaly_map
    assert_same_map(filtered, ndimage.median_filter(raw.numpy(), size=5, mode="reflect"))


def test_progress_bar_is_silent_when_asked(capfd):
    pipe = make_pipeline()
    pipe(make_volume(), batch_size=3)
    assert capfd.readouterr().err == ""
    pipe.set_progress_bar_config(disable=False)
    pipe(make_volume(), batch_size=3)
    assert "7/7" in capfd.readouterr().err
    pipe(make_volume(), batch_size=3, normative_blocks=True, block_length=3)
    assert "8/8" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"start": 0}, "`start` must be an integer between 1 and 999, got 0"),
        ({"start": 79}, "`stop` must be an integer between 80 and 1000, got 79"),
        ({"stop": 1001}, "`stop` must be an integer between 76 and 1000, got 1001"),
        ({"stop": 78.0}, "`stop` must be an integer between 76 and 1000, got 78.0"),
        ({"num_timesteps": 5}, "`num_timesteps` must be an integer between 1 and 4, got 5"),
        ({"num_timesteps": 0}, "`num_timesteps` must be an integer between 1 and 4, got 0"),
        ({"noise_type": "simplex"}, "`noise_type` must be one of pyramid, gaussian, got 'simplex'"),
        ({"aggregation": "median"}, "`aggregation` must be one of geometric, arithmetic, prob, got 'median'"),
        ({"modality_reduction": "sum"}, "`modality_reduction` must be one of max, mean, got 'sum'"),
        ({"block_length": 0}, "`block_length` must be an integer between 1 and 1000, got 0"),
        (
            {"normative_blocks": True, "num_timesteps": 2},
            r"`num_timesteps` must be \d+, all from `start` to `stop` - 1",
        ),
        ({"normative_blocks": True, "aggregation": "prob"}, "`aggregation` must be geometric or arithmetic with"),
        ({"normative_blocks": "yes"}, "`normative_blocks` must be one of False, True, got 'yes'"),
        ({"zero_background": 2}, "`zero_background` must be one of False, True, got 2"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_pipeline()(make_volume(), **arguments)


def test_wrong_settings():
    with pytest.raises(ValueError, match="`aggregation` must be one of"):
        make_pipeline(aggregation="sum")
    with pytest.raises(ValueError, match="`stop` must be an integer between 76 and 100, got 200"):
        make_pipeline(scheduler=ANDiScheduler(num_train_timesteps=100), stop=200)


def test_chains_of_a_checkpoint_with_few_timesteps():
    pipe = make_pipeline(num_timesteps=2)
    start, stop = pipe.config.start, pipe.config.stop
    expected = make_pipeline()(make_slices(), normative_blocks=True, block_length=1).anomaly_map
    chains = pipe(make_slices(), normative_blocks=True, block_length=1, num_timesteps=stop - start)
    assert_same_map(chains.anomaly_map, expected)
