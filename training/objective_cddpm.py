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

from ..checks import check_choice, check_number
from ..models.unet_2d_conditioned import ConditionedUNet2DModel
from ..models.unet_2d_heads import UNet2DHeadsModel
from ..pipelines.pipeline_cddpm import CDDPMPipeline
from ..pipelines.pipeline_pddpm import PDDPMPipeline, box_masks, boxes_at, patch_grid
from ..schedulers.draws import fold_in, uniform
from ..schedulers.scheduling_anoddpm import AnoDDPMScheduler
from ..volumes.processor import VolumeProcessor
from .finite import check_part
from .keys import BOX, NOISE
from .objective import Batch, Objective, draw_timesteps
from .objective_spark import check_encoder, encoder_config
from .options import TrainOptions


class DDPM2DObjective(Objective):
    r"""
    Mean absolute error of the predicted slice, on [-1, 1], the timestep drawn uniformly. Exports a
    [`CDDPMPipeline`] without encoder.

    Trained and averaged: the UNet. Labels: none.

    Args:
        unet (`torch.nn.Module`): One of `unet_classes`, without a condition, which predicts the slice.
        scheduler, processor, inference: As of [`Objective`].
        loss (`str`, defaults to `"l1"`): `"l1"`, or `"l2"`.
        p2_gamma (`float`, defaults to 0.0): Weight (1 - abar_t)^gamma of a timestep (Choi et al., CVPR 2022, k = 1), 0
            or more. The authors' program has it and uses 0.
        shared_noise (`bool`, defaults to `False`): One field for the slices of a forward pass, that of the first one,
            as the authors. Equal losses then need equal forward passes, not only equal steps.
    """

    unet_classes = (UNet2DModel, UNet2DHeadsModel, ConditionedUNet2DModel)
    scheduler_class = AnoDDPMScheduler
    pipeline_class = CDDPMPipeline
    objective_keys = ("loss", "p2_gamma", "shared_noise")

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
        check_choice("loss", loss, ("l1", "l2"))
        check_number("p2_gamma", p2_gamma, least=0)
        super().__init__(unet, scheduler, processor, inference)
        self.loss_type = loss
        self.p2_gamma = p2_gamma
        self.shared_noise = shared_noise

    def loss(self, model: torch.nn.Module, batch: Batch, keys: torch.Tensor) -> torch.Tensor:
        """Computes the loss from `image`; see [`Objective.loss`]."""
        images = self.processor.to_unit(batch["image"])
        target = 2.0 * images - 1.0
        timesteps = draw_timesteps(keys, len(self.scheduler))
        sample, region = self.corrupt(target, timesteps, keys)
        prediction = self.predict(model, sample, timesteps, images).float()
        loss = reconstruction_loss(target, prediction, self.loss_type, region)
        if self.p2_gamma:
            weights = (1.0 - self.scheduler.alphas_cumprod) ** self.p2_gamma
            loss = loss * weights.to(loss)[timesteps]
        return loss

    def preview(self, model: torch.nn.Module, batch: Batch, keys: torch.Tensor) -> Batch:
        """Makes rows of slice, noised slice, its reconstruction by the pipeline to be exported, their difference."""
        images = batch["image"]
        pipeline = self.make_pipeline(model)
        pipeline.set_progress_bar_config(disable=True)
        settings = pipeline.default_settings()
        level = settings["timesteps"][len(settings["timesteps"]) // 2]
        timesteps = torch.full((len(images),), level, device=images.device)
        sample, _ = self.corrupt(2.0 * self.processor.to_unit(images) - 1.0, timesteps, keys)
        results = pipeline.compute_maps(images, list(range(len(images))), batch_size=len(images), **settings)
        title = f"reconstruction, t = {', '.join(map(str, settings['timesteps']))}"
        sample = self.processor.from_unit((sample + 1.0) / 2.0)
        return self.comparison(images, sample, level, title, results.reconstruction)

    def corrupt(
        self, target: torch.Tensor, timesteps: torch.Tensor, keys: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Makes what the network sees of slices `(N, C, H, W)` in [-1, 1], and where its prediction counts, `None` for
        everywhere."""
        count = 1 if self.shared_noise else len(target)
        noise = self.scheduler.draw_noise(fold_in(keys[:count], NOISE), target.shape[1:], timesteps[:count])
        return self.scheduler.add_noise(target, noise, timesteps), None

    def predict(self, model, sample: torch.Tensor, timesteps: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
        """Predicts slices in [-1, 1] from noised ones; conditioned networks see the clean `images` in [0, 1], too."""
        return model(sample, timesteps).sample


class CDDPMObjective(DDPM2DObjective):
    r"""
    As [`DDPM2DObjective`], of a UNet that is conditioned by the code of the clean slice. Exports a [`CDDPMPipeline`].

    Trained and averaged: UNet and encoder together, but not the running statistics of the encoder's batch
    normalisation, so that the configuration of the method averages nothing, as its authors. Labels: none.

    Args:
        encoder ([`~transformers.PreTrainedModel`]): An image classifier that makes as many values as the UNet's
            `condition_dim` of a slice in [0, 1]. The authors' timm `resnet50` also drops paths in training (0.05),
            which those of transformers do not.
        unet, scheduler, processor, inference, settings: As of [`DDPM2DObjective`].
    """

    trains_unet_alone = False
    unet_classes = (ConditionedUNet2DModel,)
    objective_keys = (*DDPM2DObjective.objective_keys, "encoder", "encoder_path")

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
    def check_options(cls, options: TrainOptions) -> None:
        """Checks the blocks, and the keys of the encoder; see [`Objective.check_options`]."""
        super().check_options(options)
        if {"encoder", "encoder_path"} <= set(options.objective):
            raise ValueError("Give `objective.encoder`, for new weights, or `objective.encoder_path`, not both.")
        check_encoder(options.objective.get("encoder", {}))

    @classmethod
    def from_options(cls, options: TrainOptions, processor: VolumeProcessor) -> CDDPMObjective:
        """Builds networks, scheduler and objective. In the block `objective`, `encoder` has the settings of an image
        classifier of transformers with its `model_type`, `resnet` by default, which is a ResNet-50; or `encoder_path`
        is a folder or Hub id with a pretrained `encoder/`, such as the method spark writes."""
        cls.check_options(options)
        settings = dict(options.objective)
        given, path = settings.pop("encoder", {}), settings.pop("encoder_path", None)
        unet, scheduler = cls.make_network(options, processor), AnoDDPMScheduler(**options.scheduler)
        channels, outputs = len(processor.config.modalities), unet.config.condition_dim
        if outputs is None:
            raise ValueError("`unet.condition_dim` must be a number; without a condition the method is ddpm_2d.")
        if path is not None:
            encoder = load_encoder(path, channels, outputs)
        else:
            config = encoder_config(given, channels)
            config.num_labels = outputs
            if type(config) not in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING:
                raise ValueError(f"`objective.encoder`: transformers has no image classifier of {config.model_type}.")
            encoder = AutoModelForImageClassification.from_config(config)
        if processor.config.size is not None:
            # A copy without weights shows before the training whether the encoder can take the slices.
            shape = (channels, *processor.config.size)
            try:
                copy.deepcopy(encoder).eval().to("meta")(torch.zeros(1, *shape, device="meta"))
            except Exception as error:  # noqa: BLE001 (what an unfit network stumbles over can be anything)
                raise ValueError(
                    f"The encoder, {type(encoder).__name__}, does not take slices of {' x '.join(map(str, shape))}:"
                    f" {error}"
                ) from error
        return cls(unet, encoder, scheduler, processor, options.inference, **settings)

    def predict(self, model, sample: torch.Tensor, timesteps: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
        """Predicts slices as of [`DDPM2DObjective.predict`]."""
        return model(sample, timesteps, images)

    def make_pipeline(self, model: ConditionedDenoiser) -> CDDPMPipeline:
        """Returns the pipeline of the trained `model`, UNet and encoder."""
        return CDDPMPipeline(model.unet, self.scheduler, self.processor, model.encoder, **self.inference)


class PDDPMObjective(DDPM2DObjective):
    r"""
    As [`DDPM2DObjective`], with noise in one square patch of each slice; the prediction counts inside of it, the
    error outside is 0, and the mean runs over the whole slice. Exports a [`PDDPMPipeline`].

    Args:
        unet, scheduler, processor, settings: As of [`DDPM2DObjective`].
        inference (`dict`): As of [`Objective`]; `patch_size` and `overlap` are those of the training, too.
        boxes (`str`, defaults to `"grid"`): Each slice's patch is drawn from the `"grid"` of the inference, or lies
            anywhere, `"random"`, its upper left corner uniform over all pixels: it may hang over the border, as in the
            original.
    """

    pipeline_class = PDDPMPipeline
    objective_keys = (*DDPM2DObjective.objective_keys, "boxes")

    def __init__(
        self,
        unet: torch.nn.Module,
        scheduler: AnoDDPMScheduler,
        processor: VolumeProcessor,
        inference: dict | None = None,
        *,
        boxes: str = "grid",
        **settings,
    ):
        check_choice("boxes", boxes, ("grid", "random"))
        super().__init__(unet, scheduler, processor, inference, **settings)
        self.boxes = boxes
        config = self.make_pipeline(unet).config
        self.patch_size, self.overlap = config.patch_size, config.overlap

    def corrupt(
        self, target: torch.Tensor, timesteps: torch.Tensor, keys: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Makes what the network sees as of [`DDPM2DObjective`], and the noised patches, `(N, 1, H, W)` bool."""
        noised, _ = super().corrupt(target, timesteps, keys)
        height, width = target.shape[2:]
        draws = uniform(fold_in(keys, BOX), (2,))
        boxes = draw_boxes(draws, height, width, self.patch_size, self.boxes, self.overlap)
        region = box_masks(boxes, height, width)[:, None]
        return torch.where(region, noised, target), region


class ConditionedDenoiser(torch.nn.Module):
    """Holds a denoiser and the encoder that conditions it, which learn together."""

    def __init__(self, unet: ConditionedUNet2DModel, encoder: PreTrainedModel):
        super().__init__()
        self.unet = unet
        self.encoder = encoder

    def forward(self, sample: torch.Tensor, timesteps: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
        """Predicts slices `(N, C, H, W)` in [-1, 1] from noised ones, timesteps `(N,)` and clean slices in [0, 1]."""
        return self.unet(sample, timesteps, self.encoder(images).logits).sample


def load_encoder(path: str | Path, channels: int, outputs: int) -> PreTrainedModel:
    """Loads the `encoder/` of transformers in a folder or Hub repository, of the method spark or of a cDDPM. It must
    have been trained with as many modalities as `channels`; its last layer is new where there is none."""
    try:
        config = AutoConfig.from_pretrained(path, subfolder="encoder")
    except (OSError, ValueError) as error:
        raise OSError(
            f"`objective.encoder_path`: {path} is neither a folder nor a repository of the Hub with an encoder/ of"
            f" transformers. Train one with the method spark, or begin with new weights, `objective.encoder`. {error}"
        ) from error
    if getattr(config, "num_channels", channels) != channels:
        raise ValueError(f"The encoder {path} is for {config.num_channels} modalities, the data has {channels}.")
    is_whole = any("ForImageClassification" in name for name in config.architectures or ())
    if is_whole and config.num_labels != outputs:
        raise ValueError(
            f"The encoder {path} makes codes of {config.num_labels} values, and `unet.condition_dim` is {outputs}:"
            " make them equal."
        )
    encoder = AutoModelForImageClassification.from_pretrained(path, subfolder="encoder", num_labels=outputs)
    check_part(encoder, "objective.encoder_path", path)
    return encoder


def draw_boxes(
    draws: torch.Tensor, height: int, width: int, patch_size: int, boxes: str, overlap: str = "none"
) -> torch.Tensor:
    """Makes boxes `(N, 4)` of two draws each, `(N, 2)`: one of the grid (the first draw), or anywhere (left, top)."""
    if boxes == "grid":
        grid = patch_grid(height, width, patch_size, overlap).to(draws.device)
        return grid[(draws[:, 0] * len(grid)).long().clamp(max=len(grid) - 1)]
    left, top = (draws[:, 0] * width).long(), (draws[:, 1] * height).long()
    return boxes_at(left.clamp(max=width - 1), top.clamp(max=height - 1), patch_size)


def reconstruction_loss(
    target: torch.Tensor, prediction: torch.Tensor, loss: str = "l1", region: torch.Tensor | None = None
) -> torch.Tensor:
    """Computes the mean error of every sample, `(N,)`; pixels outside of `region` `(N, 1, H, W)`, bool, count 0."""
    error = prediction - target if region is None else (prediction - target) * region
    return (error.abs() if loss == "l1" else error.square()).mean((1, 2, 3))
