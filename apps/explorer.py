"""Computes what the noise explorer shows: noise, the noised slice, its one-shot reconstruction, spectrum and histogram.
Everything is drawn by the library's schedulers from a seed."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass, fields, replace

import numpy as np
import PIL.Image
import torch
import yaml

from ..checks import check_choice, check_integer
from ..configs import packaged_config, read_yaml
from ..pipelines.base import AnomalyPipeline
from ..schedulers.draws import make_keys
from ..schedulers.scheduling_andi import ANDiScheduler
from ..schedulers.scheduling_anoddpm import AnoDDPMScheduler
from .charts import Axis, draw_lines


# H x W pixels.

NOISE_TYPES = ("gaussian", "simplex", "pyramid")
# What the presets are called, the configuration of the package that has their numbers, and the timestep that the
# method's own inference begins with or, if it has several, the middle one.
PRESETS = {
    "AnoDDPM": ("anoddpm_nfbs.yaml", 249),
    "AnoDDPM, shipped checkpoints": ("anoddpm_heads.yaml", 199),
    "AnoDDPM, as the ANDi authors ran it": ("anoddpm_andi_brats21.yaml", 250),
    "brain_damage": ("brain_damage.yaml", 200),
    "ANDi": ("andi_brats21.yaml", 137),
    "AutoDDPM": ("autoddpm_brats21.yaml", 199),
    "cDDPM": ("cddpm.yaml", 499),
}


@dataclass(frozen=True)
class NoiseSettings:
    """
    Holds a noise, a schedule and a timestep.

    Args:
        noise_type: Of `NOISE_TYPES`.
        octaves, persistence, wavelength, z, random_offset: Of simplex noise, see [`OctaveSimplexNoise`].
        discount: Of pyramid noise, see [`ANDiScheduler`].
        normalize: Of either, in the words of their schedulers.
        beta_schedule, num_train_timesteps, beta_start, beta_end: Of the schedule.
        timestep: t, 0 to `num_train_timesteps` - 1.
    """

    noise_type: str = "simplex"
    octaves: int = 6
    persistence: float = 0.8
    wavelength: float = 64.0
    z: float | str | None = 27.0
    random_offset: bool = False
    discount: float = 0.8
    normalize: str = "none"
    beta_schedule: str = "linear"
    num_train_timesteps: int = 1000
    beta_start: float = 1e-4
    beta_end: float = 0.02
    timestep: int = 249

    @property
    def method(self) -> str:
        """The method of `train.py` whose scheduler draws this noise."""
        return "andi" if self.noise_type == "pyramid" else "anoddpm"

    def scheduler_block(self) -> dict:
        """Returns the arguments of the scheduler that matter for this noise: the block `scheduler` of a
        configuration."""
        own = {
            "gaussian": (),
            "simplex": ("octaves", "persistence", "wavelength", "z", "random_offset", "normalize"),
            "pyramid": ("discount", "normalize"),
        }[self.noise_type]
        betas = ("beta_start", "beta_end") if self.beta_schedule.startswith("linear") else ()
        names = ("num_train_timesteps", "beta_schedule", *betas, "noise_type", *own)
        return {name: getattr(self, name) for name in names}

    def make_scheduler(self) -> AnoDDPMScheduler | ANDiScheduler:
        """Makes the scheduler; raises a `ValueError` that names the setting that cannot be."""
        check_choice("noise_type", self.noise_type, NOISE_TYPES)
        kind = ANDiScheduler if self.method == "andi" else AnoDDPMScheduler
        scheduler = kind(**self.scheduler_block())
        check_integer("timestep", self.timestep, 0, self.num_train_timesteps - 1)
        return scheduler


@dataclass(frozen=True)
class Noised:
    """Holds a noised slice: `noise` and `noised` `(H, W)` float32, the `scheduler`, and at its timestep `signal`,
    sqrt(abar_t), and `sigma`, sqrt(1 - abar_t)."""

    noise: np.ndarray
    noised: np.ndarray
    scheduler: AnoDDPMScheduler | ANDiScheduler
    signal: float
    sigma: float


@dataclass(frozen=True)
class Reconstruction:
    """Holds a one-shot reconstruction: the slice as the checkpoint sees it, noised by the checkpoint's own scheduler,
    and the estimate of the clean slice, `(H, W)` float32 each; 0 is mid-grey."""

    slice: np.ndarray
    noised: np.ndarray
    estimate: np.ndarray


def read_preset(name: str) -> NoiseSettings:
    """Reads the settings of a preset of `PRESETS` from the method's configuration."""
    check_choice("preset", name, PRESETS)
    file, timestep = PRESETS[name]
    block = read_yaml(packaged_config(file))["scheduler"]
    known = {field.name for field in fields(NoiseSettings)}
    return replace(NoiseSettings(timestep=timestep), **{key: value for key, value in block.items() if key in known})


def read_depth(text: str) -> float | str | None:
    """Reads the third coordinate of simplex noise, as a person writes it: a number, `none`, or a rule of
    [`OctaveSimplexNoise`]. The scheduler checks the rule."""
    if text.strip() in ("", "none"):
        return None
    try:
        return float(text)
    except ValueError:
        return text.strip()


def write_settings(settings: NoiseSettings) -> str:
    """Writes settings as the YAML of a configuration that `train.py --config` takes."""
    blocks = {"method": settings.method, "scheduler": settings.scheduler_block()}
    if settings.method == "anoddpm":
        blocks["inference"] = {"noise_level": settings.timestep + 1}
    text = yaml.safe_dump(blocks, sort_keys=False)
    return f"# t = {settings.timestep}, counted from 0; train.py --config FILE --data DATA\n{text}"


def noise_slice(image: np.ndarray, settings: NoiseSettings, seed: int) -> Noised:
    """
    Draws noise and noises a slice.

    Args:
        image (`np.ndarray` of shape `(H, W)`): In [-1, 1].
        settings ([`NoiseSettings`]): What noise, and when.
        seed (`int`): Of the draw.

    Raises:
        ValueError: The scheduler refuses a setting.
    """
    scheduler, timestep = settings.make_scheduler(), settings.timestep
    sample = torch.from_numpy(np.ascontiguousarray(image, np.float32))[None, None]
    noise = scheduler.draw_noise(make_keys(seed, [0]), sample.shape[1:], timestep)
    noised = scheduler.add_noise(sample, noise, timestep)
    scales = [float(scheduler.gather(name, timestep, sample)) for name in ("original_scale", "noise_scale")]
    return Noised(noise[0, 0].numpy(), noised[0, 0].numpy(), scheduler, *scales)


@torch.no_grad()
def reconstruct(pipeline: AnomalyPipeline, slices: torch.Tensor, timestep: int, seed: int) -> Reconstruction:
    """
    Reconstructs a slice by one evaluation of a checkpoint's network, noised by its own scheduler.

    Args:
        pipeline ([`AnoDDPMPipeline`] or [`ANDiPipeline`]): Of a single modality.
        slices (`torch.Tensor` of shape `(1, 1, H, W)`): In the value range of its processor.
        timestep (`int`): t, 0 to T - 1 of the checkpoint.
        seed (`int`): Of the draw.
    """
    scheduler = pipeline.scheduler
    check_integer("timestep", timestep, 0, scheduler.config.num_train_timesteps - 1)
    # A slice without neighbours is its own neighbour.
    slices = slices.repeat(1, pipeline.processor.channels, 1, 1)
    noise = scheduler.draw_noise(make_keys(seed, [0]), slices.shape[1:], timestep)
    noised = scheduler.add_noise(slices, noise, timestep)
    output = pipeline.predict_noise(noised, torch.tensor([timestep]))
    estimate = scheduler.predict_original_sample(output, timestep, noised)
    return Reconstruction(*(pipeline.processor.middle(values)[0, 0].numpy() for values in (slices, noised, estimate)))


def radial_spectrum(image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """
    Computes the radial power spectrum of an image `(H, W)` without its mean.

    Returns:
        frequencies in cycles per pixel, from 1 / max(H, W) to below 0.5, and the mean power of each ring, whose unit
        makes white noise of variance v flat at v.
    """
    power = np.abs(np.fft.fft2(image - image.mean())) ** 2 / image.size
    radius = np.hypot(np.fft.fftfreq(image.shape[0])[:, None], np.fft.fftfreq(image.shape[1]))
    longest = max(image.shape)
    rings = np.rint(radius * longest).astype(int).ravel()
    counts, sums = np.bincount(rings), np.bincount(rings, power.ravel())
    wanted = np.arange(1, (longest + 1) // 2)
    return wanted / longest, sums[wanted] / counts[wanted]


def draw_spectrum(images: dict[str, np.ndarray]) -> str:
    """Draws the radial power spectra of images `(H, W)` over the wavelength, as SVG text."""
    spectra = {name: radial_spectrum(image) for name, image in images.items()}
    longest = max(max(image.shape) for image in images.values())
    top = max(float(power.max()) for _, power in spectra.values())
    highest = int(np.ceil(np.log10(max(top, 1e-6))))
    x_ticks = [(2**power, str(2**power)) for power in range(1, 10) if 2**power <= longest]
    y_ticks = [(10.0**power, f"1e{power}") for power in range(highest - 6, highest + 1, 2)]
    x = Axis("wavelength (pixels)", (longest, 2), x_ticks, logarithmic=True)
    y = Axis("power", (10.0 ** (highest - 6), 10.0**highest), y_ticks, logarithmic=True)
    return draw_lines({name: (1 / frequencies, power) for name, (frequencies, power) in spectra.items()}, x, y)


def draw_histogram(images: dict[str, np.ndarray]) -> str:
    """Draws the histograms of images `(H, W)`, as SVG text."""
    reach = int(np.ceil(max(1.0, *(float(np.abs(image).max()) for image in images.values()))))
    edges = np.linspace(-reach, reach, 81)
    shares = {name: np.histogram(image, edges)[0] / image.size for name, image in images.items()}
    x = Axis("value", (-reach, reach), [(value, str(value)) for value in range(-reach, reach + 1)])
    y_ticks = [(10.0**power, f"{100 * 10.0**power:g} %") for power in range(-4, 1)]
    y = Axis("pixels", (1e-4, 1.0), y_ticks, logarithmic=True)
    return draw_lines({name: ((edges[1:] + edges[:-1]) / 2, share) for name, share in shares.items()}, x, y)


def draw_schedule(scheduler: AnoDDPMScheduler | ANDiScheduler, timestep: int) -> str:
    """Draws sqrt(abar_t) and sqrt(1 - abar_t) of a scheduler over t, and marks t, as SVG text."""
    level, last = scheduler.alphas_cumprod.numpy(), len(scheduler) - 1
    steps = np.unique(np.linspace(0, last, 200).round().astype(int))
    x = Axis("timestep t", (0, last), [(step, str(step)) for step in range(0, last, -(-last // 5))])
    y = Axis("weight", (0, 1), [(share, f"{share:g}") for share in (0, 0.25, 0.5, 0.75, 1)])
    lines = {"of the slice": (steps, np.sqrt(level[steps])), "of the noise": (steps, np.sqrt(1 - level[steps]))}
    return draw_lines(lines, x, y, mark=timestep)


def draw_image(image: np.ndarray, low: float = -1.0, high: float = 1.0) -> str:
    """Draws an image `(H, W)` in grey from `low` to `high`, as the address of a PNG that a page holds in itself."""
    grey = np.clip((image - low) / (high - low), 0, 1)
    return _write_png(np.rint(255 * grey).astype(np.uint8))


def draw_difference(image: np.ndarray, reach: float) -> str:
    """Draws a difference `(H, W)`: red above 0, blue below, white at 0, full at `reach`; as [`draw_image`]."""
    share = np.clip(image / reach, -1, 1)[..., None]
    red, blue = np.array([178, 24, 43]), np.array([33, 102, 172])
    colours = 255 + np.where(share > 0, share * (red - 255), -share * (blue - 255))
    return _write_png(np.rint(colours).astype(np.uint8))


def _write_png(pixels: np.ndarray) -> str:
    buffer = io.BytesIO()
    PIL.Image.fromarray(pixels).save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
