"""Remove coarse noise from healthy slices: the training objective of the denoising autoencoder."""

from __future__ import annotations

import torch

from ..models.unet_2d_dae import DAEUNet2DModel
from ..pipelines.pipeline_dae import DAEPipeline
from ..schedulers.draws import fold_in
from ..schedulers.scheduling_dae import DAEScheduler
from .keys import NOISE
from .objective import Batch, Objective


class DAEObjective(Objective):
    """Mean squared error between slice and denoised slice in the foreground, as the ANDi authors trained it. Exports
    a [`DAEPipeline`].

    Trained and averaged: the UNet. Labels: none. Arguments as of [`Objective`]."""

    unet_classes = (DAEUNet2DModel,)
    scheduler_class = DAEScheduler
    pipeline_class = DAEPipeline

    def loss(self, model: torch.nn.Module, batch: Batch, keys: torch.Tensor) -> torch.Tensor:
        """Computes the loss from `image`; see [`Objective.loss`]."""
        images = self.processor.to_unit(batch["image"])
        noise = self.scheduler.draw_noise(fold_in(keys, NOISE), images.shape[1:])
        model_output = model(self.scheduler.add_noise(images, noise)).sample.float()
        return denoising_loss(self.scheduler, images, model_output)

    def preview(self, model: torch.nn.Module, batch: Batch, keys: torch.Tensor) -> Batch:
        """Makes rows of slice, noised slice, its reconstruction, and what the map is made of."""
        images = self.processor.to_unit(batch["image"])
        sample = self.scheduler.add_noise(images, self.scheduler.draw_noise(fold_in(keys, NOISE), images.shape[1:]))
        rows = {
            "slice": images,
            "coarse noise": sample,
            "denoised": model(sample).sample.float(),
            "difference without noise": (images - model(images).sample.float()).abs(),
        }
        return {title: self.processor.from_unit(row) for title, row in rows.items()}


def denoising_loss(scheduler: DAEScheduler, images: torch.Tensor, model_output: torch.Tensor) -> torch.Tensor:
    """Computes the loss of every sample, `(N,)`, from slices and denoised slices `(N, C, H, W)`: the mean over all
    pixels, of which those of the background count 0."""
    return ((model_output - images).square() * scheduler.foreground(images)).mean((1, 2, 3))
