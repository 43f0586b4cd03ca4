from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput
from torch import nn

from ..checks import check_choice
from ..hub import registration  # noqa: F401  (the class below is a component of checkpoints)
from ..hub.configuration import PlainConfigMixin
from .checks import check_sides
from .unet_2d_dae import StandardizedConvBlock, StandardizedUpBlock


RESIDUALS = ("signed", "squared")


# N slices, C modalities, H x W pixels.


@dataclass
class SiameseUNet2DOutput(BaseOutput):
    """Holds what [`SiameseUNet2DModel`] returns: logits of a pixel being anomalous, `(N, 1, H, W)`, and with
    `deep_supervision` those of every decoder block, coarse to fine, `(N, 1, H / 2^k, W / 2^k)`."""

    logits: torch.Tensor
    # Nothing but None is a default that accelerate's wrapper of mixed precision can copy.
    decoder_logits: tuple[torch.Tensor, ...] | None = None


class SiameseUNet2DModel(ModelMixin, PlainConfigMixin):
    r"""
    Segments slices with SADM's network (`SegUnet.py`): one encoder sees the residual, image - reconstruction, and the
    image; at every level the features of both are concatenated, residual first, and one decoder makes logits of them.
    16.7 M parameters at the authors' size, 33.8 GFLOP for 96 x 96 pixels.

    Blocks, standardisation of the weights and groups are those of [`DAEUNet2DModel`]: convolution, SiLU, then the
    normalisation. Parameters are named as in the original, whose weights fit as they are.

    Args:
        block_out_channels (`tuple[int, ...]`, defaults to `(64, 128, 256, 512)`): Channels of the encoder's levels.
        residual (`str`, defaults to `"signed"`): `"signed"`, or `"squared"`, which the original has as an option.
        deep_supervision (`bool`, defaults to `False`): Whether every decoder block has a head, for training.
    """

    @register_to_config
    def __init__(
        self,
        in_channels: int = 1,
        block_out_channels: tuple[int, ...] = (64, 128, 256, 512),
        residual: str = "signed",
        deep_supervision: bool = False,
    ):
        super().__init__()
        if len(block_out_channels) < 2:
            raise ValueError(
                f"`block_out_channels` must name the channels of at least two levels, got {tuple(block_out_channels)}."
            )
        check_choice("residual", residual, RESIDUALS)
        self.down_path = nn.ModuleList()
        for before, channels in zip((in_channels, *block_out_channels), block_out_channels, strict=False):
            self.down_path.append(StandardizedConvBlock(before, channels))
        # A decoder block leaves as many channels as the skip has: those of both streams one level up.
        decoded = [2 * channels for channels in block_out_channels[-2::-1]]
        self.up_path = nn.ModuleList()
        for before, channels in zip((2 * block_out_channels[-1], *decoded), decoded, strict=False):
            self.up_path.append(StandardizedUpBlock(before, channels))
        heads = decoded if deep_supervision else []
        self.deepsup_1x1 = nn.ModuleList(nn.Conv2d(channels, 1, kernel_size=1) for channels in heads)
        self.last = nn.Conv2d(decoded[-1], 1, kernel_size=1)

    def forward(
        self, image: torch.Tensor, reconstruction: torch.Tensor, return_dict: bool = True
    ) -> SiameseUNet2DOutput | tuple:
        """Segments slices `(N, C, H, W)` by their pseudo-healthy reconstructions, both in [0, 1], background 0;
        2^(levels - 1) divides H and W."""
        check_sides("image", image, 2 ** len(self.up_path))
        residual = image - reconstruction
        if self.config.residual == "squared":
            residual = residual.square()
        # Both streams share one pass through the encoder, (2 N, C, H, W).
        sample = torch.cat([residual, image])
        features = []
        for level, block in enumerate(self.down_path):
            sample = block(nn.functional.avg_pool2d(sample, 2) if level else sample)
            features.append(torch.cat(sample.unflatten(0, (2, -1)).unbind(), dim=1))
        sample = features.pop()
        decoded = []
        for block in self.up_path:
            sample = block(sample, features.pop())
            decoded.append(sample)
        heads = None
        if self.deepsup_1x1:
            heads = tuple(head(values) for head, values in zip(self.deepsup_1x1, decoded, strict=True))
        logits = self.last(sample)
        return SiameseUNet2DOutput(logits=logits, decoder_logits=heads) if return_dict else (logits, heads)

    def convert_original_state_dict(self, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Returns the weights of the original network, whose names are the same, for this one. Heads of deep
        supervision are left out if this model has none: inference does not need them."""
        return {name: tensor for name, tensor in state.items() if self.deepsup_1x1 or not name.startswith("deepsup_")}
