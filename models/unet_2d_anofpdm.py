from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import nn

from ..checks import check_integer
from ..hub import registration  # noqa: F401  (the class below is a component of checkpoints)
from ..hub.configuration import PlainConfigMixin
from .checks import check_heads, check_sides
from .weights import rename_parameters, zero_layer


# N images, C channels, H x W pixels, L = H W tokens, E features of timestep and class, D channels of an attention
# head.


class AnoFPDMUNet2DModel(ModelMixin, PlainConfigMixin):
    r"""
    Predicts the noise of slices of a given class, with the network of AnoFPDM and DDIB (`unet_v2.py` of their
    program). It is for weights of the original, see [`~AnoFPDMUNet2DModel.convert_original_state_dict`]; for training
    from scratch `UNet2DModel` with `num_class_embeds=3` suffices.

    It differs from a guided-diffusion UNet in three points. There is no SiLU before the first convolution of a
    residual block, and none before the last convolution of the network. The class is embedded through an MLP as a
    vector c, which is added to the embedding of the timestep; without a class c is zero. Every attention layer attends
    to E more tokens, the rows of the matrix c c^T. 103.1 million parameters at its authors' size (4 x 128 x 128).

    Args:
        sample_size (`int` or `tuple[int, int]`, *optional*, defaults to 128):
            Size of the slices it is trained on, recorded for readers: the network takes any size divisible by
            2^(levels - 1).
        block_out_channels (`tuple[int, ...]`, defaults to `(128, 128, 256, 384, 512)`):
            Channels of each level. E is four times the first of them.
        layers_per_block (`int`, defaults to 2): Residual blocks of a level on the way down; one more on the way up.
        attention_levels (`tuple[int, ...]`, defaults to `(2, 3, 4)`):
            Levels with attention after every residual block, counted from 0; the middle has one in any case.
        num_classes (`int`, defaults to 2): Number of classes, and the label of a slice without class.
    """

    @register_to_config
    def __init__(
        self,
        sample_size: int | tuple[int, int] | None = 128,
        in_channels: int = 4,
        out_channels: int = 4,
        block_out_channels: tuple[int, ...] = (128, 128, 256, 384, 512),
        layers_per_block: int = 2,
        attention_levels: tuple[int, ...] = (2, 3, 4),
        num_attention_heads: int = 4,
        num_classes: int = 2,
        dropout: float = 0.0,
        norm_num_groups: int = 32,
    ):
        super().__init__()
        widths = tuple(block_out_channels)
        for level in attention_levels:
            check_integer("attention_levels", level, 0, len(widths) - 1)
        attended = [widths[-1], *(widths[level] for level in attention_levels)]
        check_heads("num_attention_heads", num_attention_heads, attended)
        features = 4 * widths[0]

        def layer(before: int, width: int, level: int, upsample: bool = False) -> UNetLayer:
            attention = None
            if level in attention_levels:
                attention = ClassTokenAttention(width, features, num_attention_heads, norm_num_groups)
            resnet = ResidualBlock(before, width, features, dropout, norm_num_groups)
            return UNetLayer(resnet, attention, nn.Conv2d(width, width, 3, padding=1) if upsample else None)

        self.time_features = Timesteps(widths[0], flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embedding = TimestepEmbedding(widths[0], features)
        self.class_embedding = nn.Embedding(num_classes, widths[0])
        self.class_projection = TimestepEmbedding(widths[0], features)

        # One entry per skip, in the original's order: the first convolution, layers, and a convolution of stride 2
        # between levels.
        self.down_blocks = nn.ModuleList([nn.Conv2d(in_channels, widths[0], 3, padding=1)])
        skips, channels = [widths[0]], widths[0]
        for level, width in enumerate(widths):
            for _ in range(layers_per_block):
                self.down_blocks.append(layer(channels, width, level))
                channels = width
                skips.append(channels)
            if level < len(widths) - 1:
                self.down_blocks.append(nn.Conv2d(channels, channels, 3, stride=2, padding=1))
                skips.append(channels)
        self.mid_in = ResidualBlock(channels, channels, features, dropout, norm_num_groups)
        self.mid_attention = ClassTokenAttention(channels, features, num_attention_heads, norm_num_groups)
        self.mid_out = ResidualBlock(channels, channels, features, dropout, norm_num_groups)
        self.up_blocks = nn.ModuleList()
        for level, width in reversed(list(enumerate(widths))):
            for number in range(layers_per_block + 1):
                last = number == layers_per_block
                self.up_blocks.append(layer(channels + skips.pop(), width, level, upsample=last and level > 0))
                channels = width
        self.norm_out = nn.GroupNorm(norm_num_groups, channels)
        self.conv_out = nn.Conv2d(channels, out_channels, 3, padding=1)
        zero_layer(self.conv_out)

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float | int,
        class_labels: torch.Tensor,
        return_dict: bool = True,
    ) -> UNet2DOutput | tuple[torch.Tensor]:
        """Predicts the noise of noised slices `(N, C, H, W)` at timesteps that count from 0; 2^(levels - 1) divides H
        and W. `class_labels` `(N,)` are long: 0 healthy, 1 unhealthy, `num_classes` (2) for no class."""
        check_sides("sample", sample, 2 ** (len(self.config.block_out_channels) - 1))
        timestep = torch.as_tensor(timestep, device=sample.device).expand(sample.shape[0])
        null = self.config.num_classes
        vector = self.class_projection(self.class_embedding(class_labels.clamp(max=null - 1)))
        vector = vector * (class_labels != null).to(vector.dtype)[:, None]  # (N, E)
        embedding = self.time_embedding(self.time_features(timestep).to(sample.dtype)) + vector

        hidden, skips = sample, []
        for block in self.down_blocks:
            hidden = block(hidden) if isinstance(block, nn.Conv2d) else block(hidden, embedding, vector)
            skips.append(hidden)
        hidden = self.mid_in(hidden, embedding)
        hidden = self.mid_out(self.mid_attention(hidden, vector), embedding)
        for block in self.up_blocks:
            hidden = block(torch.cat([hidden, skips.pop()], dim=1), embedding, vector)
        hidden = self.conv_out(self.norm_out(hidden))
        return UNet2DOutput(sample=hidden) if return_dict else (hidden,)

    @staticmethod
    def convert_original_state_dict(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Renames the parameters of `UNetModel` in the original's `unet_v2.py`, a network of this model's size, to
        those of this class; names of other networks stay."""
        # The original's attention has convolutions of one pixel where this one has linear layers.
        state = {name: tensor.squeeze(2) if tensor.ndim == 3 else tensor for name, tensor in state.items()}
        return rename_parameters(state, _ORIGINAL_NAMES)


class UNetLayer(nn.Module):
    """Applies a residual block, attention if there is one, and at the end of a level on the way up doubles the
    resolution."""

    def __init__(self, resnet: nn.Module, attention: nn.Module | None, upsample: nn.Module | None):
        super().__init__()
        self.resnet = resnet
        self.attention = attention
        self.upsample = upsample

    def forward(self, hidden: torch.Tensor, embedding: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
        hidden = self.resnet(hidden, embedding)
        if self.attention is not None:
            hidden = self.attention(hidden, vector)
        if self.upsample is not None:
            hidden = self.upsample(F.interpolate(hidden, scale_factor=2, mode="nearest"))
        return hidden


class ResidualBlock(nn.Module):
    """Adds to its input: norm, convolution, norm that timestep and class scale and shift, SiLU, dropout, convolution.
    There is no SiLU before the first convolution."""

    def __init__(self, in_channels: int, out_channels: int, features: int, dropout: float, groups: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.projection = nn.Linear(features, 2 * out_channels)
        self.norm2 = nn.GroupNorm(groups, out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.shortcut = nn.Identity() if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1)
        zero_layer(self.conv2)

    def forward(self, hidden: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
        scale, shift = self.projection(F.silu(embedding))[:, :, None, None].chunk(2, dim=1)
        update = self.norm2(self.conv1(self.norm1(hidden))) * (1 + scale) + shift
        return self.shortcut(hidden) + self.conv2(self.dropout(F.silu(update)))


class ClassTokenAttention(nn.Module):
    """Adds the attention of the pixels to the E rows of c c^T and to each other; c `(N, E)` is the class vector."""

    def __init__(self, channels: int, features: int, num_heads: int, groups: int):
        super().__init__()
        self.num_heads = num_heads
        self.norm = nn.GroupNorm(groups, channels)
        self.to_qkv = nn.Linear(channels, 3 * channels)
        self.to_class_kv = nn.Linear(features, 2 * channels)
        self.to_out = nn.Linear(channels, channels)
        zero_layer(self.to_out)

    def forward(self, hidden: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
        tokens = self.norm(hidden).flatten(2).transpose(1, 2)  # (N, L, C)
        # The original splits heads before query, key and value.
        query, key, value = self.to_qkv(tokens).unflatten(2, (self.num_heads, 3, -1)).permute(3, 0, 2, 1, 4)
        # W (c c^T) + b = (W c) c^T + b: one product of W and a vector instead of E of them.
        # In one pass, which the concatenation below costs again: a table of the classes would save nothing.
        product = F.linear(vector, self.to_class_kv.weight)[:, None]
        class_kv = torch.addcmul(self.to_class_kv.bias, product, vector[:, :, None])
        class_key, class_value = class_kv.unflatten(2, (self.num_heads, 2, -1)).permute(3, 0, 2, 1, 4)
        key, value = torch.cat([class_key, key], dim=2), torch.cat([class_value, value], dim=2)
        attended = F.scaled_dot_product_attention(query, key, value)  # (N, heads, L, D)
        update = self.to_out(attended.transpose(1, 2).flatten(2))
        return hidden + update.transpose(1, 2).reshape(hidden.shape)


# Patterns and replacements, in this order, from the names of the original program.
_ORIGINAL_NAMES = (
    (r"^time_embed\.0\.", "time_embedding.linear_1."),
    (r"^time_embed\.2\.", "time_embedding.linear_2."),
    (r"^label_emb\.", "class_embedding."),
    (r"^class_emb\.0\.", "class_projection.linear_1."),
    (r"^class_emb\.2\.", "class_projection.linear_2."),
    (r"^input_blocks\.(\d+)\.0\.(op\.)?(weight|bias)$", r"down_blocks.\1.\3"),
    (r"^input_blocks\.(\d+)\.0\.", r"down_blocks.\1.resnet."),
    (r"^input_blocks\.(\d+)\.1\.", r"down_blocks.\1.attention."),
    (r"^middle_block\.0\.", "mid_in."),
    (r"^middle_block\.1\.", "mid_attention."),
    (r"^middle_block\.2\.", "mid_out."),
    (r"^output_blocks\.(\d+)\.0\.", r"up_blocks.\1.resnet."),
    (r"^output_blocks\.(\d+)\.\d\.conv\.", r"up_blocks.\1.upsample."),
    (r"^output_blocks\.(\d+)\.1\.", r"up_blocks.\1.attention."),
    (r"^out\.0\.", "norm_out."),
    (r"^out\.2\.", "conv_out."),
    (r"\.in_layers\.0\.", ".norm1."),
    (r"\.in_layers\.2\.", ".conv1."),
    (r"\.emb_layers\.1\.", ".projection."),
    (r"\.out_layers\.0\.", ".norm2."),
    (r"\.out_layers\.3\.", ".conv2."),
    (r"\.skip_connection\.", ".shortcut."),
    (r"\.qkv\.", ".to_qkv."),
    (r"\.encoder_kv\.", ".to_class_kv."),
    (r"\.proj_out\.", ".to_out."),
)
