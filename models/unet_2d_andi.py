from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from diffusers.models.embeddings import Timesteps
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import nn

from ..hub import registration  # noqa: F401  (the class below is a component of checkpoints)
from ..hub.configuration import PlainConfigMixin
from .checks import check_heads, check_sides
from .weights import rename_parameters


# N images, C channels, H x W pixels, L = H W tokens, T features of the timestep.


class ANDiUNet2DModel(ModelMixin, PlainConfigMixin):
    r"""
    Predicts the noise of slices with the network of ANDi (`modules.py` of its program): a small UNet with one skip per
    level, max pooling, bilinear upsampling, pre-norm transformer blocks from the third level on, and the sinusoidal
    features of the timestep, without an MLP, added to every block. 9.72 million parameters and 9.3 GFLOP for a slice
    of 4 x 128 x 128. For training from scratch `UNet2DModel` suffices; this class is for weights of the original
    program, see [`~ANDiUNet2DModel.convert_original_state_dict`].

    Args:
        sample_size (`int` or `tuple[int, int]`, *optional*, defaults to 128):
            Size of the slices it is trained on, recorded for readers: the network takes any size divisible by
            2^(levels - 1).
        block_out_channels (`tuple[int, ...]`, defaults to `(32, 64, 128, 256, 256)`):
            Channels of each level, 2 levels or more; the bottleneck has twice the last one.
        time_embedding_dim (`int`, defaults to 256): Features of the timestep.
    """

    @register_to_config
    def __init__(
        self,
        sample_size: int | tuple[int, int] | None = 128,
        in_channels: int = 4,
        out_channels: int = 4,
        block_out_channels: tuple[int, ...] = (32, 64, 128, 256, 256),
        num_attention_heads: int = 4,
        time_embedding_dim: int = 256,
    ):
        super().__init__()
        widths = tuple(block_out_channels)
        if len(widths) < 2:
            raise ValueError(f"`block_out_channels` must have 2 levels or more, got {widths}.")
        # Channels that come out of the way up at each level.
        up_widths = (widths[0], *widths[:-1])
        check_heads("num_attention_heads", num_attention_heads, [*widths[2:], *up_widths[2:-1]])

        def attention(width: int, level: int) -> nn.Module:
            return TransformerBlock(width, num_attention_heads) if level >= 2 else nn.Identity()

        self.time_features = Timesteps(time_embedding_dim, flip_sin_to_cos=False, downscale_freq_shift=0)
        self.conv_in = ConvNorm(in_channels, widths[0])
        self.residual_in = ConvNorm(widths[0], widths[0])
        self.down_blocks = nn.ModuleList(
            UNetBlock(widths[level - 1], widths[level], time_embedding_dim, attention(widths[level], level))
            for level in range(1, len(widths))
        )
        self.mid_in = ConvNorm(widths[-1], 2 * widths[-1])
        self.mid_out = ConvNorm(2 * widths[-1], widths[-1])
        self.mid_attention = attention(widths[-1], len(widths) - 1)
        self.up_blocks = nn.ModuleList()
        channels = widths[-1]
        for level in reversed(range(len(widths) - 1)):
            before, channels = widths[level] + channels, up_widths[level]
            self.up_blocks.append(UNetBlock(before, channels, time_embedding_dim, attention(channels, level)))
        self.conv_out = nn.Conv2d(channels, out_channels, 1)

    def forward(
        self, sample: torch.Tensor, timestep: torch.Tensor | float | int, return_dict: bool = True
    ) -> UNet2DOutput | tuple[torch.Tensor]:
        """Predicts the noise of noised slices `(N, C, H, W)` at timesteps that count from 0; 2^(levels - 1) divides H
        and W."""
        check_sides("sample", sample, 2 ** len(self.down_blocks))
        timestep = torch.as_tensor(timestep, device=sample.device).expand(sample.shape[0])
        features = F.silu(self.time_features(timestep).to(sample.dtype))  # (N, T)

        hidden = self.conv_in(sample)
        hidden = F.gelu(hidden + self.residual_in(hidden))
        skips = []
        for block in self.down_blocks:
            skips.append(hidden)
            hidden = block(F.max_pool2d(hidden, 2), features)
        hidden = self.mid_attention(self.mid_out(self.mid_in(hidden)))
        for block in self.up_blocks:
            hidden = F.interpolate(hidden, scale_factor=2, mode="bilinear", align_corners=True)
            hidden = block(torch.cat([skips.pop(), hidden], dim=1), features)
        hidden = self.conv_out(hidden)
        return UNet2DOutput(sample=hidden) if return_dict else (hidden,)

    @staticmethod
    def convert_original_state_dict(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Renames the parameters of the original program's `UNet` (five levels, the default widths) to those of this
        class; names of other networks stay."""
        return rename_parameters(state, _ORIGINAL_NAMES)


class ConvNorm(nn.Module):
    """Applies a 3 x 3 convolution without bias, then GroupNorm of one group; no activation."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)
        self.norm = nn.GroupNorm(1, out_channels)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.norm(self.conv(hidden))


class UNetBlock(nn.Module):
    """Applies a residual convolution and one that changes the width, adds the features of the timestep, then applies a
    transformer block or nothing."""

    def __init__(self, in_channels: int, out_channels: int, time_channels: int, attention: nn.Module):
        super().__init__()
        self.residual = ConvNorm(in_channels, in_channels)
        self.widen = ConvNorm(in_channels, out_channels)
        self.time_projection = nn.Linear(time_channels, out_channels)
        self.attention = attention

    def forward(self, hidden: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        hidden = F.gelu(hidden + self.residual(hidden))
        return self.attention(self.widen(hidden) + self.time_projection(features)[:, :, None, None])


class TransformerBlock(nn.Module):
    """Applies self-attention over the pixels and a feed-forward network of the same width, each after a LayerNorm and
    with a residual."""

    def __init__(self, channels: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.norm = nn.LayerNorm(channels)
        self.to_qkv = nn.Linear(channels, 3 * channels)
        self.to_out = nn.Linear(channels, channels)
        self.ff_norm = nn.LayerNorm(channels)
        self.ff_in = nn.Linear(channels, channels)
        self.ff_out = nn.Linear(channels, channels)
        # The start of torch's MultiheadAttention, which the original uses.
        nn.init.xavier_uniform_(self.to_qkv.weight)
        nn.init.zeros_(self.to_qkv.bias)
        nn.init.zeros_(self.to_out.bias)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        shape = hidden.shape
        tokens = hidden.flatten(2).transpose(1, 2)  # (N, L, C)
        query, key, value = self.to_qkv(self.norm(tokens)).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(query, key, value)  # (N, heads, L, C / heads)
        tokens = tokens + self.to_out(attended.transpose(1, 2).flatten(2))
        tokens = tokens + self.ff_out(F.gelu(self.ff_in(self.ff_norm(tokens))))
        return tokens.transpose(1, 2).reshape(shape)


# Patterns and replacements, in this order, from the names of the original program.
_ORIGINAL_NAMES = (
    (r"^inc\.", "conv_in."),
    (r"^inc2\.", "residual_in."),
    (r"^bot1\.", "mid_in."),
    (r"^bot3\.", "mid_out."),
    (r"^outc\.", "conv_out."),
    *((rf"^down{number}\.", f"down_blocks.{number - 1}.") for number in range(1, 5)),
    *((rf"^up{number}\.", f"up_blocks.{number - 1}.") for number in range(1, 5)),
    *((rf"^sa{number}\.", f"down_blocks.{number}.attention.") for number in range(1, 4)),
    (r"^sa4\.", "mid_attention."),
    *((rf"^sa{number}\.", f"up_blocks.{number - 5}.attention.") for number in (5, 6)),
    (r"\.(maxpool_conv\.1|conv\.0)\.double_conv\.", ".residual.double_conv."),
    (r"\.(maxpool_conv\.2|conv\.1)\.double_conv\.", ".widen.double_conv."),
    (r"\.double_conv\.0\.", ".conv."),
    (r"\.double_conv\.1\.", ".norm."),
    (r"\.emb_layer\.1\.", ".time_projection."),
    (r"\.mha\.in_proj_", ".to_qkv."),
    (r"\.mha\.out_proj\.", ".to_out."),
    (r"\.attention\.ln\.", ".attention.norm."),
    (r"^mid_attention\.ln\.", "mid_attention.norm."),
    (r"\.ff_self\.0\.", ".ff_norm."),
    (r"\.ff_self\.1\.", ".ff_in."),
    (r"\.ff_self\.3\.", ".ff_out."),
)
