"""AnoDDPM and brain_damage against arrays recorded from the original programs (schedules, steps, chains, losses).

Not compared: `whole_*`'s own program path (the variant that walks the forward chain is composed from the scheduler's public
steps here), since the pipeline offers the closed form only.
"""

import pytest
import torch

from anodiff import AnoDDPMPipeline, AnoDDPMScheduler, VolumeProcessor
from anodiff.training.objective_noise import noise_loss, variational_bound

from .recordings import ToyUNet, load, over


def pipeline(arrays: dict, **scheduler) -> AnoDDPMPipeline:
    scheduler = AnoDDPMScheduler(**scheduler)
    pipe = AnoDDPMPipeline(ToyUNet(arrays, len(scheduler)), scheduler, VolumeProcessor(), noise_level=1)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@over("anoddpm/schedules*.npz")
def test_schedules(path):
    arrays = load(path)
    compared = 0
    for name, expected in arrays.items():
        prefix, _, table = name.partition("_")
        kind, steps = prefix.rstrip("0123456789"), int(prefix.lstrip("abcdefghijklmnopqrstuvwxyz"))
        schedule = {"linear": "linear", "cosine": "cosine", "bd": "cosine_clipped"}[kind]
        scheduler = AnoDDPMScheduler(num_train_timesteps=steps, beta_schedule=schedule)
        posterior = scheduler.posterior_variance
        actual = {
            "betas": scheduler.betas,
            "alphas_cumprod": scheduler.alphas_cumprod,
            "posterior_variance": posterior,
            "posterior_log_variance_clipped": torch.cat([posterior[1:2], posterior[1:]]).log(),
            "coef1": scheduler.original_weight,
            "coef2": scheduler.sample_weight,
            "model_variance_fixedlarge": scheduler.variance,
        }[table.removesuffix("_f32")]
        tolerance = 1e-6 if table.endswith("_f32") else 1e-13
        torch.testing.assert_close(actual.to(expected.dtype), expected, rtol=tolerance, atol=0)
        compared += 1
    assert compared == len(arrays)


@over("anoddpm/ddpm_steps*.npz")
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_single_steps(path, schedule):
    arrays = load(path)
    steps = int(arrays["toy_T"])
    recorded = {
        name.removeprefix(f"{schedule}_"): array for name, array in arrays.items() if name.startswith(schedule)
    }
    scheduler = AnoDDPMScheduler(num_train_timesteps=steps, beta_schedule=schedule)
    x0, t = arrays["x0"], recorded["t"]

    x_t = scheduler.add_noise(x0, recorded["noise"], t)
    torch.testing.assert_close(x_t, recorded["x_t"], rtol=0, atol=2e-6)
    torch.testing.assert_close(
        scheduler.add_noise_step(x0, recorded["noise"], t), recorded["x_t_gradual"], rtol=0, atol=2e-6
    )
    torch.testing.assert_close(scheduler.posterior_mean(x0, t, x_t), recorded["q_post_mean"], rtol=0, atol=2e-6)
    posterior_log = torch.cat([scheduler.posterior_variance[1:2], scheduler.posterior_variance[1:]]).log()[t].float()
    torch.testing.assert_close(
        posterior_log.reshape(-1, 1, 1, 1).expand_as(x0), recorded["q_post_logvar"], rtol=0, atol=2e-6
    )

    model_output = ToyUNet(arrays, steps)(recorded["x_t"], t).sample
    raw = scheduler.predict_original_sample(model_output, t, recorded["x_t"])
    torch.testing.assert_close(raw, recorded["pred_x0_raw"], rtol=1e-5, atol=2e-6)
    step = scheduler.step(model_output, t, recorded["x_t"], variance_noise=torch.zeros_like(x0))
    torch.testing.assert_close(step.pred_original_sample, recorded["pred_x0_clamped"], rtol=0, atol=2e-6)
    torch.testing.assert_close(step.prev_sample, recorded["p_mean"], rtol=0, atol=2e-6)
    log = scheduler.variance.log()[t].float().reshape(-1, 1, 1, 1).expand_as(x0)
    torch.testing.assert_close(log, recorded["p_logvar"], rtol=0, atol=2e-6)
    noisy = scheduler.step(model_output, t, recorded["x_t"], variance_noise=torch.ones_like(x0)).prev_sample
    torch.testing.assert_close(noisy - step.prev_sample, (0.5 * log).exp(), rtol=0, atol=2e-6)


@over("anoddpm/partial_*.npz")
def test_partial_diffusion(path):
    arrays = load(path)
    level = int(arrays["t_distance"])
    pipe = pipeline(arrays, num_train_timesteps=int(arrays["schedule_T"]))
    states = []
    step = pipe.scheduler.step

    def recording_step(*args, **kwargs):
        states.append(args[2])
        result = step(*args, **kwargs)
        states.append(result[0])
        return result

    pipe.scheduler.step = recording_step
    x0 = arrays["x0"]
    output = pipe(x0, noise_level=level, noise=arrays["noises"], threshold=0.5)
    sequence = arrays["sequence"]
    torch.testing.assert_close(x0, sequence[0])
    torch.testing.assert_close(torch.stack([states[0], *states[1::2]]), sequence[1:], rtol=0, atol=1e-5)
    torch.testing.assert_close(output.anomaly_map, arrays["square_error"][:, 0], rtol=0, atol=1e-5)
    torch.testing.assert_close(output.reconstruction, sequence[-1], rtol=0, atol=1e-5)
    # Pixels on the threshold may fall to either side.
    clear = (arrays["square_error"][:, 0] - 0.5).abs() > 1e-4
    torch.testing.assert_close(output.pred_mask[clear].float(), arrays["prediction_thr05"][:, 0][clear].float())


@over("anoddpm/partial_*.npz")
def test_partial_diffusion_along_the_forward_chain(path):
    arrays = load(path)
    scheduler = AnoDDPMScheduler(num_train_timesteps=int(arrays["schedule_T"]))
    unet = ToyUNet(arrays, len(scheduler))
    noises, sequence = arrays["whole_noises"], arrays["whole_sequence"]
    level = int(arrays["whole_t_distance"])
    sample = arrays["x0"]
    states = [sample]
    for t in range(level):
        sample = scheduler.add_noise_step(sample, noises[t], t)
        states.append(sample)
    scheduler.set_timesteps(level)
    for t, noise in zip(scheduler.timesteps, noises[level:], strict=True):
        with torch.no_grad():
            sample = scheduler.step(unet(sample, t).sample, t, sample, variance_noise=noise).prev_sample
        states.append(sample)
    torch.testing.assert_close(torch.stack(states), sequence, rtol=0, atol=1e-5)


@over("anoddpm/partial_simplex*.npz")
def test_simplex_noise_of_the_chain(path):
    # The recorded noise comes from the recorded seeds under the authors' rule z = t / wavelength.
    arrays = load(path)
    scheduler = AnoDDPMScheduler(z="timestep")
    level = int(arrays["t_distance"])
    seeds = arrays["newseed_draws"]
    timesteps = torch.tensor([level - 1, *range(level - 1, -1, -1)])
    height, width = arrays["x0"].shape[2:]
    noise = scheduler.simplex_noise(seeds, timesteps, height, width)
    torch.testing.assert_close(noise, arrays["noises"].reshape(noise.shape), rtol=0, atol=1e-6)


@over("anoddpm/brain_damage_oneshot*.npz")
def test_one_shot(path):
    arrays = load(path)
    pipe = pipeline(
        arrays, beta_schedule="cosine_clipped", z="timestep_unscaled", wavelength=32, normalize="per_image"
    )
    x0 = arrays["x0"]
    height, width = x0.shape[2:]
    noise = pipe.scheduler.simplex_noise(arrays["seeds"], arrays["t"], height, width)
    torch.testing.assert_close(noise, arrays["noise"].reshape(noise.shape), rtol=0, atol=1e-5)
    for index, t in enumerate(arrays["t"].tolist()):
        recorded = arrays["noise"][index]
        x_t = pipe.scheduler.add_noise(x0, recorded, t)
        torch.testing.assert_close(x_t, arrays["x_t"][index], rtol=0, atol=1e-5)
        output = pipe(x0, noise_level=t + 1, mode="one_shot", noise=recorded[None])
        expected = arrays["reconstruction"][index]
        # 1e-5 of the maximum; t >= 900 divides by almost nothing and has 1e-3.
        tolerance = (1e-3 if t >= 900 else 1e-5) * expected.abs().max().item()
        torch.testing.assert_close(output.reconstruction, expected, rtol=0, atol=tolerance)
        scaled = output.anomaly_map - output.anomaly_map.min()
        scaled = scaled / scaled.max()
        torch.testing.assert_close(
            scaled, arrays["anomaly_map_minmax"][index], rtol=0, atol=1e-3 if t >= 900 else 2e-5
        )


@over("anoddpm/brain_damage_oneshot*.npz")
def test_reverse_step_of_brain_damage(path):
    # The notebook's disabled reverse step: unclamped mean, 0.7 of the true posterior deviation.
    arrays = load(path)
    scheduler = AnoDDPMScheduler(beta_schedule="cosine_clipped", clip_sample=False)
    unet = ToyUNet(arrays, len(scheduler))
    sample = arrays["x_t"][int(arrays["rev_start_index"])]
    for index, t in enumerate(arrays["rev_t"].tolist()):
        noise = torch.zeros_like(sample)
        if index < len(arrays["rev_noise"]):
            ratio = (scheduler.posterior_variance[t] / scheduler.variance[t]).sqrt()
            noise = 0.7 * ratio * arrays["rev_noise"][index]
        with torch.no_grad():
            sample = scheduler.step(
                unet(sample, torch.tensor([t])).sample, t, sample, variance_noise=noise
            ).prev_sample
        expected = arrays["rev_x"][index]
        torch.testing.assert_close(sample, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


@over("anoddpm/losses*.npz")
def test_losses(path):
    arrays = load(path)
    scheduler = AnoDDPMScheduler(num_train_timesteps=int(arrays["toy_T"]))
    x0, noise, t = arrays["x0"], arrays["noise"], arrays["t"]
    x_t = scheduler.add_noise(x0, noise, t)
    torch.testing.assert_close(x_t, arrays["x_t"], rtol=0, atol=1e-5)
    predicted = ToyUNet(arrays, len(scheduler))(x_t, t).sample.detach()
    torch.testing.assert_close(predicted, arrays["eps_pred"], rtol=0, atol=1e-5)
    for name in ("l1", "l2", "hybrid"):
        loss = noise_loss(scheduler, name, x0, x_t, noise, predicted, t)
        torch.testing.assert_close(loss, arrays[f"{name}_loss"], rtol=1e-5, atol=1e-5)
    bound = variational_bound(scheduler, x0, x_t, predicted, t)
    torch.testing.assert_close(bound, arrays["hybrid_vlb"], rtol=1e-5, atol=1e-5)
