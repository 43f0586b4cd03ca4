"""Segment what a frozen cDDPM leaves over: the training objectives of SADM, with synthetic anomalies and with lesion masks."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F

from ..models.siamese_unet import SiameseUNet2DModel, SiameseUNet2DOutput
from ..pipelines.one_step import encode_slices
from ..pipelines.pipeline_cddpm import CDDPMPipeline
from ..pipelines.pipeline_sadm import SADMPipeline
from ..volumes.processor import VolumeProcessor
from .objective_noise import check_keys
from .options import TrainOptions
from .synthetic_anomalies import draw_anomalies


LOSSES = ("bce", "dice", "bce_dice")


# N slices, C modalities, A annotations, H x W pixels.


class SADMObjective:
    r"""
    Cross entropy of the segmentation of synthetic anomalies in healthy slices, from the slices and what a trained cDDPM makes of them at a
    timestep that is drawn uniformly. The cDDPM sees the changed slice only, its encoder too, as it sees a lesion later. Exports a
    [`SADMPipeline`].

    Trained: the segmentation network. Averaged: the segmentation network. Frozen: UNet and encoder, in eval mode; in the authors' program
    the encoder normalises by the batch, and its running statistics drift. Labels: none.

    Args:
        segmentation_network ([`SiameseUNet2DModel`]): Makes logits of slice and reconstruction.
        reconstruction ([`CDDPMPipeline`]): Trained before, with or without an encoder; exported with the network.
        inference (`dict`): Inference values of [`SADMPipeline`] that are exported.
        loss (`str`, defaults to `"bce"`):
            `"bce"`, `"dice"`, 1 - soft Dice of every slice, or `"bce_dice"`, their sum. A network with `deep_supervision` adds the cross
            entropy of each of its decoder's heads.
        shared_noise (`bool`, defaults to `False`):
            One field for the slices of a forward pass, that of the first one, as the authors.
    """

    columns = ("image",)
    trains_on = "healthy"
    validates_on = "healthy"
    updates_per_batch = 1

    def __init__(
        self,
        segmentation_network: SiameseUNet2DModel,
        reconstruction: CDDPMPipeline,
        inference: dict | None = None,
        *,
        loss: str = "bce",
        shared_noise: bool = False,
    ):
        if loss not in LOSSES:
            raise ValueError(f"`loss` must be one of {', '.join(LOSSES)}, got {loss!r}.")
        self.model = segmentation_network
        self.reconstruction = reconstruction
        for component in (reconstruction.unet, reconstruction.encoder):
            if component is not None:
                component.eval().requires_grad_(False)
        self.processor = reconstruction.processor
        self.inference = inference or {}
        self.loss_type = loss
        self.shared_noise = shared_noise
        # Built once here, so that a wrong inference value is found before the training and not after it.
        self._pipeline(segmentation_network)

    @classmethod
    def from_options(cls, options: TrainOptions, processor: VolumeProcessor) -> SADMObjective:
        """
        Builds the segmentation network, whose block of the configuration is `unet`, and loads the cDDPM, `objective.reconstruction_path`, a
        folder or Hub id. It is evaluated in the type of `train.mixed_precision`.
        """
        settings = dict(options.objective)
        if "reconstruction_path" not in settings:
            raise ValueError(
                "`objective.reconstruction_path` must be the folder or Hub id of a trained cDDPM (method cddpm or ddpm_2d)."
            )
        path = settings.pop("reconstruction_path")
        check_keys("objective", settings, SADMObjective)
        check_keys("inference", options.inference, SADMPipeline)
        if options.scheduler:
            raise ValueError(
                f"`scheduler` must be empty for SADM, got {', '.join(options.scheduler)}: it comes with the cDDPM."
            )
        unet = dict(options.unet)
        name = unet.pop("_class_name", "SiameseUNet2DModel")
        if name != "SiameseUNet2DModel":
            raise ValueError(f"`unet._class_name` must be SiameseUNet2DModel, got {name!r}.")
        channels = len(processor.config.modalities)
        if unet.setdefault("in_channels", channels) != channels:
            raise ValueError(
                f"`unet.in_channels` must be {channels}, the number of modalities, got {unet['in_channels']}."
            )
        check_keys("unet", unet, SiameseUNet2DModel)
        reconstruction = CDDPMPipeline.from_pretrained(path)
        processor.check_equal(reconstruction.processor.settings(), f"the cDDPM {path} was trained with")
        precision = options.train.mixed_precision
        reconstruction.enable_fast_inference(autocast=precision if precision in ("bf16", "fp16") else None)
        return cls(SiameseUNet2DModel(**unet), reconstruction, options.inference, **settings)

    def loss(
        self, model: torch.nn.Module, batch: dict[str, torch.Tensor], generators: list[torch.Generator]
    ) -> torch.Tensor:
        """
        Loss of every sample, `(N,)`.

        Args:
            model (`torch.nn.Module`): The segmentation network as accelerate wraps it.
            batch (`dict[str, torch.Tensor]`): `image (N, C, H, W)` in the processor's value range, and other columns that are named.
            generators (`list[torch.Generator]`): One per slice; anomaly, if any, timestep and noise are drawn from it, in this order.
        """
        images, masks, timesteps, noise = self._draw(batch, generators)
        output = model(images, self.reconstruct(images, timesteps, noise))
        return segmentation_loss(self.loss_type, output, masks)

    @torch.no_grad()
    def reconstruct(self, images: torch.Tensor, timesteps: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """What the cDDPM makes of slices `(N, C, H, W)` in [0, 1], from timesteps `(N,)` and noise `(N, C, H, W)` or `(1, C, H, W)`:
        reconstructions in [0, 1], not limited."""
        pipeline = self.reconstruction
        if pipeline.device != images.device:
            pipeline.to(images.device)
        with pipeline.autocast():
            features = encode_slices(pipeline, images, len(images))
            sample = pipeline.scheduler.add_noise(2.0 * images - 1.0, noise.expand_as(images), timesteps)
            prediction = pipeline.predict_noise(sample, timesteps, features)
        return (prediction + 1.0) / 2.0

    @torch.no_grad()
    def preview(
        self, model: torch.nn.Module, batch: dict[str, torch.Tensor], generators: list[torch.Generator]
    ) -> dict[str, torch.Tensor]:
        """Rows of a validation picture, each `(N, C, H, W)`: slice with anomaly, its mask, reconstruction from the middle one of the
        pipeline's timesteps, difference, probability."""
        images, masks, timesteps, noise = self._draw(batch, generators)
        pipeline = self._pipeline(model)
        levels = pipeline.config.timesteps
        level = levels[len(levels) // 2]
        reconstruction = self.reconstruct(images, torch.full_like(timesteps, level), noise)
        rows = {
            "slice": images,
            "anomaly": masks,
            f"reconstruction, t = {level}": reconstruction,
            "difference": (images - reconstruction).abs(),
            "probability": pipeline.segment(images, reconstruction)[:, None],
        }
        return {title: self.processor.from_unit(row) for title, row in rows.items()}

    def export(self, model: torch.nn.Module, folder: str | Path) -> SADMPipeline:
        """Writes a complete pipeline folder with the weights of `model` and those of the cDDPM."""
        pipeline = self._pipeline(model)
        pipeline.save_pretrained(folder)
        return pipeline

    def anomalies(
        self, batch: dict[str, torch.Tensor], images: torch.Tensor, generators: list[torch.Generator]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Slices `(N, C, H, W)` with anomalies and their masks `(N, 1, H, W)`, of slices in [0, 1]; here synthetic ones."""
        return draw_anomalies(images, generators)

    def _draw(self, batch: dict[str, torch.Tensor], generators: list[torch.Generator]):
        """Slices with anomalies in [0, 1], masks, timesteps `(N,)` and noise."""
        images, masks = self.anomalies(batch, self.processor.to_unit(batch["image"]), generators)
        scheduler, device = self.reconstruction.scheduler, images.device
        timesteps = torch.cat([torch.randint(len(scheduler), (1,), generator=g, device=device) for g in generators])
        count = 1 if self.shared_noise else len(images)
        noise = scheduler.draw_noise((count, *images.shape[1:]), timesteps[:count], generators[:count], device)
        return images, masks, timesteps, noise

    def _pipeline(self, model: torch.nn.Module) -> SADMPipeline:
        frozen = self.reconstruction
        return SADMPipeline(frozen.unet, model, frozen.scheduler, frozen.processor, frozen.encoder, **self.inference)


class LabelledSADMObjective(SADMObjective):
    r"""
    As [`SADMObjective`], with the masks of real lesions instead of synthetic anomalies. All slices of the training split count, those
    without lesion, too.

    Trained: the segmentation network. Averaged: the segmentation network. Frozen: UNet and encoder, in eval mode. Labels: masks.
    """

    columns = ("image", "mask", "annotations", "label")
    trains_on = "all"
    validates_on = "labelled"
    updates_per_batch = 1

    def anomalies(
        self, batch: dict[str, torch.Tensor], images: torch.Tensor, generators: list[torch.Generator]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The slices as they are, and what at least half of their annotations call lesion, `(N, 1, H, W)`."""
        # Healthy subjects need no mask.
        if ((batch["label"] != 0) & (batch["annotations"] == 0)).any():
            raise ValueError(
                "`mask` must be there for every slice that is not known to be healthy: prepare the data with the masks of all lesions."
            )
        count = batch["mask"].long().sum(1, keepdim=True)
        lesion = (count > 0) & (2 * count >= batch["annotations"].reshape(-1, 1, 1, 1))
        return images, lesion.to(images.dtype)


def segmentation_loss(loss: str, output: SiameseUNet2DOutput, masks: torch.Tensor) -> torch.Tensor:
    """
    Loss of every sample, `(N,)`.

    Args:
        loss (`str`):
            `"bce"`, cross entropy; `"dice"`, 1 - Dice of probabilities and mask as MONAI's `DiceLoss(sigmoid=True)`; `"bce_dice"`, the
            sum.
        output ([`SiameseUNet2DOutput`]):
            Of the network. Heads of its decoder, if there are any, add their cross entropy against the mask of their size, as in the
            original, whatever `loss` is.
        masks (`torch.Tensor` of shape `(N, 1, H, W)`): 0 or 1.
    """

    def cross_entropy(logits: torch.Tensor) -> torch.Tensor:
        target = F.interpolate(masks, size=logits.shape[2:], mode="nearest")
        return F.binary_cross_entropy_with_logits(logits.float(), target.float(), reduction="none").mean((1, 2, 3))

    terms = [cross_entropy(logits) for logits in output.decoder_logits or ()]
    if loss != "dice":
        terms.append(cross_entropy(output.logits))
    if loss != "bce":
        probability = output.logits.float().sigmoid()
        overlap, total = (probability * masks).sum((1, 2, 3)), (probability + masks).sum((1, 2, 3))
        terms.append(1.0 - (2.0 * overlap + 1e-5) / (total + 1e-5))
    return sum(terms)
