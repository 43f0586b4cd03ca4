"""ANDi, its network for FLAIR, T1, T1ce and T2."""

from __future__ import annotations

import torch

from ..models.unet_2d_andi import ANDiUNet2DModel
from ..pipelines.pipeline_andi import ANDiPipeline
from ..schedulers.scheduling_andi import ANDiScheduler
from .parts import read_processor, transpose_kernels


def convert(state: dict[str, torch.Tensor]) -> tuple[ANDiPipeline, None]:
    """Returns the pipeline with the weights of ANDi's `UNet`; the defaults of the classes are its configuration."""
    model = ANDiUNet2DModel()
    model.load_state_dict(transpose_kernels(model.convert_original_state_dict(state)))
    return ANDiPipeline(model, ANDiScheduler(), read_processor("brats21_andi")), None
