"""The training objectives of AnoFPDM and its baselines: classifier-free guidance, the noisy classifier, and learned variances for it."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import UNet2DModel

from ..models.classifier_2d import NoisyClassifierModel
from ..models.unet_2d_anofpdm import AnoFPDMUNet2DModel
from ..models.unet_2d_heads import UNet2DHeadsModel
from ..pipelines.base import AnomalyPipeline
from ..pipelines.pipeline_anofpdm import AnoFPDMPipeline
from ..pipelines.pipeline_classifier_guided import ClassifierGuidedPipeline
from ..pipelines.pipeline_ddib import DDIBPipeline
from ..schedulers.scheduling_anofpdm import AnoFPDMScheduler
from ..volumes.processor import VolumeProcessor
from .objective_noise import check_keys
from .options import TrainOptions
from .variational_bound import variance_bound


HEALTHY, NULL = 0, 2  # labels of the network; 1 is unhealthy
PREVIEW_GUIDANCE = (1.0, 1.8, 2.0, 3.0)


class GuidedObjective:
    r"""
    Mean squared error between drawn and predicted noise of a network that knows the slice's label, the timestep drawn uniformly. For
    classifier-free guidance the label is replaced by "none" (2) in a share of the samples. Exports an [`AnoFPDMPipeline`].

    Trained: the UNet. Averaged: the UNet. Frozen: nothing. Labels: healthy or not, of every slice.

    Args:
        unet ([`AnoFPDMUNet2DModel`], or a [`~diffusers.UNet2DModel`] with `num_class_embeds=3`):
            Predicts the noise from `(sample, timesteps, class_labels)`.
        scheduler ([`AnoFPDMScheduler`]): Noises the slices.
        processor ([`VolumeProcessor`]): Of the prepared data, exported with the weights.
        inference (`dict`): Inference values of the pipeline that are exported.
        label_dropout (`float`, defaults to 0.1): Share of the samples that are trained without their label, 0 to 1.
    """

    pipeline_class = AnoFPDMPipeline
    columns = ("image", "label")
    trains_on = "all"
    validates_on = "labelled"
    updates_per_batch = 1

    def __init__(
        self,
        unet: torch.nn.Module,
        scheduler: AnoFPDMScheduler,
        processor: VolumeProcessor,
        inference: dict | None = None,
        *,
        label_dropout: float = 0.1,
    ):
        if not 0 <= label_dropout <= 1:
            raise ValueError(f"`label_dropout` must be between 0 and 1, got {label_dropout}.")
        self.model = unet
        self.scheduler = scheduler
        self.processor = processor
        self.inference = inference or {}
        self.label_dropout = label_dropout
        # Built once here, so that a wrong inference value is found before the training and not after it.
        self.pipeline_class(unet, scheduler, processor, **self.inference)

    @classmethod
    def from_options(cls, options: TrainOptions, processor: VolumeProcessor) -> GuidedObjective:
        """Builds network, scheduler and objective from the blocks of a configuration."""
        unet = _network(options, processor, (UNet2DModel, AnoFPDMUNet2DModel), outputs=1)
        scheduler = _scheduler(options)
        check_keys("inference", options.inference, cls.pipeline_class)
        check_keys("objective", options.objective, cls)
        return cls(unet, scheduler, processor, options.inference, **options.objective)

    def loss(
        self, model: torch.nn.Module, batch: dict[str, torch.Tensor], generators: list[torch.Generator]
    ) -> torch.Tensor:
        """
        Loss of every sample, `(N,)`.

        Args:
            model (`torch.nn.Module`): The network as accelerate wraps it.
            batch (`dict[str, torch.Tensor]`):
                `image (N, C, H, W)` in the processor's value range, `label (N,)` long, 0 healthy, 1 unhealthy.
            generators (`list[torch.Generator]`): One per slice; timestep, noise and dropout of the label are drawn from it.
        """
        images, labels = batch["image"], _checked(batch["label"])
        timesteps, noise = _draw(self.scheduler, images, generators)
        draws = torch.cat([torch.rand(1, generator=generator, device=images.device) for generator in generators])
        labels = drop_labels(labels, draws, self.label_dropout)
        sample = self.scheduler.add_noise(images, noise, timesteps)
        return (model(sample, timesteps, labels).sample.float() - noise).square().mean((1, 2, 3))

    @torch.no_grad()
    def preview(
        self, model: torch.nn.Module, batch: dict[str, torch.Tensor], generators: list[torch.Generator]
    ) -> dict[str, torch.Tensor]:
        """Rows of a validation picture, each `(N, C, H, W)`: slice, noised slice, and its one-shot reconstructions as healthy, without
        guidance and with several strengths of it."""
        images = batch["image"]
        level, sample = _noised_at_a_quarter(self.scheduler, images, generators)
        labels = torch.tensor([HEALTHY, NULL], device=images.device).repeat_interleave(len(images))
        model_output = model(torch.cat([sample, sample]), level.repeat(2), labels).sample.float()
        healthy, null = model_output.chunk(2)
        rows = {"slice": images, f"noised, t = {int(level[0])}": sample}
        for strength in (0.0, *PREVIEW_GUIDANCE):
            guided = (1 + strength) * healthy - strength * null
            rows[f"as healthy, w = {strength:g}"] = self.scheduler.predict_original_sample(
                guided, level, sample, clip_sample=True
            )
        return rows

    def export(self, model: torch.nn.Module, folder: str | Path) -> AnomalyPipeline:
        """Writes a complete pipeline folder with the weights of `model`."""
        pipeline = self.pipeline_class(model, self.scheduler, self.processor, **self.inference)
        pipeline.save_pretrained(folder)
        return pipeline


class DDIBObjective(GuidedObjective):
    """As [`GuidedObjective`], the same network: exports a [`DDIBPipeline`]."""

    pipeline_class = DDIBPipeline


class ClassifierObjective:
    r"""
    Cross entropy of a classifier of noised slices, the timestep drawn uniformly.

    Trained: the classifier. Averaged: the classifier. Frozen: nothing. Labels: healthy or not, of every slice. The authors' own
    training saw the same batch in every step; a run here goes through the data.

    Args:
        classifier ([`NoisyClassifierModel`]): Two classes, 0 healthy, 1 unhealthy.
        scheduler ([`AnoFPDMScheduler`]): Noises the slices.
        processor ([`VolumeProcessor`]): Of the prepared data, exported with the weights.
    """

    columns = ("image", "label")
    trains_on = "all"
    validates_on = "labelled"
    updates_per_batch = 1

    def __init__(self, classifier: NoisyClassifierModel, scheduler: AnoFPDMScheduler, processor: VolumeProcessor):
        self.model = classifier
        self.scheduler = scheduler
        self.processor = processor

    @classmethod
    def from_options(cls, options: TrainOptions, processor: VolumeProcessor) -> ClassifierObjective:
        """Builds classifier, scheduler and objective; the configuration's block `unet` is that of the classifier."""
        classifier = _network(options, processor, (NoisyClassifierModel,), outputs=0)
        scheduler = _scheduler(options)
        for block in ("inference", "objective"):
            if getattr(options, block):
                raise ValueError(
                    f"`{block}` must be empty for a classifier, got {', '.join(getattr(options, block))}."
                )
        return cls(classifier, scheduler, processor)

    def loss(
        self, model: torch.nn.Module, batch: dict[str, torch.Tensor], generators: list[torch.Generator]
    ) -> torch.Tensor:
        """
        Loss of every sample, `(N,)`.

        Args:
            model (`torch.nn.Module`): The classifier as accelerate wraps it.
            batch (`dict[str, torch.Tensor]`):
                `image (N, C, H, W)` in the processor's value range, `label (N,)` long, 0 healthy, 1 unhealthy.
            generators (`list[torch.Generator]`): One per slice; timestep and noise are drawn from it.
        """
        labels = _checked(batch["label"])
        timesteps, noise = _draw(self.scheduler, batch["image"], generators)
        sample = self.scheduler.add_noise(batch["image"], noise, timesteps)
        return F.cross_entropy(model(sample, timesteps).logits.float(), labels, reduction="none")

    @torch.no_grad()
    def preview(
        self, model: torch.nn.Module, batch: dict[str, torch.Tensor], generators: list[torch.Generator]
    ) -> dict[str, torch.Tensor]:
        """Rows of a validation picture, each `(N, C, H, W)`: slice, noised slice, with the probability of being healthy, and the
        gradient of its logarithm, scaled to the picture's range; guidance moves the slice along it."""
        images = batch["image"]
        level, sample = _noised_at_a_quarter(self.scheduler, images, generators)
        with torch.enable_grad():
            sample.requires_grad_()
            healthy = F.log_softmax(model(sample, level).logits.float(), dim=1)[:, HEALTHY]
            (gradient,) = torch.autograd.grad(healthy.sum(), sample)
        low, high = self.processor.config.value_range
        gradient = gradient / gradient.abs().amax((1, 2, 3), keepdim=True).clamp(min=1e-12)
        probabilities = " ".join(f"{value:.2f}" for value in healthy.detach().exp().tolist())
        return {
            "slice": images,
            f"noised, t = {int(level[0])}, healthy with probability {probabilities}": sample.detach(),
            "gradient towards healthy": low + (high - low) * (gradient + 1) / 2,
        }

    def export(self, model: NoisyClassifierModel, folder: str | Path) -> None:
        """Writes `classifier/`, `scheduler/` and `processor/` into a folder, which `classifier_path` of [`LearnedSigmaObjective`]
        takes; `NoisyClassifierModel.from_pretrained(folder, subfolder="classifier")` reads it. It is no pipeline."""
        export_classifier(model, self.scheduler, self.processor, folder)


class LearnedSigmaObjective:
    r"""
    Mean squared error between drawn and predicted noise, plus the variational bound in bits per dimension, from which only the variance
    learns (Nichol and Dhariwal 2021, with full weight as AnoFPDM's authors trained it), the timestep drawn uniformly. Exports a
    [`ClassifierGuidedPipeline`] with a classifier that was trained before.

    Trained: the UNet. Averaged: the UNet. Frozen: the classifier, which training does not use. Labels: none.

    Args:
        unet ([`~diffusers.UNet2DModel`]): With 2C outputs: the noise, and what the variance is made of.
        classifier ([`NoisyClassifierModel`]): Exported with the UNet.
        scheduler ([`AnoFPDMScheduler`]): Noises the slices.
        processor ([`VolumeProcessor`]): Of the prepared data, exported with the weights.
        inference (`dict`): Inference values of the pipeline that are exported.
    """

    columns = ("image",)
    trains_on = "all"
    validates_on = "healthy"
    updates_per_batch = 1

    def __init__(
        self,
        unet: torch.nn.Module,
        classifier: NoisyClassifierModel,
        scheduler: AnoFPDMScheduler,
        processor: VolumeProcessor,
        inference: dict | None = None,
    ):
        self.model = unet
        self.classifier = classifier
        self.scheduler = scheduler
        self.processor = processor
        self.inference = inference or {}
        # Built once here, so that a wrong inference value is found before the training and not after it.
        self._pipeline(unet)

    @classmethod
    def from_options(cls, options: TrainOptions, processor: VolumeProcessor) -> LearnedSigmaObjective:
        """Builds network, scheduler and objective from the blocks of a configuration; `objective.classifier_path` is a folder or Hub
        id that [`ClassifierObjective`] wrote, or a [`ClassifierGuidedPipeline`]."""
        unet = _network(options, processor, (UNet2DModel, UNet2DHeadsModel), outputs=2)
        scheduler = _scheduler(options)
        check_keys("inference", options.inference, ClassifierGuidedPipeline)
        if set(options.objective) != {"classifier_path"}:
            raise ValueError(
                "`objective` must have the key classifier_path and no other: train a classifier first (method classifier). Got"
                f" {', '.join(options.objective) or 'none'}."
            )
        classifier = load_classifier(options.objective["classifier_path"], scheduler, processor)
        return cls(unet, classifier, scheduler, processor, options.inference)

    def loss(
        self, model: torch.nn.Module, batch: dict[str, torch.Tensor], generators: list[torch.Generator]
    ) -> torch.Tensor:
        """
        Loss of every sample, `(N,)`.

        Args:
            model (`torch.nn.Module`): The network as accelerate wraps it.
            batch (`dict[str, torch.Tensor]`): `image (N, C, H, W)` in [-1, 1].
            generators (`list[torch.Generator]`): One per slice; timestep and noise are drawn from it.
        """
        timesteps, noise = _draw(self.scheduler, batch["image"], generators)
        error, bound = learned_sigma_loss(model, self.scheduler, batch["image"], noise, timesteps)
        return error + bound

    @torch.no_grad()
    def preview(
        self, model: torch.nn.Module, batch: dict[str, torch.Tensor], generators: list[torch.Generator]
    ) -> dict[str, torch.Tensor]:
        """Rows of a validation picture, each `(N, C, H, W)`: slice, noised slice, its one-shot reconstruction, their difference."""
        images = batch["image"]
        level, sample = _noised_at_a_quarter(self.scheduler, images, generators)
        model_output = model(sample, level).sample.float().chunk(2, dim=1)[0]
        reconstruction = self.scheduler.predict_original_sample(model_output, level, sample, clip_sample=True)
        return {
            "slice": images,
            f"noised, t = {int(level[0])}": sample,
            "one-shot reconstruction": reconstruction,
            "difference": (images - reconstruction).abs() + self.processor.config.value_range[0],
        }

    def export(self, model: torch.nn.Module, folder: str | Path) -> ClassifierGuidedPipeline:
        """Writes a complete pipeline folder with the weights of `model` and those of the classifier."""
        pipeline = self._pipeline(model)
        pipeline.save_pretrained(folder)
        return pipeline

    def _pipeline(self, unet: torch.nn.Module) -> ClassifierGuidedPipeline:
        return ClassifierGuidedPipeline(
            unet=unet,
            classifier=self.classifier,
            scheduler=self.scheduler,
            processor=self.processor,
            **self.inference,
        )


def drop_labels(labels: torch.Tensor, draws: torch.Tensor, probability: float) -> torch.Tensor:
    """Labels `(N,)` with "none" (2) where the uniform draw `(N,)` of a sample is below `probability`."""
    return torch.where(draws < probability, NULL, labels)


def learned_sigma_loss(
    model: torch.nn.Module,
    scheduler: AnoFPDMScheduler,
    images: torch.Tensor,
    noise: torch.Tensor,
    timesteps: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Squared error of the noise and bound of the variance, `(N,)` each, of a network with 2C outputs, from images and noise
    `(N, C, H, W)` and timesteps `(N,)`."""
    sample = scheduler.add_noise(images, noise, timesteps)
    model_output, variance_output = model(sample, timesteps).sample.float().chunk(2, dim=1)
    error = (model_output - noise).square().mean((1, 2, 3))
    estimate = scheduler.predict_original_sample(model_output, timesteps, sample, clip_sample=False)
    return error, variance_bound(scheduler, images, estimate, sample, variance_output, timesteps)


def export_classifier(
    classifier: NoisyClassifierModel, scheduler: AnoFPDMScheduler, processor: VolumeProcessor, folder: str | Path
) -> None:
    """Writes `classifier/`, `scheduler/` and `processor/`: a classifier, and what the slices that it wants look like."""
    folder = Path(folder)
    classifier.save_pretrained(folder / "classifier")
    scheduler.save_pretrained(folder / "scheduler")
    processor.save_pretrained(folder / "processor")


def load_classifier(path: str | Path, scheduler: AnoFPDMScheduler, processor: VolumeProcessor) -> NoisyClassifierModel:
    """
    Loads a classifier and makes sure that it was trained on the same kind of noised slices.

    Args:
        path (`str` or `Path`): Folder or Hub id of what [`export_classifier`] or a pipeline with a classifier wrote.
        scheduler ([`AnoFPDMScheduler`]), processor ([`VolumeProcessor`]): What it is to be used with.

    Raises:
        OSError: There is no classifier.
        ValueError: It saw other slices or other noise.
    """
    own = VolumeProcessor.from_pretrained(path, subfolder="processor")
    processor.check_equal(own.settings(), f"the classifier {path} was trained with")
    betas = AnoFPDMScheduler.from_pretrained(path, subfolder="scheduler").betas
    if not torch.equal(betas, scheduler.betas):
        raise ValueError(
            f"The classifier {path} was trained with other noise: {len(betas)} betas from {betas[0]:.3g} to {betas[-1]:.3g}, here"
            f" {len(scheduler)} from {scheduler.betas[0]:.3g} to {scheduler.betas[-1]:.3g}. Train one for this scheduler."
        )
    return NoisyClassifierModel.from_pretrained(path, subfolder="classifier")


def _network(options: TrainOptions, processor: VolumeProcessor, classes: tuple[type, ...], outputs: int):
    """A network of the block `unet`, of the first of `classes` by default, with `outputs` times as many outputs as modalities."""
    unet = dict(options.unet)
    by_name = {network.__name__: network for network in classes}
    name = unet.pop("_class_name", classes[0].__name__)
    if name not in by_name:
        raise ValueError(f"`unet._class_name` must be one of {', '.join(by_name)}, got {name!r}.")
    channels, size = len(processor.config.modalities), processor.config.size
    wanted = {"in_channels": (channels, "the number of modalities")}
    if outputs:
        times = "" if outputs == 1 else f"{outputs} times "
        wanted["out_channels"] = (outputs * channels, f"{times}the number of modalities")
    if outputs == 1:  # the guided networks
        key = "num_class_embeds" if name == "UNet2DModel" else "num_classes"
        wanted[key] = (3, "healthy, unhealthy, none") if name == "UNet2DModel" else (2, "healthy and unhealthy")
    elif not outputs:
        wanted["num_classes"] = (2, "healthy and unhealthy")
    for key, (value, reason) in wanted.items():
        if unet.setdefault(key, value) != value:
            raise ValueError(f"`unet.{key}` must be {value}, {reason}, got {unet[key]}.")
    if size is not None:
        unet.setdefault("sample_size", size[0] if size[0] == size[1] else tuple(size))
    check_keys("unet", unet, by_name[name])
    return by_name[name](**unet)


def _scheduler(options: TrainOptions) -> AnoFPDMScheduler:
    check_keys("scheduler", options.scheduler, AnoFPDMScheduler)
    return AnoFPDMScheduler(**options.scheduler)


def _checked(labels: torch.Tensor) -> torch.Tensor:
    if not ((labels == 0) | (labels == 1)).all():
        raise ValueError(
            f"`label` must be 0 (healthy) or 1 (unhealthy) for every slice, got {sorted(set(labels.tolist()))}; -1 is unknown."
            " Prepare the data with masks or labels of all subjects."
        )
    return labels


def _draw(scheduler: AnoFPDMScheduler, images: torch.Tensor, generators: list[torch.Generator]):
    """t `(N,)`, uniform, and noise `(N, C, H, W)`."""
    timesteps = torch.cat(
        [torch.randint(len(scheduler), (1,), generator=generator, device=images.device) for generator in generators]
    )
    return timesteps, scheduler.draw_noise(images.shape, timesteps, generators, images.device)


def _noised_at_a_quarter(scheduler: AnoFPDMScheduler, images: torch.Tensor, generators: list[torch.Generator]):
    """t `(N,)`, a quarter of the chain for all, and x_t `(N, C, H, W)`."""
    timesteps = torch.full((len(images),), len(scheduler) // 4, device=images.device)
    noise = scheduler.draw_noise(images.shape, timesteps, generators, images.device)
    return timesteps, scheduler.add_noise(images, noise, timesteps)
