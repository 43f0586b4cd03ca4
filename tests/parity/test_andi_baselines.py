"""The baselines of ANDi against arrays recorded from the ANDi authors' programs: AnoDDPM and its noise, AutoDDPM, DAE.

Not compared: the trick that makes the noise of AnoDDPM's chain from one field per timestep by rotations and flips, which this
library does not have; its recorded results go in as noise. Metrics of the `eval_*` files are compared elsewhere.
"""

import numpy as np
import pytest
import torch

from anodiff import (
    AnoDDPMPipeline,
    AnoDDPMScheduler,
    AutoDDPMPipeline,
    DAEPipeline,
    DAEScheduler,
    DAEUNet2DModel,
    VolumeProcessor,
)
from anodiff.pipelines.slices import Noise
from anodiff.schedulers.scheduling_dae import coarse_noise
from anodiff.schedulers.simplex import OctaveSimplexNoise, opensimplex3, permutation_tables
from anodiff.training.objective_dae import denoising_loss

from .recordings import ToyUNet, load, over, recordings


CHAIN = {"rtol": 0, "atol": 2e-6}
NETWORK = {"rtol": 0, "atol": 2e-5}
SEED_RANGE = 10_000_000  # the original draws seeds of noise from [-1e7, 1e7)


def processor(images: torch.Tensor, **settings) -> VolumeProcessor:
    return VolumeProcessor(modalities=tuple(f"m{number}" for number in range(images.shape[1])), **settings)


def scheduler(arrays: dict, **settings) -> AnoDDPMScheduler:
    """The process of a recording with `noise_steps`, `beta_start` and `beta_end`. The betas are recorded as they are used; the scheduler
    takes those of 1000 steps, which it multiplies by 1000 / T."""
    steps = int(arrays["noise_steps"])
    ends = {name: round(float(arrays[name]), 9) * steps / 1000 for name in ("beta_start", "beta_end")}
    settings = {"noise_type": "gaussian", "variance_type": "fixed_small", **ends, **settings}
    return AnoDDPMScheduler(steps, "linear_float32", **settings)


def shared_scheduler(**settings) -> AnoDDPMScheduler:
    """The process of all step files."""
    return scheduler(load(recordings("andi/schedule*.npz")[0]), **settings)


def autoddpm(arrays: dict, diffusion: AnoDDPMScheduler, images: torch.Tensor, **settings) -> AutoDDPMPipeline:
    unet = ToyUNet(arrays, len(diffusion), prefix="")
    pipe = AutoDDPMPipeline(unet, diffusion, processor(images), median_size=0, **settings)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def drawn_seeds(arrays: dict, count: int) -> torch.Tensor:
    """Seeds of the original's simplex noise, `(1 + count,)`: it draws them from numpy's global generator, the first for a table
    that makes no field."""
    seeds = np.random.RandomState(int(arrays["np_seed"])).randint(-SEED_RANGE, SEED_RANGE, 1 + count)
    return torch.from_numpy(seeds)


def distance_of_the_recordings(images: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """The recordings' stand-in for LPIPS, called with `normalize=True` as the original calls it."""
    squared = ((2 * images - 1) - (2 * others - 1)).square().mean(1, keepdim=True)
    return torch.nn.functional.avg_pool2d(squared, 3, stride=1, padding=1)


@over("andi/schedule*.npz")
def test_schedule_and_small_variance(path):
    arrays = load(path)
    diffusion = scheduler(arrays)
    torch.testing.assert_close(diffusion.betas.float(), arrays["beta"], rtol=0, atol=0)
    torch.testing.assert_close(diffusion.alphas_cumprod.float(), arrays["alpha_hat"], rtol=0, atol=0)
    torch.testing.assert_close(diffusion.variance[1:].float(), arrays["posterior_var_from_t1"], rtol=1e-6, atol=0)


@over("andi/anoddpm_gaussian*.npz")
def test_anoddpm(path):
    arrays = load(path)
    level, images = int(arrays["num_steps"]), arrays["images"]
    diffusion = shared_scheduler()
    unet = ToyUNet(arrays, len(diffusion), prefix="")
    pipe = AnoDDPMPipeline(unet, diffusion, processor(images), noise_level=level)
    pipe.set_progress_bar_config(disable=True)
    noise = torch.cat([arrays["noise_init"][None], arrays["noise_steps"]])
    assert len(noise) == int(arrays["n_draws"]) == level - 1
    settings = dict(mode="partial_offset", noise=noise, batch_size=1)
    result = pipe(images, modality_reduction="max", **settings)
    torch.testing.assert_close(result.reconstruction, arrays["recon"], **CHAIN)
    torch.testing.assert_close(result.anomaly_map, arrays["residual"].amax(1), rtol=1e-5, atol=4e-6)
    mean = pipe(images, modality_reduction="mean", **settings)
    torch.testing.assert_close(mean.anomaly_map, arrays["residual"].mean(1), rtol=1e-5, atol=4e-6)


@over("andi/anoddpm_simplex*.npz")
def test_anoddpm_with_simplex_noise(path):
    arrays = load(path)
    level, images = int(arrays["num_steps"]), arrays["images"]
    # The first fields are a field of its own for every image and channel.
    seeds = drawn_seeds(arrays, images.shape[:2].numel())[1:].reshape(images.shape[:2])
    diffusion = shared_scheduler(noise_type="simplex", z=10.0)
    drawn = diffusion.simplex_noise(seeds, None, *images.shape[2:])
    torch.testing.assert_close(drawn, arrays["noise_init"], **CHAIN)

    unet = ToyUNet(arrays, len(diffusion), prefix="")
    pipe = AnoDDPMPipeline(unet, diffusion, processor(images), noise_level=level, mode="partial_offset")
    pipe.set_progress_bar_config(disable=True)
    result = pipe(images, noise=torch.cat([drawn[None], arrays["step_noise"]]))
    torch.testing.assert_close(result.reconstruction, arrays["recon"], **CHAIN)


@over("andi/simplex*.npz")
def test_simplex_noise(path):
    arrays = load(path)
    golden = arrays["noise"]
    seeds = drawn_seeds(arrays, golden.shape[:2].numel())
    torch.testing.assert_close(permutation_tables(seeds), arrays["perm_first_is_constructor"][: len(seeds)])
    noise = OctaveSimplexNoise(
        octaves=int(arrays["octaves"]),
        persistence=round(float(arrays["persistence"]), 6),
        wavelength=float(arrays["frequency"]),
        z=float(arrays["t"]),
    )
    fields = noise(seeds[1:], None, *golden.shape[2:])
    torch.testing.assert_close(fields.reshape(golden.shape), golden, **CHAIN)

    seed = arrays["seed3"].reshape(1)
    table = permutation_tables(seed)[0]
    torch.testing.assert_close(table, arrays["perm3"])
    torch.testing.assert_close(table % (len(arrays["gradients3"]) // 3) * 3, arrays["perm_grad_index3"])
    z, y, x = torch.meshgrid(arrays["Zs"], arrays["Ys"], arrays["Xs"], indexing="ij")
    values = opensimplex3(seed, torch.stack([x, y, z], -1).reshape(-1, 3))
    torch.testing.assert_close(values.reshape(z.shape), arrays["noise3_64"], rtol=0, atol=1e-12)


@over("andi/ddpm_sample*.npz")
def test_ancestral_sampling(path):
    arrays = load(path)
    diffusion = scheduler(arrays, clip_sample=False)
    unet = ToyUNet(arrays, int(arrays["toy_T"]), prefix="")
    diffusion.set_timesteps()
    sample = arrays["x_T"]
    noise = torch.cat([arrays["noise"], torch.zeros_like(sample)[None]])
    for t, drawn in zip(diffusion.timesteps[:-1], noise, strict=True):
        with torch.no_grad():
            sample = diffusion.step(unet(sample, t).sample, t, sample, variance_noise=drawn).prev_sample
    scaled = (sample + 1) / 2 * 255
    # Truncated to whole grey levels: values on a border may fall to either side.
    clear = (scaled - scaled.round()).abs() > 1e-3
    assert clear.float().mean() > 0.9
    torch.testing.assert_close(scaled.clamp(0, 255).to(torch.uint8)[clear], arrays["sample_uint8"][clear])


@over("andi/autoddpm_inpaint*.npz")
def test_autoddpm_inpainting(path):
    arrays = load(path)
    images, healthy = arrays["images"], arrays["pseudo_healthy"]
    mask = torch.nn.functional.max_pool2d(arrays["mask_raw"], 3, stride=1, padding=1)
    torch.testing.assert_close(mask, arrays["mask_dilated"], rtol=0, atol=0)
    pipe = autoddpm(arrays, shared_scheduler(), images)
    used = []

    def recorded(draws, rows, shape):
        used.extend(draws)
        return arrays["noise"][draws, rows]

    drawing = Noise(0, recorded, torch.arange(len(images)), 0, images.device)
    levels = int(arrays["num_inpainting"]), int(arrays["resample"])
    with pipe.progress_bar(total=1) as progress, torch.no_grad():
        result = pipe.inpaint(images, healthy, mask > 0, *levels, drawing, progress)
    assert sorted(set(used)) == list(range(len(arrays["noise"])))
    torch.testing.assert_close(result, arrays["x_inpaint"], **CHAIN)
    torch.testing.assert_close(images * ~(mask > 0), arrays["masked_images"], rtol=0, atol=0)


@over("andi/eval_autoddpm_noise*.npz")
@pytest.mark.parametrize("batch_size", [1, 16])
def test_autoddpm_from_slices_to_maps(path, batch_size):
    noise = load(path)["split0_noise"]
    arrays = load(path.with_name(path.name.replace("_noise", "")))
    data = load(recordings("andi/eval_andi_a*.npz")[0])
    count = int(arrays["size_splits"])
    slices = data["images"][0].movedim(-1, 0)[:count] * 2 - 1
    settings = dict(
        noise_level=int(arrays["num_steps"]),
        inpainting_level=int(arrays["num_inpainting"]),
        resample=int(arrays["resample"]),
        masking_threshold=float(arrays["masking_thr"]),
        quantile=round(float(arrays["quantile"]), 6),
    )
    # Evaluations were recorded with the published process.
    diffusion = AnoDDPMScheduler(1000, "linear_float32", noise_type="gaussian", variance_type="fixed_small")
    pipe = autoddpm(data, diffusion, slices, **settings)

    drawing = Noise(0, noise, torch.arange(count), 0, slices.device)
    with pipe.progress_bar(total=1) as progress, torch.no_grad():
        healthy = pipe.reconstruct(slices, settings["noise_level"], drawing, progress)
    torch.testing.assert_close(healthy, arrays["split0_pseudo_healthy"], **CHAIN)
    _, mask = pipe.make_mask(
        slices, healthy, settings["masking_threshold"], settings["quantile"], distance_of_the_recordings
    )
    torch.testing.assert_close(mask.float(), arrays["split0_mask_dilated"], rtol=0, atol=0)

    result = pipe(slices, noise=noise, perceptual_distance=distance_of_the_recordings, batch_size=batch_size)
    torch.testing.assert_close(result.reconstruction, arrays["split0_x_inpaint"].clamp(-1, 1), **CHAIN)
    expected = arrays["map_raw"][0].movedim(-1, 0)[:count]
    assert expected.max() > 0
    torch.testing.assert_close(result.anomaly_map, expected, rtol=1e-4, atol=2e-6)


def dae(arrays: dict) -> DAEPipeline:
    width = 2 ** int(arrays["wf"])
    channels = [width * 2**level for level in range(int(arrays["depth"]))]
    modalities = arrays["images"].shape[1]
    unet = DAEUNet2DModel(modalities, modalities, channels).eval()
    state = {name[4:].replace("__", "."): array for name, array in arrays.items() if name.startswith("sd__")}
    unet.load_state_dict(state)
    pipe = DAEPipeline(unet, DAEScheduler(), processor(arrays["images"], value_range=(0.0, 1.0)), median_size=0)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@over("andi/dae*.npz")
def test_dae_noise_network_and_loss(path):
    arrays = load(path)
    pipe, images = dae(arrays), arrays["images"]
    torch.testing.assert_close(pipe.scheduler.foreground(images), arrays["mask"], rtol=0, atol=0)
    shifts = arrays["rolls"].expand(len(images), -1)
    noise = coarse_noise(arrays["coarse_noise_lowres"], shifts, images.shape[2:])
    torch.testing.assert_close(noise, arrays["coarse_noise"], **CHAIN)
    torch.testing.assert_close(pipe.scheduler.add_noise(images, noise), arrays["noisy"], **CHAIN)
    with torch.no_grad():
        predicted = pipe.unet(arrays["noisy"]).sample
        torch.testing.assert_close(predicted, arrays["pred"], **NETWORK)
        torch.testing.assert_close(pipe.unet(images).sample, arrays["clean_pred"], **NETWORK)
    loss = denoising_loss(pipe.scheduler, images, arrays["pred"])
    torch.testing.assert_close(loss.mean(), arrays["loss"], rtol=1e-5, atol=0)


@over("andi/dae*.npz")
def test_dae_maps(path):
    arrays = load(path)
    pipe = dae(arrays)
    for images, expected in zip(arrays["eval_images"], arrays["eval_map_raw"], strict=True):
        result = pipe(images.movedim(-1, 0), batch_size=4)
        torch.testing.assert_close(result.anomaly_map, expected.movedim(-1, 0), **NETWORK)
    assert arrays["eval_map_raw"].max() > 2 * NETWORK["atol"]
