"""brain_damage, the notebook of AnoDDPM on 2-D slices."""

from __future__ import annotations

import torch

from ..pipelines.pipeline_anoddpm import AnoDDPMPipeline
from ..training.objective_noise import NoiseObjective
from ..training.options import TrainOptions
from ..volumes.processor import VolumeProcessor
from .parts import read_config


def convert(state: dict[str, torch.Tensor]) -> tuple[AnoDDPMPipeline, dict]:
    """Returns the pipeline with the weights, the state dict of diffusers' own `UNet2DModel`, and its configuration."""
    config = read_config("brain_damage")
    blocks = {name: config[name] for name in ("unet", "scheduler", "inference", "objective") if name in config}
    processor = VolumeProcessor.from_dict(config["processor"])
    objective = NoiseObjective.from_options(TrainOptions(**blocks), processor)
    objective.model.load_state_dict(state)
    return AnoDDPMPipeline(objective.model, objective.scheduler, processor, **objective.inference), config
