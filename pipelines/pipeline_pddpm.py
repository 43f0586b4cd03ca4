from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import UNet2DModel
from diffusers.configuration_utils import register_to_config

from ..checks import check_choices, check_integer
from ..models.brain_extractor import BrainExtractor
from ..models.healthy_maps import HealthyMapsModel
from ..models.unet_2d_conditioned import ConditionedUNet2DModel
from ..schedulers.devices import send
from ..schedulers.scheduling_anoddpm import AnoDDPMScheduler
from ..volumes.processor import VolumeProcessor
from .base import AnomalyPipeline
from .one_step import check_timesteps, draw_fields
from .slices import SliceResults


OVERLAPS = ("none", "cut", "average")


# N slices, C modalities, H x W pixels, K timesteps, P patches, B items (a timestep of a patch of a slice) of a batch.


class PDDPMPipeline(AnomalyPipeline):
    r"""
    pDDPM, patched diffusion: a slice is noised in one patch at a time, a denoiser predicts the slice from the noised
    patch and the clean rest in a single evaluation, and the patches of the predictions are put together. There is no
    reverse chain.

    UNet evaluations per slice: patches x `timesteps` (4 x 1). Not deterministic in itself, but fixed by the seed.
    Training needs healthy images only, no masks.

    Paper: Behrendt, Bhattacharya, Krüger, Opfer, Schlaefer, "Patched Diffusion Models for Unsupervised Anomaly
    Detection in Brain MRI", MIDL 2023, arXiv 2303.03758.

    Maps are absolute differences on the scale of slices in [0, 1], whatever the processor's `value_range`, never
    min-max scaled.

    Args:
        unet ([`ConditionedUNet2DModel`] without a condition, or [`~diffusers.UNet2DModel`]):
            Predicts the slice, in [-1, 1], from the slice with a noised patch.
        scheduler ([`AnoDDPMScheduler`]):
            Noise and schedule. The authors': `beta_schedule="cosine"` and 2-D simplex noise, `z=None`.
        processor ([`VolumeProcessor`]): From volumes to slices and back.
        timesteps (`tuple[int, ...]`, defaults to `(499,)`):
            0-based. Several give the mean of their reconstructions, the authors' "ENS", whose code they have not
            published: `(249, 499, 749)`.
        patch_size (`int`, defaults to 48): Side of a patch in pixels.
        overlap (`str`, defaults to `"none"`):
            `"none"`: patches must fill the slice exactly. Otherwise as few as cover it are spread evenly over it, and
            where they overlap `"cut"` takes the first one, row by row, and `"average"` the mean of all.
        shared_noise (`bool`, defaults to `False`):
            The same field for all slices at one timestep, as the authors; else each slice has its own. The patches of
            a slice have parts of the same field either way.
        threshold, median_size, median_dimensions, erosion, min_component_size, slice_score, filter_order, sign,
        weighting, normalization, healthy_maps, calibration:
            See [`AnomalyPipeline`] and [`PostProcessing`]. The authors: median of 5 x 5 x 5, `erosion` H // 25, so 3
            at 96 px, components of 7 voxels and fewer removed.
    """

    model_cpu_offload_seq = "unet"

    @register_to_config
    def __init__(
        self,
        unet: ConditionedUNet2DModel | UNet2DModel,
        scheduler: AnoDDPMScheduler,
        processor: VolumeProcessor,
        brain_extractor: BrainExtractor | None = None,
        healthy_maps: HealthyMapsModel | None = None,
        timesteps: tuple[int, ...] | list[int] = (499,),
        patch_size: int = 48,
        overlap: str = "none",
        shared_noise: bool = False,
        threshold: float | None = None,
        median_size: int = 5,
        median_dimensions: int = 3,
        erosion: int = 3,
        min_component_size: int = 8,
        slice_score: str = "mean",
        filter_order: str = "erosion_first",
        sign: str = "both",
        weighting: str = "none",
        normalization: str = "none",
        calibration: dict | None = None,
    ):
        super().__init__()
        self.register_modules(
            unet=unet,
            scheduler=scheduler,
            processor=processor,
            brain_extractor=brain_extractor,
            healthy_maps=healthy_maps,
        )
        self.check_configuration()
        if unet.config.get("condition_dim") is not None:
            raise ValueError(f"`unet` must have no condition (`condition_dim` None), got {unet.config.condition_dim}.")

    @torch.no_grad()
    def __call__(
        self,
        volume: Any,
        *,
        timesteps: list[int] | None = None,
        patch_size: int | None = None,
        overlap: str | None = None,
        shared_noise: bool | None = None,
        threshold: float | None = None,
        brain_mask: Any = None,
        generator: int | torch.Generator | None = None,
        batch_size: int | None = None,
        noise: torch.Tensor | Callable | None = None,
        callback: Callable[[int, int], None] | None = None,
        return_dict: bool = True,
    ) -> Any:
        """
        Finds anomalies in a volume; arguments as of this class and of [`AnomalyPipeline`].

        Draws of a slice: the noise of each of the K `timesteps`, in their order, of which patches have parts; with
        `shared_noise` those of slice 0 are drawn only.

        Returns:
            [`AnomalyOutput`], a tuple, or a list or an iterator of either.
        """
        return self.run(locals())

    @torch.no_grad()
    def compute_maps(
        self,
        slices: torch.Tensor,
        indices: list[int],
        *,
        timesteps: list[int],
        patch_size: int,
        overlap: str,
        shared_noise: bool,
        seed: int = 0,
        batch_size: int = 16,
        noise: torch.Tensor | Callable | None = None,
    ) -> SliceResults:
        """
        Computes the method itself: slices `(N, C, H, W)` to maps `(N, H, W)` and mean reconstructions `(N, C, H, W)`,
        unfiltered.

        `indices` are the slices' numbers in their volume, which their random numbers depend on.
        """
        slices = self.processor.to_unit(slices)
        device, height, width = slices.device, *slices.shape[2:]
        boxes = patch_grid(height, width, patch_size, overlap)
        inside = box_masks(boxes.to(device), height, width)
        weights = patch_weights(inside, overlap)

        numbers, grid = torch.tensor([0] * len(indices) if shared_noise else indices), torch.tensor(timesteps)
        # Items are ordered by timestep, then by slice, then by patch; the batches are full but for the last one.
        items = torch.cartesian_prod(*(torch.arange(len(values)) for values in (timesteps, slices, boxes)))
        batches = [batch.T for batch in items.split(batch_size) if len(batch)]
        total = torch.zeros_like(slices)
        with self.progress_bar(total=len(batches)) as progress:
            for draws, rows, patches in batches:
                fields = draw_fields(self.scheduler, seed, noise, numbers[rows], draws, grid, slices)
                rows, patches, steps = (send(values, device) for values in (rows, patches, grid[draws]))

                # x_t inside of the patch, x_0 around it, both with x_0 in [-1, 1], (B, C, H, W)
                original = 2.0 * slices[rows] - 1.0
                noised = self.scheduler.add_noise(original, fields, steps)
                sample = torch.where(inside[patches, None], noised, original)

                # This network predicts x_0.
                prediction = (self.predict_noise(sample, steps) + 1.0) / 2.0
                total.index_add_(0, rows, weights[patches, None] * prediction)
                progress.update()
        reconstruction = total / len(timesteps)
        maps = (slices - reconstruction).abs().mean(1)
        return SliceResults(maps, self.processor.from_unit(reconstruction))

    def check_inputs(self, **settings) -> None:
        """Raises a `ValueError` that names the argument."""
        check_timesteps(settings["timesteps"], len(self.scheduler))
        check_choices(settings, overlap=OVERLAPS, shared_noise=(False, True))
        check_integer("patch_size", settings["patch_size"], 1)
        if self.processor.config.size is not None:
            # Raises if the patches do not fit.
            patch_grid(*self.processor.config.size, settings["patch_size"], settings["overlap"])


def patch_grid(height: int, width: int, patch_size: int, overlap: str = "none") -> torch.Tensor:
    """
    Lays as few square patches as cover a slice, spread evenly, row by row; with `overlap` "none" they must fill it.

    Returns:
        `torch.Tensor` of shape `(P, 4)`, int64: left, top, and right and bottom, which are outside, in pixels.

    Raises:
        ValueError: The patch is larger than the slice, or does not fill it.
    """
    if patch_size > min(height, width):
        raise ValueError(f"`patch_size` must be at most the side of a slice, {min(height, width)}, got {patch_size}.")
    if overlap == "none" and (height % patch_size or width % patch_size):
        raise ValueError(
            f"`patch_size` must divide the height and width of a slice, {height} and {width}, got {patch_size};"
            " other sizes need `overlap` 'cut' or 'average'."
        )
    top, left = (
        torch.linspace(0, size - patch_size, -(-size // patch_size), dtype=torch.float64).round().long()
        for size in (height, width)
    )
    return boxes_at(left.repeat(len(top)), top.repeat_interleave(len(left)), patch_size)


def boxes_at(left: torch.Tensor, top: torch.Tensor, patch_size: int) -> torch.Tensor:
    """Makes square boxes `(P, 4)` from their upper left corners `(P,)`; they may hang over the slice."""
    return torch.stack([left, top, left + patch_size, top + patch_size], dim=1)


def box_masks(boxes: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Marks the pixels of a slice that boxes `(P, 4)` hold: `(P, H, W)`, bool."""
    left, top, right, bottom = boxes.T[..., None]
    x, y = torch.arange(width, device=boxes.device), torch.arange(height, device=boxes.device)
    return ((y >= top) & (y < bottom))[:, :, None] & ((x >= left) & (x < right))[:, None, :]


def patch_weights(inside: torch.Tensor, overlap: str) -> torch.Tensor:
    """Computes the weight of each patch in every pixel, `(P, H, W)` float32 with the sum 1, from `box_masks`."""
    if overlap == "average":
        return inside / inside.sum(0)
    return (inside & (inside.cumsum(0) == 1)).float()
