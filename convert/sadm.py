"""SADM, its segmentation network beside a cDDPM."""

from __future__ import annotations

import torch

from ..models.siamese_unet import SiameseUNet2DModel
from ..pipelines.pipeline_cddpm import CDDPMPipeline
from ..pipelines.pipeline_sadm import SADMPipeline
from .parts import read_part, transpose_kernels


def convert(state: dict[str, torch.Tensor], cddpm: str) -> tuple[SADMPipeline, None]:
    """Returns the pipeline of the original's `SegUnet`, under any prefix, and of the cDDPM in the folder or under the
    Hub id `cddpm`; it has no configuration. The frozen cDDPM beside the weights stays behind."""
    first = "down_path.0.block.1.weight"
    state = read_part(state, first)
    if not state:
        raise RuntimeError(f"it has no {first}.")
    levels = {int(name.split(".")[1]) for name in state if name.startswith("down_path.")}
    widths = [len(state[f"down_path.{level}.block.1.weight"]) for level in sorted(levels)]
    model = SiameseUNet2DModel(state[first].shape[1], widths)
    model.load_state_dict(transpose_kernels(model.convert_original_state_dict(state)))
    part = CDDPMPipeline.from_pretrained(cddpm)
    return SADMPipeline(part.unet, model.eval(), part.scheduler, part.processor, part.encoder), None
