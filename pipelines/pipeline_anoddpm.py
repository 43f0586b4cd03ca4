from __future__ import annotations

from collections.abc import Callable

import torch
from diffusers import UNet2DModel

from ..models.unet_2d_andi import ANDiUNet2DModel
from ..schedulers.scheduling_anoddpm import AnoDDPMScheduler
from ..volumes.processor import VolumeProcessor
from .base import AnomalyPipeline, SliceResults, slice_generator
from .output import AnomalyOutput


MODES = ("partial", "one_shot", "partial_offset")
MODALITY_REDUCTIONS = ("mean", "max")


class AnoDDPMPipeline(AnomalyPipeline):
    r"""
    AnoDDPM: noise a slice part of the way with simplex noise, denoise it with a network that knows healthy anatomy only, and
    take the squared error. `mode="one_shot"` is brain_damage's variant: the x_0 estimate of a single evaluation.
    `mode="partial_offset"` is the baseline that the ANDi authors ran: a chain shifted by one step.

    UNet evaluations per slice: `noise_level` (partial; one fewer with the offset) or 1 (one-shot), times levels times
    `num_draws`. Not deterministic in itself, but fixed by the seed. Training needs healthy images only, no masks.

    Paper: Wyatt, Leach, Schmon, Willcocks, "AnoDDPM: Anomaly Detection With Denoising Diffusion Probabilistic Models Using Simplex
    Noise", CVPRW 2022.

    Args:
        unet ([`~diffusers.UNet2DModel`]): Predicts the noise.
        scheduler ([`AnoDDPMScheduler`]): Betas, noise and update rule.
        processor ([`VolumeProcessor`]): From volumes to slices and back.
        noise_level (`int` or `list[int]`, defaults to 250):
            Forward steps L, 1 to T: the slice is noised to t = L - 1. AnoDDPM's metric script uses 200, its figures 250, brain_damage
            t = 200 (L = 201). Several levels are averaged.
        mode (`str`, defaults to `"partial"`):
            `"partial"`, `"one_shot"`, or `"partial_offset"` (ANDi method card B1): the slice is noised to t = L, one step further than
            the first evaluation says, which is that of L - 1; the last is that of t = 1, without noise. With a scheduler of
            `variance_type="fixed_small"` and `modality_reduction="max"` it is AnoDDPM as the ANDi authors compared with it.
        num_draws (`int`, defaults to 1): Reconstructions per slice and level; their mean is compared with the slice.
        modality_reduction (`str`, defaults to `"mean"`): `"mean"` or `"max"` of the squared errors of the modalities.
        threshold, median_size, median_dimensions, erosion, min_component_size, slice_score:
            See [`AnomalyPipeline`] and [`PostProcessing`]. AnoDDPM: threshold 0.5, no filter.
    """

    model_cpu_offload_seq = "unet"

    def __init__(
        self,
        unet: UNet2DModel | ANDiUNet2DModel,
        scheduler: AnoDDPMScheduler,
        processor: VolumeProcessor,
        noise_level: int | list[int] = 250,
        mode: str = "partial",
        num_draws: int = 1,
        modality_reduction: str = "mean",
        threshold: float | None = None,
        median_size: int = 0,
        median_dimensions: int = 2,
        erosion: int = 0,
        min_component_size: int = 0,
        slice_score: str = "mean",
    ):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler, processor=processor)
        self.check_inputs(noise_level, mode, num_draws, modality_reduction)
        self.register_to_config(
            noise_level=noise_level,
            mode=mode,
            num_draws=num_draws,
            modality_reduction=modality_reduction,
            threshold=threshold,
            median_size=median_size,
            median_dimensions=median_dimensions,
            erosion=erosion,
            min_component_size=min_component_size,
            slice_score=slice_score,
        )
        _ = self.postprocessing  # checks its values

    @torch.no_grad()
    def __call__(
        self,
        volume,
        *,
        noise_level: int | list[int] | None = None,
        mode: str | None = None,
        num_draws: int | None = None,
        modality_reduction: str | None = None,
        threshold: float | None = None,
        brain_mask=None,
        generator: int | torch.Generator | None = None,
        batch_size: int = 16,
        noise: torch.Tensor | Callable | None = None,
        return_dict: bool = True,
    ) -> AnomalyOutput | tuple | list:
        """
        Args:
            volume:
                Path, nibabel image, `(X, Y)` or `(X, Y, Z)` array, PIL image, dict of modalities, tensor `(N, C, H, W)` that is already
                processed, or a list of volumes, which gives a list of results.
            noise_level, mode, num_draws, modality_reduction, threshold (*optional*): Instead of the checkpoint's.
            brain_mask (*optional*): Mask of the volume, same kinds as the volume.
            generator (`int` or `torch.Generator`, *optional*): Seed; `None` is 0. Slice and draw have generators of their own.
            batch_size (`int`, defaults to 16): Slices and draws that share one evaluation. Does not change the result.
            noise (`torch.Tensor` or callable, *optional*):
                Replaces every draw. Tensor `(1 + steps, N * levels * num_draws, C, H, W)`: forward noise, then that of each reverse
                step (one-shot: forward noise only; with the offset: `noise_level` - 2 steps, since the last adds none), for all N
                slices, the draws of a slice next to each other. Callable:
                `noise(step, items, shape)` with step 0 for the forward noise, the list of item numbers, and the shape wanted.
            return_dict (`bool`, defaults to `True`): Whether to return an [`AnomalyOutput`] or a tuple.

        Example:

        ```py
        >>> from anodiff import AnoDDPMPipeline

        >>> pipe = AnoDDPMPipeline.from_pretrained("owner/anoddpm-t1")
        >>> result = pipe("scan_t1.nii.gz")
        >>> result.save("out/")
        ```
        """
        given = dict(noise_level=noise_level, mode=mode, num_draws=num_draws, modality_reduction=modality_reduction)
        return self.run(
            volume,
            given,
            threshold=threshold,
            brain_mask=brain_mask,
            generator=generator,
            batch_size=batch_size,
            noise=noise,
            return_dict=return_dict,
        )

    def default_settings(self) -> dict:
        """The checkpoint's values of what `compute_maps` needs to be told."""
        return {name: self.config[name] for name in ("noise_level", "mode", "num_draws", "modality_reduction")}

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
        seed: int,
        batch_size: int,
        noise: torch.Tensor | Callable | None = None,
    ) -> SliceResults:
        """
        The method itself: slices `(N, C, H, W)` to maps `(N, H, W)` and mean reconstructions `(N, C, H, W)`, unfiltered.

        `indices` are the slices' numbers in their volume, which their random numbers depend on. The map is the squared difference
        of slice and mean reconstruction, its mean or maximum over channels.
        """
        # Items: slice-major, then level, then draw. N slices, E items per slice, B items per batch.
        levels = [noise_level] if isinstance(noise_level, int) else list(noise_level)
        members = [(level, draw) for level in levels for draw in range(num_draws)]
        items = [(row, member) for row in range(len(slices)) for member in range(len(members))]
        groups = [items]
        offset = 1 if mode == "partial_offset" else 0
        if mode != "one_shot":
            # Items of one batch walk the same timesteps.
            groups = [[item for item in items if members[item[1]][0] == level] for level in sorted(set(levels))]
        batches = [group[start : start + batch_size] for group in groups for start in range(0, len(group), batch_size)]
        evaluations = sum(1 if mode == "one_shot" else members[batch[0][1]][0] - offset for batch in batches)

        total = torch.zeros_like(slices)
        with self.progress_bar(total=evaluations) as progress, self.autocast():
            for batch in batches:
                rows = torch.tensor([row for row, _ in batch], device=slices.device)
                numbers = [indices[row] * len(members) + member for row, member in batch]
                generators = [slice_generator(seed, indices[row], member, slices.device) for row, member in batch]
                timesteps = torch.tensor(
                    [members[member][0] - 1 + offset for _, member in batch], device=slices.device
                )

                # x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) n, (B, C, H, W)
                original = slices[rows]
                sample = self.scheduler.add_noise(
                    original, self._noise(noise, 0, numbers, original, timesteps, generators), timesteps
                )
                if mode == "one_shot":
                    model_output = self.predict_noise(sample, timesteps)
                    sample = self.scheduler.predict_original_sample(model_output, timesteps, sample)
                    progress.update()
                else:
                    self.scheduler.set_timesteps(members[batch[0][1]][0], device=slices.device)
                    walked = self.scheduler.timesteps
                    walked = walked[: len(walked) - offset]  # the shifted chain never evaluates t = 0
                    for step, t in enumerate(walked, start=1):
                        model_output = self.predict_noise(sample, t.expand(len(batch)))
                        if offset and step == len(walked):
                            variance_noise = torch.zeros_like(sample)
                        else:
                            variance_noise = self._noise(
                                noise, step, numbers, sample, t.expand(len(batch)), generators
                            )
                        sample = self.scheduler.step(
                            model_output, t, sample, variance_noise=variance_noise, return_dict=False
                        )[0]
                        progress.update()
                total.index_add_(0, rows, sample)
        reconstruction = total / len(members)
        squared = (slices - reconstruction).square()
        return SliceResults(squared.amax(1) if modality_reduction == "max" else squared.mean(1), reconstruction)

    def check_inputs(
        self,
        noise_level: int | list[int],
        mode: str,
        num_draws: int,
        modality_reduction: str,
        batch_size: int = 1,
    ) -> None:
        """Raises a `ValueError` that names the argument."""
        for name, value, allowed in (
            ("mode", mode, MODES),
            ("modality_reduction", modality_reduction, MODALITY_REDUCTIONS),
        ):
            if value not in allowed:
                raise ValueError(f"`{name}` must be one of {', '.join(allowed)}, got {value!r}.")
        lowest, highest = 1, self.scheduler.config.num_train_timesteps
        if mode == "partial_offset":  # noises to t = L, and needs t = 1 to walk at all
            lowest, highest = 2, highest - 1
        levels = noise_level if isinstance(noise_level, (list, tuple)) else [noise_level]
        for level in levels or [None]:
            if not isinstance(level, int) or not lowest <= level <= highest:
                raise ValueError(
                    f"`noise_level` must be between {lowest} and {highest} (or a list of such), got {noise_level}."
                )
        for name, value in (("num_draws", num_draws), ("batch_size", batch_size)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"`{name}` must be an integer of at least 1, got {value!r}.")

    def _noise(self, noise, step, numbers, sample, timesteps, generators) -> torch.Tensor:
        if noise is None:
            return self.scheduler.draw_noise(sample.shape, timesteps, generators, sample.device, sample.dtype)
        drawn = noise(step, numbers, tuple(sample.shape)) if callable(noise) else noise[step][numbers]
        return drawn.to(sample.device, sample.dtype)
