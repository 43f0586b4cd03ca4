"""Random changes of training slices: where things are, and how bright."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from ..schedulers.draws import fold_in, uniform
from .keys import AFFINE, INTENSITY
from .options import AugmentationOptions


# N images, C channels, H x W pixels. Ranges of `augment_intensity`, those of cDDPM's `aug_intensity`:
LOG_GAMMA = 0.3
BIAS_COEFFICIENT, BIAS_ORDER = 0.5, 3
BIAS_POWERS = [(i, j) for i in range(BIAS_ORDER + 1) for j in range(BIAS_ORDER + 1 - i)]
BLUR_STD = 1.0  # pixels; the authors' 2 are torchio's millimetres, and their pixels have 2 mm
GHOSTS, GHOST_INTENSITY, GHOST_RESTORE = (4, 10), (0.5, 1.0), 0.02


def augment(
    batch: dict[str, torch.Tensor], keys: torch.Tensor, options: AugmentationOptions, background: float
) -> dict[str, torch.Tensor]:
    """Moves every slice of a batch by a random affine map of its own key `(N, 2)`: `image (N, C, H, W)` bilinearly,
    with `background` from outside, `mask (N, A, H, W)` and `brain (N, H, W)`, if there, alike by the nearest pixel,
    with 0."""
    moves = (
        options.rotation,
        *options.translation,
        options.horizontal_flip,
        *(factor - 1 for factor in options.scale),
    )
    if not any(moves):
        return batch
    images = batch["image"]
    # Five uniform numbers per image in a fixed order: rotation, shift along W, shift along H, scale, flip.
    drawn = uniform(fold_in(keys, AFFINE), (5,))
    signed = 2 * drawn - 1
    angle = signed[:, 0] * math.radians(options.rotation)
    low, high = options.scale
    zoom = 1.0 / (low + drawn[:, 3] * (high - low))
    flip = torch.where(drawn[:, 4] < 0.5, -1.0, 1.0) if options.horizontal_flip else torch.ones_like(zoom)
    # affine_grid's coordinates run from -1 to 1 along either side: rotations of a slice that is not square need its
    # aspect.
    height, width = images.shape[2:]
    cos, sin = angle.cos() * zoom, angle.sin() * zoom
    theta = torch.stack(
        [
            torch.stack([flip * cos, -sin * height / width, -2 * signed[:, 1] * options.translation[0]], 1),
            torch.stack([flip * sin * width / height, cos, -2 * signed[:, 2] * options.translation[1]], 1),
        ],
        1,
    )
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    changed = {"image": F.grid_sample(images - background, grid, align_corners=False) + background}
    for name in {"mask", "brain"} & set(batch):
        planes = batch[name] if name == "mask" else batch[name][:, None]
        moved = F.grid_sample(planes.to(images.dtype), grid, mode="nearest", align_corners=False).to(planes.dtype)
        changed[name] = moved if name == "mask" else moved[:, 0]
    return {**batch, **changed}


def augment_intensity(
    images: torch.Tensor, keys: torch.Tensor, options: AugmentationOptions, value_range: tuple[float, float]
) -> torch.Tensor:
    """
    Changes the intensities of slices `(N, C, H, W)` in `value_range` at random, each by its own key `(N, 2)`, in this
    order: contrast, an uneven brightness, a blur, ghosts. Channels change alike; values may leave the range, as the
    authors'.

    This is cDDPM's `aug_intensity` slice by slice, on the device; the authors change whole volumes with torchio,
    before they take one slice. So it is close and not identical: here the brightness varies within the slice alone,
    blur and ghosts stay in it, and ghosts run along its rows or columns, never across slices.
    """
    if not any((options.gamma, options.bias_field, options.blur, options.ghosting)):
        return images
    # Uniform numbers in a fixed order, whatever is asked for: four decisions, gamma, one number for each term of the
    # field, blur along H and W, and axis, number and strength of the ghosts.
    changes = (
        (options.gamma, _gamma, 1),
        (options.bias_field, _bias_field, len(BIAS_POWERS)),
        (options.blur, _blur, 2),
        (options.ghosting, _ghosts, 3),
    )
    sizes = [4] + [size for _, _, size in changes]
    decisions, *draws = uniform(fold_in(keys, INTENSITY), (sum(sizes),)).split(sizes, dim=1)
    low, high = value_range
    changed = (images - low) / (high - low)
    for (probability, change, _), decision, drawn in zip(changes, decisions.unbind(1), draws, strict=True):
        if probability:
            chosen = (decision < probability)[:, None, None, None]
            changed = torch.where(chosen, change(changed, drawn), changed)
    return changed * (high - low) + low


def _gamma(images: torch.Tensor, drawn: torch.Tensor) -> torch.Tensor:
    exponent = (LOG_GAMMA * (2 * drawn - 1)).exp()[..., None, None]
    return images.sign() * images.abs() ** exponent


def _bias_field(images: torch.Tensor, drawn: torch.Tensor) -> torch.Tensor:
    height, width = images.shape[2:]
    y, x = (torch.linspace(-1, 1, size, device=images.device) for size in (height, width))
    terms = torch.stack([y[:, None] ** i * x**j for i, j in BIAS_POWERS])  # (terms, H, W)
    coefficients = BIAS_COEFFICIENT * (2 * drawn - 1)
    return images * torch.einsum("nt,thw->nhw", coefficients, terms).exp()[:, None]


def _blur(images: torch.Tensor, drawn: torch.Tensor) -> torch.Tensor:
    """Gaussian of its own standard deviations along H and W for each image."""
    deviations = drawn * BLUR_STD
    radius = math.ceil(4 * BLUR_STD)
    offsets = torch.arange(-radius, radius + 1, device=images.device)
    weights = torch.softmax(-0.5 * (offsets / deviations.clamp(min=1e-3)[..., None]) ** 2, dim=2)  # (N, 2, taps)
    number, channels, height, width = images.shape
    flat = images.reshape(1, number * channels, height, width)
    weights = weights.repeat_interleave(channels, dim=0)
    flat = F.pad(flat, (radius,) * 4, mode="replicate")
    flat = F.conv2d(flat, weights[:, 0, None, :, None], groups=number * channels)
    flat = F.conv2d(flat, weights[:, 1, None, None, :], groups=number * channels)
    return flat.reshape(images.shape)


def _ghosts(images: torch.Tensor, drawn: torch.Tensor) -> torch.Tensor:
    """Every k-th line of k-space is weakened, along one axis, but for those of the centre: k ghosts."""
    along_rows = drawn[:, 0, None] < 0.5
    first, last = GHOSTS
    number = first + (drawn[:, 1, None] * (last + 1 - first)).long().clamp(max=last - first)
    weakest, strongest = GHOST_INTENSITY
    intensity = weakest + drawn[:, 2, None] * (strongest - weakest)

    def weights(size: int, applies: torch.Tensor) -> torch.Tensor:  # (N, size), the zero frequency first
        lines = torch.arange(size, device=images.device)
        restored = max(round(GHOST_RESTORE * size), 1)
        begin = size // 2 - restored // 2
        centre = (lines >= begin) & (lines < begin + restored)
        weakened = (lines % number == 0) & ~centre & applies
        return torch.fft.ifftshift(1.0 - intensity * weakened, dim=1)

    height, width = images.shape[2:]
    lines = weights(height, ~along_rows)[:, None, :, None] * weights(width, along_rows)[:, None, None, :]
    return torch.fft.ifft2(torch.fft.fft2(images.float()) * lines).real.to(images.dtype)
