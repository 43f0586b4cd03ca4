"""Segment what a frozen cDDPM leaves over: the training objectives of SADM, with synthetic anomalies and with lesion
masks."""

from __future__ import annotations

from contextlib import nullcontext

import torch
import torch.nn.functional as F

from ..checks import check_choice
from ..models.siamese_unet import SiameseUNet2DModel, SiameseUNet2DOutput
from ..pipelines.base import PRECISIONS
from ..pipelines.one_step import encode_slices
from ..pipelines.pipeline_cddpm import CDDPMPipeline
from ..pipelines.pipeline_sadm import SADMPipeline
from ..schedulers.draws import fold_in
from ..volumes.processor import VolumeProcessor
from .finite import check_part
from .keys import ANOMALY
from .objective import MODALITIES, Batch, Objective
from .options import TrainOptions
from .synthetic_anomalies import draw_anomalies


# N slices, C modalities, A annotations, H x W pixels.


class SADMObjective(Objective):
    r"""
    Cross entropy of the segmentation of synthetic anomalies in healthy slices, from the slices and what a trained
    cDDPM makes of them at a timestep that is drawn uniformly. The cDDPM sees the changed slice only, its encoder too,
    as it sees a lesion later. Exports a [`SADMPipeline`].

    Trained and averaged: the segmentation network, of the block `unet`. Frozen: UNet and encoder of the cDDPM, in eval
    mode; in the authors' program the encoder normalises by the batch, and its running statistics drift. Labels: none.

    Args:
        segmentation_network ([`SiameseUNet2DModel`]): Makes logits of slice and reconstruction.
        reconstruction ([`CDDPMPipeline`]): Trained before, with or without an encoder; exported with the network.
        inference (`dict`): As of [`Objective`]; `timesteps` and `shared_noise` are those of the cDDPM by default.
        precision (`str`, *optional*): `"bf16"` or `"fp16"` evaluates the cDDPM so, by autocast: it is exported as it
            is.
        loss (`str`, defaults to `"bce"`): As of [`segmentation_loss`].
        shared_noise (`bool`, defaults to `False`): One field for the slices of a forward pass, that of the first one,
            as the authors.
    """

    trains_unet_alone = False
    unet_classes = (SiameseUNet2DModel,)
    pipeline_class = SADMPipeline
    objective_keys = ("reconstruction_path", "loss", "shared_noise")
    part = ("reconstruction_path", "a trained cDDPM (method cddpm or ddpm_2d)")

    def __init__(
        self,
        segmentation_network: SiameseUNet2DModel,
        reconstruction: CDDPMPipeline,
        inference: dict | None = None,
        precision: str | None = None,
        *,
        loss: str = "bce",
        shared_noise: bool = False,
    ):
        check_choice("loss", loss, ("bce", "dice", "bce_dice"))
        self.reconstruction = reconstruction
        for component in (reconstruction.unet, reconstruction.encoder):
            if component is not None:
                component.eval().requires_grad_(False)
        config = reconstruction.config
        inference = {"timesteps": config.timesteps, "shared_noise": config.shared_noise, **(inference or {})}
        super().__init__(segmentation_network, reconstruction.scheduler, reconstruction.processor, inference)
        self.loss_type = loss
        self.shared_noise = shared_noise
        self.precision = precision

    @classmethod
    def from_options(cls, options: TrainOptions, processor: VolumeProcessor) -> SADMObjective:
        """Builds the segmentation network, and loads the cDDPM of `objective.reconstruction_path`, a folder or Hub id,
        which is evaluated in the type of `train.mixed_precision`."""
        cls.check_options(options)
        settings = dict(options.objective)
        path = settings.pop("reconstruction_path")
        network = cls.make_network(options, processor)
        reconstruction = CDDPMPipeline.from_pretrained(path)
        for component in filter(None, (reconstruction.unet, reconstruction.encoder)):
            check_part(component, "objective.reconstruction_path", path)
        processor.check_equal(reconstruction.processor.settings(), f"the cDDPM {path} was trained with")
        return cls(network, reconstruction, options.inference, options.train.mixed_precision, **settings)

    @classmethod
    def network_arguments(cls, network: type, channels: int) -> dict[str, tuple[int, str]]:
        """Returns the number of inputs."""
        return {"in_channels": (channels, MODALITIES)}

    def loss(self, model: torch.nn.Module, batch: Batch, keys: torch.Tensor) -> torch.Tensor:
        """Computes the loss from slices with `anomalies`; see [`Objective.loss`]."""
        images, masks, timesteps, noise = self._draw(batch, keys)
        output = model(images, self.reconstruct(images, timesteps, noise))
        return segmentation_loss(self.loss_type, output, masks)

    @torch.no_grad()
    def reconstruct(self, images: torch.Tensor, timesteps: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """Reconstructs slices `(N, C, H, W)` in [0, 1] with the cDDPM, with noise of `(N or 1, C, H, W)`; the values
        are not limited."""
        pipeline = self.reconstruction
        if pipeline.device != images.device:
            pipeline.to(images.device)
        coarse = self.precision in ("bf16", "fp16")
        with torch.autocast(images.device.type, PRECISIONS[self.precision]) if coarse else nullcontext():
            features = encode_slices(pipeline, images, len(images))
            sample = pipeline.scheduler.add_noise(2.0 * images - 1.0, noise.expand_as(images), timesteps)
            prediction = pipeline.predict_noise(sample, timesteps, features)
        return (prediction + 1.0) / 2.0

    def preview(self, model: torch.nn.Module, batch: Batch, keys: torch.Tensor) -> Batch:
        """Makes rows of slice with anomaly, its mask, reconstruction from the middle one of the pipeline's timesteps,
        difference, probability."""
        images, masks, timesteps, noise = self._draw(batch, keys)
        pipeline = self.make_pipeline(model)
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

    def make_pipeline(self, model: torch.nn.Module) -> SADMPipeline:
        """Returns the pipeline of the trained `model` and the cDDPM."""
        frozen = self.reconstruction
        return SADMPipeline(frozen.unet, model, frozen.scheduler, frozen.processor, frozen.encoder, **self.inference)

    def anomalies(self, batch: Batch, images: torch.Tensor, keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns slices `(N, C, H, W)` in [0, 1] with anomalies, here synthetic ones, and masks `(N, 1, H, W)`."""
        return draw_anomalies(images, fold_in(keys, ANOMALY))

    def _draw(self, batch: Batch, keys: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Slices with anomalies in [0, 1], masks, timesteps `(N,)` and noise `(N or 1, C, H, W)`."""
        images, masks = self.anomalies(batch, self.processor.to_unit(batch["image"]), keys)
        return images, masks, *self.draw(images, keys, shared=self.shared_noise)


class LabelledSADMObjective(SADMObjective):
    """As [`SADMObjective`], with the masks of real lesions instead of synthetic anomalies. All slices of the training
    split count, those without lesion, too. Labels: masks."""

    columns = ("image", "mask", "annotations", "label")
    trains_on = "all"
    validates_on = "labelled"
    learns_from = "masks of all who are not known to be healthy"

    @classmethod
    def lacks(cls, subject: dict) -> bool:
        """Tells whether a subject that may have lesions has no mask of them."""
        return subject["label"] != 0 and not subject["annotations"]

    def anomalies(self, batch: Batch, images: torch.Tensor, keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the slices as they are, and what at least half of their annotations call lesion, `(N, 1, H, W)`."""
        # Healthy subjects need no mask.
        if ((batch["label"] != 0) & (batch["annotations"] == 0)).any():
            raise ValueError(
                "`mask` must be there for every slice that is not known to be healthy: prepare the data with the"
                " masks of all lesions."
            )
        count = batch["mask"].long().sum(1, keepdim=True)
        lesion = (count > 0) & (2 * count >= batch["annotations"].reshape(-1, 1, 1, 1))
        return images, lesion.to(images.dtype)


def segmentation_loss(loss: str, output: SiameseUNet2DOutput, masks: torch.Tensor) -> torch.Tensor:
    """Computes the loss of every sample, `(N,)`, against masks `(N, 1, H, W)` of 0 and 1: `"bce"`, cross entropy,
    `"dice"`, 1 - Dice of probabilities and mask as MONAI's `DiceLoss(sigmoid=True)`, or `"bce_dice"`, the sum. Heads
    of the decoder (`deep_supervision`) add their cross entropy, as in the original, whatever `loss` is."""

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
