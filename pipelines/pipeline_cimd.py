from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from diffusers import UNet2DModel
from diffusers.configuration_utils import register_to_config

from ..checks import check_choice, check_integer, check_number
from ..schedulers.devices import send
from ..schedulers.scheduling_cimd import SAMPLERS, CIMDScheduler
from ..volumes.processor import VolumeProcessor
from .base import NOT_FINITE, AnomalyPipeline
from .output import CIMDOutput
from .postprocessing import median_filter
from .slices import Noise, PreparedSlices, SliceResults


# N slices, E ensemble members, C modalities, H x W pixels, B items (a member of a slice) of a batch.


class CIMDPipeline(AnomalyPipeline):
    r"""
    CIMD, collectively intelligent medical diffusion: a diffusion model of masks, given the image, is sampled several
    times; each sample is one segmentation that an expert might have drawn, and their spread imitates that of the
    experts.

    UNet evaluations per slice: `num_ensemble` x `num_inference_steps` (16 x 1000). Not deterministic in itself, but
    fixed by the seed: a member is the same however many there are. Training needs masks, at best several annotations
    of each image.

    Paper: Rahman, Valanarasu, Hacihaliloglu, Patel, "Ambiguous Medical Image Segmentation using Diffusion Models",
    CVPR 2023, arXiv 2304.04745.

    In the authors' program the latent variable of the paper never enters the network, so that this is its sampling:
    ancestral steps with a learned variance. Their program saves what it samples; masks are cut at 0.5 here, the middle
    of the trained 0 and 1.

    Args:
        unet ([`~diffusers.UNet2DModel`] or [`UNet2DHeadsModel`]):
            C + 1 channels in, the image and the noised mask, and 2 out: the noise of the mask, and what the variance
            is made of.
        scheduler ([`CIMDScheduler`]): Noise and steps of the mask.
        processor ([`VolumeProcessor`]): From volumes to slices and back. The authors' images lie in [0, 1].
        num_ensemble (`int`, defaults to 16): Members, E. The authors' script has 5 by default, later papers report 16.
        num_inference_steps (`int`, *optional*):
            Steps of a member, 2 to T. Defaults to the whole chain, as the authors do.
        sampler (`str`, defaults to `"ddpm"`):
            `"ddpm"`, or `"ddim"` without noise in its steps, so that members differ by their start alone; the authors'
            own DDIM does not work.
        threshold (`float`, defaults to 0.5): Of the members' masks, at least 0 and below 1.
        median_size (`int`, defaults to 0):
            Side of a median filter of every member in network pixels, 0 for none. The authors suggest one against
            speckle, without a size.
    """

    task = "segmentation"
    model_cpu_offload_seq = "unet"

    @register_to_config
    def __init__(
        self,
        unet: UNet2DModel,
        scheduler: CIMDScheduler,
        processor: VolumeProcessor,
        num_ensemble: int = 16,
        num_inference_steps: int | None = None,
        sampler: str = "ddpm",
        threshold: float = 0.5,
        median_size: int = 0,
    ):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler, processor=processor)
        self.check_configuration(inputs=len(processor.config.modalities) + 1, outputs=(2,))

    @torch.no_grad()
    def __call__(
        self,
        volume: Any,
        *,
        num_ensemble: int | None = None,
        num_inference_steps: int | None = None,
        sampler: str | None = None,
        median_size: int | None = None,
        threshold: float | None = None,
        brain_mask: Any = None,
        generator: int | torch.Generator | None = None,
        batch_size: int | None = None,
        noise: torch.Tensor | Callable | None = None,
        callback: Callable[[int, int], None] | None = None,
        return_dict: bool = True,
    ) -> Any:
        """
        Segments a volume several times, slice by slice; arguments as of this class and of [`AnomalyPipeline`]. Nothing
        is marked outside the brain.

        Draws of a slice, one channel each: of each member, in turn, its start, then the noise of each step, that of
        the last one unused.

        Returns:
            [`CIMDOutput`], a tuple, or a list or an iterator of either.

        Example:

        ```py
        >>> from anodiff import CIMDPipeline

        >>> pipe = CIMDPipeline.from_pretrained("owner/cimd-lidc")
        >>> result = pipe("nodule.png", num_ensemble=16, num_inference_steps=50)
        >>> result.save("out/")
        ```
        """
        return self.run(locals())

    @torch.no_grad()
    def compute_maps(
        self,
        slices: torch.Tensor,
        indices: list[int],
        *,
        num_ensemble: int,
        num_inference_steps: int | None,
        sampler: str,
        median_size: int,
        seed: int = 0,
        batch_size: int = 16,
        noise: torch.Tensor | Callable | None = None,
    ) -> SliceResults:
        """
        Computes the method itself: slices `(N, C, H, W)` to the maps of their members `(N, E, H, W)`, in [0, 1];
        what is above the threshold is the member's mask.

        `indices` are the slices' numbers in their volume, which their random numbers depend on.
        """
        self.scheduler.set_timesteps(num_inference_steps, device=slices.device)
        timesteps = self.scheduler.timesteps
        numbers, device = torch.tensor(indices), slices.device
        draw_noise = partial(self.scheduler.draw_noise, size=(1, *slices.shape[2:]))
        members = torch.zeros(len(slices), num_ensemble, *slices.shape[2:], device=device)
        # Items are ordered by slice, then by member.
        items = torch.cartesian_prod(torch.arange(len(slices)), torch.arange(num_ensemble))
        batches = [batch.T for batch in items.split(batch_size) if len(batch)]
        with self.progress_bar(total=len(batches) * len(timesteps)) as progress:
            for rows, ensemble in batches:
                drawing = Noise(seed, noise, numbers[rows], ensemble * (1 + len(timesteps)), device)
                rows, ensemble = send(rows, device), send(ensemble, device)
                images = slices[rows]  # (B, C, H, W)
                sample = drawing(draw_noise, images[:, :1])  # (B, 1, H, W)
                for step, t in enumerate(timesteps, start=1):
                    t = t.repeat(len(sample))
                    model_output = self.predict_noise(torch.cat([images, sample], dim=1), t)
                    drawn = drawing(draw_noise, sample, step) if sampler == "ddpm" else None
                    sample = self.scheduler.step(model_output, t, sample, drawn, sampler=sampler).prev_sample
                    progress.update()
                members[rows, ensemble] = sample[:, 0]
        # Here, since what follows would hide it.
        if not torch.isfinite(members).all():
            raise ValueError(NOT_FINITE)
        # Masks are trained as 0 and 1; what the scheduler's range leaves beyond them cannot change a mask.
        members = members.clamp(0.0, 1.0)
        if median_size > 1:
            members = median_filter(members.flatten(0, 1), median_size, 2).view_as(members)
        return SliceResults(members)

    def check_inputs(self, **settings) -> None:
        """Raises a `ValueError` that names the argument."""
        check_integer("num_ensemble", settings["num_ensemble"], 1)
        if settings["num_inference_steps"] is not None:
            check_integer("num_inference_steps", settings["num_inference_steps"], 2, len(self.scheduler))
        check_choice("sampler", settings["sampler"], SAMPLERS)
        check_integer("median_size", settings["median_size"], 0)
        if settings["median_size"] and not settings["median_size"] % 2:
            raise ValueError(f"`median_size` must be odd, or 0 for no filter, got {settings['median_size']}.")

    def check_threshold(self, threshold: float | None) -> None:
        """Raises a `ValueError` unless the members' masks can be cut at `threshold`, at least 0 and below 1."""
        check_number("threshold", threshold, least=0, below=1)

    def filter_maps(
        self, maps: torch.Tensor, brain: torch.Tensor, added: torch.Tensor | None, volumes: Sequence[int]
    ) -> torch.Tensor:
        """Returns the members `(N, E, H, W)`, 0 outside the brain; their median filter is part of `compute_maps`."""
        return maps * brain[:, None]

    def finish_volume(
        self, prepared: PreparedSlices, results: SliceResults, threshold: float | None, settings: dict
    ) -> CIMDOutput:
        """Brings the members onto the grid of the input, and summarizes them."""
        processed, maps = prepared.processed, results.maps.movedim(1, 0)  # (E, N, H, W)
        if processed is None:
            return CIMDOutput(**summarize_members(maps, threshold), settings=settings)
        source = processed.source
        maps = np.stack([source.as_given(self.processor.postprocess(one, processed)) for one in maps])
        summary = summarize_members(torch.from_numpy(maps), threshold)
        return CIMDOutput(
            **{name: values.numpy() for name, values in summary.items()}, settings=settings, source=source
        )


def summarize_members(maps: torch.Tensor, threshold: float) -> dict[str, torch.Tensor]:
    """Computes the arrays of a [`CIMDOutput`] from the maps of its members, `(E, ...)` float32."""
    masks = maps > threshold
    count = masks.sum(0)
    share = count / len(masks)
    return {
        "member_masks": masks.to(torch.uint8),
        "member_maps": maps,
        "mean_map": maps.mean(0),
        "std_map": maps.std(0, correction=0),
        "probability_map": share,
        "agreement": torch.maximum(share, 1 - share),
        "majority_mask": (2 * count > len(masks)).to(torch.uint8),
    }
