"""Renames the parameters of original programs, and sets the weights that guided-diffusion begins with."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D


def rename_parameters(
    state: dict[str, torch.Tensor], patterns: Iterable[tuple[str, str | Callable[[re.Match], str]]]
) -> dict[str, torch.Tensor]:
    """Renames the parameters of a state dict by regular expressions and their replacements, as in `re.sub`, each
    applied to what those before it made."""
    renamed = {}
    for name, tensor in state.items():
        for pattern, replacement in patterns:
            name = re.sub(pattern, replacement, name)
        renamed[name] = tensor
    return renamed


def convert_guided_diffusion_unet(
    state: dict[str, torch.Tensor], layers_per_block: int, num_heads: int
) -> dict[str, torch.Tensor]:
    """Renames the parameters of guided-diffusion's `UNetModel`, with or without `resblock_updown`, to those of
    diffusers' `UNet2DModel`. `num_heads` is as in [`convert_guided_diffusion_layers`], for every attention layer."""

    def place(match: re.Match) -> str:
        # Blocks of the original are numbered through all levels: layers and a change of the resolution on the way
        # down, where block 0 is the first convolution; one layer more on the way up, the last of which also changes
        # the resolution.
        way, block, part, resample, rest = match.groups()
        level, number = divmod(int(block) - (way == "input"), layers_per_block + 1)
        side = "down" if way == "input" else "up"
        if rest.startswith(("norm.", "qkv.", "proj_out.")):
            return f"{side}_blocks.{level}.attentions.{number}.{rest}"
        if number == layers_per_block if way == "input" else part != "0":
            return f"{side}_blocks.{level}.{side}samplers.0.{'conv.' if resample else ''}{rest}"
        return f"{side}_blocks.{level}.resnets.{number}.{rest}"

    renamed = rename_parameters(
        state,
        (
            (r"^input_blocks\.0\.0\.", "conv_in."),
            (r"^(input|output)_blocks\.(\d+)\.(\d)\.(op\.|conv\.)?(.*)", place),
            (r"^label_emb\.0\.", "class_embedding.linear_1."),
            (r"^label_emb\.2\.", "class_embedding.linear_2."),
            (r"^label_emb\.", "class_embedding."),
            (r"^middle_block\.0\.", "mid_block.resnets.0."),
            (r"^middle_block\.1\.", "mid_block.attentions.0."),
            (r"^middle_block\.2\.", "mid_block.resnets.1."),
            (r"^out\.0\.", "conv_norm_out."),
            (r"^out\.2\.", "conv_out."),
        ),
    )
    return convert_guided_diffusion_layers(renamed, lambda channels: num_heads)


def convert_guided_diffusion_layers(
    state: dict[str, torch.Tensor], num_heads: Callable[[int], int]
) -> dict[str, torch.Tensor]:
    """Renames the parameters within guided-diffusion's residual blocks, attention layers and embedding of the timestep
    to those of diffusers, whatever the names of the blocks. `num_heads` gives the number of heads for a number of
    channels, where the original splits heads before query, key and value; 1 where it splits them afterwards."""
    renamed = rename_parameters(
        state,
        (
            (r"time_embed\.0\.", "time_embedding.linear_1."),
            (r"time_embed\.2\.", "time_embedding.linear_2."),
            (r"\.in_layers\.0\.", ".norm1."),
            (r"\.in_layers\.2\.", ".conv1."),
            (r"\.emb_layers\.1\.", ".time_emb_proj."),
            (r"\.out_layers\.0\.", ".norm2."),
            (r"\.out_layers\.3\.", ".conv2."),
            (r"\.skip_connection\.", ".conv_shortcut."),
            (r"\.norm\.", ".group_norm."),
            (r"\.proj_out\.", ".to_out.0."),
        ),
    )
    converted = {}
    for name, tensor in renamed.items():
        if tensor.ndim == 3:
            tensor = tensor.squeeze(2)  # a convolution of one pixel, here a linear layer
        if ".qkv." in name:
            parts = tensor.unflatten(0, (num_heads(len(tensor) // 3), 3, -1))
            for number, part in enumerate(("to_q", "to_k", "to_v")):
                converted[name.replace(".qkv.", f".{part}.")] = parts[:, number].flatten(0, 1)
        else:
            converted[name] = tensor
    return converted


def zero_residual_branches(model: torch.nn.Module) -> None:
    """Gives the last layer of every residual branch that diffusers makes zero weights, as guided-diffusion does:
    blocks begin as the identity."""
    for module in model.modules():
        if isinstance(module, Attention):
            zero_layer(module.to_out[0])
        elif isinstance(module, ResnetBlock2D):
            zero_layer(module.conv2)


def zero_layer(layer: torch.nn.Module) -> None:
    """Sets weight and bias of a layer to zero."""
    torch.nn.init.zeros_(layer.weight)
    torch.nn.init.zeros_(layer.bias)
