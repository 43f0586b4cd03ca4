from __future__ import annotations

import re
from collections.abc import Callable

import torch
from diffusers import UNet2DModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D

from ..hub import registration  # noqa: F401  (the class below is a component of checkpoints)


class UNet2DHeadsModel(UNet2DModel):
    r"""
    `UNet2DModel` with the same number of attention heads at every level and with zero-initialised residual branches: the network
    of AnoDDPM (`UNet.py`, guided-diffusion style), which one `attention_head_dim` for all levels cannot say.

    The defaults are AnoDDPM's at 256 px (131.65 M parameters). All other arguments are those of [`UNet2DModel`]. guided-diffusion's
    own `UNetModel`, which AnoFPDM's baselines use (`unet_v1.py`), has the timestep scale and shift the second norm
    (`resnet_time_scale_shift="scale_shift"`), `flip_sin_to_cos=True`, 4 heads, and plain blocks and convolutions that change the
    resolution; it needs `attn_norm_num_groups`, without which diffusers leaves the norm of the middle attention out.

    Args:
        num_attention_heads (`int`, defaults to 2):
            Heads of every attention layer. AnoDDPM trained with 2 and evaluated, by mistake, with 1; weights of one do not work
            with the other although all shapes agree, so the number belongs to the configuration.
    """

    @register_to_config
    def __init__(
        self,
        sample_size: int | tuple[int, int] | None = 256,
        in_channels: int = 1,
        out_channels: int = 1,
        center_input_sample: bool = False,
        time_embedding_type: str = "positional",
        time_embedding_dim: int | None = None,
        freq_shift: int = 0,
        flip_sin_to_cos: bool = False,
        down_block_types: tuple[str, ...] = ("ResnetDownsampleBlock2D",) * 3 + ("AttnDownBlock2D",) * 3,
        mid_block_type: str | None = "UNetMidBlock2D",
        up_block_types: tuple[str, ...] = ("AttnUpBlock2D",) * 3 + ("ResnetUpsampleBlock2D",) * 3,
        block_out_channels: tuple[int, ...] = (128, 128, 256, 256, 512, 512),
        layers_per_block: int = 2,
        mid_block_scale_factor: float = 1,
        downsample_padding: int = 1,
        downsample_type: str = "resnet",
        upsample_type: str = "resnet",
        dropout: float = 0.0,
        act_fn: str = "silu",
        norm_num_groups: int = 32,
        attn_norm_num_groups: int | None = None,
        norm_eps: float = 1e-5,
        resnet_time_scale_shift: str = "default",
        add_attention: bool = True,
        class_embed_type: str | None = None,
        num_class_embeds: int | None = None,
        num_train_timesteps: int | None = None,
        num_attention_heads: int = 2,
    ):
        own_config = self.config
        parent = {key: value for key, value in own_config.items() if not key.startswith("_")}
        del parent["num_attention_heads"]
        super().__init__(**parent, attention_head_dim=None)
        # The parent has added `attention_head_dim`, which this class does not take.
        self._internal_dict = own_config
        for module in self.modules():
            if isinstance(module, Attention):
                if module.inner_dim % num_attention_heads:
                    raise ValueError(
                        f"`num_attention_heads` must divide the channels of every attention layer, got {num_attention_heads}"
                        f" for {module.inner_dim}."
                    )
                module.heads = num_attention_heads
                module.scale = (module.inner_dim // num_attention_heads) ** -0.5
        zero_residual_branches(self)

    def convert_original_state_dict(self, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """
        Renames the parameters of guided-diffusion's `UNetModel` without `resblock_updown` (AnoFPDM's `unet_v1.py`) to those of this
        model.

        Args:
            state (`dict[str, torch.Tensor]`):
                State dict of a network of this model's size. The label embedding of a model without classes, which AnoFPDM's last
                version has and does not use, is left out.

        Returns:
            `dict[str, torch.Tensor]`: For [`~torch.nn.Module.load_state_dict`] of this model.
        """
        layers = self.config.layers_per_block
        # Blocks of the original are numbered through all levels: layers and a change of the resolution on the way down, where block 0
        # is the first convolution; one layer more on the way up, the last of which also changes the resolution.
        renamed = {}
        for name, tensor in state.items():
            if match := re.match(r"(input|output)_blocks\.(\d+)\.(\d)\.(conv\.|op\.)?", name):
                way, block, part, resample = match[1], int(match[2]), match[3], match[4]
                rest = name[match.end() :]
                kind = "resnets" if part == "0" else "attentions"
                if way == "input" and block == 0:
                    name = f"conv_in.{rest}"
                else:
                    level, number = divmod(block - (way == "input"), layers + 1)
                    side = "down" if way == "input" else "up"
                    place = f"{side}samplers.0.conv" if resample else f"{kind}.{number}"
                    name = f"{side}_blocks.{level}.{place}.{rest}"
            elif name.startswith("label_emb.") and self.class_embedding is None:
                continue
            for old, new in (
                ("label_emb.", "class_embedding."),
                ("middle_block.0.", "mid_block.resnets.0."),
                ("middle_block.1.", "mid_block.attentions.0."),
                ("middle_block.2.", "mid_block.resnets.1."),
                ("out.0.", "conv_norm_out."),
                ("out.2.", "conv_out."),
            ):
                if name.startswith(old):
                    name = new + name.removeprefix(old)
            renamed[name] = tensor
        return convert_guided_diffusion_layers(renamed, lambda channels: self.config.num_attention_heads)


def zero_residual_branches(model: UNet2DModel) -> None:
    """Gives the last layer of every residual branch and of the network zero weights, as guided-diffusion does: blocks begin as identity."""
    layers = [model.conv_out]
    for module in model.modules():
        if isinstance(module, Attention):
            layers.append(module.to_out[0])
        elif isinstance(module, ResnetBlock2D):
            layers.append(module.conv2)
    for layer in layers:
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)


def convert_guided_diffusion_layers(
    state: dict[str, torch.Tensor], num_heads: Callable[[int], int]
) -> dict[str, torch.Tensor]:
    """
    Gives guided-diffusion's residual blocks, attention layers and embedding of the timestep the names of diffusers.

    Args:
        state (`dict[str, torch.Tensor]`): Parameters, the blocks under whatever names.
        num_heads (`Callable`): Attention heads for a number of channels: the original splits heads before query, key and value.
    """
    converted = {}
    for name, tensor in state.items():
        for old, new in (
            ("time_embed.0.", "time_embedding.linear_1."),
            ("time_embed.2.", "time_embedding.linear_2."),
            (".in_layers.0.", ".norm1."),
            (".in_layers.2.", ".conv1."),
            (".emb_layers.1.", ".time_emb_proj."),
            (".out_layers.0.", ".norm2."),
            (".out_layers.3.", ".conv2."),
            (".skip_connection.", ".conv_shortcut."),
            (".norm.", ".group_norm."),
            (".proj_out.", ".to_out.0."),
        ):
            name = name.replace(old, new)
        if tensor.ndim == 3:
            tensor = tensor.squeeze(2)  # a convolution of one pixel, here a linear layer
        if ".qkv." in name:
            parts = tensor.unflatten(0, (num_heads(len(tensor) // 3), 3, -1))
            for number, part in enumerate(("to_q", "to_k", "to_v")):
                converted[name.replace(".qkv.", f".{part}.")] = parts[:, number].flatten(0, 1)
        else:
            converted[name] = tensor
    return converted
