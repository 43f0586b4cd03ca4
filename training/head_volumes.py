"""Whole heads with skull and their brains, drawn as a training goes: what the brain extractor learns from."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from ..data.phantoms.heads import CONTRASTS, LESIONS, make_slices
from ..data.phantoms.label_maps import OUTER_FLUID, TISSUES, VESSEL, LabelMaps
from ..schedulers.draws import fold_in, normal, uniform


# N heads, X x Y x Z voxels along RAS axes. Draws of one head, apart from those of `data/phantoms/head_draws.py`.
_PLACE, _MOVE, _ANGLES, _OUTSIDE, _BIAS, _GRAIN, _CUT = range(200, 207)

# Tissues that are no brain and that its mask does not close over.
_HARD = [TISSUES.index(name) for name in ("soft", "eye", "mucosa", "skin", "bone", "marrow")]
# Half an edge of the box that closes the brain's surface, in mm.
_CLOSING = 7.5


@torch.no_grad()
def draw_heads(
    maps: LabelMaps, chosen: torch.Tensor, keys: torch.Tensor, size: Sequence[int], spacing: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Draws whole heads, each as another scanner may show it: any contrast, lesions, a neck, cut fields of view, turned
    heads, thick slices, uneven brightness, dark or bright fat, now and then without skull.

    Args:
        maps ([`LabelMaps`]): Their device is that of the result.
        chosen (`torch.Tensor` of shape `(N,)`): Map of each head.
        keys (`torch.Tensor` of shape `(N, 2)`): What everything random of a head is drawn from.
        size (`Sequence[int]`): X, Y and Z in voxels.
        spacing (`float`): Edge of a voxel in mm.

    Returns:
        Volumes and brains, both `(N, 1, X, Y, Z)` float32; brightness from 0 on, brains 0 or 1.
    """
    device, (width, height, depth) = maps.tissues.device, size
    keys, chosen = keys.to(device), chosen.to(device)
    u = uniform(fold_in(keys, _PLACE), (4,))
    # The middle of the volume lies up to 45 mm below that of the brain, or 25 mm above it.
    planes = (torch.arange(depth, device=device) - (depth - 1) / 2) * spacing
    positions = (-45 + 70 * u[:, :1]) + planes
    contrast = (u[:, 1] * len(CONTRASTS)).long()
    # Half of the heads are healthy.
    lesions = [(None, None, None, *LESIONS)[int(6 * value)] for value in u[:, 2].tolist()]
    images = torch.empty(len(keys), *size, device=device)
    tissues = torch.empty(len(keys), *size, dtype=torch.uint8, device=device)
    for number, name in enumerate(CONTRASTS):
        own = (contrast == number).nonzero()[:, 0]
        if not len(own):
            continue
        heads = make_slices(
            maps,
            chosen[own],
            keys[own],
            positions[own],
            contrasts=(name,),
            size=(height, width),
            spacing=spacing,
            thickness=torch.full((len(own),), spacing, device=device),
            lesions=[lesions[index] for index in own.tolist()],
        )
        # (Z, H, W), anterior and right first, to RAS axes
        images[own] = heads.images[:, 0].permute(0, 3, 2, 1).flip(1, 2)
        tissues[own] = heads.tissues.permute(0, 3, 2, 1).flip(1, 2)
    brain = find_brains(tissues, spacing)
    images, stripped = _change_outside(images, tissues, brain, keys)
    images, brain = _move(images[:, None], brain[:, None].float(), keys, stripped)
    images = _scan(images, keys)
    return _cut(images, brain, keys, spacing)


def find_brains(tissues: torch.Tensor, spacing: float) -> torch.Tensor:
    """Finds brains `(N, X, Y, Z)`, bool, in tissues of this shape: brain tissue and the fluid in it, closed over
    sulci."""
    tissue = ((tissues > 0) & (tissues < VESSEL)).float()
    half = max(1, round(_CLOSING / spacing))
    wide = F.pad(tissue[:, None], (half,) * 6)
    for sign in (1, -1):
        for axis in range(3):
            box, padding = [1] * 3, [0] * 3
            box[axis], padding[axis] = 2 * half + 1, half
            wide = sign * F.max_pool3d(sign * wide, box, 1, padding)
    closed = wide[:, 0, half:-half, half:-half, half:-half] > 0.5
    return closed & ~torch.isin(tissues, torch.tensor(_HARD, dtype=torch.uint8, device=tissues.device))


def _change_outside(images, tissues, brain, keys) -> tuple[torch.Tensor, torch.Tensor]:
    """Images `(N, X, Y, Z)` whose fat and skin are darker (fat suppression) or brighter, or that have no skull, and
    which these are, `(N,)`."""
    u = uniform(fold_in(keys, _OUTSIDE), (5,))[..., None, None, None]
    factor = torch.where(u[:, 0] < 0.3, 0.05 + 0.6 * u[:, 1], torch.where(u[:, 0] < 0.5, 1.2 + 1.8 * u[:, 1], 1.0))
    outer = ~brain & (tissues > 0) & (tissues != OUTER_FLUID)
    weight = F.avg_pool3d(outer.float()[:, None], 3, 1, 1)[:, 0]
    images = images * (1 + weight * (factor - 1))
    # A third of the heads come stripped: a third of these clean, a third with a rim, a third with remnants, such as
    # eyes and scalp.
    inside = brain.float()
    rim = F.max_pool3d(inside[:, None], 3, 1, 1)[:, 0]
    around = F.max_pool3d(F.max_pool3d(inside[:, None], 5, 1, 2), 5, 1, 2)[:, 0]
    field = normal(fold_in(fold_in(keys, _OUTSIDE), 1), (1, 7, 7, 7))
    field = F.interpolate(field, images.shape[1:], mode="trilinear", align_corners=True)[:, 0]
    remnants = torch.maximum(inside, around * (field > 1.2 * u[:, 4] - 0.4))
    left = torch.where(u[:, 3] < 1 / 3, inside, torch.where(u[:, 3] < 2 / 3, rim, remnants))
    bare = u[:, 2] < 1 / 3
    return torch.where(bare, images * left, images), bare[:, 0, 0, 0]


def _move(images, brain, keys, stripped) -> tuple[torch.Tensor, torch.Tensor]:
    """Turns, scales and shifts three quarters of the volumes `(N, 1, X, Y, Z)` and their brains. Of a third of the
    `stripped` ones the slices lie too close, as in files that do not say their distance."""
    u = uniform(fold_in(keys, _MOVE), (8,))
    angles = normal(fold_in(keys, _ANGLES), (3,)) * math.radians(12)
    moves = u[:, 0] < 0.75
    heads, device = len(keys), keys.device
    matrix = torch.eye(3, device=device).repeat(heads, 1, 1)
    for axis, (first, second) in enumerate(((1, 2), (0, 2), (0, 1))):
        turn = torch.eye(3, device=device).repeat(heads, 1, 1)
        turn[:, first, first] = turn[:, second, second] = angles[:, axis].cos()
        turn[:, first, second], turn[:, second, first] = -angles[:, axis].sin(), angles[:, axis].sin()
        matrix = matrix @ turn
    scale = (0.88 + 0.27 * u[:, 1:2]).repeat(1, 3)
    scale[:, 2] *= torch.where(stripped & (u[:, 5] < 1 / 3), 1 + 4 * u[:, 6], 1.0)
    matrix = matrix * scale[:, None]
    # affine_grid's coordinates run from -1 to 1 along every side, the last axis first.
    sides = torch.tensor(images.shape[:1:-1], dtype=torch.float32, device=device)
    matrix = matrix * sides / sides[:, None]
    shift = 0.2 * (2 * u[:, 2:5] - 1)
    theta = torch.cat([matrix, shift[..., None]], 2)
    theta = torch.where(moves[:, None, None], theta, torch.eye(3, 4, device=device))
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    moved = F.grid_sample(torch.cat([images, brain], 1), grid, align_corners=False)
    return moved[:, :1], (moved[:, 1:] > 0.5).float()


def _scan(images: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Volumes `(N, 1, X, Y, Z)` with thick slices, uneven brightness, another gamma, and noise."""
    u = uniform(fold_in(keys, _BIAS), (8,))
    knots = normal(fold_in(fold_in(keys, _BIAS), 1), (1, 4, 4, 4))
    field = F.interpolate(knots, images.shape[2:], mode="trilinear", align_corners=True)
    strength = 0.5 * u[:, 0].square()
    images = images * torch.exp(strength[:, None, None, None, None] * field)
    factors = torch.where(u[:, 1] < 0.4, 2 + (2 * u[:, 3]).long(), 1).tolist()
    for head, (axis, factor) in enumerate(zip((3 * u[:, 2]).long().tolist(), factors, strict=True)):
        if factor > 1:
            pool = [factor if own == axis else 1 for own in range(3)]
            own = F.avg_pool3d(images[head : head + 1], pool, ceil_mode=True, count_include_pad=False)
            images[head] = F.interpolate(own, images.shape[2:], mode="trilinear")[0]
    top = images.amax((1, 2, 3, 4), keepdim=True).clamp(min=1e-6)
    gamma = torch.exp(0.4 * (2 * u[:, 4] - 1))[:, None, None, None, None]
    images = top * (images / top).clamp(0, 1) ** gamma
    sigma = 0.05 * u[:, 5].square()
    grain = normal(fold_in(keys, _GRAIN), images.shape[1:])
    return (images + sigma[:, None, None, None, None] * grain).abs()


def _cut(images, brain, keys, spacing: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Volumes and brains `(N, 1, X, Y, Z)` with a smaller field of view: 0 beyond it."""
    u = uniform(fold_in(keys, _CUT), (3, 2, 2))
    # How often, and how much of the volume in mm, at the low and the high end of each axis.
    chances = torch.tensor([[0.2, 0.2], [0.15, 0.15], [0.4, 0.25]], device=keys.device)
    reach = torch.tensor([[40.0, 40.0], [40.0, 40.0], [90.0, 50.0]], device=keys.device)
    cuts = torch.where(u[..., 0] < chances, u[..., 1] * reach / spacing, 0.0)
    inside = torch.ones((), dtype=torch.bool, device=keys.device)
    for axis in range(3):
        length = images.shape[2 + axis]
        index = torch.arange(length, device=keys.device)
        kept = (index >= cuts[:, axis, :1]) & (index < length - cuts[:, axis, 1:])
        shape = [len(keys), 1, 1, 1, 1]
        shape[2 + axis] = length
        inside = inside & kept.view(shape)
    return images * inside, brain * inside
