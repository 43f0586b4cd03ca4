from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.resnet import ResnetBlock2D
from diffusers.utils import BaseOutput
from torch import nn

from ..checks import check_integer
from ..hub import registration  # noqa: F401  (the class below is a component of checkpoints)
from ..hub.configuration import PlainConfigMixin
from .checks import check_heads
from .weights import convert_guided_diffusion_layers, rename_parameters, zero_residual_branches


# N images, C channels, H x W pixels, L = H W tokens, D channels of an attention head, K classes.


@dataclass
class NoisyClassifierOutput(BaseOutput):
    """Holds what [`NoisyClassifierModel`] returns: unnormalised log probabilities of the classes, `(N, K)`."""

    logits: torch.Tensor


class NoisyClassifierModel(ModelMixin, PlainConfigMixin):
    r"""
    Classifies a noised slice, given its timestep, as healthy (class 0) or unhealthy (class 1): guided-diffusion's
    `EncoderUNetModel`, the downward half of a UNet with residual blocks that halve the resolution and an attention
    pool, which AnoFPDM's program uses for classifier guidance. 42.06 million parameters with the defaults.

    Args:
        sample_size (`int` or `tuple[int, int]`, defaults to 128):
            Size of the slices, divisible by 2^(levels - 1). The pool has a parameter per position: no other size
            works.
        attention_levels (`tuple[int, ...]`, defaults to `(2, 3, 4)`):
            Levels with attention after every residual block, counted from 0; one follows the last level in any case.
        attention_head_dim (`int`, defaults to 64): Channels of an attention head, at every level and in the pool.
    """

    @register_to_config
    def __init__(
        self,
        sample_size: int | tuple[int, int] = 128,
        in_channels: int = 4,
        num_classes: int = 2,
        block_out_channels: tuple[int, ...] = (128, 128, 256, 384, 512),
        layers_per_block: int = 2,
        attention_levels: tuple[int, ...] = (2, 3, 4),
        attention_head_dim: int = 64,
        dropout: float = 0.0,
        norm_num_groups: int = 32,
    ):
        super().__init__()
        widths = tuple(block_out_channels)
        height, width = (sample_size, sample_size) if isinstance(sample_size, int) else sample_size
        factor = 2 ** (len(widths) - 1)
        if height % factor or width % factor:
            raise ValueError(f"`sample_size` must have sides divisible by {factor}, got {sample_size}.")
        for level in attention_levels:
            check_integer("attention_levels", level, 0, len(widths) - 1)
        attended = [widths[-1], *(widths[level] for level in attention_levels)]
        check_heads("attention_head_dim", attention_head_dim, attended)
        channels, features = widths[0], 4 * widths[0]

        def resnet(before: int, after: int, down: bool = False) -> ResnetBlock2D:
            return ResnetBlock2D(
                in_channels=before,
                out_channels=after,
                temb_channels=features,
                groups=norm_num_groups,
                eps=1e-5,
                dropout=dropout,
                time_embedding_norm="scale_shift",
                down=down,
            )

        def attention(channels: int) -> Attention:
            return Attention(
                channels,
                heads=channels // attention_head_dim,
                dim_head=attention_head_dim,
                norm_num_groups=norm_num_groups,
                bias=True,
                residual_connection=True,
            )

        self.time_features = Timesteps(widths[0], flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embedding = TimestepEmbedding(widths[0], features)
        self.conv_in = nn.Conv2d(in_channels, widths[0], 3, padding=1)
        self.blocks = nn.ModuleList()
        for level, after in enumerate(widths):
            attends = level in attention_levels
            for _ in range(layers_per_block):
                block = resnet(channels, after)
                self.blocks.append(ClassifierBlock(block, attention(after) if attends else nn.Identity()))
                channels = after
            if level < len(widths) - 1:
                self.blocks.append(ClassifierBlock(resnet(channels, channels, down=True), nn.Identity()))
        self.blocks.append(ClassifierBlock(resnet(channels, channels), attention(channels)))
        self.blocks.append(ClassifierBlock(resnet(channels, channels), nn.Identity()))
        self.norm_out = nn.GroupNorm(norm_num_groups, channels, eps=1e-5)
        self.pool = AttentionPool(height * width // factor**2, channels, attention_head_dim, num_classes)
        zero_residual_branches(self)

    def forward(
        self, sample: torch.Tensor, timestep: torch.Tensor | float | int, return_dict: bool = True
    ) -> NoisyClassifierOutput | tuple[torch.Tensor]:
        """Classifies noised slices `(N, C, H, W)` of the size `sample_size` at timesteps that count from 0."""
        size = self.config.sample_size
        if tuple(sample.shape[2:]) != ((size, size) if isinstance(size, int) else tuple(size)):
            raise ValueError(
                f"`sample` must have the size {size} that the classifier was made for, got {tuple(sample.shape)}."
            )
        timestep = torch.as_tensor(timestep, device=sample.device).expand(sample.shape[0])
        embedding = self.time_embedding(self.time_features(timestep).to(sample.dtype))
        hidden = self.conv_in(sample)
        for block in self.blocks:
            hidden = block(hidden, embedding)
        logits = self.pool(F.silu(self.norm_out(hidden)))
        return NoisyClassifierOutput(logits=logits) if return_dict else (logits,)

    def convert_original_state_dict(self, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Renames the parameters of guided-diffusion's `EncoderUNetModel` (attention pool, residual blocks that halve
        the resolution), a network of this model's size, to those of this model."""
        layers = len(self.blocks) - 2
        # Block 0 is the first convolution, so that layer k of this model is block k + 1 of the original.
        renamed = rename_parameters(
            state,
            (
                (r"^input_blocks\.0\.0\.", "conv_in."),
                (r"^input_blocks\.(\d+)\.", lambda match: f"blocks.{int(match[1]) - 1}."),
                (r"^middle_block\.([01])\.", rf"blocks.{layers}.\1."),
                (r"^middle_block\.2\.", rf"blocks.{layers + 1}.0."),
                (r"^(blocks\.\d+)\.0\.", r"\1.resnet."),
                (r"^(blocks\.\d+)\.1\.", r"\1.attention."),
                (r"^out\.0\.", "norm_out."),
                (r"^out\.2\.qkv_proj\.", "pool.to_qkv."),
                (r"^out\.2\.c_proj\.", "pool.to_out."),
                (r"^out\.2\.positional_embedding", "pool.positional_embedding"),
            ),
        )
        head_dim = self.config.attention_head_dim
        return convert_guided_diffusion_layers(renamed, lambda channels: channels // head_dim)


class ClassifierBlock(nn.Module):
    """Applies a residual block, then attention or nothing."""

    def __init__(self, resnet: nn.Module, attention: nn.Module):
        super().__init__()
        self.resnet = resnet
        self.attention = attention

    def forward(self, hidden: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
        return self.attention(self.resnet(hidden, embedding))


class AttentionPool(nn.Module):
    """Pools `(N, C, H, W)` to `(N, outputs)` by the attention of the mean token to itself and all positions."""

    def __init__(self, positions: int, channels: int, head_dim: int, outputs: int):
        super().__init__()
        self.num_heads = channels // head_dim
        self.positional_embedding = nn.Parameter(torch.randn(channels, positions + 1) / math.sqrt(channels))
        self.to_qkv = nn.Linear(channels, 3 * channels)
        self.to_out = nn.Linear(channels, outputs)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        tokens = hidden.flatten(2)
        tokens = torch.cat([tokens.mean(2, keepdim=True), tokens], dim=2) + self.positional_embedding
        # Unlike the other layers of the original, this one splits query, key and value before heads.
        query, key, value = (
            self.to_qkv(tokens.transpose(1, 2)).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        )
        pooled = F.scaled_dot_product_attention(query[:, :, :1], key, value)  # (N, heads, 1, D)
        return self.to_out(pooled.flatten(1))
