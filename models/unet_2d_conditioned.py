from __future__ import annotations

import torch
from diffusers import UNet2DModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.embeddings import TimestepEmbedding

from ..hub import registration  # noqa: F401  (the class below is a component of checkpoints)
from .checks import check_heads
from .weights import convert_guided_diffusion_unet, zero_layer, zero_residual_branches


class ConditionedUNet2DModel(UNet2DModel):
    r"""
    Predicts the noise of slices that belong to a vector, given as `class_labels` `(N, condition_dim)`: `UNet2DModel`,
    except that the embeddings of timestep and vector are concatenated, not added. The network of cDDPM
    (`OpenAI_Unet.py`), and without a condition that of its DDPM_2D and of pDDPM.

    The defaults are the authors': 44.07 M parameters, 37.51 M without a condition, 149 GFLOP for 96 x 96 pixels;
    attention in the middle only. All other arguments are those of [`UNet2DModel`]. Residual branches begin with zero,
    as in the original.

    Args:
        condition_dim (`int`, *optional*, defaults to 512):
            Length of the vector; `None` for no condition. The paper says 128.
        time_embedding_dim (`int`, *optional*):
            Length of each of the two embeddings; 4 times the first of `block_out_channels` by default.
        class_embed_type (`None`): An argument because the parent reads it; its value follows from `condition_dim`.
    """

    @register_to_config
    def __init__(
        self,
        sample_size: int | tuple[int, int] | None = 96,
        in_channels: int = 1,
        out_channels: int = 1,
        center_input_sample: bool = False,
        time_embedding_type: str = "positional",
        time_embedding_dim: int | None = None,
        freq_shift: int = 0,
        flip_sin_to_cos: bool = True,
        down_block_types: tuple[str, ...] = ("ResnetDownsampleBlock2D",) * 3,
        mid_block_type: str | None = "UNetMidBlock2D",
        up_block_types: tuple[str, ...] = ("ResnetUpsampleBlock2D",) * 3,
        block_out_channels: tuple[int, ...] = (128, 256, 256),
        layers_per_block: int = 3,
        mid_block_scale_factor: float = 1,
        downsample_padding: int = 1,
        downsample_type: str = "resnet",
        upsample_type: str = "resnet",
        dropout: float = 0.0,
        act_fn: str = "silu",
        attention_head_dim: int | None = 64,
        norm_num_groups: int = 32,
        attn_norm_num_groups: int | None = 32,
        norm_eps: float = 1e-5,
        resnet_time_scale_shift: str = "scale_shift",
        add_attention: bool = True,
        num_train_timesteps: int | None = None,
        class_embed_type: str | None = None,
        condition_dim: int | None = 512,
    ):
        if condition_dim is not None and condition_dim < 1:
            raise ValueError(f"`condition_dim` must be at least 1, or None for no condition, got {condition_dim}.")
        if class_embed_type is not None:
            raise ValueError(
                f"`class_embed_type` must be None, `condition_dim` decides here, got {class_embed_type!r}."
            )
        if add_attention and attention_head_dim is not None:
            check_heads("attention_head_dim", attention_head_dim, [block_out_channels[-1]])
        own_config = self.config
        parent = {key: value for key, value in own_config.items() if not key.startswith("_")}
        width = time_embedding_dim or 4 * block_out_channels[0]
        if parent.pop("condition_dim") is not None:
            parent |= {"class_embed_type": "identity", "time_embedding_dim": 2 * width}
        super().__init__(**parent)
        self._internal_dict = own_config  # the parent has put its own values into it
        if condition_dim is not None:
            # The parent adds: [t ; c] = [t ; 0] + [0 ; c].
            self.time_embedding = PaddedEmbedding(self.time_embedding.linear_1.in_features, width, (0, width))
            self.class_embedding = PaddedEmbedding(condition_dim, width, (width, 0))
        zero_residual_branches(self)
        zero_layer(self.conv_out)

    def convert_original_state_dict(self, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Renames the parameters of the original's `UNetModel`, guided-diffusion's with residual blocks that change
        the resolution and of this model's size, to those of this model."""
        # The original splits query, key and value before the heads.
        return convert_guided_diffusion_unet(state, self.config.layers_per_block, num_heads=1)


class PaddedEmbedding(TimestepEmbedding):
    """Embeds a vector with two linear layers, and puts zeros before and behind the result."""

    def __init__(self, in_channels: int, out_channels: int, padding: tuple[int, int]):
        super().__init__(in_channels, out_channels)
        self.padding = padding

    def forward(self, sample: torch.Tensor, condition: torch.Tensor | None = None) -> torch.Tensor:
        return torch.nn.functional.pad(super().forward(sample, condition), self.padding)
