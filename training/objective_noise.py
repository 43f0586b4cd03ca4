"""Predict the noise of a diffusion process: the training objective of AnoDDPM, brain_damage, ANDi and AutoDDPM."""

from __future__ import annotations

import torch
from diffusers import UNet2DModel

from ..checks import check_choice, check_integer
from ..models.unet_2d_andi import ANDiUNet2DModel
from ..models.unet_2d_heads import UNet2DHeadsModel
from ..pipelines.pipeline_andi import ANDiPipeline
from ..pipelines.pipeline_anoddpm import AnoDDPMPipeline
from ..pipelines.pipeline_autoddpm import AutoDDPMPipeline
from ..schedulers.draws import fold_in
from ..schedulers.scheduling_andi import ANDiScheduler
from ..schedulers.scheduling_anoddpm import AnoDDPMScheduler
from ..volumes.processor import VolumeProcessor
from .keys import NOISE
from .objective import Batch, Objective, draw_timesteps
from .options import TrainOptions
from .variational_bound import variational_bound


class NoiseObjective(Objective):
    r"""
    Mean squared error between drawn and predicted noise, the timestep drawn uniformly. Exports an [`AnoDDPMPipeline`].

    Trained and averaged: the UNet. Labels: none.

    Args:
        unet, scheduler, processor, inference: As of [`Objective`].
        loss (`str`, defaults to `"l2"`): `"l2"`, `"l1"`, or `"hybrid"`: l2 plus the variational bound of the step in
            bits per dimension.
        max_timestep (`int`, *optional*): Timesteps are drawn from `min_timestep` to `max_timestep - 1`; all of them by
            default. AnoDDPM: 800.
        min_timestep (`int`, defaults to 0): The smallest one. ANDi: 1.
    """

    unet_classes = (UNet2DModel, UNet2DHeadsModel, ANDiUNet2DModel)
    scheduler_class = AnoDDPMScheduler
    pipeline_class = AnoDDPMPipeline
    objective_keys = ("loss", "max_timestep", "min_timestep")
    losses = ("l2", "l1", "hybrid")

    def __init__(
        self,
        unet: torch.nn.Module,
        scheduler: AnoDDPMScheduler | ANDiScheduler,
        processor: VolumeProcessor,
        inference: dict | None = None,
        *,
        loss: str = "l2",
        max_timestep: int | None = None,
        min_timestep: int = 0,
    ):
        check_choice("loss", loss, self.losses)
        if max_timestep is None:
            max_timestep = len(scheduler)
        check_integer("max_timestep", max_timestep, 1, len(scheduler))
        check_integer("min_timestep", min_timestep, 0, max_timestep - 1)
        super().__init__(unet, scheduler, processor, inference)
        self.loss_type = loss
        self.min_timestep = min_timestep
        self.max_timestep = max_timestep

    def loss(self, model: torch.nn.Module, batch: Batch, keys: torch.Tensor) -> torch.Tensor:
        """Computes the loss from `image`; see [`Objective.loss`]."""
        images = batch["image"]
        timesteps = draw_timesteps(keys, self.max_timestep, self.min_timestep)
        noise = self.scheduler.draw_noise(fold_in(keys, NOISE), images.shape[1:], timesteps)
        sample = self.scheduler.add_noise(images, noise, timesteps)
        model_output = model(sample, timesteps).sample.float()
        return noise_loss(self.scheduler, self.loss_type, images, sample, noise, model_output, timesteps)

    def preview(self, model: torch.nn.Module, batch: Batch, keys: torch.Tensor) -> Batch:
        """Makes rows of slice, noised slice, its one-shot reconstruction, their difference."""
        level = self.inference.get("noise_level", self.max_timestep // 4)
        level = max(level if isinstance(level, int) else level[0], 1)
        timesteps, sample = self.noise_to(batch["image"], level - 1, keys)
        model_output = model(sample, timesteps).sample.float()
        reconstruction = self.scheduler.predict_original_sample(model_output, timesteps, sample)
        return self.comparison(batch["image"], sample, level - 1, "one-shot reconstruction", reconstruction)


class ANDiObjective(NoiseObjective):
    """As [`NoiseObjective`], with the noise of [`ANDiScheduler`], pyramidal by default: exports an [`ANDiPipeline`].
    With `normalize="per_batch"` of the scheduler, the authors' rule, the slices of one forward pass share a standard
    deviation and pyramid sizes, so that equal losses need equal forward passes, not only equal steps. There is no
    `loss="hybrid"`."""

    scheduler_class = ANDiScheduler
    pipeline_class = ANDiPipeline
    losses = ("l2", "l1")

    @classmethod
    def check_options(cls, options: TrainOptions) -> None:
        """Checks the blocks, and that the network is to predict the noise; see [`Objective.check_options`]."""
        super().check_options(options)
        prediction = options.scheduler.get("prediction_type", "epsilon")
        check_choice("scheduler.prediction_type", prediction, ("epsilon",))


class AutoDDPMObjective(NoiseObjective):
    """As [`NoiseObjective`]: exports an [`AutoDDPMPipeline`]."""

    pipeline_class = AutoDDPMPipeline


def noise_loss(
    scheduler: AnoDDPMScheduler | ANDiScheduler,
    loss_type: str,
    images: torch.Tensor,
    sample: torch.Tensor,
    noise: torch.Tensor,
    model_output: torch.Tensor,
    timesteps: torch.Tensor,
) -> torch.Tensor:
    """Computes the loss of every sample, `(N,)`, from x_0, x_t, drawn and predicted noise, all `(N, C, H, W)`."""
    if loss_type == "l1":
        return (model_output - noise).abs().mean((1, 2, 3))
    squared = (model_output - noise).square().mean((1, 2, 3))
    if loss_type == "l2":
        return squared
    return squared + variational_bound(scheduler, images, sample, model_output, timesteps)
