"""Properties of `AnoFPDMPipeline`."""

import json

import nibabel as nib
import numpy as np
import pytest
import torch
from torch.testing import assert_close

from anodiff import AnoFPDMPipeline, AnoFPDMScheduler, VolumeProcessor
from anodiff.pipelines.postprocessing import median_filter
from anodiff.pipelines.running_maps import RunningMaps
from anodiff.schedulers.draws import make_keys, normal

from .. import tiny
from ..tiny import SIZE, assert_same_map, make_slices, make_volume


CALIBRATED = {"similarity_threshold": 0.9999, "gap_scale": (1e-3,)}


def make_pipeline(known=("image",), **settings) -> AnoFPDMPipeline:
    return tiny.make_pipeline("AnoFPDMPipeline", known, **settings)


def compute(pipe, slices, indices=None, batch_size=16, noise=None, **settings):
    settings = {**pipe.default_settings(), **settings}
    indices = list(range(len(slices))) if indices is None else indices
    return pipe.compute_maps(slices, indices, seed=0, batch_size=batch_size, noise=noise, **settings)


def evaluations_of(pipe) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Timesteps and labels of every evaluation from now on."""
    seen, forward = [], pipe.unet.forward

    def counting(sample, timesteps, class_labels):
        assert len(sample) == len(timesteps) == len(class_labels)
        seen.append((timesteps.clone(), class_labels.clone()))
        return forward(sample, timesteps, class_labels)

    pipe.unet.forward = counting
    return seen


def test_published_defaults():
    pipe = AnoFPDMPipeline(make_pipeline().unet, AnoFPDMScheduler(), VolumeProcessor())
    assert pipe.config.forward_steps == 600 and pipe.config.guidance_scale == 2.0 and pipe.config.stride == 1
    assert pipe.config.forward_process == "ddim" and pipe.config.index_mode == "original"
    assert pipe.config.unguided_branch == "healthy" and pipe.config.quantile_range == (0.90, 0.98)
    assert (
        pipe.config.modalities is None and pipe.config.similarity_threshold is None and pipe.config.gap_scale is None
    )
    assert pipe.postprocessing.median_size == 5 and pipe.postprocessing.median_dimensions == 2
    assert pipe.postprocessing.min_component_size == 41


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        # (evaluated batches, slices in them) for 3 slices in batches of 2, 6 steps.
        ({}, (2 * 11, 3 * 17)),
        ({"index_mode": "aligned"}, (2 * 6, 3 * 12)),
        ({"index_mode": "aligned", "stride": 4}, (2 * 2, 3 * 4)),
        ({"stride": 2}, (2 * 5, 3 * 8)),
        # The last slice is alone: two of its steps share a batch.
        ({"forward_process": "random"}, (6 + 3, 3 * 12)),
    ],
)
def test_number_of_evaluations(settings, expected):
    pipe = make_pipeline(**settings)
    seen = evaluations_of(pipe)
    compute(pipe, make_slices(), batch_size=2)
    assert (len(seen), sum(len(timesteps) for timesteps, _ in seen)) == expected
    assert max(len(timesteps) for timesteps, _ in seen) == 4


def test_order_of_timesteps_and_labels():
    pipe = make_pipeline(forward_steps=5, stride=2)
    seen = evaluations_of(pipe)
    compute(pipe, make_slices(1))
    assert [timesteps.tolist() for timesteps, _ in seen] == [[0, 0], [2], [2, 2], [4], [4, 4]]
    assert [labels.tolist() for _, labels in seen] == [[0, 2], [2], [0, 2], [2], [0, 2]]
    seen.clear()
    compute(pipe, make_slices(1), index_mode="aligned")
    assert [timesteps.tolist() for timesteps, _ in seen] == [[0, 0], [2, 2], [4, 4]]


@pytest.mark.parametrize(
    "settings", [{}, {"index_mode": "aligned", "stride": 2}, {"forward_process": "random"}], ids=str
)
def test_batch_size_does_not_matter(settings):
    pipe = make_pipeline(**settings, **CALIBRATED)
    results = [pipe(make_volume(), batch_size=size) for size in (1, 3, 16, 100)]
    for other in results[1:]:
        assert_same_map(other.anomaly_map, results[0].anomaly_map)
        np.testing.assert_array_equal(other.slice_details["t_e"], results[0].slice_details["t_e"])
        assert (other.pred_mask != results[0].pred_mask).mean() < 1e-3


@pytest.mark.parametrize(("process", "draws"), [("ddim", 1), ("random", 6)])
def test_draws_are_those_of_their_slice_and_step_for_any_batch_size(process, draws):
    pipe = make_pipeline(forward_process=process)
    original = pipe.scheduler.draw_noise
    expected = {}
    for step in range(draws):
        keys = make_keys(7, range(5), step)
        images = normal(keys, (1, SIZE, SIZE)).numpy()
        expected |= {tuple(key): image.tobytes() for key, image in zip(keys.tolist(), images, strict=True)}
    for batch_size in (1, 4, 100):
        seen = {}

        def recording(keys, size, seen=seen):
            noise = original(keys, size)
            for key, image in zip(keys.tolist(), noise, strict=True):
                assert tuple(key) not in seen
                seen[tuple(key)] = image.numpy().tobytes()
            return noise

        pipe.scheduler.draw_noise = recording
        pipe(make_volume(), batch_size=batch_size, generator=7)
        assert seen == expected and len(set(seen.values())) == 5 * draws


def test_a_slice_does_not_depend_on_its_neighbours():
    pipe = make_pipeline(**CALIBRATED)
    whole = compute(pipe, make_slices(5))
    single = compute(pipe, make_slices(5)[3:4], [3])
    assert single.reconstruction is None
    assert_same_map(single.maps[0], whole.maps[3])
    assert torch.equal(single.masks[0], whole.masks[3])
    for name, values in single.details.items():
        assert_close(values[0], whole.details[name][3], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("index_mode", ["original", "aligned"])
@pytest.mark.parametrize("branch", ["healthy", "none"])
def test_map_is_that_of_the_formulas(index_mode, branch):
    pipe = make_pipeline(
        ("flair", "t1", "t2"), modalities=("t2", "flair"), index_mode=index_mode, unguided_branch=branch
    )
    slices, noise = make_slices(2, 3), torch.randn(1, 2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    scheduler, errors, plain_errors, gaps = pipe.scheduler, [], [], []

    def evaluate(sample, t, label):
        with torch.no_grad():
            return pipe.unet(sample, torch.full((2,), t), torch.full((2,), label)).sample

    def original_of(output, t):
        abar = scheduler.alphas_cumprod[t].item()
        return ((sample - (1 - abar) ** 0.5 * output) / abar**0.5).clamp(-1, 1)

    def encode(t):
        abar, following = scheduler.alphas_cumprod[t].item(), scheduler.alphas_cumprod[t + 1].item()
        original = original_of(evaluate(sample, t, 2), t)
        epsilon = (sample - abar**0.5 * original) / (1 - abar) ** 0.5
        return following**0.5 * original + (1 - following) ** 0.5 * epsilon

    for t in range(6):
        if t == 0:
            abar = scheduler.alphas_cumprod[0].item()
            sample = abar**0.5 * slices + (1 - abar) ** 0.5 * noise[0]
        else:
            sample = encode(t if index_mode == "original" else t - 1)
        healthy, null = evaluate(sample, t, 0), evaluate(sample, t, 2)
        guided = original_of(3 * healthy - 2 * null, t)[:, [2, 0]]
        unguided = original_of(healthy if branch == "healthy" else null, t)[:, [2, 0]]
        errors.append((guided - slices[:, [2, 0]]) ** 2)
        plain_errors.append((unguided - slices[:, [2, 0]]) ** 2)
        gaps.append(((guided - unguided) ** 2).mean((2, 3)))
    errors, plain_errors, gaps = torch.stack(errors), torch.stack(plain_errors), torch.stack(gaps)
    t_e = gaps.argmax(0)
    assert (t_e > 0).any()
    expected = [
        torch.stack([errors[: max(int(t_e[n, m]), 1), n, m].mean(0) for m in range(2)]).mean(0) for n in range(2)
    ]
    result = compute(pipe, slices, noise=noise)
    assert_same_map(result.maps, torch.stack(expected))
    assert torch.equal(result.details["t_e"], t_e)
    assert_close(result.details["gap"], gaps.amax(0), rtol=1e-4, atol=1e-7)
    curves = [part.mean((2, 3, 4)) for part in (errors, plain_errors)]
    assert_close(result.details["similarity"], torch.cosine_similarity(*curves, dim=0), rtol=0, atol=1e-5)


def test_random_process_noises_every_step_anew():
    pipe = make_pipeline(forward_process="random", forward_steps=7, stride=3)
    slices = make_slices()
    noise = torch.randn(3, 3, 1, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    samples, add_noise = [], pipe.scheduler.add_noise

    def recording(*arguments):
        samples.append(add_noise(*arguments))
        return samples[-1]

    pipe.scheduler.add_noise = recording
    compute(pipe, slices, batch_size=3, noise=noise)
    for sample, drawn, t in zip(samples, noise, (0, 3, 6), strict=True):
        assert_close(sample, add_noise(slices, drawn, t), rtol=0, atol=0)


def running_maps(gaps: list[float]) -> tuple[RunningMaps, torch.Tensor]:
    """Running maps of one pixel-wise constant slice whose gaps are given, and the squared errors of the steps."""
    original = torch.zeros(1, 1, 2, 2)
    running, errors = RunningMaps(original, len(gaps)), torch.arange(1.0, len(gaps) + 1)
    for step, (gap, error) in enumerate(zip(gaps, errors, strict=True)):
        guided = torch.full_like(original, float(error) ** 0.5)
        running.update(slice(None), step, guided, guided - gap**0.5)
    return running, errors


def test_step_t_e_itself_does_not_count():
    running, errors = running_maps([1.0, 2.0, 4.0, 3.0])
    assert running.best_step.item() == 2
    assert_close(running.maps, torch.full((1, 1, 2, 2), errors[:2].mean().item()), rtol=1e-6, atol=0)


def test_first_of_equal_gaps_wins_and_step_zero_counts_itself():
    for gaps in ([4.0, 1.0, 4.0], [0.0, 0.0, 0.0]):
        running, errors = running_maps(gaps)
        assert running.best_step.item() == 0
        assert_close(running.maps, torch.full((1, 1, 2, 2), errors[0].item()), rtol=1e-6, atol=0)


def test_first_step_is_flagged():
    pipe = make_pipeline(forward_steps=1)
    result = pipe(make_slices())
    assert (result.slice_details["t_e"] == 0).all() and (result.slice_details["first_step_used"] == 1).all()
    assert (result.anomaly_map > 0).any()
    later = pipe(make_slices(), forward_steps=6).slice_details
    np.testing.assert_array_equal(later["first_step_used"], later["t_e"] == 0)
    assert (later["t_e"] > 0).any()


def test_memory_does_not_grow_with_the_steps():
    pipe = make_pipeline()
    largest = []

    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                largest.append(result.numel())
            return result

    numbers = {}
    for steps in (4, 50):
        for process in ("ddim", "random"):
            largest.clear()
            with Largest():
                compute(pipe, make_slices(), forward_steps=steps, forward_process=process)
            numbers[steps, process] = max(largest)
    assert numbers[4, "ddim"] == numbers[50, "ddim"]
    # A batch is full of steps of the random process: 16 items at most.
    assert numbers[50, "random"] <= 16 / 3 * numbers[4, "ddim"]


def test_uncalibrated_gives_a_map_only():
    pipe = make_pipeline()
    result = pipe(make_volume())
    assert result.pred_mask is None and set(result.slice_details) == {"similarity", "t_e", "gap", "first_step_used"}
    labelled = pipe(make_volume(), similarity_threshold=1.0)
    assert labelled.pred_mask is None and (labelled.slice_details["label"] == 1).all()
    # A threshold of the map needs no calibration.
    threshold = float(np.median(result.anomaly_map))
    np.testing.assert_array_equal(
        pipe(make_volume(), threshold=threshold).pred_mask, (result.anomaly_map > threshold).astype(np.uint8)
    )


def test_label_decides_about_the_mask():
    pipe = make_pipeline(gap_scale=(1e-3,))
    slices = make_slices(4)
    ungated = compute(pipe, slices, gate_by_label=False)
    assert "label" not in ungated.details and ungated.masks.flatten(1).any(1).all()
    middle = ungated.details["similarity"].sort().values[1].item()
    gated = compute(pipe, slices, similarity_threshold=middle)
    # At most the threshold is unhealthy.
    assert gated.details["label"].sum() == 2
    unhealthy = gated.details["label"].bool()
    assert torch.equal(gated.masks[unhealthy], ungated.masks[unhealthy]) and not gated.masks[~unhealthy].any()


def test_mask_is_cut_at_the_quantile_of_the_unfiltered_map():
    pipe = make_pipeline(median_size=3, similarity_threshold=1.0, gap_scale=(1e9,))
    result = compute(pipe, make_slices())
    # A gap that is nothing beside the scale: the highest quantile.
    assert (result.details["quantile"] == 0.98).all()
    expected = result.maps.flatten(1).quantile(0.98, dim=1)
    assert_close(result.details["mask_threshold"], expected, rtol=1e-6, atol=0)
    filtered = median_filter(result.maps.numpy(), 3, 2, border="mirror")
    np.testing.assert_array_equal(result.masks.numpy(), filtered >= expected[:, None, None].numpy())
    lowest = compute(pipe, make_slices(), gap_scale=(1e-12,))
    assert (lowest.details["quantile"] == 0.90).all()
    assert (lowest.details["mask_threshold"] < expected).all()


def test_map_of_the_output_is_filtered_once():
    slices = make_slices()
    raw = make_pipeline(**CALIBRATED)
    pipe = make_pipeline(median_size=5, min_component_size=4, **CALIBRATED)
    output, results = pipe(slices), compute(pipe, slices)
    assert_same_map(results.maps, raw(slices).anomaly_map)
    assert_same_map(output.anomaly_map, median_filter(results.maps.numpy(), 5, 2))
    np.testing.assert_array_equal(output.pred_mask.numpy(), results.masks.numpy())


def test_small_components_go_slice_by_slice():
    # One pixel at the same place of three slices is a component of three in the volume.
    maps = torch.zeros(3, 1, SIZE, SIZE)
    maps[:, :, 2, 2], maps[:, :, 8:10, 8:10] = 1.0, 1.0
    pipe = make_pipeline(min_component_size=4)
    kept = pipe.segment(maps, torch.zeros(3, 1), maps, [1.0], (0.99, 0.99), "image")[0]
    assert kept[:, 8:10, 8:10].all() and kept.sum() == 12


def test_quantile_of_the_foreground():
    pipe = make_pipeline(similarity_threshold=1.0, gap_scale=(1e-12,))
    slices = make_slices()
    slices[:2, :, :10] = -1.0
    result = compute(pipe, slices, quantile_region="foreground")
    for one, inside, threshold in zip(
        result.maps, slices.mean(1) > -0.95, result.details["mask_threshold"], strict=True
    ):
        assert_close(threshold, one[inside].quantile(0.90), rtol=1e-5, atol=0)
    whole = compute(pipe, slices).details["mask_threshold"]
    assert (result.details["mask_threshold"] != whole).all()


def test_modalities_are_chosen_by_name():
    pipe = make_pipeline(("flair", "t1", "t2"))
    slices = make_slices(2, 3)
    every = compute(pipe, slices)
    assert every.details["t_e"].shape == (2, 3)
    parts = [compute(pipe, slices, modalities=(name,)) for name in ("flair", "t1", "t2")]
    assert_same_map(torch.stack([part.maps for part in parts]).mean(0), every.maps)
    assert torch.equal(torch.cat([part.details["t_e"] for part in parts], 1), every.details["t_e"])


def make_items(channels=1):
    """Two subjects with a healthy and an unhealthy slice each, one slice of unknown label, and one without brain."""
    items = []
    for seed in range(2):
        images = torch.rand(4, channels, SIZE, SIZE, generator=torch.Generator().manual_seed(seed)) * 2 - 1
        brain = torch.ones(4, SIZE, SIZE, dtype=torch.bool)
        brain[3] = False
        items.append({"image": images.numpy(), "brain": brain.numpy(), "label": [0, 1, -1, 0], "slice": [2, 5, 6, 7]})
    return items


def test_calibration_takes_labelled_slices_with_brain():
    # What a former calibration chose, for other modalities, does not stand in the way.
    pipe = make_pipeline(("flair", "t1"), **{**CALIBRATED, "gap_scale": (1.0, 1.0)}, threshold=0.5)
    pipe.register_to_config(modalities=["t1"])
    record = pipe.calibrate(make_items(2), batch_size=3)
    assert (record["policy"], record["slices"], record["anomalous_slices"]) == ("labels", 4, 2)
    assert record["values"].items() <= dict(pipe.config).items() and pipe.config.threshold is None
    (candidate,) = record["candidates"]
    assert candidate["guidance_scale"] == 2.0 and candidate["image_accuracy"] == record["image_accuracy"]

    details = [compute(pipe, torch.from_numpy(item["image"]), item["slice"]).details for item in make_items(2)]
    similarity, gap = (torch.stack([one[name][:2] for one in details]) for name in ("similarity", "gap"))
    assert_close(torch.tensor(pipe.config.gap_scale), gap[:, 1].amax(0), rtol=1e-5, atol=0)
    assert candidate["mean_gap"] == pytest.approx(gap[:, 1].mean().item(), rel=1e-5)
    # Quantiles of the healthy slices lie between them.
    assert similarity[:, 0].min() <= pipe.config.similarity_threshold <= similarity[:, 0].max()
    wrong = (similarity[:, 1] > pipe.config.similarity_threshold).sum() + 1
    assert candidate["wrong_labels"] == wrong and candidate["image_accuracy"] == 1 - wrong / 4


def test_calibration_checks_what_it_is_given():
    pipe = make_pipeline()
    with pytest.raises(ValueError, match="`guidance_scale` must be a finite number and above 0, got 0.0"):
        pipe.calibrate(make_items(), guidance_scales=[0])
    healthy = [{**item, "label": [0, 0, 0, 0]} for item in make_items()]
    with pytest.raises(ValueError, match="got 6 and 0: choose other validation data"):
        pipe.calibrate(healthy)
    assert pipe.config.gap_scale is None


def test_empty_slices_are_not_computed():
    pipe = make_pipeline(**CALIBRATED)
    seen = evaluations_of(pipe)
    volume = make_volume()
    volume[..., 2] = 0
    result = pipe(volume)
    assert max(len(timesteps) for timesteps, _ in seen) == 2 * 4
    assert (result.anomaly_map[..., 2] == 0).all() and (result.pred_mask[..., 2] == 0).all()
    assert result.slice_details["label"][2] == -1 and np.isnan(result.slice_details["similarity"][2])
    nothing = pipe(make_slices(), brain_mask=torch.zeros(3, SIZE, SIZE, dtype=torch.bool))
    assert not nothing.anomaly_map.any() and not nothing.pred_mask.any()


@pytest.mark.parametrize("process", ["ddim", "random"])
def test_values_that_are_not_finite_are_an_error(process):
    pipe = make_pipeline(forward_process=process)
    forward = pipe.unet.forward

    def damaged(sample, timesteps, class_labels):
        output = forward(sample, timesteps, class_labels)
        output.sample[timesteps == 5] = torch.nan
        return output

    pipe.unet.forward = damaged
    with pytest.raises(ValueError, match="NaN or infinite"):
        pipe(make_slices())


def test_calibrated_values_travel_with_the_checkpoint(tmp_path):
    settings = {**CALIBRATED, "gap_scale": (1e-3, 2e-3)}
    pipe = make_pipeline(("flair", "t2"), modalities=("flair", "t2"), median_size=3, min_component_size=2, **settings)
    volume = {"flair": make_volume(seed=1), "t2": make_volume(seed=2)}
    expected = pipe(volume)
    pipe.save_pretrained(tmp_path)
    loaded = AnoFPDMPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    result = loaded(volume)
    assert loaded.config.gap_scale == [1e-3, 2e-3] and result.pred_mask.any()
    np.testing.assert_array_equal(result.pred_mask, expected.pred_mask)


def test_results_are_saved(tmp_path):
    pipe = make_pipeline(**CALIBRATED)
    volume = make_volume()
    pipe(nib.Nifti1Image(volume, np.eye(4))).save(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "anomaly_map.nii.gz",
        "pred_mask.nii.gz",
        "result.json",
    ]
    record = json.loads((tmp_path / "result.json").read_text())
    assert len(record["label"]) == len(record["t_e"]) == len(record["similarity"]) == volume.shape[2]
    assert record["settings"]["forward_steps"] == 6 and record["settings"]["gap_scale"] == [1e-3]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"forward_steps": 101}, "`forward_steps` must be an integer between 1 and 50, got 101"),
        ({"forward_steps": 0}, "`forward_steps` must be an integer between 1 and 50, got 0"),
        ({"stride": 7}, "`stride` must be an integer between 1 and 6, got 7"),
        ({"stride": 1.5}, "`stride` must be an integer between 1 and 6, got 1.5"),
        ({"guidance_scale": 0}, "`guidance_scale` must be a finite number and above 0, got 0"),
        ({"forward_process": "ddpm"}, "`forward_process` must be one of ddim, random, got 'ddpm'"),
        ({"index_mode": "shifted"}, "`index_mode` must be one of original, aligned, got 'shifted'"),
        ({"unguided_branch": "null"}, "`unguided_branch` must be one of healthy, none, got 'null'"),
        ({"quantile_region": "brain"}, "`quantile_region` must be one of image, foreground, got 'brain'"),
        ({"gate_by_label": 2}, "`gate_by_label` must be one of False, True, got 2"),
        ({"modalities": ("flair",)}, "`modalities` must be different ones of image, got"),
        ({"modalities": ()}, "`modalities` must be different ones of image, got"),
        ({"modalities": "image"}, "`modalities` must be different ones of image, got 'image'"),
        (
            {"similarity_threshold": 1.5},
            "`similarity_threshold` must be a finite number and between -1 and 1, got 1.5",
        ),
        ({"gap_scale": (0.1, 0.1)}, "`gap_scale` must have one value above 0 for each of image, got"),
        ({"gap_scale": (0.0,)}, "`gap_scale` must have one value above 0 for each of image, got"),
        ({"quantile_range": (0.98, 0.9)}, "`quantile_range` must be two values, 0 <= lowest <= highest <= 1"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_pipeline()(make_volume(), **arguments)


def test_wrong_settings():
    with pytest.raises(ValueError, match="`index_mode` must be one of"):
        make_pipeline(index_mode="other")
    with pytest.raises(ValueError, match=r"`processor` must have the `value_range` \(-1, 1\)"):
        make_pipeline(processor_settings={"value_range": (0.0, 1.0)})
