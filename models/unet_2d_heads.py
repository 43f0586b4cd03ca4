from __future__ import annotations

import torch
from diffusers import UNet2DModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.attention_processor import Attention

from ..hub import registration  # noqa: F401  (the class below is a component of checkpoints)
from .checks import check_heads
from .weights import convert_guided_diffusion_unet, zero_layer, zero_residual_branches


class UNet2DHeadsModel(UNet2DModel):
    r"""
    Predicts the noise of slices: `UNet2DModel` with the same number of attention heads at every level, which one
    `attention_head_dim` for all levels cannot express, and with residual branches that begin with zero. The network of
    AnoDDPM (`UNet.py`, guided-diffusion style).

    The defaults are AnoDDPM's at 256 px (131.65 M parameters). All other arguments are those of [`UNet2DModel`].
    guided-diffusion's own `UNetModel`, which AnoFPDM's baselines use (`unet_v1.py`), has the timestep scale and shift
    the second norm (`resnet_time_scale_shift="scale_shift"`), `flip_sin_to_cos=True`, 4 heads, and plain blocks and
    convolutions that change the resolution; it needs `attn_norm_num_groups`, without which diffusers leaves the norm
    of the middle attention out.

    Args:
        num_attention_heads (`int`, defaults to 2):
            Heads of every attention layer. AnoDDPM trained with 2 and evaluated, by mistake, with 1; weights of one do
            not work with the other although all shapes agree, so the number belongs to the configuration.
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
                check_heads("num_attention_heads", num_attention_heads, [module.inner_dim])
                module.heads = num_attention_heads
                module.scale = (module.inner_dim // num_attention_heads) ** -0.5
        zero_residual_branches(self)
        zero_layer(self.conv_out)

    def convert_original_state_dict(self, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Renames the parameters of guided-diffusion's `UNetModel` without `resblock_updown` (AnoFPDM's `unet_v1.py`),
        of this model's size, to those of this model. The label embedding of a model without classes, which AnoFPDM's
        last version has and does not use, is left out."""
        if self.class_embedding is None:
            state = {name: tensor for name, tensor in state.items() if not name.startswith("label_emb.")}
        return convert_guided_diffusion_unet(state, self.config.layers_per_block, self.config.num_attention_heads)
