from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from diffusers import UNet2DModel
from diffusers.configuration_utils import register_to_config

from ..checks import check_choices, check_integer
from ..models.brain_extractor import BrainExtractor
from ..models.healthy_maps import HealthyMapsModel
from ..models.unet_2d_andi import ANDiUNet2DModel
from ..schedulers.devices import send
from ..schedulers.scheduling_anoddpm import AnoDDPMScheduler
from ..volumes.processor import VolumeProcessor
from .base import AnomalyPipeline
from .mahalanobis import MAHALANOBIS, mahalanobis_distance
from .modalities import check_modalities, hide_missing
from .slices import Noise, SliceResults


MODES = ("partial", "one_shot", "partial_offset")
MAP_TYPES = ("squared", *MAHALANOBIS)
MODALITY_REDUCTIONS = ("mean", "max")


# N slices, M members of a slice (levels, draws of each), B items of a batch, C modalities, H x W pixels.


class AnoDDPMPipeline(AnomalyPipeline):
    r"""
    AnoDDPM: noise a slice part of the way with simplex noise, denoise it with a network that knows healthy anatomy
    only, and take the squared error. `mode="one_shot"` is brain_damage's variant: the x_0 estimate of a single
    evaluation. `mode="partial_offset"` is the baseline that the ANDi authors ran: a chain shifted by one step.

    UNet evaluations per slice: `noise_level` (partial; one fewer with the offset) or 1 (one-shot), times levels times
    `num_draws`. Not deterministic in itself, but fixed by the seed. Training needs healthy images only, no masks.

    Paper: Wyatt, Leach, Schmon, Willcocks, "AnoDDPM: Anomaly Detection With Denoising Diffusion Probabilistic Models
    Using Simplex Noise", CVPRW 2022.

    Args:
        unet ([`~diffusers.UNet2DModel`]): Predicts the noise.
        scheduler ([`AnoDDPMScheduler`]): Betas, noise and update rule.
        processor ([`VolumeProcessor`]): From volumes to slices and back.
        noise_level (`int` or `list[int]`, defaults to 250):
            Forward steps L, 1 to T: the slice is noised to t = L - 1. AnoDDPM's metric script uses 200, its figures
            250, brain_damage t = 200 (L = 201). Several levels are averaged.
        mode (`str`, defaults to `"partial"`):
            `"partial"`, `"one_shot"`, or `"partial_offset"` (see `docs/methods.md`): the slice is noised to t = L, one
            step further than the first evaluation says, which is that of L - 1; the last is that of t = 1, without
            noise. With a scheduler of `variance_type="fixed_small"` and `modality_reduction="max"` it is AnoDDPM as
            the ANDi authors compared with it.
        num_draws (`int`, defaults to 1): Reconstructions per slice and level; their mean is compared with the slice.
        modality_reduction (`str`, defaults to `"mean"`): `"mean"` or `"max"` of the maps of the modalities.
        map_type (`str`, defaults to `"squared"`):
            `"squared"`: squared difference of slice and mean reconstruction. `"mahalanobis"` and
            `"mahalanobis_pixel"`: distance from the distribution of the reconstructions, of all levels and draws
            ([`~pipelines.mahalanobis.mahalanobis_distance`]).
        optional_modalities (`list[str]`, *optional*):
            Modalities that the network does without, where others are there; a training with
            `objective.modality_dropout` names them. Of a volume that lacks some the network sees none of them, not even
            noise, and the map is that of the others.
        present_modalities (`list[str]`, *optional*):
            Those that count as there; all that a volume has by default.
        threshold, median_size, median_dimensions, erosion, min_component_size, slice_score, sign, weighting,
        normalization, healthy_maps, calibration:
            See [`AnomalyPipeline`] and [`PostProcessing`]. AnoDDPM: threshold 0.5, no filter.
    """

    model_cpu_offload_seq = "unet"
    sees_neighbours = True

    @register_to_config
    def __init__(
        self,
        unet: UNet2DModel | ANDiUNet2DModel,
        scheduler: AnoDDPMScheduler,
        processor: VolumeProcessor,
        brain_extractor: BrainExtractor | None = None,
        healthy_maps: HealthyMapsModel | None = None,
        noise_level: int | list[int] = 250,
        mode: str = "partial",
        num_draws: int = 1,
        modality_reduction: str = "mean",
        map_type: str = "squared",
        threshold: float | None = None,
        median_size: int = 0,
        median_dimensions: int = 2,
        erosion: int = 0,
        min_component_size: int = 0,
        slice_score: str = "mean",
        sign: str = "both",
        weighting: str = "none",
        normalization: str = "none",
        calibration: dict | None = None,
        optional_modalities: list[str] | None = None,
        present_modalities: list[str] | None = None,
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

    @torch.no_grad()
    def __call__(
        self,
        volume: Any,
        *,
        noise_level: int | list[int] | None = None,
        mode: str | None = None,
        num_draws: int | None = None,
        modality_reduction: str | None = None,
        map_type: str | None = None,
        present_modalities: list[str] | None = None,
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

        Draws of a slice: K numbers for each member, K the evaluations of the longest chain: the noise that it begins
        with, then that of its reverse steps but the last, which adds none. Members are ordered by level, then by draw.

        Returns:
            [`AnomalyOutput`], a tuple, or a list or an iterator of either. `reconstruction` is the mean of the members.

        Example:

        ```py
        >>> from anodiff import AnoDDPMPipeline

        >>> pipe = AnoDDPMPipeline.from_pretrained("owner/anoddpm-t1")
        >>> result = pipe("scan_t1.nii.gz")
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
        noise_level: int | list[int],
        mode: str,
        num_draws: int,
        modality_reduction: str,
        map_type: str,
        present_modalities: list[str] | None,
        seed: int = 0,
        batch_size: int = 16,
        noise: torch.Tensor | Callable | None = None,
    ) -> SliceResults:
        """
        Computes the method itself: slices `(N, C, H, W)` to maps `(N, H, W)` and mean reconstructions `(N, C, H, W)`,
        unfiltered.

        `indices` are the slices' numbers in their volume, which their random numbers depend on.
        """
        # Levels of the members, (M,), and their evaluations, of which each has a draw.
        levels = torch.tensor(noise_level).reshape(-1).repeat_interleave(num_draws)
        offset = 1 if mode == "partial_offset" else 0
        lengths = torch.ones_like(levels) if mode == "one_shot" else levels - offset
        draws = lengths.amax() * torch.arange(len(levels))

        numbers, device = torch.tensor(indices), slices.device
        draw_noise = partial(self.scheduler.draw_noise, size=slices.shape[1:])
        total = torch.zeros_like(slices)
        kept = slices.new_zeros(len(levels) if map_type in MAHALANOBIS else 0, *slices.shape)
        # Items of a batch walk equally long chains. They are ordered by member, then by slice: what a slice's members
        # add up to is added in the same order for every batch size.
        groups = [(steps, torch.nonzero(lengths == steps).flatten()) for steps in lengths.unique().tolist()]
        evaluations = sum(-(-len(members) * len(slices) // batch_size) * steps for steps, members in groups)
        with self.progress_bar(total=evaluations) as progress:
            for steps, members_of_group in groups:
                items = torch.cartesian_prod(members_of_group, torch.arange(len(slices)))
                for members, rows in (batch.T for batch in items.split(batch_size) if len(batch)):
                    drawing = Noise(seed, noise, numbers[rows], draws[members], device)
                    # Noise takes the timesteps from the CPU, where no device has to be waited for.
                    known = levels[members] - 1
                    rows, timesteps = send(rows, device), send(known, device)

                    # x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) n, (B, C, H, W); `noised` is t.
                    original, noised = slices[rows], timesteps + offset
                    drawn = drawing(partial(draw_noise, timesteps=known + offset), original)
                    sample = self.scheduler.add_noise(original, drawn, noised)
                    for step in range(1, steps + 1):
                        seen = hide_missing(self, sample, present_modalities)
                        model_output = self.predict_noise(seen, timesteps)
                        if mode == "one_shot":
                            sample = self.scheduler.predict_original_sample(model_output, timesteps, sample)
                        else:
                            # The last step adds no noise: sigma_0 is 0, and the shifted chain ends without any.
                            drawn = torch.zeros_like(sample)
                            if step < steps:
                                drawn = drawing(partial(draw_noise, timesteps=known + 1 - step), sample, step)
                            sample = self.scheduler.step(model_output, timesteps, sample, drawn).prev_sample
                        timesteps = timesteps - 1
                        progress.update()
                    total.index_add_(0, rows, sample)
                    if len(kept):
                        kept[send(members, device), rows] = sample
        # Neighbours are denoised with the slices, and are no part of their maps.
        slices, reconstruction, kept = map(self.processor.middle, (slices, total / len(levels), kept))
        reconstruction = hide_missing(self, reconstruction, present_modalities)
        channels = self.modality_channels(present_modalities)
        if map_type in MAHALANOBIS:
            seen, kept = self.processor.to_unit(slices[:, channels]), self.processor.to_unit(kept[:, :, channels])
            maps = mahalanobis_distance(seen, kept, map_type)
        else:
            maps = (slices - reconstruction)[:, channels].square()
        return SliceResults(maps.amax(1) if modality_reduction == "max" else maps.mean(1), reconstruction)

    def check_inputs(self, **settings) -> None:
        """Raises a `ValueError` that names the argument."""
        check_choices(settings, mode=MODES, modality_reduction=MODALITY_REDUCTIONS, map_type=MAP_TYPES)
        check_modalities(self, settings["present_modalities"])
        check_integer("num_draws", settings["num_draws"], 1)
        lowest, highest = 1, self.scheduler.config.num_train_timesteps
        if settings["mode"] == "partial_offset":  # noises to t = L, and needs t = 1 to walk at all
            lowest, highest = 2, highest - 1
        levels = settings["noise_level"]
        levels = (list(levels) if isinstance(levels, (list, tuple)) else [levels]) or [None]
        for level in levels:
            check_integer("noise_level", level, lowest, highest)
        if settings["map_type"] in MAHALANOBIS and len(levels) * settings["num_draws"] < 2:
            raise ValueError(
                f"`map_type` {settings['map_type']} needs several reconstructions of a slice: give `num_draws` of at least 2, or"
                " several levels as `noise_level`."
            )
