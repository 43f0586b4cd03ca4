"""Synthetic anomalies in healthy slices, as DRAEM makes them and SADM's authors use them: Perlin noise above a
threshold is the mask, its grey values, changed by three of ten augmenters, are the texture, which is blended into the
slice.

Zavrtanik, Kristan, Skocaj, "DRAEM - A discriminatively trained reconstruction embedding for surface anomaly
detection", ICCV 2021; SADM's `DRAEM/augmenter.py`. The augmenters, imgaug's in the original, are written here on
batches of grey images: imgaug does not run with today's numpy, and torchvision would be a requirement for one
function. Their random numbers cannot be those of the original, their distributions are.

Everything random about a slice comes from one vector of its own key, so that neither batches nor processes change it,
and nothing waits for the device.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from ..schedulers.draws import uniform


# N slices, C modalities, H x W pixels.

MAX_EXPONENT = 6  # up to 2^6 Perlin cells along an axis
THRESHOLD = 0.5  # of the Perlin noise, for the mask
ROTATION = 90.0  # degrees, of the noise
OPACITY = (0.2, 1.0)  # beta, the share of the texture
NUM_AUGMENTERS = 3  # of ten, different ones

_CORNERS = 2**MAX_EXPONENT + 1  # of the cells, per axis
_PARAMETERS = 3  # uniform numbers per augmenter and slice


def draw_anomalies(images: torch.Tensor, keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Draws one anomaly into each slice of `(N, C, H, W)` in [0, 1] from its key `(N, 2)`, the same in all modalities;
    returns the slices and masks `(N, 1, H, W)` of 0 and 1. About 7 % of the masks are empty, and those slices as they
    were; the median of the others covers 4 % of a slice, brain or not."""
    height, width = images.shape[2:]
    # Uniform numbers in a fixed order, however many of them are used: two exponents, rotation, beta, order of the
    # augmenters, their parameters in every round, angles.
    sizes = [2, 1, 1, len(AUGMENTERS), NUM_AUGMENTERS * _PARAMETERS, _CORNERS**2]
    exponents, turn, opacity, order, parameters, angles = uniform(keys, (sum(sizes),)).split(sizes, dim=1)

    # Noise on the next powers of two, of which cells are a part, cut to the slice.
    size = next_power_of_two(height), next_power_of_two(width)
    choices = [min(MAX_EXPONENT, side.bit_length() - 1) + 1 for side in size]
    cells = 2 ** torch.stack([(exponents[:, axis] * choices[axis]).long() for axis in (0, 1)], dim=1)
    noise = perlin_noise(size, cells, 2 * math.pi * angles.reshape(-1, _CORNERS, _CORNERS))[:, :height, :width]
    noise = rotate(noise, ROTATION * (2 * turn[:, 0] - 1))

    chosen = order.argsort(dim=1)[:, :NUM_AUGMENTERS]
    augmented = augment_texture(texture(noise), chosen, parameters.reshape(-1, NUM_AUGMENTERS, _PARAMETERS))
    low, high = OPACITY
    mask = (noise > THRESHOLD)[:, None].to(images.dtype)
    return blend(images, mask, augmented[:, None], low + (high - low) * opacity[:, 0]), mask


def next_power_of_two(size: int) -> int:
    """Returns the smallest power of two that is not below `size`."""
    return 1 << (size - 1).bit_length()


def perlin_noise(size: tuple[int, int], cells: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """Computes Perlin noise `(N, H, W)`, about -1 to 1, from the numbers of its `cells` along H and W, `(N, 2)`, which
    should divide the `size`, and the angles of the gradients at their corners in radians, `(N, P, Q)`, at least one
    more than cells along either axis."""
    # Position in cells, y (N, H, 1) and x (N, 1, W), its corner above and to the left, and where it lies in the cell.
    down, across = (torch.arange(side, device=angles.device, dtype=angles.dtype) / side for side in size)
    y = down[None, :, None] * cells[:, 0, None, None]
    x = across[None, None, :] * cells[:, 1, None, None]
    row, column = y.floor(), x.floor()
    y, x = y - row, x - column
    number = torch.arange(len(angles), device=angles.device)[:, None, None]

    def product(below: int, right: int) -> torch.Tensor:
        angle = angles[number, row.long() + below, column.long() + right]
        return angle.cos() * (y - below) + angle.sin() * (x - right)

    def fade(t: torch.Tensor) -> torch.Tensor:
        return t**3 * (t * (6 * t - 15) + 10)

    upper = torch.lerp(product(0, 0), product(0, 1), fade(x).expand(-1, size[0], -1))
    lower = torch.lerp(product(1, 0), product(1, 1), fade(x).expand(-1, size[0], -1))
    return math.sqrt(2) * torch.lerp(upper, lower, fade(y).expand_as(upper))


def rotate(images: torch.Tensor, degrees: torch.Tensor) -> torch.Tensor:
    """Turns images `(N, H, W)`, each by its angle `(N,)` about the centre, bilinear, 0 from outside."""
    angle = torch.deg2rad(degrees)
    cos, sin, nothing = angle.cos(), angle.sin(), torch.zeros_like(angle)
    aspect = images.shape[1] / images.shape[2]
    theta = torch.stack([cos, -sin * aspect, nothing, sin / aspect, cos, nothing], 1).reshape(-1, 2, 3)
    grid = F.affine_grid(theta, [len(images), 1, *images.shape[1:]], align_corners=False)
    return F.grid_sample(images[:, None], grid, align_corners=False)[:, 0]


def texture(noise: torch.Tensor) -> torch.Tensor:
    """Turns noise into grey values 0 to 255, whole numbers; negative noise wraps round, as it does in the original."""
    return (255 * noise).trunc().remainder(256)


def blend(images: torch.Tensor, mask: torch.Tensor, texture: torch.Tensor, opacity: torch.Tensor) -> torch.Tensor:
    """Blends: slices `(N, C, H, W)` in [0, 1] become, where the mask `(N, 1, H, W)` is 1, in part `opacity` `(N,)` the
    texture `(N, 1, H, W)` of grey values 0 to 255."""
    opacity = opacity.reshape(-1, 1, 1, 1).to(images.dtype)
    return images * (1 - mask) + opacity * (texture / 255 * mask) + (1 - opacity) * images * mask


def augment_texture(grey: torch.Tensor, chosen: torch.Tensor, parameters: torch.Tensor) -> torch.Tensor:
    """Sends each grey image of `(N, H, W)` through the `chosen` ones of `AUGMENTERS`, `(N, K)`, in their order, which
    take what they need of the `parameters` `(N, K, 3)`, uniform numbers in [0, 1)."""
    number = torch.arange(len(grey), device=grey.device)
    for round_ in range(chosen.shape[1]):
        u = parameters[:, round_, :, None, None]
        # All ten of all images and then the right one of each: less work than asking the device which.
        candidates = torch.stack([augmenter(grey, u[:, 0], u[:, 1], u[:, 2]) for augmenter in AUGMENTERS])
        grey = candidates[chosen[:, round_], number]
    return grey


# The augmenters: grey images (N, H, W) of whole numbers 0 to 255, and three uniform numbers (N, 1, 1) each. Ranges are
# those of DRAEM, where it names none imgaug's defaults.


def _whole(grey: torch.Tensor) -> torch.Tensor:
    return grey.round().clamp(0, 255)


def _gamma(grey, u, v, w):
    return _whole(255 * (grey / 255) ** (0.5 + 1.5 * u))


def _brightness(grey, u, v, w):
    return _whole(grey * (0.8 + 0.4 * u) + (60 * v - 30).round())


def _sharpness(grey, u, v, w):
    # From smoothed (0) over unchanged (1) to three times the detail, as PIL; the rim stays.
    kernel = grey.new_tensor([[1, 1, 1], [1, 5, 1], [1, 1, 1]]) / 13
    smooth = grey.clone()
    smooth[:, 1:-1, 1:-1] = _whole(F.conv2d(grey[:, None], kernel[None, None])[:, 0])
    return _whole(smooth + 3 * u * (grey - smooth))


def _hue_and_saturation(grey, u, v, w):
    # Grey has no colour until its saturation, here 0 to 50 of 255, is raised, and of the colour only red is kept: it
    # is less than the brightness where the hue, up to 50 of 255 parts of the circle from red, is more than 60 degrees
    # away.
    hue = (100 * u - 50).abs() / 255 * 360
    saturation = (100 * v - 50).clamp(min=0) / 255
    return _whole(grey * (1 - saturation * (hue / 60 - 1).clamp(0, 1)))


def _solarize(grey, u, v, w):
    return torch.where((v < 0.5) & (grey >= (32 + 96 * u).round()), 255 - grey, grey)


def _posterize(grey, u, v, w):
    step = 2 ** (8 - (1 + (8 * u).floor()))  # 1 to 8 bits stay
    return (grey / step).floor() * step


def _invert(grey, u, v, w):
    return 255 - grey


def _autocontrast(grey, u, v, w):
    # Up to 20 % of the pixels of either end are cut off.
    ordered = grey.flatten(1).sort(dim=1).values
    cut = ((20 * u[:, 0]).floor() / 100 * ordered.shape[1]).long()
    low = ordered.gather(1, cut)[:, :, None]
    high = ordered.gather(1, ordered.shape[1] - 1 - cut)[:, :, None]
    return torch.where(high > low, ((grey - low) * 255 / (high - low).clamp(min=1)).floor().clamp(0, 255), grey)


def _equalize(grey, u, v, w):
    # As PIL: the number of darker pixels, in steps of 1/255 of all but the brightest.
    levels = grey.long().flatten(1)
    counts = levels.new_zeros(len(grey), 256).scatter_add_(1, levels, torch.ones_like(levels))
    brightest = counts.gather(1, levels.amax(1, keepdim=True))
    step = (levels.shape[1] - brightest) // 255
    table = ((step // 2 + counts.cumsum(1) - counts) // step.clamp(min=1)).clamp(max=255)
    table = torch.where(step > 0, table, torch.arange(256, device=grey.device))
    return table.gather(1, levels).reshape(grey.shape).to(grey.dtype)


def _rotation(grey, u, v, w):
    return _whole(rotate(grey, 45 * (2 * u[:, 0, 0] - 1)))


AUGMENTERS = (
    _gamma,
    _brightness,
    _sharpness,
    _hue_and_saturation,
    _solarize,
    _posterize,
    _invert,
    _autocontrast,
    _equalize,
    _rotation,
)
