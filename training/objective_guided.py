"""The training objectives of AnoFPDM and its baselines: classifier-free guidance, the noisy classifier, and learned
variances for it."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import UNet2DModel

from ..checks import check_number
from ..models.classifier_2d import NoisyClassifierModel
from ..models.unet_2d_anofpdm import AnoFPDMUNet2DModel
from ..models.unet_2d_heads import UNet2DHeadsModel
from ..pipelines.base import HEALTHY, NULL
from ..pipelines.pipeline_anofpdm import AnoFPDMPipeline
from ..pipelines.pipeline_classifier_guided import ClassifierGuidedPipeline
from ..pipelines.pipeline_ddib import DDIBPipeline
from ..schedulers.draws import fold_in, uniform
from ..schedulers.scheduling_anofpdm import AnoFPDMScheduler
from ..volumes.processor import VolumeProcessor
from .finite import check_part
from .keys import LABEL
from .objective import MODALITIES, Batch, Objective
from .variational_bound import variance_bound


class GuidedObjective(Objective):
    r"""
    Mean squared error between drawn and predicted noise of a network that knows the slice's label, the timestep
    drawn uniformly. For classifier-free guidance the label is replaced by "none" (2) in a share of the samples.
    Exports an [`AnoFPDMPipeline`].

    Trained and averaged: the UNet. Labels: healthy or not, of every slice.

    Args:
        unet (`torch.nn.Module`): One of `unet_classes`, of `(sample, timesteps, class_labels)`.
        scheduler, processor, inference: As of [`Objective`].
        label_dropout (`float`, defaults to 0.1): Share of the samples that are trained without their label, 0 to 1.
    """

    columns = ("image", "label")
    trains_on = "all"
    validates_on = "labelled"
    unet_classes = (UNet2DModel, AnoFPDMUNet2DModel)
    scheduler_class = AnoFPDMScheduler
    pipeline_class = AnoFPDMPipeline
    objective_keys = ("label_dropout",)

    def __init__(
        self,
        unet: torch.nn.Module,
        scheduler: AnoFPDMScheduler,
        processor: VolumeProcessor,
        inference: dict | None = None,
        *,
        label_dropout: float = 0.1,
    ):
        check_number("label_dropout", label_dropout, least=0, most=1)
        super().__init__(unet, scheduler, processor, inference)
        self.label_dropout = label_dropout

    @classmethod
    def network_arguments(cls, network: type, channels: int) -> dict[str, tuple[int, str]]:
        """Returns as many outputs as inputs, and the labels, of which [`UNet2DModel`] counts "none", too."""
        if network is UNet2DModel:
            labels = {"num_class_embeds": (3, "healthy, unhealthy, none")}
        else:
            labels = {"num_classes": (2, "healthy and unhealthy")}
        return super().network_arguments(network, channels) | labels

    def loss(self, model: torch.nn.Module, batch: Batch, keys: torch.Tensor) -> torch.Tensor:
        """Computes the loss from `image` and `label`, which must be known; see [`Objective.loss`]."""
        images, labels = batch["image"], _checked(batch["label"])
        timesteps, noise = self.draw(images, keys)
        labels = drop_labels(labels, uniform(fold_in(keys, LABEL)), self.label_dropout)
        sample = self.scheduler.add_noise(images, noise, timesteps)
        return (model(sample, timesteps, labels).sample.float() - noise).square().mean((1, 2, 3))

    def preview(self, model: torch.nn.Module, batch: Batch, keys: torch.Tensor) -> Batch:
        """Makes rows of slice, noised slice, its one-shot reconstructions as healthy at several guidance strengths."""
        images, quarter = batch["image"], len(self.scheduler) // 4
        level, sample = self.noise_to(images, quarter, keys)
        labels = torch.tensor([HEALTHY, NULL], device=images.device).repeat_interleave(len(images))
        model_output = model(torch.cat([sample, sample]), level.repeat(2), labels).sample.float()
        healthy, null = model_output.chunk(2)
        rows = {"slice": images, f"noised, t = {quarter}": sample}
        for strength in (0.0, 1.0, 1.8, 2.0, 3.0):
            guided = (1 + strength) * healthy - strength * null
            rows[f"as healthy, w = {strength:g}"] = self.scheduler.predict_original_sample(
                guided, level, sample, clip_sample=True
            )
        return rows


class DDIBObjective(GuidedObjective):
    """As [`GuidedObjective`], the same network: exports a [`DDIBPipeline`]."""

    pipeline_class = DDIBPipeline


class ClassifierObjective(Objective):
    """Cross entropy of a classifier of noised slices, the timestep drawn uniformly. Exports the classifier, which is
    no pipeline.

    Trained and averaged: the classifier, of the block `unet`, 0 healthy, 1 unhealthy. Labels: of every slice. The
    authors' own training saw the same batch in every step; a run here goes through the data."""

    columns = ("image", "label")
    trains_on = "all"
    validates_on = "labelled"
    trains_unet_alone = False
    unet_classes = (NoisyClassifierModel,)
    scheduler_class = AnoFPDMScheduler

    @classmethod
    def network_arguments(cls, network: type, channels: int) -> dict[str, tuple[int, str]]:
        """Returns the number of inputs and of classes."""
        return {"in_channels": (channels, MODALITIES), "num_classes": (2, "healthy and unhealthy")}

    def loss(self, model: torch.nn.Module, batch: Batch, keys: torch.Tensor) -> torch.Tensor:
        """Computes the loss from `image` and `label`, which must be known; see [`Objective.loss`]."""
        labels = _checked(batch["label"])
        timesteps, noise = self.draw(batch["image"], keys)
        sample = self.scheduler.add_noise(batch["image"], noise, timesteps)
        return F.cross_entropy(model(sample, timesteps).logits.float(), labels, reduction="none")

    def preview(self, model: torch.nn.Module, batch: Batch, keys: torch.Tensor) -> Batch:
        """Makes rows of slice, noised slice with its probability of being healthy, and the gradient of the logarithm,
        along which guidance moves the slice, scaled to the picture's range."""
        images, quarter = batch["image"], len(self.scheduler) // 4
        level, sample = self.noise_to(images, quarter, keys)
        with torch.enable_grad():
            sample.requires_grad_()
            healthy = F.log_softmax(model(sample, level).logits.float(), dim=1)[:, HEALTHY]
            (gradient,) = torch.autograd.grad(healthy.sum(), sample)
        gradient = gradient / gradient.abs().amax((1, 2, 3), keepdim=True).clamp(min=1e-12)
        probabilities = " ".join(f"{value:.2f}" for value in healthy.detach().exp().tolist())
        return {
            "slice": images,
            f"noised, t = {quarter}, healthy with probability {probabilities}": sample.detach(),
            "gradient towards healthy": self.processor.from_unit((gradient + 1) / 2),
        }

    def export(self, model: NoisyClassifierModel, folder: str | Path) -> None:
        """Writes `classifier/`, `scheduler/` and `processor/` into a folder, which [`load_classifier`] reads."""
        model.save_pretrained(Path(folder, "classifier"))
        self.scheduler.save_pretrained(Path(folder, "scheduler"))
        self.processor.save_pretrained(Path(folder, "processor"))


class LearnedSigmaObjective(Objective):
    r"""
    Mean squared error between drawn and predicted noise, plus the variational bound in bits per dimension, from
    which only the variance learns (Nichol and Dhariwal 2021, with full weight as AnoFPDM's authors trained it), the
    timestep drawn uniformly. Exports a [`ClassifierGuidedPipeline`] with a classifier that was trained before.

    Trained and averaged: the UNet. Frozen: the classifier, which training does not use. Labels: none.

    Args:
        unet, scheduler, processor, inference: As of [`Objective`].
        classifier_path (`str`): Of the classifier that is exported with the UNet, as of [`load_classifier`].
    """

    trains_on = "all"
    unet_classes = (UNet2DModel, UNet2DHeadsModel)
    scheduler_class = AnoFPDMScheduler
    pipeline_class = ClassifierGuidedPipeline
    objective_keys = ("classifier_path",)
    part = ("classifier_path", "a trained classifier (method classifier)")

    def __init__(
        self,
        unet: torch.nn.Module,
        scheduler: AnoFPDMScheduler,
        processor: VolumeProcessor,
        inference: dict | None = None,
        *,
        classifier_path: str,
    ):
        self.classifier = load_classifier(classifier_path, scheduler, processor)
        super().__init__(unet, scheduler, processor, inference)

    @classmethod
    def network_arguments(cls, network: type, channels: int) -> dict[str, tuple[int, str]]:
        """Returns twice as many outputs as inputs: noise and variance."""
        return {"in_channels": (channels, MODALITIES), "out_channels": (2 * channels, f"twice {MODALITIES}")}

    def loss(self, model: torch.nn.Module, batch: Batch, keys: torch.Tensor) -> torch.Tensor:
        """Computes the loss from `image` in [-1, 1]; see [`Objective.loss`]."""
        timesteps, noise = self.draw(batch["image"], keys)
        error, bound = learned_sigma_loss(model, self.scheduler, batch["image"], noise, timesteps)
        return error + bound

    def preview(self, model: torch.nn.Module, batch: Batch, keys: torch.Tensor) -> Batch:
        """Makes rows of slice, noised slice, its one-shot reconstruction, their difference."""
        quarter = len(self.scheduler) // 4
        level, sample = self.noise_to(batch["image"], quarter, keys)
        model_output = model(sample, level).sample.float().chunk(2, dim=1)[0]
        reconstruction = self.scheduler.predict_original_sample(model_output, level, sample, clip_sample=True)
        return self.comparison(batch["image"], sample, quarter, "one-shot reconstruction", reconstruction)

    def make_pipeline(self, model: torch.nn.Module) -> ClassifierGuidedPipeline:
        """Returns the pipeline of the trained `model` and the classifier."""
        return ClassifierGuidedPipeline(model, self.classifier, self.scheduler, self.processor, **self.inference)


def drop_labels(labels: torch.Tensor, draws: torch.Tensor, probability: float) -> torch.Tensor:
    """Replaces labels `(N,)` by "none" (2) where the uniform draw `(N,)` of a sample is below `probability`."""
    return torch.where(draws < probability, NULL, labels)


def learned_sigma_loss(
    model: torch.nn.Module,
    scheduler: AnoFPDMScheduler,
    images: torch.Tensor,
    noise: torch.Tensor,
    timesteps: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Computes squared error of the noise and bound of the variance, `(N,)` each, of a network with 2C outputs."""
    sample = scheduler.add_noise(images, noise, timesteps)
    model_output, variance_output = model(sample, timesteps).sample.float().chunk(2, dim=1)
    error = (model_output - noise).square().mean((1, 2, 3))
    estimate = scheduler.predict_original_sample(model_output, timesteps, sample, clip_sample=False)
    return error, variance_bound(scheduler, images, estimate, sample, variance_output, timesteps)


def load_classifier(path: str | Path, scheduler: AnoFPDMScheduler, processor: VolumeProcessor) -> NoisyClassifierModel:
    """Loads a classifier from the folder or Hub id of what [`ClassifierObjective`] or a pipeline with a classifier
    wrote; it must have been trained with slices and noise as of `processor` and `scheduler`."""
    own = VolumeProcessor.from_pretrained(path, subfolder="processor")
    processor.check_equal(own.settings(), f"the classifier {path} was trained with")
    betas = AnoFPDMScheduler.from_pretrained(path, subfolder="scheduler").betas
    if not torch.equal(betas, scheduler.betas):
        raise ValueError(
            f"The classifier {path} was trained with other noise: {len(betas)} betas from {betas[0]:.3g} to"
            f" {betas[-1]:.3g}, here {len(scheduler)} from {scheduler.betas[0]:.3g} to {scheduler.betas[-1]:.3g}."
            " Train one for this scheduler."
        )
    classifier = NoisyClassifierModel.from_pretrained(path, subfolder="classifier")
    check_part(classifier, "objective.classifier_path", path)
    return classifier


def _checked(labels: torch.Tensor) -> torch.Tensor:
    if not ((labels == 0) | (labels == 1)).all():
        raise ValueError(
            f"`label` must be 0 (healthy) or 1 (unhealthy) for every slice, got {sorted(set(labels.tolist()))}; -1 is"
            " unknown. Prepare the data with masks or labels of all subjects."
        )
    return labels
