"""Predict hidden cells of a slice: masked pretraining of the image encoder that cDDPM is conditioned by."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_BACKBONE_MAPPING,
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
    AutoBackbone,
    PretrainedConfig,
)

from ..models.spark import LOSSES, REGIONS, SparKModel, resize_cells, spark_loss
from ..volumes.processor import VolumeProcessor
from .options import TrainOptions


class SparKObjective:
    r"""
    Error of a [`SparKModel`] in the cells of a slice that it has not seen, the cells drawn anew for every sample. Slices are brought to
    [0, 1]. Exports the encoder alone.

    Trained: encoder, decoder and what joins them. Averaged: the same, but not the running statistics of the batch normalisation. Frozen:
    nothing. Labels: none.

    Args:
        model ([`SparKModel`]): With a [`~transformers.AutoBackbone`] as encoder.
        processor ([`VolumeProcessor`]): Of the prepared data, exported with the encoder.
        loss, region, normalize: As of [`spark_loss`].
    """

    columns = ("image",)
    trains_on = "healthy"
    validates_on = "healthy"
    updates_per_batch = 1

    def __init__(
        self,
        model: SparKModel,
        processor: VolumeProcessor,
        *,
        loss: str = "l2",
        region: str = "masked",
        normalize: bool = False,
    ):
        for name, value, allowed in (("loss", loss, LOSSES), ("region", region, REGIONS)):
            if value not in allowed:
                raise ValueError(f"`{name}` must be one of {', '.join(allowed)}, got {value!r}.")
        self.model = model
        self.processor = processor
        self.settings = {"loss": loss, "region": region, "normalize": normalize}

    @classmethod
    def from_options(cls, options: TrainOptions, processor: VolumeProcessor) -> SparKObjective:
        """
        Builds encoder, model and objective from the block `objective` of a configuration: `encoder`, settings of a transformers backbone
        with its `model_type`, `resnet` by default; `mask_ratio`, `mask_grid` and `decoder_width` of [`SparKModel`]; and the loss.
        """
        for block in ("unet", "scheduler", "inference"):
            if getattr(options, block):
                raise ValueError(
                    f"`{block}` must be empty for spark, got {', '.join(getattr(options, block))}; the encoder's settings are"
                    " `objective.encoder`."
                )
        if processor.config.size is None:
            raise ValueError("`processor.size` must be given, (H, W): masks are made for slices of one size.")
        settings = dict(options.objective)
        config = backbone_config(settings.pop("encoder", {}), len(processor.config.modalities))
        if type(config) not in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING:
            warnings.warn(
                f"transformers has no image classifier of {config.model_type}: no cddpm can load this encoder.",
                stacklevel=2,
            )
        encoder = AutoBackbone.from_config(config)
        of_model, of_loss = ("mask_ratio", "mask_grid", "decoder_width"), ("loss", "region", "normalize")
        unknown = sorted(set(settings) - set(of_model) - set(of_loss))
        if unknown:
            raise ValueError(
                f"`objective` has no key {', '.join(unknown)}; spark takes {', '.join(('encoder', *of_model, *of_loss))}."
            )
        model = SparKModel(
            encoder,
            tuple(processor.config.size),
            len(processor.config.modalities),
            **{name: settings.pop(name) for name in of_model if name in settings},
        )
        return cls(model, processor, **settings)

    def loss(
        self, model: torch.nn.Module, batch: dict[str, torch.Tensor], generators: list[torch.Generator]
    ) -> torch.Tensor:
        """
        Loss of every sample, `(N,)`.

        Args:
            model (`torch.nn.Module`): The [`SparKModel`] as accelerate wraps it.
            batch (`dict[str, torch.Tensor]`): `image (N, C, H, W)` in the processor's value range.
            generators (`list[torch.Generator]`): One per slice; the visible cells are drawn from it.
        """
        images = self.processor.to_unit(batch["image"])
        visible = self._draw(images, generators)
        return spark_loss(images, model(images, visible).float(), visible, **self.settings)

    @torch.no_grad()
    def preview(
        self, model: torch.nn.Module, batch: dict[str, torch.Tensor], generators: list[torch.Generator]
    ) -> dict[str, torch.Tensor]:
        """Rows of a validation picture, each `(N, C, H, W)`: slice, what is seen of it, the prediction, and both put together."""
        images = self.processor.to_unit(batch["image"])
        visible = self._draw(images, generators)
        seen = resize_cells(visible, images.shape[2:])
        prediction = model(images, visible).float()
        rows = {
            "slice": images,
            "visible cells": images * seen,
            "prediction": prediction,
            "prediction in the hidden cells": torch.where(seen, images, prediction),
        }
        return {title: self.processor.from_unit(row) for title, row in rows.items()}

    def export(self, model: SparKModel, folder: str | Path) -> None:
        """Writes `encoder/`, a model folder of transformers, and `processor/`: what `encoder_path` of the objective cddpm takes. It is no
        pipeline; `ResNetForImageClassification.from_pretrained(folder, subfolder="encoder")` gives the encoder a new last layer."""
        folder = Path(folder)
        model.encoder.save_pretrained(folder / "encoder")
        self.processor.save_pretrained(folder / "processor")

    def _draw(self, images: torch.Tensor, generators: list[torch.Generator]) -> torch.Tensor:
        rows, columns = self.model.mask_grid
        draws = [torch.rand(rows * columns, generator=generator, device=images.device) for generator in generators]
        return self.model.choose_cells(torch.stack(draws))


def backbone_config(settings: dict, channels: int) -> PretrainedConfig:
    """
    Configuration of a transformers backbone that gives the maps of all its stages; arguments as of [`encoder_config`].

    Raises:
        ValueError: As of [`encoder_config`], and a model without such a backbone.
    """
    config = encoder_config(settings, channels)
    if type(config) not in MODEL_FOR_BACKBONE_MAPPING or not hasattr(config, "stage_names"):
        raise ValueError(
            f"`objective.encoder.model_type`: transformers has no backbone of {config.model_type} with stages."
        )
    config.out_features = list(config.stage_names)[1:]  # without the stem
    return config


def encoder_config(settings: dict, channels: int) -> PretrainedConfig:
    """
    Configuration of an image encoder of transformers.

    Args:
        settings (`dict`): Of the configuration, with `model_type`, `resnet` by default.
        channels (`int`): Modalities, which are `num_channels`.

    Raises:
        ValueError: An unknown `model_type` or key, or another `num_channels`.
    """
    settings = dict(settings)
    name = settings.pop("model_type", "resnet")
    if name not in CONFIG_MAPPING:
        raise ValueError(
            f"`objective.encoder.model_type` must be one that transformers knows, such as resnet, got {name!r}."
        )
    known = CONFIG_MAPPING[name]().to_dict()
    if "num_channels" in known and settings.setdefault("num_channels", channels) != channels:
        raise ValueError(
            f"`objective.encoder.num_channels` must be {channels}, the number of modalities, got {settings['num_channels']}."
        )
    unknown = sorted(set(settings) - set(known))
    if unknown:
        raise ValueError(
            f"`objective.encoder` has no key {', '.join(unknown)}; {name} takes {', '.join(sorted(known))}."
        )
    config = CONFIG_MAPPING[name](**settings)
    for key, value in vars(config).items():
        if isinstance(value, tuple):  # a default that the backbones of ConvNeXt and FocalNet cannot add to a list
            setattr(config, key, list(value))
    return config
