"""Synthetic heads of label maps: healthy images of any contrast, of which no scan was ever taken.

A map that names the tissue of every voxel is bent, every tissue gets a brightness that its contrast allows, and the
scanner's blur, shading and noise are added (the idea of SynthSeg, Billot et al., Medical Image Analysis 86, 2023).
Networks that are trained on such heads have seen no patient.

Everything random is a function of a head's key and of a slice's number: a slice is the same alone, within its volume,
in any batch and on any device (to rounding).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from ...checks import check_choice
from ...schedulers.draws import fold_in, uniform
from .head_draws import ERRORS, KNOTS, LESION, MASK, SHAPE, HeadDraws
from .head_painting import paint_slices
from .head_splines import Places, spline
from .label_maps import AIR, CORTEX, FLUID, LAST_OF_BRAIN, OUTER_FLUID, VESSEL, WHITE, LabelMaps


# B heads, M maps, Z slices, S samples of a slice's thickness, H x W pixels of the network's plane (rows from anterior
# to posterior, columns from the patient's right to the left), T tissues; mm are RAS millimetres from the map's centre.

# How the source of a recipe calls synthetic heads.
HEADS = "synthetic heads"
CONTRASTS = ("flair", "t1", "t2", "any")
LESIONS = ("tumour", "ms", "stroke")
LOOKS = ("usual", "hyper", "hypo", "iso")

# Edge of the cubes that lesions are placed in, in mm, and the planes, rows and columns of them.
_COARSE, _COARSE_SHAPE = 6.0, (26, 36, 28)


@dataclass(frozen=True)
class Heads:
    """
    Holds slices of synthetic heads.

    Args:
        images (`torch.Tensor` of shape `(B, C, Z, H, W)`): About 0 to 2, cortex or white matter near 1; a channel per
            contrast.
        brain (`torch.Tensor` of shape `(B, Z, H, W)`, bool): The brain, with the fluid in and around it.
        tissues (`torch.Tensor` of shape `(B, Z, H, W)`, uint8): Tissue of the slice's middle.
        lesion (`torch.Tensor` of shape `(B, Z, H, W)`, bool): Where lesions make up more than half of a voxel.
    """

    images: torch.Tensor
    brain: torch.Tensor
    tissues: torch.Tensor
    lesion: torch.Tensor


@torch.no_grad()
def make_slices(
    maps: LabelMaps,
    chosen: torch.Tensor,
    keys: torch.Tensor | HeadDraws,
    positions: torch.Tensor,
    *,
    contrasts: Sequence[str] = ("flair",),
    size: tuple[int, int] = (160, 128),
    spacing: float | torch.Tensor = 1.5,
    centre: torch.Tensor | None = None,
    thickness: torch.Tensor | None = None,
    samples: int | None = None,
    lesions: Sequence[str | None] | None = None,
    lesion_masks: LabelMaps | None = None,
    look: str = "usual",
    mask_errors: bool = False,
) -> Heads:
    """
    Makes slices of heads.

    Args:
        maps ([`LabelMaps`]): Their device is the device of the result.
        chosen (`torch.Tensor` of shape `(B,)`): Map of each head.
        keys (`torch.Tensor` of shape `(B, 2)`, or [`HeadDraws`] of them):
            What everything random of a head is drawn from. Draws that were given before are not made again.
        positions (`torch.Tensor` of shape `(B, Z)`): Middle of each slice, in mm above the centre of the brain.
        contrasts (`Sequence[str]`): Of `CONTRASTS`, a channel each; the anatomy is the same in all.
        size (`tuple[int, int]`): H and W.
        spacing (`float` or `torch.Tensor` of shape `(B,)`): Size of a pixel in mm.
        centre (`torch.Tensor` of shape `(B, 2)`, *optional*):
            Middle of the slices, in mm towards anterior and right; the centre of the brain's map by default.
        thickness (`torch.Tensor` of shape `(B,)`, *optional*): Of a slice, in mm; 1 mm for one sample a slice.
        samples (`int`, *optional*):
            Odd number of samples of a slice's thickness; by default about 1.3 mm apart in the thickest of the batch.
        lesions (`Sequence[str | None]`, *optional*): What every head has of `LESIONS`; none by default.
        lesion_masks ([`LabelMaps`], *optional*):
            A mask of a lesion for each head instead of drawn ones, see [`read_lesion_masks`]. It is bent with the head,
            and marks only what is tissue of the brain.
        look (`str`):
            Of the lesions: `"usual"`, bright in FLAIR and T2, dark in T1; `"hyper"` and `"hypo"`, brighter and darker
            than white matter in every contrast; `"iso"`, as bright, with another texture.
        mask_errors (`bool`):
            Let some masks leave remnants of the head beside the brain, or cut into it, as brain extraction does.
    """
    check_choice("look", look, LOOKS)
    for contrast in contrasts:
        check_choice("contrast", contrast, CONTRASTS)
    for lesion in lesions or ():
        check_choice("lesions", lesion, (None, *LESIONS))
    if lesion_masks is not None and (lesions is not None or len(lesion_masks) != len(keys)):
        raise ValueError(
            f"`lesion_masks` must hold a mask for each of the {len(keys)} heads, without `lesions` beside it, got"
            f" {len(lesion_masks)}."
        )
    draws = keys if isinstance(keys, HeadDraws) else HeadDraws(keys)
    device, heads = maps.tissues.device, len(draws)
    # The mean over the thickness, of an odd number, so that there is a middle.
    samples = samples or (1 if thickness is None else math.ceil(float(thickness.max()) / 1.3) | 1)
    thickness = torch.ones(heads, device=device) if thickness is None else thickness.to(device)
    offsets = (torch.arange(samples, device=device) + 0.5) / samples - 0.5
    z = positions.to(device)[:, :, None] + thickness[:, None, None] * offsets  # (B, Z, S)
    spacing = torch.as_tensor(spacing, dtype=torch.float32, device=device).expand(heads)
    centre = torch.zeros(heads, 2, device=device) if centre is None else centre.to(device)
    y, x = (
        centre[:, axis, None] - (torch.arange(length, device=device) - (length - 1) / 2) * spacing[:, None]
        for axis, length in enumerate(size)
    )
    # Samples of a slice lie apart in its plane, too, the middle one in the middle: what is smaller than a pixel is
    # averaged.
    from_middle = torch.arange(samples, device=device) - samples // 2
    rows, columns = ((samples // 2 + step * from_middle) % samples for step in (2, -2))
    apart = torch.stack([offsets[rows], offsets[columns]], -1) * spacing[:, None, None]  # (B, S, 2)
    apart = apart[:, None].expand(*z.shape, 2).flatten(1, 2)
    samples_of_all = Places(z.flatten(1), y, x)
    tissues = _bend(maps, chosen.to(device), draws, samples_of_all, apart).unflatten(1, z.shape[1:])
    brain = _brain_mask(tissues, draws, spacing)
    # A slice's own key: the number of its position, in micrometres, which may be negative.
    numbers = ((z.mean(2) + 1000) * 1000).round().long()
    slice_keys = fold_in(draws.keys.repeat_interleave(z.shape[1], 0), numbers.flatten())
    places = Places(positions.to(device), y, x)
    if mask_errors:
        brain = _with_errors(brain, tissues, draws, places)
    lesion = None
    if lesions is not None and any(lesions):
        lesion = _draw_lesions(maps, chosen.to(device), draws, lesions, places)
    elif lesion_masks is not None:
        own = torch.arange(heads, device=device)
        inside = _bend(lesion_masks.to(device), own, draws, samples_of_all, apart).unflatten(1, z.shape[1:])
        lesion = torch.stack([inside.float().mean(2), torch.zeros_like(brain, dtype=torch.float32)], 1)
    if lesion is not None:
        lesion = lesion * _is_solid(tissues).float().mean(2)[:, None]
    images = []
    for channel, contrast in enumerate(contrasts):
        own = draws.of(100 + channel), fold_in(slice_keys, 100 + channel)
        images.append(paint_slices(tissues, contrast, *own, places, lesion, look))
    marked = torch.zeros_like(brain) if lesion is None else (lesion[:, 0] > 0.5) & brain
    return Heads(torch.stack(images, 1), brain, tissues[:, :, samples // 2], marked)


def _bend(
    maps: LabelMaps, chosen: torch.Tensor, draws: HeadDraws, places: Places, apart: torch.Tensor | None = None
) -> torch.Tensor:
    """Tissues `(B, P, H, W)` of bent maps at places; a plane's points lie `apart (B, P, 2)`, in mm, from these rows
    and columns."""
    matrix = draws.once("matrix", lambda: _draw_matrix(draws))
    shifts = sum(
        spline(draws.once(("knots", number), lambda number=number: _draw_knots(draws, number)), places)
        for number in range(len(_DISPLACEMENTS))
    )
    z, y, x = places.z[:, :, None, None], places.y[:, None, :, None], places.x[:, None, None, :]
    if apart is not None:
        y, x = y + apart[:, :, :1, None], x + apart[:, :, 1:, None]
    linear = [matrix[:, axis, :, None, None, None] for axis in range(3)]
    # Rows of the matrix give source x, y, z in mm of a point (x, y, z).
    points = [row[:, 0] * x + row[:, 1] * y + row[:, 2] * z + shifts[:, axis] for axis, row in enumerate(linear)]
    to_voxel = maps.to_voxel[chosen][..., None, None, None]
    shape, index, inside = maps.tissues.shape[1:], chosen[:, None, None, None], True
    for axis, length in enumerate(shape):
        row = to_voxel[:, axis]
        voxel = row[:, 0] * points[0] + row[:, 1] * points[1] + row[:, 2] * points[2] + row[:, 3]
        voxel = voxel.round_().long()
        inside = inside & (voxel >= 0) & (voxel < length)
        index = index * length + voxel.clamp_(0, length - 1)
    return torch.where(inside, maps.tissues.flatten()[index], AIR)


def _draw_matrix(draws: HeadDraws) -> torch.Tensor:
    """Matrices `(B, 3, 3)` that turn, shear, scale and perhaps mirror a head."""
    heads, device = len(draws), draws.keys.device
    u, angles = draws.of(SHAPE).uniform(16), draws.of(SHAPE, 1).normal(6)
    cos, sin = (angles[:, :3] * math.radians(5)).cos(), (angles[:, :3] * math.radians(5)).sin()
    matrix = torch.eye(3, device=device).repeat(heads, 1, 1)
    for axis, (first, second) in enumerate(((1, 2), (0, 2), (0, 1))):
        turn = torch.eye(3, device=device).repeat(heads, 1, 1)
        turn[:, first, first] = turn[:, second, second] = cos[:, axis]
        turn[:, first, second], turn[:, second, first] = -sin[:, axis], sin[:, axis]
        matrix = matrix @ turn
    shear = torch.eye(3, device=device).repeat(heads, 1, 1)
    for number, (row, column) in enumerate(((0, 1), (0, 2), (1, 2))):
        shear[:, row, column] = 0.02 * angles[:, 3 + number]
    scale = 1 / (0.87 + 0.26 * u[:, :3])
    scale[:, 0] *= torch.where(u[:, 3] < 0.5, -1.0, 1.0)  # left and right
    return matrix @ shear * scale[:, None]


# Two fields of displacements, knots and size in mm: the shape of the head, and that of its folds.
_DISPLACEMENTS = (((5, 5, 5), 3.5), ((10, 10, 9), 1.5))


def _draw_knots(draws: HeadDraws, number: int) -> torch.Tensor:
    """Coefficients `(B, 3, I, J, K)` of a field of displacements."""
    knots, size = _DISPLACEMENTS[number]
    strength = size * (0.4 + 0.8 * draws.of(SHAPE).uniform(16)[:, 4 + number])
    return draws.of(KNOTS, number).normal(3, *knots) * strength[:, None, None, None, None]


def _brain_mask(tissues: torch.Tensor, draws: HeadDraws, spacing: torch.Tensor) -> torch.Tensor:
    """Masks `(B, Z, H, W)` as brain extraction gives them: the tissue of the brain, closed over narrow sulci, and the
    fluid that it surrounds."""
    is_brain = (tissues > AIR) & (tissues <= LAST_OF_BRAIN)
    tissue, outer = is_brain.float().mean(2), (tissues == OUTER_FLUID).float().mean(2) > 0.5
    boxes = 1 + 2 * ((4.5 + 6 * draws.of(MASK).uniform()) / spacing).round().long().clamp(min=1)  # 9 to 21 mm
    reaches = (30 / spacing).round().long()
    closed = _by_size(_close, (tissue > 0.5).float(), boxes)
    share = _by_size(_mean_around, tissue, reaches)
    return (closed > 0.5) | (outer & (share > 0.5))


def _by_size(function, images: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
    """Applies `function(images, size)` to the images `(B, ...)` of every size `(B,)` at once."""
    sizes, order = sizes.sort()
    # A GPU is waited for here, but once and not for every size.
    values, counts = np.unique(sizes.cpu(), return_counts=True)
    parts = images[order].split(counts.tolist())
    changed = torch.empty_like(images)
    changed[order] = torch.cat([function(part, int(size)) for part, size in zip(parts, values, strict=True)])
    return changed


def _close(masks: torch.Tensor, box: int) -> torch.Tensor:
    half = box // 2
    wide = _max_pool(F.pad(masks, (half,) * 4), box)
    return -_max_pool(F.pad(-wide, (half,) * 4, value=-1.0)[..., half:-half, half:-half], box, half)


def _mean_around(images: torch.Tensor, reach: int) -> torch.Tensor:
    around = 2 * reach + 1
    rows = F.avg_pool2d(images, (around, 1), 1, (reach, 0))
    return F.avg_pool2d(rows, (1, around), 1, (0, reach))


def _with_errors(brain: torch.Tensor, tissues: torch.Tensor, draws: HeadDraws, places: Places) -> torch.Tensor:
    """Masks `(B, Z, H, W)` that in six of ten heads reach into what lies around the brain, in a quarter cut a rim off
    it, here and there."""
    field = spline(draws.of(ERRORS).normal(1, 9, 9, 8), places)[:, 0]
    u = draws.of(ERRORS, 1).uniform(4)[..., None, None, None]
    head = (tissues > AIR).float().mean(2) > 0.5
    reach = (2 * u[:, 1]).masked_fill(u[:, 0] > 0.6, torch.inf)
    cut = (0.4 + 1.6 * u[:, 3]).masked_fill(u[:, 2] > 0.25, torch.inf)
    near = _max_pool(brain.float(), 15, 7) > 0
    inner = _max_pool((~brain).float(), 3, 1) == 0
    return (brain | (near & head & (field > reach))) & (inner | (field > -cut))


def _max_pool(images: torch.Tensor, box: int, padding: int = 0) -> torch.Tensor:
    # One axis after the other: a box of 13 x 13 costs 26 comparisons instead of 169.
    return F.max_pool2d(F.max_pool2d(images, (box, 1), 1, (padding, 0)), (1, box), 1, (0, padding))


def _is_solid(tissues: torch.Tensor) -> torch.Tensor:
    return (tissues > AIR) & (tissues < VESSEL) & (tissues != FLUID)


def _draw_lesions(
    maps: LabelMaps, chosen: torch.Tensor, draws: HeadDraws, kinds: Sequence[str | None], places: Places
) -> torch.Tensor:
    """Weights `(B, 2, Z, H, W)` in [0, 1] of lesions and of their cores at planes, rows and columns in mm: blobs with
    uneven edges, tumours in the white matter, plaques of MS beside the ventricles, strokes in the cortex."""
    device, heads = draws.keys.device, len(draws)
    grid = [(torch.arange(size, device=device) - (size - 1) / 2) * _COARSE for size in _COARSE_SHAPE]
    tissues = _bend(maps, chosen, draws, Places(*(axis.expand(heads, -1) for axis in grid)))
    white = tissues == WHITE
    beside = white & (F.max_pool3d((tissues == FLUID).float(), 5, 1, 2) > 0)
    allowed = {"tumour": white, "ms": beside, "stroke": tissues == CORTEX}
    draws = draws.of(LESION)
    uneven = spline(draws.of(0).normal(1, 20, 20, 18), places)[:, 0]
    drawn = draws.of(1).uniform(16)
    weights = torch.zeros(heads, 2, *uneven.shape[1:], device=device)
    for head, kind in enumerate(kinds):
        if kind is None:
            continue
        u, count = drawn[head], 4 + int(drawn[head, 0] * 8) if kind == "ms" else 1
        spots = fold_in(draws.keys[head].expand(count, 2), torch.arange(2, 2 + count, device=device))
        # The place with the highest number of those that are allowed; a map without any has it in the middle.
        order = uniform(spots, (tissues[head].numel(),)) * allowed[kind][head].flatten()
        index = torch.stack(torch.unravel_index(order.argmax(1), tissues.shape[1:]), 1)
        for spot in range(count):
            v = uniform(fold_in(spots[spot : spot + 1], 1), (8,))[0]
            low, high = {"tumour": (10, 26), "ms": (2.5, 7), "stroke": (12, 28)}[kind]
            radius = (low + (high - low) * v[0]) * (0.75 + 0.6 * v[1:4])
            axes = zip((places.z, places.y, places.x), grid, index[spot], radius, strict=True)
            z, y, x = (((place[head] - axis[number]) / length) ** 2 for place, axis, number, length in axes)
            distance = (z[:, None, None] + y[:, None] + x).sqrt() + 0.2 * uneven[head]
            soft = 0.05 + 0.12 * u[1]
            weights[head, 0] = torch.maximum(weights[head, 0], ((1 - distance) / soft).sigmoid())
            if kind == "tumour" and u[2] < 0.5:
                weights[head, 1] = ((0.3 + 0.3 * u[3] - distance) / soft).sigmoid()
    return weights
