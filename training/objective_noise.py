"""Predict the noise of a diffusion process: the training objective of AnoDDPM, brain_damage, ANDi and AutoDDPM."""

from __future__ import annotations

import inspect
import math
from pathlib import Path

import torch
from diffusers import UNet2DModel

import anodiff

from ..pipelines.base import AnomalyPipeline
from ..pipelines.pipeline_andi import ANDiPipeline
from ..pipelines.pipeline_anoddpm import AnoDDPMPipeline
from ..pipelines.pipeline_autoddpm import AutoDDPMPipeline
from ..schedulers.scheduling_andi import ANDiScheduler
from ..schedulers.scheduling_anoddpm import AnoDDPMScheduler
from ..volumes.processor import VolumeProcessor
from .options import TrainOptions


LOSSES = ("l2", "l1", "hybrid")


class NoiseObjective:
    r"""
    Mean squared error between drawn and predicted noise, the timestep drawn uniformly.

    Trained: the UNet. Averaged: the UNet. Frozen: nothing. Labels: none.

    Args:
        unet ([`~diffusers.UNet2DModel`]): Predicts the noise.
        scheduler ([`AnoDDPMScheduler`] or [`ANDiScheduler`]): Noises the slices.
        processor ([`VolumeProcessor`]): Of the prepared data, exported with the weights.
        inference (`dict`): Inference values of the pipeline that are exported.
        loss (`str`, defaults to `"l2"`):
            `"l2"`, `"l1"`, or `"hybrid"`: l2 plus the variational bound of the step in bits per dimension.
        max_timestep (`int`, *optional*):
            Timesteps are drawn from `min_timestep` to `max_timestep - 1`; all of them by default. AnoDDPM: 800.
        min_timestep (`int`, defaults to 0): The smallest one. ANDi: 1.
    """

    columns = ("image",)
    trains_on = "healthy"
    validates_on = "healthy"
    updates_per_batch = 1
    pipeline_class = AnoDDPMPipeline
    scheduler_class = AnoDDPMScheduler

    def __init__(
        self,
        unet: torch.nn.Module,
        scheduler: AnoDDPMScheduler,
        processor: VolumeProcessor,
        inference: dict | None = None,
        *,
        loss: str = "l2",
        max_timestep: int | None = None,
        min_timestep: int = 0,
    ):
        steps = scheduler.config.num_train_timesteps
        if loss not in LOSSES:
            raise ValueError(f"`loss` must be one of {', '.join(LOSSES)}, got {loss!r}.")
        if max_timestep is not None and not 1 <= max_timestep <= steps:
            raise ValueError(f"`max_timestep` must be between 1 and {steps}, got {max_timestep}.")
        if not 0 <= min_timestep < (max_timestep or steps):
            raise ValueError(
                f"`min_timestep` must be at least 0 and below `max_timestep` {max_timestep or steps}, got {min_timestep}."
            )
        if loss == "hybrid" and self.scheduler_class is not AnoDDPMScheduler:
            raise ValueError(
                f"`loss` 'hybrid' needs the posterior variances of AnoDDPMScheduler, not {type(scheduler).__name__}."
            )
        if scheduler.config.get("prediction_type", "epsilon") != "epsilon":
            raise ValueError(
                f"`scheduler.prediction_type` must be epsilon to be trained here, got {scheduler.config.prediction_type!r}."
            )
        self.model = unet
        self.scheduler = scheduler
        self.processor = processor
        self.inference = inference or {}
        self.loss_type = loss
        self.min_timestep = min_timestep
        self.max_timestep = max_timestep or steps
        # Built once here, so that a wrong inference value is found before the training and not after it.
        self.pipeline_class(unet, scheduler, processor, **self.inference)

    @classmethod
    def from_options(cls, options: TrainOptions, processor: VolumeProcessor) -> NoiseObjective:
        """Builds network, scheduler and objective from the blocks of a configuration."""
        unet = dict(options.unet)
        unet_class = unet.pop("_class_name", "UNet2DModel")
        unet_classes = {
            "UNet2DModel": UNet2DModel,
            "UNet2DHeadsModel": anodiff.UNet2DHeadsModel,
            "ANDiUNet2DModel": anodiff.ANDiUNet2DModel,
        }
        if unet_class not in unet_classes:
            raise ValueError(f"`unet._class_name` must be one of {', '.join(unet_classes)}, got {unet_class!r}.")
        channels, size = len(processor.config.modalities), processor.config.size
        for key, value in (("in_channels", channels), ("out_channels", channels)):
            if unet.setdefault(key, value) != value:
                raise ValueError(f"`unet.{key}` must be {value}, the number of modalities, got {unet[key]}.")
        if size is not None:
            unet.setdefault("sample_size", size[0] if size[0] == size[1] else tuple(size))
        for block, target in (
            ("unet", unet_classes[unet_class]),
            ("scheduler", cls.scheduler_class),
            ("inference", cls.pipeline_class),
            ("objective", cls),
        ):
            check_keys(block, unet if block == "unet" else getattr(options, block), target)
        return cls(
            unet_classes[unet_class](**unet),
            cls.scheduler_class(**options.scheduler),
            processor,
            options.inference,
            **options.objective,
        )

    def loss(
        self, model: torch.nn.Module, batch: dict[str, torch.Tensor], generators: list[torch.Generator]
    ) -> torch.Tensor:
        """
        Loss of every sample, `(N,)`.

        Args:
            model (`torch.nn.Module`): The network as accelerate wraps it.
            batch (`dict`): `"image"`, slices `(N, C, H, W)` in the processor's value range.
            generators (`list[torch.Generator]`): One per slice; timestep and noise are drawn from it.
        """
        images = batch["image"]
        timesteps = torch.cat(
            [
                torch.randint(self.min_timestep, self.max_timestep, (1,), generator=g, device=images.device)
                for g in generators
            ]
        )
        noise = self.scheduler.draw_noise(images.shape, timesteps, generators, images.device)
        sample = self.scheduler.add_noise(images, noise, timesteps)
        model_output = model(sample, timesteps).sample.float()
        return noise_loss(self.scheduler, self.loss_type, images, sample, noise, model_output, timesteps)

    @torch.no_grad()
    def preview(
        self, model: torch.nn.Module, batch: dict[str, torch.Tensor], generators: list[torch.Generator]
    ) -> dict:
        """Rows of a validation picture, each `(N, C, H, W)`: slice, noised slice, its one-shot reconstruction, their difference."""
        images = batch["image"]
        level = self.inference.get("noise_level", self.max_timestep // 4)
        level = max(level if isinstance(level, int) else level[0], 1)
        timesteps = torch.full((len(images),), level - 1, device=images.device)
        noise = self.scheduler.draw_noise(images.shape, timesteps, generators, images.device)
        sample = self.scheduler.add_noise(images, noise, timesteps)
        model_output = model(sample, timesteps).sample.float()
        reconstruction = self.scheduler.predict_original_sample(model_output, timesteps, sample)
        return {
            "slice": images,
            f"noised, t = {level - 1}": sample,
            "one-shot reconstruction": reconstruction,
            "difference": (images - reconstruction).abs() + self.processor.config.value_range[0],
        }

    def export(self, model: torch.nn.Module, folder: str | Path) -> AnomalyPipeline:
        """Writes a complete pipeline folder with the weights of `model`."""
        pipeline = self.pipeline_class(model, self.scheduler, self.processor, **self.inference)
        pipeline.save_pretrained(folder)
        return pipeline


class ANDiObjective(NoiseObjective):
    r"""
    As [`NoiseObjective`], with the noise of [`ANDiScheduler`], pyramidal by default: exports an [`ANDiPipeline`].

    With `normalize="per_batch"` of the scheduler, the authors' rule, the slices of one forward pass share a standard deviation and
    pyramid sizes, so that equal losses need equal forward passes, not only equal steps.
    """

    pipeline_class = ANDiPipeline
    scheduler_class = ANDiScheduler


class AutoDDPMObjective(NoiseObjective):
    """As [`NoiseObjective`]: exports an [`AutoDDPMPipeline`]."""

    pipeline_class = AutoDDPMPipeline


def check_keys(block: str, given: dict, target: type) -> None:
    """Raises if a block of the configuration has a key that `target` does not take."""
    known = [name for name in inspect.signature(target.__init__).parameters if name != "self"]
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise ValueError(f"`{block}` has no key {', '.join(unknown)}; {target.__name__} takes {', '.join(known)}.")


def noise_loss(
    scheduler: AnoDDPMScheduler,
    loss_type: str,
    images: torch.Tensor,
    sample: torch.Tensor,
    noise: torch.Tensor,
    model_output: torch.Tensor,
    timesteps: torch.Tensor,
) -> torch.Tensor:
    """Loss of every sample, `(N,)`, from images x_0, sample x_t, drawn noise and predicted noise, all `(N, C, H, W)`."""
    if loss_type == "l1":
        return (model_output - noise).abs().mean((1, 2, 3))
    squared = (model_output - noise).square().mean((1, 2, 3))
    if loss_type == "l2":
        return squared
    return squared + variational_bound(scheduler, images, sample, model_output, timesteps)


def variational_bound(
    scheduler: AnoDDPMScheduler,
    images: torch.Tensor,
    sample: torch.Tensor,
    model_output: torch.Tensor,
    timesteps: torch.Tensor,
) -> torch.Tensor:
    """Term of the variational bound of each sample's timestep in bits per dimension, `(N,)` (DDPM eq. 5): a Kullback-Leibler
    divergence for t > 0, for t = 0 the likelihood of 8-bit images in [-1, 1]."""
    # true_mean, true_variance -> q(x_{t-1} | x_t, x_0); mean, variance -> p_theta(x_{t-1} | x_t), fixed large.
    estimate = scheduler.predict_original_sample(model_output, timesteps, sample)
    if scheduler.config.clip_sample:
        estimate = estimate.clamp(-1.0, 1.0)
    mean = scheduler.posterior_mean(estimate, timesteps, sample)
    true_mean = scheduler.posterior_mean(images, timesteps, sample)
    # The posterior variance of t = 0 is 0; as in the original its logarithm is that of t = 1.
    posterior = scheduler.posterior_variance
    true_log = (
        torch.cat([posterior[1:2], posterior[1:]]).log().float().to(sample.device)[timesteps].reshape(-1, 1, 1, 1)
    )
    log = scheduler.variance.log().float().to(sample.device)[timesteps].reshape(-1, 1, 1, 1)
    divergence = 0.5 * (-1.0 + log - true_log + (true_log - log).exp() + (true_mean - mean).square() * (-log).exp())

    # Probability of the grey level's bin, 2 / 255 wide; the outermost bins are open.
    deviation = (-0.5 * log).exp()

    def cumulative(value: torch.Tensor) -> torch.Tensor:
        # The original's approximation of the normal distribution function.
        return 0.5 * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (value + 0.044715 * value**3)))

    upper = cumulative((images - mean + 1.0 / 255) * deviation)
    lower = cumulative((images - mean - 1.0 / 255) * deviation)
    probability = torch.where(images < -0.999, upper, torch.where(images > 0.999, 1.0 - lower, upper - lower)).clamp(
        min=1e-12
    )
    bound = torch.where((timesteps == 0).reshape(-1, 1, 1, 1), -probability.log(), divergence)
    return bound.mean((1, 2, 3)) / math.log(2.0)
