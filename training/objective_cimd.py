"""The training objective of CIMD: a diffusion model of masks, given the image, from several annotations of it."""

from __future__ import annotations

import torch
from diffusers import UNet2DModel

from ..checks import check_integer, check_number
from ..models.gaussian_encoder import GaussianEncoder, gaussian_divergence
from ..models.unet_2d_heads import UNet2DHeadsModel
from ..pipelines.pipeline_cimd import CIMDPipeline
from ..schedulers.draws import fold_in, uniform
from ..schedulers.scheduling_cimd import CIMDScheduler
from ..volumes.processor import VolumeProcessor
from .keys import ANNOTATION, UPDATE
from .objective import Batch, Objective
from .variational_bound import variance_bound


# N slices, C modalities, A annotations, H x W pixels.

PREVIEW_STEPS = 10


class CIMDObjective(Objective):
    r"""
    Mean squared error between drawn and predicted noise of a mask, plus the variational bound in bits per pixel,
    from which only the variance learns; one of the annotations and the timestep are drawn uniformly at every visit of
    a slice. Exports a [`CIMDPipeline`].

    The authors' third term is the divergence of two Gaussian encoders, one of image and annotation, one of image and
    predicted noise. In their program both are random and never trained, and the network gets no latent variable: the
    term compares random features of the noise with random features of the annotation, and users report blurred masks.
    It is off here. `kl_weight=1e-3` brings their program back; with `train_encoders=True` the encoders learn as well,
    one reading of the paper that nobody has published.

    Trained: the UNet, and the encoders with `train_encoders`, which are frozen otherwise. Averaged: all of them.
    Labels: masks.

    Args:
        unet, scheduler, processor, inference: As of [`Objective`].
        vb_weight (`float`, defaults to 1.0): Weight of the variational bound, 0 or more. Without it the variance
            learns nothing.
        kl_weight (`float`, defaults to 0.0): Weight of the divergence, 0 or more. The authors: 1e-3.
        train_encoders (`bool`, defaults to `False`): Train the encoders too; needs a `kl_weight`.
        updates_per_batch (`int`, defaults to 1): Optimizer steps on one batch with one choice of annotations, each
            with timesteps and noise of its own. The authors' program has 2 and counts one. Here every update is a
            step: its 53,000 steps are `train.max_steps` 106000.
    """

    columns = ("image", "mask", "annotations")
    trains_on = "annotated"
    validates_on = "annotated"
    unet_classes = (UNet2DModel, UNet2DHeadsModel)
    scheduler_class = CIMDScheduler
    pipeline_class = CIMDPipeline
    objective_keys = ("vb_weight", "kl_weight", "train_encoders", "updates_per_batch")

    def __init__(
        self,
        unet: torch.nn.Module,
        scheduler: CIMDScheduler,
        processor: VolumeProcessor,
        inference: dict | None = None,
        *,
        vb_weight: float = 1.0,
        kl_weight: float = 0.0,
        train_encoders: bool = False,
        updates_per_batch: int = 1,
    ):
        check_number("vb_weight", vb_weight, least=0)
        check_number("kl_weight", kl_weight, least=0)
        if train_encoders and not kl_weight:
            raise ValueError("`train_encoders` needs a `kl_weight` above 0: without it there are no encoders.")
        check_integer("updates_per_batch", updates_per_batch, 1)
        model = UNetWithEncoders(unet, train_encoders) if kl_weight else unet
        super().__init__(model, scheduler, processor, inference)
        self.vb_weight = vb_weight
        self.kl_weight = kl_weight
        self.updates_per_batch = updates_per_batch

    @classmethod
    def network_arguments(cls, network: type, channels: int) -> dict[str, tuple[int, str]]:
        """Returns inputs for image and mask, outputs for the mask."""
        return {
            "in_channels": (channels + 1, "the modalities and the mask"),
            "out_channels": (2, "noise and variance of the mask"),
        }

    def loss(self, model: torch.nn.Module, batch: Batch, keys: torch.Tensor, update: int = 0) -> torch.Tensor:
        """Computes the loss from `image`, `mask` and `annotations`; see [`Objective.loss`]. `update` is the number of
        the update on this batch: all of them see the same annotation, and draw the rest anew."""
        images, annotations = batch["image"], _checked(batch["annotations"])
        target = draw_annotation(batch["mask"], annotations, keys).to(images.dtype)
        timesteps, noise = self.draw(target, fold_in(fold_in(keys, UPDATE), update))
        terms = cimd_loss_terms(model, self.scheduler, images, target, noise, timesteps, with_kl=self.kl_weight > 0)
        return terms["mse"] + self.vb_weight * terms["vb"] + self.kl_weight * terms["kl"]

    def preview(self, model: torch.nn.Module, batch: Batch, keys: torch.Tensor) -> Batch:
        """Makes rows of slice, mean of its annotations, a noised one, its one-shot estimate, and two members of an
        ensemble of few steps."""
        images, annotations = batch["image"], _checked(batch["annotations"])
        masks = batch["mask"].to(images.dtype)
        pipeline = self.make_pipeline(model)
        pipeline.set_progress_bar_config(disable=True)
        quarter = len(self.scheduler) // 4
        level, sample = self.noise_to(draw_annotation(masks, annotations, keys), quarter, keys)
        epsilon = pipeline.predict_noise(torch.cat([images, sample], dim=1), level)[:, :1]
        few = {"num_ensemble": 2, "num_inference_steps": min(PREVIEW_STEPS, len(self.scheduler))}
        members = pipeline.compute_maps(images, list(range(len(images))), **pipeline.default_settings() | few).maps
        rows = {
            "mean of the annotations": masks.sum(1, keepdim=True) / annotations[:, None, None, None],
            f"one of them noised, t = {quarter}": sample,
            "its one-shot estimate": self.scheduler.predict_original_sample(epsilon, level, sample),
            f"member 1, {PREVIEW_STEPS} steps": members[:, :1],
            f"member 2, {PREVIEW_STEPS} steps": members[:, 1:],
        }
        # Masks are 0 and 1, pictures have the range of the slices.
        return {"slice": images[:, :1]} | {title: self.processor.from_unit(row.float()) for title, row in rows.items()}

    def make_pipeline(self, model: torch.nn.Module) -> CIMDPipeline:
        """Returns the pipeline of the trained `model`; encoders stay behind, sampling does not need them."""
        unet = model.unet if isinstance(model, UNetWithEncoders) else model
        return CIMDPipeline(unet, self.scheduler, self.processor, **self.inference)


class UNetWithEncoders(torch.nn.Module):
    """Holds a denoiser and the two encoders of the divergence, so that they share checkpoints and processes."""

    def __init__(self, unet: torch.nn.Module, train_encoders: bool = False):
        super().__init__()
        self.unet = unet
        # Prior and posterior of the original; the paper's networks of modelling and controlling ambiguity.
        self.label_encoder = GaussianEncoder().requires_grad_(train_encoders)
        self.output_encoder = GaussianEncoder().requires_grad_(train_encoders)

    def forward(
        self, sample: torch.Tensor, timesteps: torch.Tensor, label: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the outputs `(N, 2, H, W)` for image and noised mask `(N, C + 1, H, W)`, and the divergence of what
        the encoders make of the mask without noise, `label`, and of the predicted noise: `(N,)` in nats."""
        model_output = self.unet(sample, timesteps).sample
        image = sample[:, :1]  # the first modality alone, as the original's
        of_label = self.label_encoder(image, label)
        of_output = self.output_encoder(image, model_output[:, :1])
        return model_output, gaussian_divergence(*of_label, *of_output)


def draw_annotation(masks: torch.Tensor, annotations: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Draws one of the first `annotations` `(N,)` masks `(N, A, H, W)` of each slice, uniformly: `(N, 1, H, W)`."""
    chosen = (uniform(fold_in(keys, ANNOTATION)) * annotations).long().minimum(annotations - 1)
    return masks[torch.arange(len(masks), device=masks.device), chosen][:, None]


def cimd_loss_terms(
    model: torch.nn.Module,
    scheduler: CIMDScheduler,
    images: torch.Tensor,
    target: torch.Tensor,
    noise: torch.Tensor,
    timesteps: torch.Tensor,
    *,
    label: torch.Tensor | None = None,
    with_kl: bool = False,
) -> dict[str, torch.Tensor]:
    """
    Computes the terms of the loss of each sample, `(N,)`: `"mse"`; `"vb"`, in bits per pixel, with gradients for the
    variance only; `"kl"` in nats, 0 unless `with_kl`, with gradients for the predicted noise.

    Args:
        model (`torch.nn.Module`): The UNet, or with `with_kl` a [`UNetWithEncoders`].
        target (`torch.Tensor` of shape `(N, 1, H, W)`): The mask that is diffused, x_0: 0 or 1.
        label (`torch.Tensor` of shape `(N, 1, H, W)`, *optional*): What the label encoder sees, if it is not `target`.
    """
    sample = scheduler.add_noise(target, noise, timesteps)
    # In the type of the images: recorded masks may be float64.
    model_input = torch.cat([images, sample.to(images.dtype)], dim=1)
    if with_kl:
        model_output, divergence = model(model_input, timesteps, target if label is None else label)
    else:
        model_output, divergence = model(model_input, timesteps).sample, images.new_zeros(len(images))
    epsilon, variance_output = model_output.float().chunk(2, dim=1)
    estimate = scheduler.predict_original_sample(epsilon, timesteps, sample)
    return {
        "mse": (noise - epsilon).square().mean((1, 2, 3)),
        "vb": variance_bound(scheduler, target, estimate, sample, variance_output, timesteps),
        "kl": divergence,
    }


def _checked(annotations: torch.Tensor) -> torch.Tensor:
    if not (annotations > 0).all():
        raise ValueError(
            f"`annotations` must be at least 1 for every slice, got {annotations.tolist()}: an annotation may mark"
            " nothing, but there must be one. Prepare the data without cases that nobody annotated."
        )
    return annotations
