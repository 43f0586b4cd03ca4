"""Predict the clean slice from a noised one: the training objectives of cDDPM, its unconditional DDPM_2D and pDDPM."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from diffusers import UNet2DModel
from transformers import (
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
    AutoConfig,
    AutoModelForImageClassification,
    PreTrainedModel,
)

from ..models.unet_2d_conditioned import ConditionedUNet2DModel
from ..models.unet_2d_heads import UNet2DHeadsModel
from ..pipelines.pipeline_cddpm import CDDPMPipeline
from ..pipelines.pipeline_pddpm import PDDPMPipeline, box_masks, boxes_at, patch_grid
from ..schedulers.scheduling_anoddpm import AnoDDPMScheduler
from ..volumes.processor import VolumeProcessor
from .objective_noise import check_keys
from .objective_spark import encoder_config
from .options import TrainOptions


LOSSES = ("l1", "l2")
BOXES = ("grid", "random")


class DDPM2DObjective:
    r"""
    Mean absolute error of the predicted slice, on [-1, 1], the timestep drawn uniformly. Exports a [`CDDPMPipeline`] without encoder.

    Trained: the UNet. Averaged: the UNet. Frozen: nothing. Labels: none.

    Args:
        unet ([`~diffusers.UNet2DModel`], [`UNet2DHeadsModel`] or [`ConditionedUNet2DModel`] without a condition): Predicts the slice.
        scheduler ([`AnoDDPMScheduler`]): Noises the slices.
        processor ([`VolumeProcessor`]): Of the prepared data, exported with the weights.
        inference (`dict`): Inference values of the pipeline that are exported.
        loss (`str`, defaults to `"l1"`): `"l1"`, or `"l2"`.
        p2_gamma (`float`, defaults to 0.0):
            Weight (1 - abar_t)^gamma of a timestep (Choi et al., CVPR 2022, k = 1), 0 or more. The authors' program has it and uses 0.
        shared_noise (`bool`, defaults to `False`):
            One field for the slices of a forward pass, that of the first one, as the authors. Equal losses then need equal forward passes,
            not only equal steps.
    """

    columns = ("image",)
    trains_on = "healthy"
    validates_on = "healthy"
    updates_per_batch = 1
    pipeline_class = CDDPMPipeline
    unet_classes = (UNet2DModel, UNet2DHeadsModel, ConditionedUNet2DModel)

    def __init__(
        self,
        unet: torch.nn.Module,
        scheduler: AnoDDPMScheduler,
        processor: VolumeProcessor,
        inference: dict | None = None,
        *,
        loss: str = "l1",
        p2_gamma: float = 0.0,
        shared_noise: bool = False,
    ):
        if loss not in LOSSES:
            raise ValueError(f"`loss` must be one of {', '.join(LOSSES)}, got {loss!r}.")
        if not p2_gamma >= 0:
            raise ValueError(f"`p2_gamma` must not be negative, got {p2_gamma}.")
        self.model = unet
        self.scheduler = scheduler
        self.processor = processor
        self.inference = inference or {}
        self.loss_type = loss
        self.p2_gamma = p2_gamma
        self.shared_noise = shared_noise
        # Built once here, so that a wrong inference value is found before the training and not after it.
        self._pipeline(self.model)

    @classmethod
    def from_options(cls, options: TrainOptions, processor: VolumeProcessor) -> DDPM2DObjective:
        """Builds network, scheduler and objective from the blocks of a configuration."""
        check_keys("objective", options.objective, cls)
        return cls(*cls._components(options, processor), processor, options.inference, **options.objective)

    @classmethod
    def _components(cls, options: TrainOptions, processor: VolumeProcessor) -> tuple[UNet2DModel, AnoDDPMScheduler]:
        unet = dict(options.unet)
        classes = {network.__name__: network for network in cls.unet_classes}
        name = unet.pop("_class_name", cls.unet_classes[0].__name__)
        if name not in classes:
            raise ValueError(f"`unet._class_name` must be one of {', '.join(classes)}, got {name!r}.")
        channels, size = len(processor.config.modalities), processor.config.size
        for key in ("in_channels", "out_channels"):
            if unet.setdefault(key, channels) != channels:
                raise ValueError(f"`unet.{key}` must be {channels}, the number of modalities, got {unet[key]}.")
        if size is not None:
            unet.setdefault("sample_size", size[0] if size[0] == size[1] else tuple(size))
        for block, given, target in (
            ("unet", unet, classes[name]),
            ("scheduler", options.scheduler, AnoDDPMScheduler),
            ("inference", options.inference, cls.pipeline_class),
        ):
            check_keys(block, given, target)
        return classes[name](**unet), AnoDDPMScheduler(**options.scheduler)

    def loss(
        self, model: torch.nn.Module, batch: dict[str, torch.Tensor], generators: list[torch.Generator]
    ) -> torch.Tensor:
        """
        Loss of every sample, `(N,)`.

        Args:
            model (`torch.nn.Module`): `self.model` as accelerate wraps it.
            batch (`dict[str, torch.Tensor]`): `image (N, C, H, W)` in the processor's value range.
            generators (`list[torch.Generator]`): One per slice; timestep, noise and, in pDDPM, box are drawn from it, in this order.
        """
        images = self.processor.to_unit(batch["image"])
        target = 2.0 * images - 1.0
        timesteps = torch.cat(
            [torch.randint(len(self.scheduler), (1,), generator=g, device=images.device) for g in generators]
        )
        sample, region = self._corrupt(target, timesteps, generators)
        prediction = self._predict(model, sample, timesteps, images).float()
        loss = reconstruction_loss(target, prediction, self.loss_type, region)
        if self.p2_gamma:
            weights = (1.0 - self.scheduler.alphas_cumprod) ** self.p2_gamma
            loss = loss * weights.to(loss)[timesteps]
        return loss

    @torch.no_grad()
    def preview(
        self, model: torch.nn.Module, batch: dict[str, torch.Tensor], generators: list[torch.Generator]
    ) -> dict[str, torch.Tensor]:
        """Rows of a validation picture, each `(N, C, H, W)`: slice, a noised slice, its reconstruction by the pipeline that would be
        exported, their difference."""
        images = batch["image"]
        pipeline = self._pipeline(model)
        pipeline.set_progress_bar_config(disable=True)
        settings = pipeline.default_settings()
        level = settings["timesteps"][len(settings["timesteps"]) // 2]
        timesteps = torch.full((len(images),), level, device=images.device)
        sample, _ = self._corrupt(2.0 * self.processor.to_unit(images) - 1.0, timesteps, generators)
        reconstruction = pipeline.compute_maps(
            images,
            list(range(len(images))),
            seed=generators[0].initial_seed(),
            batch_size=len(images),
            **settings,
        ).reconstruction
        return {
            "slice": images,
            f"noised, t = {level}": self.processor.from_unit((sample + 1.0) / 2.0),
            f"reconstruction, t = {', '.join(map(str, settings['timesteps']))}": reconstruction,
            "difference": (images - reconstruction).abs() + self.processor.config.value_range[0],
        }

    def export(self, model: torch.nn.Module, folder: str | Path) -> CDDPMPipeline | PDDPMPipeline:
        """Writes a complete pipeline folder with the weights of `model`."""
        pipeline = self._pipeline(model)
        pipeline.save_pretrained(folder)
        return pipeline

    def _corrupt(
        self, target: torch.Tensor, timesteps: torch.Tensor, generators: list[torch.Generator]
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What the network sees of slices `(N, C, H, W)` in [-1, 1], and where its prediction counts, `None` for everywhere."""
        count = 1 if self.shared_noise else len(target)
        shape = (count, *target.shape[1:])
        noise = self.scheduler.draw_noise(shape, timesteps[:count], generators[:count], target.device)
        return self.scheduler.add_noise(target, noise, timesteps), None

    def _predict(self, model, sample: torch.Tensor, timesteps: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
        return model(sample, timesteps).sample

    def _pipeline(self, model: torch.nn.Module) -> CDDPMPipeline | PDDPMPipeline:
        return self.pipeline_class(model, self.scheduler, self.processor, **self.inference)


class CDDPMObjective(DDPM2DObjective):
    r"""
    As [`DDPM2DObjective`], of a UNet that is conditioned by the code of the clean slice. Exports a [`CDDPMPipeline`].

    Trained: UNet and encoder together. Averaged: both, but not the running statistics of the encoder's batch normalisation, so that the
    configuration of the method averages nothing, as its authors. Frozen: nothing. Labels: none.

    Args:
        unet ([`ConditionedUNet2DModel`]): Predicts the slice.
        encoder ([`~transformers.ResNetForImageClassification`]):
            Makes as many values as the UNet's `condition_dim` of a slice in [0, 1]. Any image classifier of transformers does. The
            authors' timm `resnet50` also drops paths in training (0.05), which those of transformers do not.
        scheduler, processor, inference, loss, p2_gamma, shared_noise: As of [`DDPM2DObjective`].
    """

    unet_classes = (ConditionedUNet2DModel,)

    def __init__(
        self,
        unet: ConditionedUNet2DModel,
        encoder: PreTrainedModel,
        scheduler: AnoDDPMScheduler,
        processor: VolumeProcessor,
        inference: dict | None = None,
        **settings,
    ):
        super().__init__(ConditionedDenoiser(unet, encoder), scheduler, processor, inference, **settings)

    @classmethod
    def from_options(cls, options: TrainOptions, processor: VolumeProcessor) -> CDDPMObjective:
        """
        Builds networks, scheduler and objective from the blocks of a configuration. In `objective`, `encoder` has the settings of an image
        classifier of transformers with its `model_type`, `resnet` by default, which is a ResNet-50; or `encoder_path` is a folder or Hub id
        with a pretrained `encoder/`, such as the method spark writes.
        """
        settings = dict(options.objective)
        given, path = settings.pop("encoder", None), settings.pop("encoder_path", None)
        if given is not None and path is not None:
            raise ValueError(
                "Give either `objective.encoder`, for new weights, or `objective.encoder_path`, not both."
            )
        check_keys("objective", settings, DDPM2DObjective)
        unet, scheduler = cls._components(options, processor)
        channels, outputs = len(processor.config.modalities), unet.config.condition_dim
        if outputs is None:
            raise ValueError("`unet.condition_dim` must be a number; without a condition the method is ddpm_2d.")
        if path is not None:
            encoder = load_encoder(path, channels, outputs)
        else:
            config = encoder_config(given or {}, channels)
            config.num_labels = outputs
            if type(config) not in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING:
                raise ValueError(f"`objective.encoder`: transformers has no image classifier of {config.model_type}.")
            encoder = AutoModelForImageClassification.from_config(config)
        _try_encoder(encoder, channels, processor.config.size)
        return cls(unet, encoder, scheduler, processor, options.inference, **settings)

    def _predict(self, model, sample: torch.Tensor, timesteps: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
        return model(sample, timesteps, images)

    def _pipeline(self, model: ConditionedDenoiser) -> CDDPMPipeline:
        return CDDPMPipeline(model.unet, self.scheduler, self.processor, model.encoder, **self.inference)


class PDDPMObjective(DDPM2DObjective):
    r"""
    As [`DDPM2DObjective`], with noise in one square patch of each slice; the prediction counts inside of it, the error outside is 0, and
    the mean runs over the whole slice. Exports a [`PDDPMPipeline`].

    Trained: the UNet. Averaged: the UNet. Frozen: nothing. Labels: none.

    Args:
        unet, scheduler, processor, loss, p2_gamma, shared_noise: As of [`DDPM2DObjective`].
        inference (`dict`): Inference values of the pipeline that are exported; `patch_size` and `overlap` are those of the training, too.
        boxes (`str`, defaults to `"grid"`):
            Each slice's patch is drawn from the `"grid"` of the inference, or lies anywhere, `"random"`, its upper left corner uniform over
            all pixels: it may hang over the border, as in the original.
    """

    pipeline_class = PDDPMPipeline

    def __init__(
        self,
        unet: torch.nn.Module,
        scheduler: AnoDDPMScheduler,
        processor: VolumeProcessor,
        inference: dict | None = None,
        *,
        loss: str = "l1",
        p2_gamma: float = 0.0,
        shared_noise: bool = False,
        boxes: str = "grid",
    ):
        if boxes not in BOXES:
            raise ValueError(f"`boxes` must be one of {', '.join(BOXES)}, got {boxes!r}.")
        super().__init__(
            unet, scheduler, processor, inference, loss=loss, p2_gamma=p2_gamma, shared_noise=shared_noise
        )
        self.boxes = boxes
        settings = self._pipeline(unet).config
        self.patch_size, self.overlap = settings.patch_size, settings.overlap

    def _corrupt(
        self, target: torch.Tensor, timesteps: torch.Tensor, generators: list[torch.Generator]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        noised, _ = super()._corrupt(target, timesteps, generators)
        height, width = target.shape[2:]
        draws = [torch.rand(2, generator=generator, device=target.device) for generator in generators]
        boxes = draw_boxes(torch.stack(draws), height, width, self.patch_size, self.boxes, self.overlap)
        region = box_masks(boxes, height, width)[:, None]
        return torch.where(region, noised, target), region


class ConditionedDenoiser(torch.nn.Module):
    """
    A denoiser and the encoder that conditions it, which learn together.

    Args:
        unet ([`ConditionedUNet2DModel`]), encoder ([`~transformers.PreTrainedModel`]): As of [`CDDPMObjective`].
    """

    def __init__(self, unet: ConditionedUNet2DModel, encoder: PreTrainedModel):
        super().__init__()
        self.unet = unet
        self.encoder = encoder

    def forward(self, sample: torch.Tensor, timesteps: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
        """Predictions `(N, C, H, W)` from noised slices in [-1, 1], timesteps `(N,)` and the clean slices in [0, 1]."""
        return self.unet(sample, timesteps, self.encoder(images).logits).sample


def load_encoder(path: str | Path, channels: int, outputs: int) -> PreTrainedModel:
    """
    Loads a pretrained encoder; its last layer is new where the folder holds none.

    Args:
        path (`str` or `Path`): Folder or Hub id with an `encoder/` of transformers: of the method spark, or of a cDDPM.
        channels (`int`): Modalities, which the encoder must have been trained with.
        outputs (`int`): Length of its code.

    Raises:
        OSError: There is no encoder.
        ValueError: It takes another number of modalities, or makes codes of another length.
    """
    try:
        config = AutoConfig.from_pretrained(path, subfolder="encoder")
    except (OSError, ValueError) as error:
        raise OSError(
            f"`objective.encoder_path`: {path} is neither a folder nor a repository of the Hub with an encoder/ of transformers. Train"
            f" one with the method spark, or begin with new weights, `objective.encoder`. {error}"
        ) from error
    if getattr(config, "num_channels", channels) != channels:
        raise ValueError(f"The encoder {path} is for {config.num_channels} modalities, the data has {channels}.")
    is_whole = any("ForImageClassification" in name for name in config.architectures or ())
    if is_whole and config.num_labels != outputs:
        raise ValueError(
            f"The encoder {path} makes codes of {config.num_labels} values, and `unet.condition_dim` is {outputs}: make them equal."
        )
    return AutoModelForImageClassification.from_pretrained(path, subfolder="encoder", num_labels=outputs)


def _try_encoder(encoder: PreTrainedModel, channels: int, size: tuple[int, int] | None) -> None:
    """Before the training, not at its first batch."""
    if size is None:
        return
    try:
        copy.deepcopy(encoder).eval().to("meta")(torch.zeros(1, channels, *size, device="meta"))
    except Exception as error:  # noqa: BLE001 (what an unfit network stumbles over can be anything)
        raise ValueError(
            f"The encoder, {type(encoder).__name__}, does not take slices of {channels} x {size[0]} x {size[1]}: {error}"
        ) from error


def draw_boxes(
    draws: torch.Tensor, height: int, width: int, patch_size: int, boxes: str, overlap: str = "none"
) -> torch.Tensor:
    """Boxes `(N, 4)` from two uniform draws each, `(N, 2)`: one of the grid (the first draw), or one anywhere (left, top)."""
    if boxes == "grid":
        grid = patch_grid(height, width, patch_size, overlap).to(draws.device)
        return grid[(draws[:, 0] * len(grid)).long().clamp(max=len(grid) - 1)]
    left, top = (draws[:, 0] * width).long(), (draws[:, 1] * height).long()
    return boxes_at(left.clamp(max=width - 1), top.clamp(max=height - 1), patch_size)


def reconstruction_loss(
    target: torch.Tensor, prediction: torch.Tensor, loss: str = "l1", region: torch.Tensor | None = None
) -> torch.Tensor:
    """Error of every sample, `(N,)`: its mean over all pixels, of which those outside of `region` `(N, 1, H, W)`, bool, count 0."""
    error = prediction - target
    if region is not None:
        error = error * region
    return (error.abs() if loss == "l1" else error.square()).mean((1, 2, 3))
