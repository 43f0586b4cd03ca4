"""The cDDPM program: cDDPM with its encoder, DDPM_2D without one, and pDDPM."""

from __future__ import annotations

import re
from typing import Any

import torch
from transformers import ResNetConfig, ResNetForImageClassification

from ..models.unet_2d_conditioned import ConditionedUNet2DModel
from ..models.weights import rename_parameters
from ..pipelines.pipeline_cddpm import CDDPMPipeline
from ..pipelines.pipeline_pddpm import PDDPMPipeline
from ..schedulers.scheduling_anoddpm import AnoDDPMScheduler
from .parts import add_network, make_network, read_config, read_part, read_processor, transpose_kernels


def convert(
    state: dict[str, torch.Tensor], method: str, unet: dict[str, Any], modality: str
) -> tuple[CDDPMPipeline | PDDPMPipeline, dict]:
    """
    Returns the pipeline with the weights, and its configuration. A cddpm without an encoder is a DDPM_2D.

    Args:
        state (`dict[str, torch.Tensor]`):
            Weights of the denoising network (`UNetModel`) and, of a cDDPM, of its encoder (a ResNet of timm), under
            any prefixes.
        method (`str`): `"cddpm"` or `"pddpm"`.
        unet (`dict`): Arguments of the network that differ from its authors'.
        modality (`str`): Contrast of the training data, `"t1"` or `"t2"`.
    """
    denoiser, resnet = read_part(state, "input_blocks.0.0.weight"), read_part(state, "layer1.0.conv1.weight")
    if not denoiser:
        raise RuntimeError("it has no input_blocks.0.0.weight.")
    conditioned = "label_emb.0.weight" in denoiser
    if conditioned != bool(resnet) or (conditioned and method == "pddpm"):
        raise RuntimeError(
            "a cddpm has an encoder and a condition (label_emb), or neither, a pddpm neither; there is"
            f" {'an' if resnet else 'no'} encoder and {'a' if conditioned else 'no'} condition."
        )
    config = read_config("ddpm_2d" if method == "cddpm" and not conditioned else method)
    processor = read_processor(f"sadm_{modality}")
    condition_dim = denoiser["label_emb.0.weight"].shape[1] if conditioned else None
    model = make_network(ConditionedUNet2DModel, unet, config["unet"], processor, condition_dim=condition_dim)
    # The program has more beside the network, such as tables of the schedule.
    own = re.compile(r"(input_blocks|middle_block|output_blocks|out|time_embed|label_emb)\.")
    denoiser = {name: tensor for name, tensor in denoiser.items() if own.match(name)}
    model.load_state_dict(transpose_kernels(model.convert_original_state_dict(denoiser)))
    parts = {"unet": model, "scheduler": AnoDDPMScheduler(**config["scheduler"]), "processor": processor}
    if method == "pddpm":
        return PDDPMPipeline(**parts, **config["inference"]), add_network(config, model)
    encoder = convert_encoder(resnet) if conditioned else None
    return CDDPMPipeline(**parts, encoder=encoder, **config["inference"]), add_network(config, model)


def convert_encoder(state: dict[str, torch.Tensor]) -> ResNetForImageClassification:
    """Returns a ResNet of transformers with the weights of one of timm (or torchvision), whose sizes they tell."""
    # Bottlenecks have three convolutions, basic blocks two.
    last = "conv3" if "layer1.0.conv3.weight" in state else "conv2"
    blocks: dict[str, set[str]] = {}
    for name in state:
        if match := re.match(r"layer(\d)\.(\d+)\.", name):
            blocks.setdefault(match[1], set()).add(match[2])
    stages = sorted(blocks)
    config = ResNetConfig(
        layer_type="bottleneck" if last == "conv3" else "basic",
        num_channels=state["conv1.weight"].shape[1],
        embedding_size=len(state["conv1.weight"]),
        hidden_sizes=[len(state[f"layer{stage}.0.{last}.weight"]) for stage in stages],
        depths=[len(blocks[stage]) for stage in stages],
        num_labels=len(state["fc.weight"]),
    )
    own = {name: tensor for name, tensor in state.items() if re.match(r"(conv1|bn1|layer\d|fc)\.", name)}
    renamed = rename_parameters(
        own,
        (
            (r"^conv1\.", "resnet.embedder.embedder.convolution."),
            (r"^bn1\.", "resnet.embedder.embedder.normalization."),
            (r"^fc\.", "classifier.1."),
            (r"\.conv(\d)\.", lambda match: f".layer.{int(match[1]) - 1}.convolution."),
            (r"\.bn(\d)\.", lambda match: f".layer.{int(match[1]) - 1}.normalization."),
            (r"\.downsample\.0\.", ".shortcut.convolution."),
            (r"\.downsample\.1\.", ".shortcut.normalization."),
            (r"^layer(\d)\.(\d+)\.", lambda match: f"resnet.encoder.stages.{int(match[1]) - 1}.layers.{match[2]}."),
        ),
    )
    encoder = ResNetForImageClassification(config).eval()
    encoder.load_state_dict(transpose_kernels(renamed))
    return encoder
