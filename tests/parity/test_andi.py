"""ANDi and its single-modality successor in UAD-IMAG against arrays recorded from the original programs.

Not compared: `logsnr_classic` of UAD-IMAG's schedule, an alternative that no published run uses; of `eval_andi_*` everything
after `map_raw`, which evaluation does.
"""

import math

import pytest
import torch

from anodiff import ANDiPipeline, ANDiScheduler, VolumeProcessor
from anodiff.schedulers.draws import make_keys
from anodiff.schedulers.noise import draw_pyramid, pyramid_noise, pyramid_sizes

from .recordings import ToyUNet, load, over, recordings


def beta_range() -> dict:
    # The step files share the schedule of this one.
    arrays = load(recordings("andi/schedule*.npz")[0])
    return {
        "num_train_timesteps": int(arrays["noise_steps"]),
        "beta_start": round(float(arrays["beta_start"]), 9),
        "beta_end": round(float(arrays["beta_end"]), 9),
    }


def make_pipeline(arrays: dict, scheduler: ANDiScheduler, scale: int, **settings) -> ANDiPipeline:
    modalities = tuple(f"modality{index}" for index in range(arrays["W"].shape[0]))
    processor = VolumeProcessor(modalities=modalities)
    pipe = ANDiPipeline(ToyUNet(arrays, scale, prefix=""), scheduler, processor, median_size=0, **settings)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def deviations(scheduler: ANDiScheduler, unet: ToyUNet, images, noise, timesteps) -> torch.Tensor:
    """d_t from the scheduler's public steps, (N, K, C, H, W); noise (K, N, C, H, W)."""
    found = []
    for drawn, t in zip(noise, timesteps, strict=True):
        sample = scheduler.add_noise(images, drawn, t)
        with torch.no_grad():
            model_output = unet(sample, t).sample
        found.append(scheduler.deviation(scheduler.mean_error(model_output, t, sample, images, drawn)))
    return torch.stack(found, 1)


def compute(pipe: ANDiPipeline, images, noise, batch_size: int = 5, **settings) -> torch.Tensor:
    settings = {**pipe.default_settings(), **settings}
    return pipe.compute_maps(
        images, list(range(len(images))), seed=0, batch_size=batch_size, noise=noise, **settings
    ).maps


def assert_close_deviations(actual, expected):
    # The original subtracts two float32 means of size 1, so its small deviations are rounded.
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=2e-8)


def map_tolerance(recorded: torch.Tensor) -> torch.Tensor:
    """Relative tolerance of geometric means (N, C, H, W) over recorded d_t (N, K, C, H, W): 5e-3, but the recording itself is as
    far from the exact value as 1.6e-2 where some d_t is tiny. Each of its means of size 1 has an error of about 3e-7."""
    return (2 * 3e-7 / recorded.sqrt()).mean(1).clamp(min=5e-3)


def assert_close_maps(actual, expected, tolerance=5e-3, outliers: float = 0.0):
    # Where one deviation of the original is exactly 0 its geometric mean is 0; the tolerance is infinite there.
    relative = ((actual - expected) / expected).abs()
    assert relative.median() < 1e-4
    assert (relative > tolerance).float().mean() <= outliers


@over("andi/schedule*.npz")
def test_schedule(path):
    arrays = load(path)
    scheduler = ANDiScheduler(**beta_range())
    assert torch.equal(scheduler.betas.float(), arrays["beta"])
    assert torch.equal((1 - scheduler.betas).float(), arrays["alpha"])
    torch.testing.assert_close(scheduler.alphas_cumprod.float(), arrays["alpha_hat"], rtol=0, atol=2e-6)
    # A relative bound as well: these are small. The original's 1 - abar is a difference of float32 numbers.
    torch.testing.assert_close(scheduler.deviation_weight.float(), arrays["dev_weight"], rtol=2e-3, atol=2e-6)
    torch.testing.assert_close(
        scheduler.posterior_variance[1:].float(), arrays["posterior_var_from_t1"], rtol=2e-3, atol=2e-6
    )


@over("andi/pyramid_noise*.npz")
def test_pyramid_noise_from_given_draws(path):
    arrays = load(path)
    cases = sorted({name.split("_")[0] for name in arrays})
    assert cases
    for case in cases:
        shape = arrays[f"{case}_shape"].tolist()
        rates, sizes = arrays[f"{case}_r"], arrays[f"{case}_sizes"]
        torch.testing.assert_close(pyramid_sizes(*shape[2:], rates), sizes)
        levels = [arrays[f"{case}_level{level}"] for level in range(len(sizes))]
        discount = round(float(arrays[f"{case}_discount"]), 6)
        noise = pyramid_noise(arrays[f"{case}_base"], levels, sizes, discount, per_image=False)
        torch.testing.assert_close(noise, arrays[f"{case}_out"], rtol=0, atol=3e-6)


@over("andi/pyramid_stats*.npz")
def test_pyramid_noise_in_distribution(path):
    # Two images with two channels per call, as recorded.
    arrays = load(path)
    size, discount, calls = int(arrays["size"]), float(arrays["discount"]), int(arrays["n_draws"])
    fields = [
        draw_pyramid(make_keys(0, [call] * 2, [0, 1]), (2, size, size), discount=discount, per_image=False)
        for call in range(calls)
    ]
    fields = torch.stack(fields)  # (calls, 2, 2, S, S)
    torch.testing.assert_close(fields.flatten(1).std(1), torch.ones(calls), rtol=0, atol=1e-5)

    frequency = torch.fft.fftfreq(size, 1 / size)
    radius = (frequency[:, None].square() + frequency.square()).sqrt().round().long().clamp(max=size // 2).flatten()
    power = torch.fft.fft2(fields).abs().square().mean((1, 2)).flatten(1) / size**2  # (calls, S * S)
    bins = torch.zeros(calls, size // 2 + 1).index_add_(1, radius, power) / torch.bincount(radius)
    error = (bins.var(0) / calls + arrays["radial_power_sem"].square()).sqrt()
    # 5 standard errors: a chance of 2e-5 for 33 bins.
    assert ((bins.mean(0) - arrays["radial_power"]).abs() / error).max() < 5
    # A standard deviation over n values has the relative standard error 1 / sqrt(2 n), here and in the recording: 5 of both.
    means = fields.mean((3, 4))
    torch.testing.assert_close(means.std(), arrays["image_mean_std"], rtol=5 / means.numel() ** 0.5, atol=0)


@over("andi/forward*.npz")
def test_forward_process_and_means(path):
    arrays = load(path)
    scheduler = ANDiScheduler(**beta_range())
    x0, t, noise = arrays["x0"], arrays["t"], arrays["noise"]
    x_t = scheduler.add_noise(x0, noise, t)
    torch.testing.assert_close(x_t, arrays["x_t"], rtol=0, atol=2e-6)
    pyramid = scheduler.add_noise(x0, arrays["pyr_noise"], t)
    torch.testing.assert_close(pyramid, arrays["x_t_pyr"], rtol=0, atol=2e-6)

    with torch.no_grad():
        model_output = ToyUNet(arrays, len(scheduler), prefix="")(arrays["x_t"], t).sample
    torch.testing.assert_close(model_output, arrays["eps_pred"], rtol=0, atol=2e-6)
    x_t, model_output = arrays["x_t"], arrays["eps_pred"]
    for actual, expected in (
        (scheduler.predicted_mean(noise, t, x_t), "mu_q"),
        (scheduler.predicted_mean(model_output, t, x_t), "mu_theta"),
        (scheduler.posterior_mean(x0, t, x_t), "mean_from_x0"),
        (
            ANDiScheduler(**beta_range(), clip_sample=True).predicted_mean(model_output, t, x_t),
            "mean_from_eps_clipped",
        ),
    ):
        torch.testing.assert_close(actual, arrays[expected], rtol=0, atol=2e-6)


@over("andi/andi_gaussian*.npz", "andi/andi_pyramid*.npz")
def test_maps(path):
    arrays = load(path)
    scheduler = ANDiScheduler(**beta_range(), log_floor=0.0)
    # The original raises `start=0` to 1; here it is refused.
    start, stop = max(int(arrays["start"]), 1), int(arrays["stop"])
    pipe = make_pipeline(arrays, scheduler, len(scheduler), start=start, stop=stop)
    images, noise, order = arrays["images"], arrays["noise"], arrays["t_order"]
    scheduler.set_timesteps(start=start, stop=stop)
    assert torch.equal(scheduler.timesteps, order)

    by_time = arrays["d_t"].flip(1)
    found = deviations(scheduler, pipe.unet, images, noise, order)
    assert_close_deviations(found, by_time)
    tolerance = map_tolerance(by_time)
    assert_close_maps(found.log().mean(1).exp(), arrays["gmean"], tolerance)
    # The direct form, as the original has it.
    for step, t in enumerate(order):
        sample = scheduler.add_noise(images, noise[step], t)
        with torch.no_grad():
            model_output = pipe.unet(sample, t).sample
        direct = scheduler.predicted_mean(noise[step], t, sample) - scheduler.predicted_mean(model_output, t, sample)
        assert_close_deviations(direct.square(), by_time[:, step])

    maps = compute(pipe, images, noise)
    assert_close_maps(maps, arrays["gmean_max"], tolerance.amax(1))
    assert_close_maps(
        compute(pipe, images, noise, modality_reduction="mean"), arrays["gmean"].mean(1), tolerance.amax(1)
    )
    # Without that rounding: the same in float64.
    exact = deviations(
        scheduler, ToyUNet(arrays, len(scheduler), prefix="").double(), images.double(), noise.double(), order
    )
    torch.testing.assert_close(maps.double(), exact.log().mean(1).exp().amax(1), rtol=5e-3, atol=0)
    arithmetic = compute(pipe, images, noise, aggregation="arithmetic")
    torch.testing.assert_close(arithmetic, arrays["mean"].amax(1), rtol=1e-3, atol=2e-8)
    # The constant between d_t and the squared error of the noise.
    if "noise_dev_gmean" in arrays:
        factor = scheduler.deviation_weight[order].log().mean().exp().float()
        torch.testing.assert_close(maps, arrays["noise_dev_gmean"].amax(1) * factor, rtol=5e-3, atol=0)


@over("andi/andi_blocks*.npz")
def test_normative_blocks(path):
    arrays = load(path)
    scheduler = ANDiScheduler(**beta_range(), log_floor=0.0)
    start, stop, length = max(int(arrays["start"]), 1), int(arrays["stop"]), int(arrays["skip"])
    # The original begins at `stop` - 1 and behind every end; what is below the last end is not compared.
    ends = [t for t in range(stop - 1, start - 1, -1) if t % length == 0 or t == 1]
    tops = [stop - 1] + [end - 1 for end in ends[:-1]]
    pipe = make_pipeline(
        arrays, scheduler, len(scheduler), start=start, stop=stop, normative_blocks=True, block_length=length
    )
    # The draw behind the last end is not used.
    images, noise = arrays["images"], arrays["noise"][: len(ends)]
    # Where the original writes the block of t = 1 over another one, the last one is recorded.
    places = {(end - start) // length: draw for draw, end in enumerate(ends)}
    for place, draw in places.items():
        alone = dict(start=ends[draw], stop=tops[draw] + 1, aggregation="arithmetic")
        block = arrays["d_blocks"][:, place]
        for reduction, expected in (("max", block.amax(1)), ("mean", block.mean(1))):
            found = compute(pipe, images, noise[draw : draw + 1], modality_reduction=reduction, **alone)
            assert_close_deviations(found, expected)
    if len(places) == len(ends):
        blocks = arrays["d_blocks"][:, sorted(places)]
        expected = blocks.log().mean(1).exp().amax(1)
        assert_close_maps(compute(pipe, images, noise), expected, map_tolerance(blocks).amax(1))


@over("andi/eval_andi_[!n]*.npz")
def test_maps_of_the_evaluation(path):
    arrays, noise = load(path), load(recordings("andi/eval_andi_noise*.npz")[0])["noise"]
    scheduler = ANDiScheduler(log_floor=0.0)
    start, stop = max(int(arrays["start"]), 1), int(arrays["stop"])
    pipe = make_pipeline(arrays, scheduler, len(scheduler), start=start, stop=stop)
    for volume, expected, draws in zip(arrays["images"], arrays["map_raw"], noise, strict=True):
        slices = volume.permute(3, 0, 1, 2) * 2 - 1  # (slices, C, H, W)
        # Recorded by rising t; a pixel in a thousand may have lost its largest channel to a deviation of 0.
        assert_close_maps(compute(pipe, slices, draws.flip(0)), expected.permute(2, 0, 1), outliers=1e-3)


def uadimag_scheduler(arrays: dict, **options) -> ANDiScheduler:
    # N intervals have N + 1 timesteps.
    return ANDiScheduler(
        num_train_timesteps=int(arrays["N"]) + 1,
        beta_schedule="shifted_cosine",
        clip_sample=True,
        log_floor=0.0,
        **options,
    )


@over("andi/uadimag_schedule*.npz")
def test_uadimag_schedule(path):
    arrays = load(path)
    limits = {"log_snr_min": float(arrays["logsnr_min"]), "log_snr_max": float(arrays["logsnr_max"])}
    ratio = int(arrays["noise_d"]) / int(arrays["image_d"])
    shifted = uadimag_scheduler(arrays, resolution_ratio=ratio, **limits)
    unshifted = uadimag_scheduler(arrays, resolution_ratio=1.0, **limits)
    for scheduler, name in ((shifted, "logsnr_shifted"), (unshifted, "logsnr_unshifted")):
        # From t = 1 down to 0. Near t = 1 the tangent of a float32 angle has no more than 3 digits, elsewhere 6.
        logsnr = scheduler.alphas_cumprod.logit().flip(0).float()
        early = arrays["timesteps"] < 0.9
        torch.testing.assert_close(logsnr[early], arrays[name][early], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(logsnr, arrays[name], rtol=0, atol=1e-3)
    alphas_cumprod = shifted.alphas_cumprod.flip(0)
    torch.testing.assert_close(alphas_cumprod.sqrt().float(), arrays["alpha"], rtol=0, atol=2e-6)
    torch.testing.assert_close((1 - alphas_cumprod).sqrt().float(), arrays["sigma"], rtol=0, atol=2e-6)


@pytest.mark.parametrize("prediction", ["v", "eps"])
@over("andi/uadimag_andi*.npz")
def test_uadimag_maps(path, prediction):
    arrays = load(path)
    schedule = load(recordings("andi/uadimag_schedule*.npz")[0])
    steps = int(arrays["N"])
    scheduler = uadimag_scheduler(
        arrays,
        prediction_type={"v": "v_prediction", "eps": "epsilon"}[prediction],
        resolution_ratio=int(schedule["noise_d"]) / int(arrays["image_d"]),
    )
    # t = start, ..., stop + 1 in units of 1 / N.
    start, stop = int(arrays["stop"]) + 1, int(arrays["start"]) + 1
    pipe = make_pipeline(arrays, scheduler, steps, start=start, stop=stop, zero_background=True)
    images, noise = arrays["images"], arrays["noise"]
    scheduler.set_timesteps(start=start, stop=stop)
    torch.testing.assert_close(scheduler.timesteps / steps, arrays["t_used"], rtol=0, atol=1e-6)

    background = images == -1
    found = deviations(scheduler, pipe.unet, images, noise, scheduler.timesteps)
    recorded = arrays[f"{prediction}_gmean_dev"]
    assert_close_deviations(found, recorded)
    maps, brain = compute(pipe, images, noise), ~background.all(1)
    gmean = arrays[f"{prediction}_gmean_map"].amax(1)
    assert_close_maps(maps[brain], gmean[brain], map_tolerance(recorded).amax(1)[brain])
    assert (maps[~brain] == 0).all()
    torch.testing.assert_close(
        compute(pipe, images, noise, aggregation="prob"),
        arrays[f"{prediction}_prob_map"].amax(1),
        rtol=1e-3,
        atol=2e-6,
    )


def test_constants_of_the_card():
    # Sections 1 and C1: what the geometric mean of the published ranges is multiplied by.
    weights = ANDiScheduler().deviation_weight[75:200]
    assert math.isclose(weights.log().mean().exp(), 4.4068e-5, rel_tol=2e-5)
    scheduler = ANDiScheduler(num_train_timesteps=1001, beta_schedule="shifted_cosine")
    ones, zeros = torch.ones(100, 1, 1, 1), torch.zeros(100, 1, 1, 1)
    weights = scheduler.posterior_mean(ones, torch.arange(26, 126), zeros).square()
    assert math.isclose(weights.log().mean().exp(), 6.6441e-4, rel_tol=2e-5)
