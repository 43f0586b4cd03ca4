"""How heads look in a contrast: brightness of tissues and lesions, and what a scanner adds."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ...schedulers.draws import fold_in, normal
from .head_draws import FIELDS, LESION, LOOK, NOISE, RIMS, SCANNER, TEXTURE, TISSUE, HeadDraws
from .head_splines import Places, spline
from .label_maps import CORTEX, FLUID, OUTER_FLUID, TISSUES, WHITE


# B heads, Z slices, S samples of a slice's thickness, H x W pixels, T tissues.


def paint_slices(
    tissues: torch.Tensor,
    contrast: str,
    draws: HeadDraws,
    slice_keys: torch.Tensor,
    places: Places,
    lesion: torch.Tensor | None,
    look: str,
) -> torch.Tensor:
    """
    Paints slices as a scanner shows them: brightness of tissues, lesions, blur, shading and noise.

    Args:
        tissues (`torch.Tensor` of shape `(B, Z, S, H, W)`): Of every sample of a slice's thickness.
        contrast (`str`): Of `heads.CONTRASTS`.
        draws ([`HeadDraws`]): Of the heads in this contrast.
        slice_keys (`torch.Tensor` of shape `(B Z, 2)`): Of every slice in this contrast, for what differs from slice to
            slice.
        places ([`Places`]): Middles of the slices, and their rows and columns.
        lesion (`torch.Tensor` of shape `(B, 2, Z, H, W)`, *optional*): Weights in [0, 1] of lesions and of their cores.
        look (`str`): Of the lesions, of `heads.LOOKS`.

    Returns:
        `torch.Tensor` of shape `(B, Z, H, W)`: about 0 to 2, cortex or white matter near 1.
    """
    heads, slices, samples, height, width = tissues.shape
    means, deviations = draws.once(("tissues", contrast), lambda: _tissue_values(contrast, draws))
    flat = tissues.flatten(1).long()
    image = means.gather(1, flat).view_as(tissues)
    # Noise of the tissue itself, coarser than a voxel so that it survives the blur.
    grain = normal(fold_in(slice_keys, TEXTURE), (samples, height, width)).view_as(tissues)
    image = image + deviations.gather(1, flat).view_as(tissues) * grain
    image = image.mean(2)
    rims = _rims(tissues) * (0.35 * draws.of(RIMS).uniform() ** 2)[:, None, None, None]
    image = image * (1 - rims if contrast == "t1" else 1 + rims)
    if lesion is not None:
        values = _lesion_values(contrast, look, means, draws)[..., None, None, None]
        rough = 0.2 * values[:, 0] * F.avg_pool2d(grain[:, :, 0], 3, 1, 1)
        image = image + lesion[:, 0] * (values[:, 0] + rough - image)
        image = image + lesion[:, 1] * (values[:, 1] - image)

    u = draws.of(SCANNER).uniform(8)[..., None, None, None]
    fields = [
        spline(draws.of(FIELDS, number).normal(1, *knots), places)[:, 0]
        for number, knots in enumerate(((14, 14, 12), (7, 7, 6), (4, 4, 3)))
    ]
    image = image * (1 + 0.05 * u[:, 0] * fields[0] + 0.05 * u[:, 1] * fields[1])
    # Regions differ within a tissue, and fluid that flows shines or fades.
    for number, (kind, strength) in enumerate(((WHITE, 0.1), (CORTEX, 0.12), (FLUID, 0.35))):
        region = (tissues == kind) | ((tissues == OUTER_FLUID) if kind == FLUID else False)
        knots = draws.of(FIELDS, 3 + number).normal(1, 9, 9, 8)
        own = spline(knots, places)[:, 0] * strength * u[:, 6 if kind == FLUID else 7] ** 2
        image = image * (1 + own * region.float().mean(2)).clamp(min=0)
    image = _blur(image, 0.3 + 0.5 * u[:, 2, 0, 0, 0])
    image = image.clamp(min=0) ** (0.75 + 0.65 * u[:, 3])
    image = image * torch.exp((0.02 + 0.2 * u[:, 4]) * fields[2])
    # Rician: the magnitude of a complex signal with noise in both parts.
    sigma = 0.005 + 0.045 * u[:, 5] ** 2
    parts = normal(fold_in(slice_keys, NOISE), (2, height, width)).view(heads, slices, 2, height, width)
    return ((image + sigma * parts[:, :, 0]) ** 2 + (sigma * parts[:, :, 1]) ** 2).sqrt()


def _lesion_values(contrast: str, look: str, means: torch.Tensor, draws: HeadDraws) -> torch.Tensor:
    """Brightness `(B, 2)` of lesions and of their cores."""
    white, cortex, fluid = means[:, WHITE], means[:, CORTEX], means[:, FLUID]
    u = draws.of(LESION).uniform(4)
    core = fluid + (cortex - fluid) * 0.5 * u[:, 1]
    if look == "iso":
        return torch.stack([white, white], 1)
    if look == "usual" and contrast == "flair":
        return torch.stack([cortex * (1.15 + 0.55 * u[:, 0]), core], 1)
    if look == "usual" and contrast in ("t1", "t2"):
        return torch.stack([fluid + (cortex - fluid) * (0.2 + 0.6 * u[:, 0]), core], 1)
    bright = u[:, 2] < 0.5 if look == "usual" else torch.full_like(u[:, 2], look == "hyper") > 0
    value = white * torch.where(bright, 1.25 + 0.55 * u[:, 0], 0.35 + 0.4 * u[:, 0])
    return torch.stack([value, value * (0.8 + 0.4 * u[:, 1])], 1)


def _rims(tissues: torch.Tensor) -> torch.Tensor:
    """Weight in [0, 1], `(B, Z, H, W)`, of white matter close to a ventricle, whose rims and caps shine in many healthy
    people."""
    ventricle = (tissues == FLUID).float().mean(2)
    white = (tissues == WHITE).float().mean(2)
    near = F.avg_pool2d(F.max_pool2d(ventricle, 5, 1, 2), 5, 1, 2)
    return near * white


def _blur(images: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """Blurs `(B, Z, H, W)` in the plane by a Gaussian of `sigma (B,)` pixels, below 1."""
    taps = torch.exp(-(torch.arange(-3, 4, device=images.device) ** 2) / (2 * sigma[:, None] ** 2))
    taps = taps / taps.sum(1, keepdim=True)
    heads, slices, height, width = images.shape
    blurred = F.pad(images.transpose(0, 1), (3,) * 4, mode="replicate")
    blurred = F.conv2d(blurred, taps[:, None, :, None], groups=heads)
    return F.conv2d(blurred, taps[:, None, None], groups=heads).transpose(0, 1)


def _tissue_values(contrast: str, draws: HeadDraws) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation `(B, T)` of every tissue's brightness."""
    u = draws.of(TISSUE).uniform(2, len(TISSUES))
    deviations = 0.005 + 0.055 * u[:, 1] ** 1.5
    for tissue in ("soft", "mucosa", "skin", "marrow"):
        deviations[:, TISSUES.index(tissue)] += 0.12  # fat, muscle and vessels in one
    u = u[:, 0]
    if contrast != "any":
        return _means(contrast, u), deviations
    # Of the known contrasts more than of those that no sequence has.
    kinds = ("flair", "t1", "t2", "random")
    look = draws.of(LOOK).uniform()
    drawn = sum((look > share).long() for share in (0.25, 0.45, 0.65))
    means = torch.stack([_means(kind, u) for kind in kinds])
    return means[drawn, torch.arange(len(draws), device=draws.keys.device)], deviations


def _means(contrast: str, drawn: torch.Tensor) -> torch.Tensor:
    """Mean brightness `(B, T)` of every tissue in FLAIR, T1, T2 or a random contrast, from uniform numbers of the same
    shape."""
    u = dict(zip(TISSUES, drawn.unbind(1), strict=True))

    def between(tissue, start, end, low=0.0, high=1.0):
        return start + (end - start) * (low + (high - low) * u[tissue])

    one = torch.ones_like(u["air"])
    if contrast == "random":
        white, cortex, fluid = (0.05 + 1.15 * u[tissue] for tissue in ("white", "cortex", "fluid"))
    elif contrast == "flair":
        white, cortex, fluid = 0.62 + 0.38 * u["white"], one, 0.12 + 0.63 * u["fluid"] ** 1.5
    elif contrast == "t1":
        white, cortex, fluid = one, 0.55 + 0.3 * u["cortex"], 0.08 + 0.3 * u["fluid"]
    else:
        cortex, fluid = 0.35 + 0.32 * u["cortex"], one
        white = cortex * (0.6 + 0.28 * u["white"])
    stem = 0.9 + 0.15 * u["accumbens"]
    means = {"white": white, "cortex": cortex, "fluid": fluid}
    means |= {tissue: between(tissue, white, cortex) * stem for tissue in ("thalamus", "brain_stem", "ventral_dc")}
    for tissue in ("caudate", "putamen", "hippocampus", "amygdala", "accumbens"):
        means[tissue] = between(tissue, white, cortex, 0.4, 1.15)
    means |= {
        # Iron darkens the pallidum where T2 weighs.
        "pallidum": between(
            "pallidum", white, 0.6 * white if contrast in ("flair", "t2") else white + 0.6 * (cortex - white)
        ),
        "cerebellar_white": white * (0.92 + 0.16 * u["cerebellar_white"]),
        "cerebellar_cortex": cortex * (0.88 + 0.2 * u["cerebellar_cortex"]),
        "chiasm": white * (0.8 + 0.3 * u["chiasm"]),
        "choroid": between("choroid", fluid, 1.2 * one),
        "vessel": between("vessel", fluid, white),
        "outer_fluid": fluid * (0.85 + 0.3 * u["outer_fluid"]),
        "cord": means["brain_stem"] * (0.9 + 0.2 * u["cord"]),
        "nerve": white * (0.7 + 0.4 * u["nerve"]),
        "eye": fluid * (0.7 + 0.9 * u["eye"]),
        "soft": 0.15 + 2.6 * u["soft"] ** 1.5,
        "mucosa": 0.3 + 1.0 * u["mucosa"],
        "skin": 0.2 + 2.4 * u["skin"],
        "vein": 0.05 + 1.1 * u["vein"],
        "marrow": 0.15 + 1.2 * u["marrow"],
        "bone": 0.2 * u["bone"],
        "air": 0.02 * u["air"],
    }
    return torch.stack([means[tissue] for tissue in TISSUES], 1)
