from __future__ import annotations

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import nn

from ..hub import registration  # noqa: F401  (the class below is a component of checkpoints)
from ..hub.configuration import PlainConfigMixin
from .checks import check_sides


class DAEUNet2DModel(ModelMixin, PlainConfigMixin):
    r"""
    Denoises slices with the network of the denoising autoencoder (Kascenas et al., MIDL 2022) as the ANDi authors ran
    it: a U-Net of weight-standardised convolutions with reflect padding, without a timestep.

    A block consists of convolution 3 x 3, SiLU and group normalisation, two times. The way down has mean pooling, the
    way up transposed convolutions 2 x 2 and concatenation `[up, skip]`, and a convolution 1 x 1 ends it. Parameters
    are named as in the original (`down_path.0.block.1.weight`), whose weights fit as they are.

    Args:
        block_out_channels (`tuple[int, ...]`, defaults to `(64, 128, 256, 512)`):
            Channels of the levels. The groups of a level are the upper middle one of its channels' divisors: 8, 16,
            16, 32.
    """

    @register_to_config
    def __init__(
        self,
        in_channels: int = 4,
        out_channels: int = 4,
        block_out_channels: tuple[int, ...] = (64, 128, 256, 512),
    ):
        super().__init__()
        if not block_out_channels:
            raise ValueError("`block_out_channels` must name the channels of at least one level, got none.")
        self.down_path = nn.ModuleList()
        for before, channels in zip((in_channels, *block_out_channels), block_out_channels, strict=False):
            self.down_path.append(StandardizedConvBlock(before, channels))
        self.up_path = nn.ModuleList()
        for before, channels in zip(block_out_channels[:0:-1], block_out_channels[-2::-1], strict=True):
            self.up_path.append(StandardizedUpBlock(before, channels))
        self.last = nn.Conv2d(block_out_channels[0], out_channels, kernel_size=1)

    def forward(self, sample: torch.Tensor, return_dict: bool = True) -> UNet2DOutput | tuple:
        """Denoises noisy slices `(N, C, H, W)`; H and W are multiples of 2^(levels - 1)."""
        check_sides("sample", sample, 2 ** len(self.up_path))
        skips = []
        for level, block in enumerate(self.down_path):
            if level:
                skips.append(sample)
                sample = nn.functional.avg_pool2d(sample, 2)
            sample = block(sample)
        for block, skip in zip(self.up_path, reversed(skips), strict=True):
            sample = block(sample, skip)
        sample = self.last(sample)
        return UNet2DOutput(sample=sample) if return_dict else (sample,)


class _StandardizedConv2d(nn.Conv2d):
    """Convolves with weights that have mean 0 and standard deviation 1 over the inputs of every output channel."""

    def forward(self, sample: torch.Tensor) -> torch.Tensor:
        mean = self.weight.mean((1, 2, 3), keepdim=True)
        deviation = self.weight.std((1, 2, 3), keepdim=True)  # unbiased, as in the original
        return self._conv_forward(sample, (self.weight - mean) / (deviation + 1e-5), self.bias)


class StandardizedConvBlock(nn.Module):
    """Applies two times: reflect padding, standardised convolution, SiLU, group normalisation. The number of groups is
    the upper middle one of the divisors of the channels."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        divisors = [number for number in range(1, out_channels + 1) if out_channels % number == 0]
        groups = divisors[len(divisors) // 2]
        layers = []
        for channels in (in_channels, out_channels):
            layers += [
                nn.ReflectionPad2d(1),
                _StandardizedConv2d(channels, out_channels, kernel_size=3),
                nn.SiLU(),
                nn.GroupNorm(groups, out_channels),
            ]
        self.block = nn.Sequential(*layers)

    def forward(self, sample: torch.Tensor) -> torch.Tensor:
        return self.block(sample)


class StandardizedUpBlock(nn.Module):
    """Doubles the size by a transposed convolution, concatenates the skip, which has `out_channels`, and applies a
    block."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.up = nn.ConvTranspose2d(in_channels, out_channels, kernel_size=2, stride=2)
        self.conv_block = StandardizedConvBlock(2 * out_channels, out_channels)

    def forward(self, sample: torch.Tensor, skip: torch.Tensor) -> torch.Tensor:
        return self.conv_block(torch.cat([self.up(sample), skip], 1))
