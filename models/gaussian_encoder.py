from __future__ import annotations

import torch
from torch import nn


# N images, C channels, H x W pixels, D latent dimensions.


class GaussianEncoder(nn.Module):
    r"""
    Encodes an image and a mask, or predicted noise, as a diagonal normal distribution: the small encoder of CIMD's KL
    term (`AxisAlignedConvGaussian`, which is that of the Probabilistic U-Net). Blocks of convolutions with average
    pools between them, the mean over all pixels, and a linear layer. 1,368,108 parameters at its authors' size. Only
    training uses it; no pipeline holds one.

    Args:
        in_channels (`int`, defaults to 2): Channels of the image and of what goes with it, together.
        block_out_channels (`tuple[int, ...]`, defaults to `(32, 64, 128, 192)`): Channels of each block.
        latent_dim (`int`, defaults to 6): Dimensions D of the distribution.
    """

    def __init__(
        self,
        in_channels: int = 2,
        block_out_channels: tuple[int, ...] = (32, 64, 128, 192),
        layers_per_block: int = 3,
        latent_dim: int = 6,
    ):
        super().__init__()
        layers, channels = [], in_channels
        for level, width in enumerate(block_out_channels):
            if level:
                layers.append(nn.AvgPool2d(2, ceil_mode=True))
            for _ in range(layers_per_block):
                layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
                channels = width
        self.layers = nn.Sequential(*layers)
        self.head = nn.Conv2d(channels, 2 * latent_dim, 1)
        for layer in self.layers:
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
                nn.init.trunc_normal_(layer.bias, std=0.001, a=-0.002, b=0.002)
        nn.init.kaiming_normal_(self.head.weight, nonlinearity="relu")
        nn.init.normal_(self.head.bias)

    def forward(self, image: torch.Tensor, other: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns mean and logarithm of the standard deviation, `(N, D)` each, in the type of the weights. `image` and
        `other` are `(N, C, H, W)` and have `in_channels` together."""
        hidden = self.layers(torch.cat([image, other], dim=1).to(self.head.weight.dtype))
        hidden = self.head(hidden.mean((2, 3), keepdim=True)).flatten(1)
        mean, log_std = hidden.to(self.head.weight.dtype).chunk(2, dim=1)  # autocast may have made it coarser
        return mean, log_std


def gaussian_divergence(
    mean: torch.Tensor, log_std: torch.Tensor, other_mean: torch.Tensor, other_log_std: torch.Tensor
) -> torch.Tensor:
    """Returns the Kullback-Leibler divergence of a diagonal normal distribution from another one in nats, `(N,)`;
    arguments are `(N, D)`."""
    ratio = log_std - other_log_std
    distance = (mean - other_mean) * (-other_log_std).exp()
    return (0.5 * ((2 * ratio).exp() + distance.square() - 1) - ratio).sum(1)
