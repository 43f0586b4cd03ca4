"""The baselines of AnoFPDM against arrays recorded from its program: DDIB, classifier guidance, AnoDDPM and AnoDDIM, and simplex noise.

Left out: `target_dynclip` of DDIB (dynamic clipping, which no configuration uses); `oct2d_*`, `stats128_*` and `perm_grad_index3_*` of the
noise (not used by a method, information only, and a table that follows from the permutation); of classifier guidance `ddpm_*` (a
variant that crashes in the original) and `step_noguide_xstart` (the state that follows from it is compared). Masks are
`map >= threshold` there and `map > threshold` in our pipelines: no recorded score equals a threshold.
"""

import numpy as np
import pytest
import torch

from anodiff import (
    AnoDDPMPipeline,
    AnoDDPMScheduler,
    AnoFPDMScheduler,
    ClassifierGuidedPipeline,
    DDIBPipeline,
    NoisyClassifierModel,
    VolumeProcessor,
)
from anodiff.pipelines.postprocessing import median_filter
from anodiff.schedulers.simplex import OctaveSimplexNoise, permutation_tables

from .recordings import ToyUNet, load, over


CHAIN = {"rtol": 0, "atol": 1e-4}
TARGET = {"rtol": 0, "atol": 1e-3}


class ToyClassifier(NoisyClassifierModel):
    """logits = 2 tanh(sum(x * V)) + t / T * c."""

    def __init__(self, arrays: dict):
        torch.nn.Module.__init__(self)
        self.register_to_config(in_channels=arrays["clf_V"].shape[1])
        self.templates, self.bias = torch.nn.Parameter(arrays["clf_V"]), torch.nn.Parameter(arrays["clf_c"])
        self.steps = arrays["T"].item()

    def forward(self, sample, timestep):
        logits = 2 * torch.tanh(torch.einsum("nchw,kchw->nk", sample, self.templates))
        return type("Output", (), {"logits": logits + timestep[:, None] / self.steps * self.bias})


def processor(images: torch.Tensor) -> VolumeProcessor:
    return VolumeProcessor(modalities=names(range(images.shape[1])))


def names(channels) -> tuple[str, ...]:
    return tuple(f"m{int(channel)}" for channel in channels)


def indices(images: torch.Tensor) -> list[int]:
    return list(range(len(images)))


def check_map(maps: torch.Tensor, arrays: dict, mask: str, prefix: str = "") -> None:
    """From the unfiltered map to the mask and the image label: the original's filter does not repeat the edge."""
    filtered = median_filter(maps.numpy(), 5, 2, border="mirror")
    np.testing.assert_allclose(filtered, arrays[prefix + "amap"][:, 0], **TARGET)
    expected = arrays[mask][:, 0].bool().numpy()
    threshold = arrays["threshold"].item()
    predicted = filtered >= np.float32(threshold)
    unsure = np.abs(arrays[prefix + "amap"][:, 0].numpy() - threshold) < 1e-4
    np.testing.assert_array_equal(predicted[~unsure], expected[~unsure])
    np.testing.assert_array_equal(predicted.any((1, 2)), arrays[prefix + "pred_lab"].bool())


@over("anofpdm/ddib*.npz")
@pytest.mark.parametrize("batch_size", [2, 16])
def test_ddib(path, batch_size):
    arrays = load(path)
    pipe = DDIBPipeline(
        ToyUNet(arrays),
        AnoFPDMScheduler(arrays["T"].item()),
        processor(arrays["x0"]),
        forward_steps=arrays["sample_steps"].item(),
        guidance_scale=arrays["w"].item(),
        modalities=names(arrays["modality"]),
    )
    pipe.set_progress_bar_config(disable=True)
    states = []
    step, encode_step = pipe.scheduler.step, pipe.scheduler.encode_step

    def recorded_step(*args, **kwargs):
        result = step(*args, **kwargs)
        states.append(result[0])
        return result

    def recorded_encode_step(*args, **kwargs):
        states.append(encode_step(*args, **kwargs))
        return states[-1]

    pipe.scheduler.step, pipe.scheduler.encode_step = recorded_step, recorded_encode_step
    result = pipe.compute_maps(arrays["x0"], indices(arrays["x0"]), batch_size=batch_size, **pipe.default_settings())
    if batch_size >= len(arrays["x0"]):
        expected = torch.cat([arrays["latents"], arrays["decoded"]])
        torch.testing.assert_close(torch.stack(states), expected, **TARGET)
        torch.testing.assert_close(states[len(states) // 2 - 1], arrays["latent"], **TARGET)
    torch.testing.assert_close(result.reconstruction, arrays["target"], **TARGET)
    torch.testing.assert_close(result.maps, arrays["amap_nomedian"][:, 0], **TARGET)
    check_map(result.maps, arrays, "pred_mask")


@over("anofpdm/classifier_guided*.npz")
def test_classifier_guidance(path):
    arrays = load(path)
    pipe = ClassifierGuidedPipeline(
        ToyUNet(arrays),
        ToyClassifier(arrays),
        AnoFPDMScheduler(arrays["T"].item()),
        processor(arrays["x0"]),
        noise_level=arrays["sample_steps"].item(),
        guidance_scale=arrays["classifier_scale"].item(),
    )
    pipe.set_progress_bar_config(disable=True)
    x_t, scale = arrays["x_t"], arrays["classifier_scale"].item()
    timesteps = torch.full((len(x_t),), arrays["sample_steps"].item() - 1)
    with torch.no_grad():
        logits = pipe.classifier(x_t, timesteps).logits
    torch.testing.assert_close(logits, arrays["logits_t"], **CHAIN)
    torch.testing.assert_close(scale * pipe.classifier_gradient(x_t, timesteps), arrays["grad"], **CHAIN)
    torch.testing.assert_close(pipe.guided_step(x_t, timesteps, scale, False), arrays["step_sample"], **CHAIN)
    torch.testing.assert_close(pipe.guided_step(x_t, timesteps, 0.0, False), arrays["step_noguide_sample"], **CHAIN)
    difference = (pipe.guided_step(x_t, timesteps, scale, True) - arrays["step_sample"]).abs().max()
    assert difference > 2 * CHAIN["atol"], "the original does not limit x_0 after the guidance"

    settings = pipe.default_settings()
    noise = arrays["noise"][None]
    result = pipe.compute_maps(arrays["x0"], indices(arrays["x0"]), seed=0, batch_size=2, noise=noise, **settings)
    torch.testing.assert_close(result.reconstruction, arrays["target"], **TARGET)
    check_map(result.maps, arrays, "mask")


def anoddpm(arrays, noise_type):
    scheduler = AnoDDPMScheduler(
        arrays["T"].item(), noise_type=noise_type, z="timestep" if noise_type == "simplex" else 27.0
    )
    pipe = AnoDDPMPipeline(
        ToyUNet(arrays), scheduler, processor(arrays["x0"]), noise_level=arrays["sample_steps"].item()
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@over("anofpdm/anoddpm*.npz")
@pytest.mark.parametrize(("prefix", "noise_type"), [("gauss", "gaussian"), ("simplex", "simplex")])
def test_anoddpm(path, prefix, noise_type):
    arrays = load(path)
    pipe = anoddpm(arrays, noise_type)
    steps, noise = arrays["sample_steps"].item(), arrays[f"{prefix}_noise"]
    start = pipe.scheduler.add_noise(arrays["x0"], noise[0], steps - 1)
    torch.testing.assert_close(start, arrays[f"{prefix}_xt"], **CHAIN)
    result = pipe.compute_maps(
        arrays["x0"], indices(arrays["x0"]), seed=0, batch_size=2, noise=noise, **pipe.default_settings()
    )
    torch.testing.assert_close(result.reconstruction, arrays[f"{prefix}_ddpm_target"], **CHAIN)
    if prefix == "simplex":
        assert len(arrays["modality"]) == arrays["x0"].shape[1], "the map is the mean of all modalities"
        check_map(result.maps, arrays, "simplex_mask", "simplex_")


@over("anofpdm/anoddpm*.npz")
def test_anoddim(path):
    arrays = load(path)
    scheduler = AnoFPDMScheduler(arrays["T"].item())
    scheduler.set_timesteps(arrays["sample_steps"].item())
    unet, sample = ToyUNet(arrays), arrays["gauss_xt"]
    for t in scheduler.timesteps:
        with torch.no_grad():
            model_output = unet(sample, t.expand(len(sample))).sample
        sample = scheduler.step(model_output, t, sample, return_dict=False)[0]
    torch.testing.assert_close(sample, arrays["gauss_ddim_target"], **CHAIN)


@over("anofpdm/anoddpm*.npz")
def test_simplex_noise_of_a_chain(path):
    arrays = load(path)
    noise, steps = arrays["simplex_noise"], arrays["sample_steps"].item()
    shape = noise.shape[1:]
    scheduler = AnoDDPMScheduler(arrays["T"].item(), z="timestep")
    seeds = arrays["simplex_seeds"].reshape(len(noise), *shape[:2])
    for call, t in enumerate([steps - 1, *range(steps - 1, -1, -1)]):
        timesteps = torch.full(shape[:2], t)
        fields = scheduler.simplex_noise(seeds[call], timesteps, *shape[2:], torch.float64)
        torch.testing.assert_close(fields.float(), noise[call], rtol=0, atol=1e-6)


@over("anofpdm/simplex*.npz")
def test_simplex_fields(path):
    arrays = load(path)
    seeds = arrays["seeds"]
    tables = permutation_tables(seeds).reshape(len(seeds), -1)
    fields = OctaveSimplexNoise(z="timestep")
    for number, seed in enumerate(seeds):
        torch.testing.assert_close(tables[number].long(), arrays[f"perm_{number}"], rtol=0, atol=0)
        expected = arrays[f"fixedT_{number}"]
        timesteps = arrays["t_values"][:, None]
        actual = fields(seed.expand(len(timesteps), 1), timesteps, *expected.shape[1:], torch.float64)
        torch.testing.assert_close(actual[:, 0], expected, rtol=0, atol=1e-12)
        one = OctaveSimplexNoise(octaves=1, wavelength=16, z=13.0)
        expected = arrays[f"octave1_f16_{number}"]
        actual = one(seed.reshape(1, 1), None, *expected.shape[1:], torch.float64)
        torch.testing.assert_close(actual[0], expected, rtol=0, atol=1e-12)
        rect = OctaveSimplexNoise(octaves=4, persistence=0.6, wavelength=16, z=5.0)
        expected = arrays[f"rect_{number}"]
        actual = rect(seed.reshape(1, 1), None, *expected.shape[1:], torch.float64)
        torch.testing.assert_close(actual[0], expected, rtol=0, atol=1e-12)
        whole = arrays[f"oct3d_{number}"]
        volume = OctaveSimplexNoise(octaves=3, persistence=0.7, wavelength=16, z="timestep")
        depth = torch.arange(len(whole))[:, None]
        actual = volume(seed.expand(len(whole), 1), depth, *whole.shape[1:], torch.float64)
        torch.testing.assert_close(actual[:, 0], whole, rtol=0, atol=1e-12)


@over("anofpdm/simplex*.npz")
def test_simplex_noise_of_a_batch(path):
    arrays = load(path)
    expected = arrays["batch_noise"]
    timesteps = arrays["batch_t"][:, None].expand(expected.shape[:2])
    seeds = arrays["batch_seeds"].reshape(expected.shape[:2])
    actual = OctaveSimplexNoise(z="timestep")(seeds, timesteps, *expected.shape[2:], torch.float64)
    torch.testing.assert_close(actual.float(), expected, rtol=0, atol=1e-6)
