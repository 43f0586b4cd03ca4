from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import nn


# N images, C channels, H x W pixels, R x S cells of the mask, h x w positions of a feature map, V visible positions of
# all images.


LOSSES = ("l2", "l1")
REGIONS = ("masked", "all")

_MASKED = (nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d)
_POINTWISE = (nn.Linear, nn.LayerNorm)


class SparKModel(nn.Module):
    r"""
    Pretrains a convolutional encoder with SparK (Tian et al. 2023), as cDDPM does: the encoder sees a few cells of an
    image, and a light decoder predicts the rest. Only the encoder is used afterwards, so that this is no component of
    a pipeline.

    The convolutions are sparse: nothing of a hidden cell reaches a visible one. Layers that mix positions
    (convolutions, pooling) get their input with 0 in the hidden cells, and batch normalisation sees the visible
    positions only. Hooks do so while this model calls the encoder; called by anybody else, it is the ordinary network.

    Args:
        encoder (`torch.nn.Module`):
            A CNN of [`~transformers.AutoBackbone`] with all stages in `out_features`: its output has `feature_maps`,
            fine to coarse, each half as large as the one before. It is not copied, and gets hooks. Of layers that mix
            positions, convolutions, max and average pooling, and batch normalisation are known; others are an error.
        sample_size (`int` or `tuple[int, int]`):
            Size (H, W) of the images; sizes that depend on it are found by a trial.
        mask_ratio (`float`, defaults to 0.65):
            Share of cells that is hidden: of K cells, `round(K (1 - mask_ratio))` stay visible, 3 of 9 with the
            authors' values.
        mask_grid (`int` or `tuple[int, int]`, *optional*):
            Cells (R, S) of the mask, which divide the image. One for each position of the coarsest map by default, 3 x
            3 for a ResNet at 96 px. In a finer grid a position is visible where any of its cells is.
        decoder_width (`int`, defaults to 512):
            Channels that the decoder begins with, divisible by 2^stages; halved by every stage.
    """

    def __init__(
        self,
        encoder: nn.Module,
        sample_size: int | tuple[int, int],
        in_channels: int = 1,
        *,
        mask_ratio: float = 0.65,
        mask_grid: int | tuple[int, int] | None = None,
        decoder_width: int = 512,
    ):
        super().__init__()
        height, width = (sample_size, sample_size) if isinstance(sample_size, int) else sample_size
        _check_layers(encoder)
        # A trial of a copy without weights, which computes nothing.
        try:
            trial = copy.deepcopy(encoder).eval().to("meta")(torch.zeros(1, in_channels, height, width, device="meta"))
        except Exception as error:  # noqa: BLE001 (what an unfit network stumbles over can be anything)
            raise ValueError(
                f"`encoder` {type(encoder).__name__} must take images of {in_channels} x {height} x {width}: {error}"
            ) from error
        shapes = [tuple(map_.shape[1:]) for map_ in trial.feature_maps[::-1]]
        coarsest = shapes[0][1:]
        stages = (height // coarsest[0]).bit_length() - 1
        wanted = [(coarsest[0] << level, coarsest[1] << level) for level in range(len(shapes))]
        if (height, width) != (coarsest[0] << stages, coarsest[1] << stages) or wanted != [s[1:] for s in shapes]:
            raise ValueError(
                "`encoder` must give maps that halve in size from stage to stage, `sample_size` must be a multiple"
                f" of its stride, got maps of {', '.join(f'{h} x {w}' for _, h, w in shapes)} for {height} x {width}."
            )
        if decoder_width < 2**stages or decoder_width % 2**stages:
            raise ValueError(f"`decoder_width` must be a multiple of {2**stages}, got {decoder_width}.")
        grid = coarsest if mask_grid is None else (mask_grid, mask_grid) if isinstance(mask_grid, int) else mask_grid
        if len(grid) != 2 or min(grid) < 1 or height % grid[0] or width % grid[1]:
            raise ValueError(f"`mask_grid` must divide the size {height} x {width} of the images, got {mask_grid}.")
        cells = grid[0] * grid[1]
        self.mask_grid, self.visible_cells = tuple(grid), round(cells * (1 - mask_ratio))
        if not 0 < self.visible_cells < cells:
            raise ValueError(f"`mask_ratio` must leave 1 to {cells - 1} of {cells} cells visible, got {mask_ratio}.")

        self.encoder = encoder
        self.norms, self.tokens, self.projections = nn.ModuleList(), nn.ParameterList(), nn.ModuleList()
        for level, (channels, *_) in enumerate(shapes):
            channels_out = decoder_width >> level
            projection = nn.Conv2d(channels, channels_out, 3 if level else 1, padding=1 if level else 0)
            self.norms.append(nn.BatchNorm2d(channels))
            token = nn.init.trunc_normal_(torch.empty(1, channels, 1, 1), std=0.02, a=-0.02, b=0.02)
            self.tokens.append(nn.Parameter(token))
            self.projections.append(nn.Identity() if not level and channels == channels_out else projection)
        self.decoder = nn.ModuleList(_DecoderStage(decoder_width >> level) for level in range(stages))
        self.head = nn.Conv2d(decoder_width >> stages, in_channels, kernel_size=1)
        _initialize(self.decoder)
        _initialize(self.head)

        self._visible: torch.Tensor | None = None  # (N, 1, R, S) while the encoder is called from here
        self._positions: torch.Tensor | None = None  # (N, h, w) from the entry of a normalisation to its exit
        for module in (*encoder.modules(), *self.norms):
            if isinstance(module, _MASKED):
                module.register_forward_pre_hook(self._hide)
            elif isinstance(module, nn.BatchNorm2d):
                module.register_forward_pre_hook(self._gather)
                module.register_forward_hook(self._scatter)

    def choose_cells(self, draws: torch.Tensor) -> torch.Tensor:
        """Chooses the visible cells `(N, 1, R, S)`, bool: those with the smallest draws, uniform and `(N, R * S)`."""
        chosen = draws.argsort(dim=1)[:, : self.visible_cells]
        visible = torch.zeros(draws.shape, dtype=torch.bool, device=draws.device).scatter_(1, chosen, True)
        return visible.reshape(-1, 1, *self.mask_grid)

    def forward(self, images: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
        """Predicts images `(N, C, H, W)` in [0, 1], hidden cells and visible ones, from those cells that `visible`
        `(N, 1, R, S)`, bool, shows to the encoder."""
        self._visible = visible
        try:
            maps = self.encoder(images).feature_maps[::-1]
            normalized = [norm(map_) for norm, map_ in zip(self.norms, maps, strict=True)]
        finally:
            self._visible = None
        hidden = 0.0
        for level, stage in enumerate(self.decoder):
            if level < len(maps):
                seen = resize_cells(visible, maps[level].shape[2:])
                hidden = hidden + self.projections[level](torch.where(seen, normalized[level], self.tokens[level]))
            hidden = stage(hidden)
        return self.head(hidden)

    def _hide(self, module: nn.Module, arguments: tuple) -> tuple | None:
        if self._visible is None:
            return None
        (hidden,) = arguments
        return (hidden * resize_cells(self._visible, hidden.shape[2:]),)

    def _gather(self, module: nn.Module, arguments: tuple) -> tuple | None:
        if self._visible is None:
            return None
        (hidden,) = arguments
        self._positions = resize_cells(self._visible, hidden.shape[2:])[:, 0]
        return (hidden.permute(0, 2, 3, 1)[self._positions][..., None, None],)  # V images of one pixel

    def _scatter(self, module: nn.Module, arguments: tuple, output: torch.Tensor) -> torch.Tensor | None:
        if self._visible is None:
            return None
        hidden = output.new_zeros(*self._positions.shape, output.shape[1])
        hidden[self._positions] = output[..., 0, 0]
        # As the network's other tensors: oneDNN's backward of strided 1 x 1 convolutions in channels_last corrupts
        # memory on processors without AVX-512 (torch 2.13).
        return hidden.permute(0, 3, 1, 2).contiguous()


class _DecoderStage(nn.Module):
    """Doubles the size and halves the channels, (N, C, h, w) to (N, C / 2, 2h, 2w)."""

    def __init__(self, channels: int):
        super().__init__()
        self.up = nn.ConvTranspose2d(channels, channels, kernel_size=4, stride=2, padding=1)
        self.layers = nn.Sequential(
            nn.Conv2d(channels, channels, kernel_size=3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU6(),
            nn.Conv2d(channels, channels // 2, kernel_size=3, padding=1, bias=False),
            nn.BatchNorm2d(channels // 2),
        )

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.layers(self.up(hidden))


def resize_cells(visible: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Resizes visible cells `(N, 1, R, S)` to the positions of a feature map `(N, 1, h, w)`, bool; a position of a
    coarser map is visible if it holds any visible cell."""
    return F.adaptive_max_pool2d(visible.float(), tuple(size)) > 0


def spark_loss(
    images: torch.Tensor,
    reconstruction: torch.Tensor,
    visible: torch.Tensor,
    *,
    loss: str = "l2",
    region: str = "masked",
    normalize: bool = False,
) -> torch.Tensor:
    """
    Returns the error of each image, `(N,)`: the mean over the errors of its cells.

    Args:
        images, reconstruction (`torch.Tensor` of shape `(N, C, H, W)`): Images and predictions in [0, 1].
        visible (`torch.Tensor` of shape `(N, 1, R, S)`): bool, cells that the encoder saw; as many in each image.
        loss (`str`, defaults to `"l2"`): `"l2"`, squared error, or `"l1"`, absolute error.
        region (`str`, defaults to `"masked"`): `"masked"`, hidden cells alone, or `"all"`.
        normalize (`bool`, defaults to `False`): Whether the pixels of a target's cell are standardised.
    """
    grid = visible.shape[2:]

    def cells(values: torch.Tensor) -> torch.Tensor:  # (N, R, S, pixels of all channels)
        cut = values.unflatten(3, (grid[1], -1)).unflatten(2, (grid[0], -1))  # (N, C, R, H / R, S, W / S)
        return cut.permute(0, 2, 4, 1, 3, 5).flatten(3)

    target, prediction = cells(images), cells(reconstruction)
    if normalize:
        target = (target - target.mean(3, keepdim=True)) / (target.var(3, keepdim=True) + 1e-6).sqrt()
    difference = prediction - target
    error = (difference.square() if loss == "l2" else difference.abs()).mean(3)
    if region == "all":
        return error.mean((1, 2))
    hidden = ~visible[:, 0]
    return (error * hidden).sum((1, 2)) / hidden.sum((1, 2))


def _check_layers(encoder: nn.Module) -> None:
    unknown = set()
    for module in encoder.modules():
        layer = not list(module.children()) and bool(list(module.parameters(recurse=False)))
        mixes = isinstance(module, (nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d))
        if mixes or (layer and not isinstance(module, (*_MASKED, *_POINTWISE, nn.BatchNorm2d))):
            unknown.add(type(module).__name__)
    if unknown:
        raise ValueError(
            f"`encoder` has layers {', '.join(sorted(unknown))}, which are not known to be sparse; a CNN may have"
            " convolutions, max and average pooling, batch normalisation, and layers of single positions (linear,"
            " layer normalisation over channels)."
        )


def _initialize(module: nn.Module) -> None:
    for layer in module.modules():
        if isinstance(layer, nn.ConvTranspose2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(layer, nn.Conv2d):
            nn.init.trunc_normal_(layer.weight, std=0.02)
        if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)) and layer.bias is not None:
            nn.init.zeros_(layer.bias)
