"""Remove coarse noise from healthy slices: the training objective of the denoising autoencoder."""

from __future__ import annotations

from pathlib import Path

import torch

from ..models.unet_2d_dae import DAEUNet2DModel
from ..pipelines.pipeline_dae import DAEPipeline
from ..schedulers.scheduling_dae import DAEScheduler
from ..volumes.processor import VolumeProcessor
from .objective_noise import check_keys
from .options import TrainOptions


class DAEObjective:
    r"""
    Mean squared error between slice and denoised slice in the foreground, as the ANDi authors trained it.

    Trained: the UNet. Averaged: the UNet. Frozen: nothing. Labels: none.

    Args:
        unet ([`DAEUNet2DModel`]): Predicts the slice.
        scheduler ([`DAEScheduler`]): Makes the noise.
        processor ([`VolumeProcessor`]): Of the prepared data, exported with the weights.
        inference (`dict`): Inference values of [`DAEPipeline`] that are exported.
    """

    columns = ("image",)
    trains_on = "healthy"
    validates_on = "healthy"
    updates_per_batch = 1
    pipeline_class = DAEPipeline

    def __init__(
        self,
        unet: DAEUNet2DModel,
        scheduler: DAEScheduler,
        processor: VolumeProcessor,
        inference: dict | None = None,
    ):
        self.model = unet
        self.scheduler = scheduler
        self.processor = processor
        self.inference = inference or {}
        # Built once here, so that a wrong inference value is found before the training and not after it.
        DAEPipeline(unet, scheduler, processor, **self.inference)

    @classmethod
    def from_options(cls, options: TrainOptions, processor: VolumeProcessor) -> DAEObjective:
        """Builds network, scheduler and objective from the blocks of a configuration."""
        unet = dict(options.unet)
        unet_class = unet.pop("_class_name", "DAEUNet2DModel")
        if unet_class != "DAEUNet2DModel":
            raise ValueError(f"`unet._class_name` must be DAEUNet2DModel, got {unet_class!r}.")
        channels = len(processor.config.modalities)
        for key in ("in_channels", "out_channels"):
            if unet.setdefault(key, channels) != channels:
                raise ValueError(f"`unet.{key}` must be {channels}, the number of modalities, got {unet[key]}.")
        for block, given, target in (
            ("unet", unet, DAEUNet2DModel),
            ("scheduler", options.scheduler, DAEScheduler),
            ("inference", options.inference, DAEPipeline),
        ):
            check_keys(block, given, target)
        if options.objective:
            raise ValueError(
                f"`objective` has no key {', '.join(sorted(options.objective))}; DAEObjective takes none."
            )
        return cls(DAEUNet2DModel(**unet), DAEScheduler(**options.scheduler), processor, options.inference)

    def loss(
        self, model: torch.nn.Module, batch: dict[str, torch.Tensor], generators: list[torch.Generator]
    ) -> torch.Tensor:
        """
        Loss of every sample, `(N,)`: the mean over all pixels, of which those of the background count 0.

        Args:
            model (`torch.nn.Module`): The network as accelerate wraps it.
            batch (`dict`): `"image"`, slices `(N, C, H, W)` in the processor's value range.
            generators (`list[torch.Generator]`): One per slice; field and shift are drawn from it.
        """
        images = self.processor.to_unit(batch["image"])
        noise = self.scheduler.draw_noise(images.shape, generators, images.device)
        model_output = model(self.scheduler.add_noise(images, noise)).sample.float()
        return denoising_loss(self.scheduler, images, model_output)

    @torch.no_grad()
    def preview(
        self, model: torch.nn.Module, batch: dict[str, torch.Tensor], generators: list[torch.Generator]
    ) -> dict:
        """Rows of a validation picture, each `(N, C, H, W)`: slice, noised slice, its reconstruction, and what the map is made of."""
        images = self.processor.to_unit(batch["image"])
        sample = self.scheduler.add_noise(images, self.scheduler.draw_noise(images.shape, generators, images.device))
        rows = {
            "slice": images,
            "coarse noise": sample,
            "denoised": model(sample).sample.float(),
            "difference without noise": (images - model(images).sample.float()).abs(),
        }
        return {title: self.processor.from_unit(row) for title, row in rows.items()}

    def export(self, model: torch.nn.Module, folder: str | Path) -> DAEPipeline:
        """Writes a complete pipeline folder with the weights of `model`."""
        pipeline = DAEPipeline(model, self.scheduler, self.processor, **self.inference)
        pipeline.save_pretrained(folder)
        return pipeline


def denoising_loss(scheduler: DAEScheduler, images: torch.Tensor, model_output: torch.Tensor) -> torch.Tensor:
    """Loss of every sample, `(N,)`, from slices and denoised slices, both `(N, C, H, W)`."""
    return ((model_output - images).square() * scheduler.foreground(images)).mean((1, 2, 3))
