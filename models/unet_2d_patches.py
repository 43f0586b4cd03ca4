from __future__ import annotations

import torch
from diffusers import UNet2DModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import nn

from ..checks import check_integer
from ..hub import registration  # noqa: F401  (the class below is a component of checkpoints)
from .checks import check_sides


class UNet2DPatchesModel(UNet2DModel):
    r"""
    Predicts the noise of slices with a `UNet2DModel` whose pixels are patches: P x P pixels of C channels become one of
    C P^2 channels before the first convolution, and are taken apart after the last one (as in Hoogeboom, Heek and
    Salimans, "simple diffusion", arXiv 2301.11093). No level has the resolution of the slices, at which a network has
    so few channels that a GPU waits for its memory: with as many operations it is about twice as fast there.

    All arguments but the first are those of [`UNet2DModel`], with its defaults; `sample_size`, `in_channels` and
    `out_channels` are those of the slices. Their sides must be divisible by P 2^(levels - 1).

    Args:
        patch_size (`int`, defaults to 2): P, at least 1.
    """

    @register_to_config
    def __init__(
        self,
        patch_size: int = 2,
        sample_size: int | tuple[int, int] | None = None,
        in_channels: int = 3,
        out_channels: int = 3,
        center_input_sample: bool = False,
        time_embedding_type: str = "positional",
        time_embedding_dim: int | None = None,
        freq_shift: int = 0,
        flip_sin_to_cos: bool = True,
        down_block_types: tuple[str, ...] = ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        mid_block_type: str | None = "UNetMidBlock2D",
        up_block_types: tuple[str, ...] = ("AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        block_out_channels: tuple[int, ...] = (224, 448, 672, 896),
        layers_per_block: int = 2,
        mid_block_scale_factor: float = 1,
        downsample_padding: int = 1,
        downsample_type: str = "conv",
        upsample_type: str = "conv",
        dropout: float = 0.0,
        act_fn: str = "silu",
        attention_head_dim: int | None = 8,
        norm_num_groups: int = 32,
        attn_norm_num_groups: int | None = None,
        norm_eps: float = 1e-5,
        resnet_time_scale_shift: str = "default",
        add_attention: bool = True,
        class_embed_type: str | None = None,
        num_class_embeds: int | None = None,
        num_train_timesteps: int | None = None,
    ):
        # All arguments of the parent stand above: diffusers makes a network with those that a signature names.
        check_integer("patch_size", patch_size, 1)
        super().__init__(
            **{key: value for key, value in self.config.items() if key != "patch_size" and not key.startswith("_")}
        )
        first, last = self.conv_in, self.conv_out
        self.conv_in = nn.Sequential(
            nn.PixelUnshuffle(patch_size), nn.Conv2d(in_channels * patch_size**2, first.out_channels, 3, padding=1)
        )
        self.conv_out = nn.Sequential(
            nn.Conv2d(last.in_channels, out_channels * patch_size**2, 3, padding=1), nn.PixelShuffle(patch_size)
        )

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float | int,
        class_labels: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> UNet2DOutput | tuple:
        """Predicts `(N, C, H, W)` of noised slices, at timesteps `(N,)` or one of all."""
        check_sides("sample", sample, self.config.patch_size * 2 ** (len(self.config.block_out_channels) - 1))
        return super().forward(sample, timestep, class_labels, return_dict)
