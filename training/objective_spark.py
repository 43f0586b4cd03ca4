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

from ..checks import check_choice, check_keys
from ..models.spark import LOSSES, REGIONS, SparKModel, resize_cells, spark_loss
from ..schedulers.draws import fold_in, uniform
from ..volumes.processor import VolumeProcessor
from .keys import CELLS
from .objective import MODALITIES, Batch, Objective
from .options import TrainOptions


OF_MODEL = ("mask_ratio", "mask_grid", "decoder_width")


class SparKObjective(Objective):
    """Error of a [`SparKModel`] in the cells of a slice that it has not seen, the cells drawn anew for every sample.
    Slices are brought to [0, 1]. Exports the encoder alone.

    Trained and averaged: encoder, decoder and what joins them, but not the running statistics of the batch
    normalisation. Labels: none. Arguments as of [`Objective`] and [`spark_loss`]."""

    trains_unet_alone = False
    objective_keys = ("encoder", *OF_MODEL, "loss", "region", "normalize")

    def __init__(
        self,
        model: SparKModel,
        processor: VolumeProcessor,
        *,
        loss: str = "l2",
        region: str = "masked",
        normalize: bool = False,
    ):
        check_choice("loss", loss, LOSSES)
        check_choice("region", region, REGIONS)
        super().__init__(model, None, processor)
        self.settings = {"loss": loss, "region": region, "normalize": normalize}

    @classmethod
    def check_options(cls, options: TrainOptions) -> None:
        """Checks the blocks, and the keys of the encoder; see [`Objective.check_options`]."""
        super().check_options(options)
        check_encoder(options.objective.get("encoder", {}))

    @classmethod
    def from_options(cls, options: TrainOptions, processor: VolumeProcessor) -> SparKObjective:
        """Builds encoder, model and objective from the block `objective`: `encoder`, settings of a backbone of
        transformers with its `model_type`, `resnet` by default; what [`SparKModel`] takes; and the loss."""
        cls.check_options(options)
        if processor.config.size is None:
            raise ValueError("`processor.size` must be given, (H, W): masks are made for slices of one size.")
        settings, channels = dict(options.objective), len(processor.config.modalities)
        config = backbone_config(settings.pop("encoder", {}), channels)
        if type(config) not in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING:
            warnings.warn(
                f"transformers has no image classifier of {config.model_type}: no cddpm can load this encoder.",
                stacklevel=2,
            )
        of_model = {name: settings.pop(name) for name in OF_MODEL if name in settings}
        encoder = AutoBackbone.from_config(config)
        return cls(SparKModel(encoder, tuple(processor.config.size), channels, **of_model), processor, **settings)

    def loss(self, model: torch.nn.Module, batch: Batch, keys: torch.Tensor) -> torch.Tensor:
        """Computes the loss from `image`; see [`Objective.loss`]."""
        images = self.processor.to_unit(batch["image"])
        visible = self._draw_cells(keys)
        return spark_loss(images, model(images, visible).float(), visible, **self.settings)

    def preview(self, model: torch.nn.Module, batch: Batch, keys: torch.Tensor) -> Batch:
        """Makes rows of slice, what is seen of it, the prediction, and both put together."""
        images = self.processor.to_unit(batch["image"])
        visible = self._draw_cells(keys)
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
        """Writes `encoder/`, a model folder of transformers, and `processor/`: what cddpm's `encoder_path` takes."""
        model.encoder.save_pretrained(Path(folder, "encoder"))
        self.processor.save_pretrained(Path(folder, "processor"))

    def _draw_cells(self, keys: torch.Tensor) -> torch.Tensor:
        rows, columns = self.model.mask_grid
        return self.model.choose_cells(uniform(fold_in(keys, CELLS), (rows * columns,)))


def backbone_config(settings: dict, channels: int) -> PretrainedConfig:
    """Makes the configuration of a backbone that gives the maps of all its stages, as of [`encoder_config`]."""
    config = encoder_config(settings, channels)
    if type(config) not in MODEL_FOR_BACKBONE_MAPPING or not hasattr(config, "stage_names"):
        raise ValueError(
            f"`objective.encoder.model_type`: transformers has no backbone of {config.model_type} with stages."
        )
    config.out_features = list(config.stage_names)[1:]  # without the stem
    return config


def encoder_config(settings: dict, channels: int) -> PretrainedConfig:
    """Makes the configuration of an image encoder of transformers for `channels` modalities from settings that
    [`check_encoder`] finds right."""
    settings, known = dict(settings), check_encoder(settings)
    if "num_channels" in known and settings.setdefault("num_channels", channels) != channels:
        raise ValueError(
            f"`objective.encoder.num_channels` must be {channels}, {MODALITIES}, got {settings['num_channels']}."
        )
    config = CONFIG_MAPPING[settings.pop("model_type", "resnet")](**settings)
    for key, value in vars(config).items():
        if isinstance(value, tuple):  # a default that the backbones of ConvNeXt and FocalNet cannot add to a list
            setattr(config, key, list(value))
    return config


def check_encoder(settings: dict) -> list[str]:
    """Checks `model_type`, `resnet` by default, and keys of an image encoder's settings; returns the keys it knows."""
    name = settings.get("model_type", "resnet")
    if name not in CONFIG_MAPPING:
        raise ValueError(
            f"`objective.encoder.model_type` must be one that transformers knows, such as resnet, got {name!r}."
        )
    known = sorted(CONFIG_MAPPING[name]().to_dict())
    check_keys("objective.encoder", settings, known, name)
    return known
