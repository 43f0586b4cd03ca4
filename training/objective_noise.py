"""Predict the noise of a diffusion process: the training objective of AnoDDPM, brain_damage, ANDi and AutoDDPM."""

from __future__ import annotations

import torch
from diffusers import UNet2DModel

from ..checks import check_choice, check_integer, check_number
from ..models.unet_2d_andi import ANDiUNet2DModel
from ..models.unet_2d_heads import UNet2DHeadsModel
from ..models.unet_2d_patches import UNet2DPatchesModel
from ..pipelines.pipeline_andi import ANDiPipeline
from ..pipelines.pipeline_anoddpm import AnoDDPMPipeline
from ..pipelines.pipeline_autoddpm import AutoDDPMPipeline
from ..schedulers.draws import fold_in, uniform
from ..schedulers.scheduling_andi import ANDiScheduler
from ..schedulers.scheduling_anoddpm import AnoDDPMScheduler
from ..volumes.processor import VolumeProcessor
from .keys import MODALITY, NOISE
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
        modality_dropout (`float`, defaults to 0.0):
            Probability that a modality of a sample is hidden, in [0, 1); one at least stays. The network then sees the
            lowest value of the processor's range there, without noise, and the loss is that of the other modalities:
            what it sees of a scan without that modality (`hide_missing`), for which nobody knows the noise. The
            pipeline's `optional_modalities` are then all of them.
    """

    unet_classes = (UNet2DModel, UNet2DHeadsModel, UNet2DPatchesModel, ANDiUNet2DModel)
    scheduler_class = AnoDDPMScheduler
    pipeline_class = AnoDDPMPipeline
    objective_keys = ("loss", "max_timestep", "min_timestep", "modality_dropout")
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
        modality_dropout: float = 0.0,
    ):
        check_choice("loss", loss, self.losses)
        if max_timestep is None:
            max_timestep = len(scheduler)
        check_integer("max_timestep", max_timestep, 1, len(scheduler))
        check_integer("min_timestep", min_timestep, 0, max_timestep - 1)
        check_number("modality_dropout", modality_dropout, least=0, below=1)
        if modality_dropout:
            modalities = list(processor.config.modalities)
            if len(modalities) == 1:
                raise ValueError(
                    f"`modality_dropout` must be 0 for data of one modality, {modalities[0]}, got {modality_dropout}."
                )
            if loss == "hybrid":
                raise ValueError("`modality_dropout` needs the `loss` l2 or l1, got hybrid.")
            inference = {**(inference or {}), "optional_modalities": modalities}
        super().__init__(unet, scheduler, processor, inference)
        self.loss_type = loss
        self.min_timestep = min_timestep
        self.max_timestep = max_timestep
        self.modality_dropout = modality_dropout

    def loss(self, model: torch.nn.Module, batch: Batch, keys: torch.Tensor) -> torch.Tensor:
        """Computes the loss from `image`; see [`Objective.loss`]."""
        images = batch["image"]
        timesteps = draw_timesteps(keys, self.max_timestep, self.min_timestep)
        noise = self.scheduler.draw_noise(fold_in(keys, NOISE), images.shape[1:], timesteps)
        sample = self.scheduler.add_noise(images, noise, timesteps)
        if not self.modality_dropout:
            model_output = model(sample, timesteps).sample.float()
            return noise_loss(self.scheduler, self.loss_type, images, sample, noise, model_output, timesteps)
        present = draw_present(keys, len(self.processor.config.modalities), self.modality_dropout)
        # (N, C, 1, 1); channels of neighbouring slices follow each other.
        present = present.repeat(1, images.shape[1] // present.shape[1])[..., None, None]
        seen = torch.where(present, sample, self.processor.config.value_range[0])
        # What is hidden counts as predicted, so that the mean is that of the others.
        model_output = torch.where(present, model(seen, timesteps).sample.float(), noise)
        losses = noise_loss(self.scheduler, self.loss_type, images, sample, noise, model_output, timesteps)
        return losses / present.float().mean((1, 2, 3))

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
    """As [`NoiseObjective`]: exports an [`AutoDDPMPipeline`]. There is no `modality_dropout`."""

    pipeline_class = AutoDDPMPipeline

    @classmethod
    def check_options(cls, options: TrainOptions) -> None:
        """Checks the blocks, and that no modality is to be hidden; see [`Objective.check_options`]."""
        super().check_options(options)
        if options.objective.get("modality_dropout"):
            raise ValueError(
                "`objective.modality_dropout` must be 0 for the method autoddpm, whose pipeline compares slices with all"
                f" their modalities, got {options.objective['modality_dropout']!r}; andi and anoddpm do without some."
            )


def draw_present(keys: torch.Tensor, modalities: int, dropout: float) -> torch.Tensor:
    """Draws which modalities of each sample stay, from keys `(N, 2)`: `(N, modalities)` bool, each of them hidden with
    the probability `dropout`, but never all."""
    drawn = uniform(fold_in(keys, MODALITY), (modalities,))
    return (drawn >= dropout) | (drawn == drawn.amax(1, keepdim=True))


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
