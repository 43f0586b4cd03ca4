from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from diffusers import UNet2DModel
from diffusers.configuration_utils import register_to_config

from ..checks import check_choices, check_integer, check_number
from ..models.brain_extractor import BrainExtractor
from ..models.healthy_maps import HealthyMapsModel
from ..models.unet_2d_anofpdm import AnoFPDMUNet2DModel
from ..schedulers.scheduling_anofpdm import AnoFPDMScheduler
from ..volumes.processor import VolumeProcessor
from .base import HEALTHY, NOT_FINITE, NULL, AnomalyPipeline
from .postprocessing import median_filter, remove_small_components
from .running_maps import RunningMaps, map_quantiles, quantile_levels, similarity_threshold
from .slices import Noise, SliceResults


# N slices, B of them in a batch, C modalities, M of them compared, S steps of the forward process, H x W pixels.

FORWARD_PROCESSES = ("ddim", "random")
INDEX_MODES = ("original", "aligned")
UNGUIDED_BRANCHES = ("healthy", "none")
QUANTILE_REGIONS = ("image", "foreground")


class AnoFPDMPipeline(AnomalyPipeline):
    r"""
    AnoFPDM: carry a slice through the forward process of a diffusion model and compare, at each step, two one-shot
    predictions of the clean slice: G, guided towards "healthy", and U, without guidance. The gap between the two says
    whether the slice is unhealthy, up to which step t_e the squared errors of G are averaged to a map, and at which
    quantile the map is cut.

    UNet evaluations per slice: 3 S - 1 with S = `forward_steps` (1799), two of three in one batch; 2 S with
    `index_mode="aligned"` or `forward_process="random"`; a `stride` divides S. Not deterministic in itself, but fixed
    by the seed. Training and calibration need a label for each slice, healthy or not, no masks.

    Paper: Che, Rafsani, Shah, Rahman Siddiquee, Wu, "AnoFPDM: Anomaly Detection with Forward Process of Diffusion
    Models for Brain MRI", arXiv 2404.15683, WACV 2025 workshops.

    Label and mask need the calibrated values `similarity_threshold` and `gap_scale`; without them there is the map
    alone. They belong to one network and one set of the other values: calibrate again after a change. How the three
    results come about:

    - the map is the mean over modalities. It is filtered once, where every pipeline's map is, as [`PostProcessing`]
      says;
    - the mask is chosen here. The threshold is a quantile of the map *before* the median; what is cut is the same map
      after a median of `median_size` in the slice, mirrored at the border as the authors do it. Then components of
      fewer than `min_component_size` pixels of the slice go (the authors keep 41 and more). What lies outside the
      brain is part of this median, but not of the filtered map, so that the two may differ at the rim of the brain;
    - a `threshold`, if there is one, replaces this mask by `anomaly_map > threshold`, as in every pipeline.

    Details of each slice: `similarity`; `t_e`, `gap` (its largest value) and `first_step_used` (1 where t_e is 0 and
    the map is the error of that step, for which the original divides by 0) per modality; if calibrated also `label` (0
    or 1), `quantile` per modality and `mask_threshold`.

    Args:
        unet ([`~diffusers.UNet2DModel`] or [`AnoFPDMUNet2DModel`]):
            Predicts the noise for class labels 0 (healthy), 1 (unhealthy) and 2 (none):
            `UNet2DModel(num_class_embeds=3)`, or the original's own network.
        scheduler ([`AnoFPDMScheduler`]): Schedule and DDIM steps.
        processor ([`VolumeProcessor`]): From volumes to slices and back, `value_range` (-1, 1).
        forward_steps (`int`, defaults to 600): S: the timesteps 0, ..., S - 1, at most T.
        guidance_scale (`float`, defaults to 2.0):
            w of (1 + w) eps(healthy) - w eps(null). The authors: 2 BraTS21, 30 ATLAS.
        forward_process (`str`, defaults to `"ddim"`):
            `"ddim"`: the slice is noised once, to t = 0, and encoded from there without a class. `"random"`: noised
            anew at every step.
        index_mode (`str`, defaults to `"original"`):
            Of the encoding: `"original"` moves with the timestep t *before* it predicts at t, so that predictions see
            a sample of t + 1 (the authors' numbers), `"aligned"` afterwards: a third less work, other numbers, see
            docs/results.md.
        stride (`int`, defaults to 1):
            Walk every k-th timestep only: k times faster. The map bears it; the similarity, and so label and mask,
            does not (measured in docs/results.md). Best with `"aligned"`: the shift of `"original"` is one step of the
            grid, so it grows with the stride.
        unguided_branch (`str`, defaults to `"healthy"`):
            Class of U: `"healthy"` as in the authors' program, or `"none"` as in the paper's wording.
        modalities (`tuple[str, ...]`, *optional*):
            Names of those that are compared; the network sees all. Defaults to all of them. The authors: flair and t2
            of BraTS21.
        similarity_threshold (`float`, *optional*): A slice is unhealthy where the curves' similarity is at most this.
        gap_scale (`tuple[float, ...]`, *optional*): Largest gap of unhealthy slices, one per compared modality.
        quantile_range (`tuple[float, float]`, defaults to (0.90, 0.98)):
            Quantile of the map for a gap of `gap_scale` and above, and for none; between them in 100 steps.
        quantile_region (`str`, defaults to `"image"`):
            Pixels that the quantile is taken of: all of the `"image"`, as the authors do, or its `"foreground"`, where
            the mean of the channels exceeds -0.95 (the authors' rule for their metrics). Mind that `quantile_range`
            fits the image.
        gate_by_label (`bool`, defaults to `True`): Whether slices with the label healthy have an empty mask.
        threshold, median_size, median_dimensions, erosion, min_component_size, slice_score, sign, weighting,
        normalization, healthy_maps, calibration:
            See [`AnomalyPipeline`] and [`PostProcessing`].
    """

    model_cpu_offload_seq = "unet"
    sees_neighbours = True

    @register_to_config
    def __init__(
        self,
        unet: UNet2DModel | AnoFPDMUNet2DModel,
        scheduler: AnoFPDMScheduler,
        processor: VolumeProcessor,
        brain_extractor: BrainExtractor | None = None,
        healthy_maps: HealthyMapsModel | None = None,
        forward_steps: int = 600,
        guidance_scale: float = 2.0,
        forward_process: str = "ddim",
        index_mode: str = "original",
        stride: int = 1,
        unguided_branch: str = "healthy",
        modalities: list[str] | None = None,
        similarity_threshold: float | None = None,
        gap_scale: list[float] | None = None,
        quantile_range: list[float] | tuple[float, float] = (0.90, 0.98),
        quantile_region: str = "image",
        gate_by_label: bool = True,
        threshold: float | None = None,
        median_size: int = 5,
        median_dimensions: int = 2,
        erosion: int = 0,
        min_component_size: int = 41,
        slice_score: str = "mean",
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
        self.check_value_range()

    @torch.no_grad()
    def __call__(
        self,
        volume: Any,
        *,
        forward_steps: int | None = None,
        guidance_scale: float | None = None,
        forward_process: str | None = None,
        index_mode: str | None = None,
        stride: int | None = None,
        unguided_branch: str | None = None,
        modalities: list[str] | None = None,
        similarity_threshold: float | None = None,
        gap_scale: list[float] | None = None,
        quantile_range: list[float] | tuple[float, float] | None = None,
        quantile_region: str | None = None,
        gate_by_label: bool | None = None,
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

        Draws of a slice: one with `"ddim"` (K = 1), the noise of t = 0; with `"random"` that of each step, the lowest
        timestep first.

        Returns:
            [`AnomalyOutput`], a tuple, or a list or an iterator of either. `reconstruction` is `None`.

        Example:

        ```py
        >>> from anodiff import AnoFPDMPipeline

        >>> pipe = AnoFPDMPipeline.from_pretrained("owner/anofpdm-brats21").to("cuda")
        >>> result = pipe({"flair": "flair.nii.gz", "t1": "t1.nii.gz", "t1ce": "t1ce.nii.gz", "t2": "t2.nii.gz"})
        >>> result.slice_details["label"], result.slice_details["t_e"]
        ```
        """
        return self.run(locals())

    @torch.no_grad()
    def compute_maps(
        self,
        slices: torch.Tensor,
        indices: list[int],
        *,
        forward_steps: int,
        guidance_scale: float,
        forward_process: str,
        index_mode: str,
        stride: int,
        unguided_branch: str,
        modalities: list[str] | None,
        similarity_threshold: float | None,
        gap_scale: list[float] | None,
        quantile_range: list[float] | tuple[float, float],
        quantile_region: str,
        gate_by_label: bool,
        seed: int = 0,
        batch_size: int = 16,
        noise: torch.Tensor | Callable | None = None,
    ) -> SliceResults:
        """
        Computes the method itself: slices `(N, C, H, W)` to maps `(N, H, W)`, unfiltered, and, where it is calibrated,
        masks `(N, H, W)`, which are complete. `indices` are the slices' numbers in their volume, which their random
        numbers depend on.

        There are masks if `gap_scale` is known, and `similarity_threshold` too unless masks are not gated.
        """
        self.scheduler.set_timesteps(forward_steps, slices.device, stride=stride)
        num_steps = len(self.scheduler.timesteps)
        channels = self.modality_channels(modalities)
        running = RunningMaps(self.processor.middle(slices)[:, channels], num_steps)
        batches = range(0, len(slices), batch_size)
        with self.progress_bar(total=len(batches) * num_steps) as progress:
            for start in batches:
                rows = slice(start, start + batch_size)
                predictions = self.walk(
                    slices[rows],
                    indices[rows],
                    guidance_scale=guidance_scale,
                    forward_process=forward_process,
                    index_mode=index_mode,
                    unguided_branch=unguided_branch,
                    channels=channels,
                    seed=seed,
                    batch_size=batch_size,
                    noise=noise,
                )
                for step, (_, guided, unguided) in enumerate(predictions):
                    running.update(rows, step, guided, unguided)
                    progress.update()
        # A step that is NaN is never the best one, and would go unnoticed.
        if not torch.isfinite(running.total).all():
            raise ValueError(NOT_FINITE)

        details = {"similarity": running.similarity(), "t_e": running.best_step * stride, "gap": running.best_gap}
        details["first_step_used"] = (running.best_step == 0).long()
        maps, masks = running.maps, None
        if similarity_threshold is not None:
            details["label"] = (details["similarity"] <= similarity_threshold).long()
        if gap_scale is not None and (similarity_threshold is not None or not gate_by_label):
            masks, details["quantile"], details["mask_threshold"] = self.segment(
                maps, running.best_gap, slices, gap_scale, quantile_range, quantile_region
            )
            if gate_by_label:
                masks &= details["label"].bool()[:, None, None]
        return SliceResults(maps.mean(1), masks=masks, details=details)

    def walk(
        self,
        slices: torch.Tensor,
        indices: list[int],
        *,
        guidance_scale: float,
        forward_process: str,
        index_mode: str,
        unguided_branch: str,
        channels: list[int],
        seed: int,
        batch_size: int,
        noise: torch.Tensor | Callable | None,
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Walks one batch of slices `(B, C, H, W)` up the scheduler's grid: gives for every step x_t `(B, C, H, W)`
        and the predictions G_t and U_t of the compared channels, `(B, M, H, W)` each."""
        grid = self.scheduler.timesteps.flip(0)
        draw_noise = partial(self.scheduler.draw_noise, size=slices.shape[1:])
        # On the device once: no step of an encoding waits for the host. All channels need no copy.
        everything = channels == self.modality_channels(None)
        compared = slice(None) if everything else torch.tensor(channels, device=slices.device)
        random, middle = forward_process == "random", self.processor.middle
        # Steps of the random process do not wait for each other: several share a batch if the slices leave room.
        together = max(1, batch_size // len(slices)) if random else 1
        sample = null_output = previous = None
        for first in range(0, len(grid), together):
            # Items are ordered by step, then by slice.
            timesteps = grid[first : first + together].repeat_interleave(len(slices))
            null = torch.full_like(timesteps, NULL)
            if random or first == 0:
                # x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) n
                steps = len(timesteps) // len(slices)
                images = slices.repeat(steps, 1, 1, 1)
                draws = torch.arange(first, first + steps).repeat_interleave(len(slices))
                drawing = Noise(seed, noise, torch.tensor(indices).repeat(steps), draws, slices.device)
                sample = self.scheduler.add_noise(images, drawing(draw_noise, images), timesteps)
            elif index_mode == "original":
                # From t to the next timestep, and yet the predictions below say t.
                sample = self.scheduler.encode_step(self.predict_noise(sample, timesteps, null), timesteps, sample)
            else:
                sample = self.scheduler.encode_step(null_output, previous, sample)
            previous = timesteps

            # Both labels in one batch, (2B, C, H, W).
            labels = torch.cat([torch.full_like(timesteps, HEALTHY), null])
            outputs = self.predict_noise(sample.repeat(2, 1, 1, 1), timesteps.repeat(2), labels, unit=len(timesteps))
            healthy_output, null_output = outputs.chunk(2)
            guided = torch.sub((1.0 + guidance_scale) * healthy_output, null_output, alpha=guidance_scale)
            unguided = healthy_output if unguided_branch == "healthy" else null_output
            guided, unguided = (
                self.scheduler.predict_original_sample(own[:, compared], timesteps, middle(sample)[:, compared])
                for own in map(middle, (guided, unguided))
            )
            yield from zip(*(part.split(len(slices)) for part in (sample, guided, unguided)), strict=True)

    def segment(
        self,
        modality_maps: torch.Tensor,
        gap: torch.Tensor,
        slices: torch.Tensor,
        gap_scale: list[float],
        quantile_range: list[float] | tuple[float, float],
        quantile_region: str,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """
        Cuts the maps of modalities `(N, M, H, W)` where the largest gaps `(N, M)` say.

        Returns:
            `tuple` of masks `(N, H, W)`, bool, not gated by any label; levels of the quantiles `(N, M)`; thresholds
            `(N,)`, the means of the modalities' quantiles.
        """
        levels = quantile_levels(gap, gap_scale, quantile_range)
        inside = self.processor.middle(slices).mean(1) > -0.95
        if quantile_region == "image":
            inside = torch.ones_like(inside)
        thresholds = map_quantiles(modality_maps, levels, inside).mean(1)
        maps = modality_maps.mean(1)
        if self.config.median_size > 1:
            maps = median_filter(maps, self.config.median_size, 2, border="mirror")
        masks = (maps >= thresholds[:, None, None]).cpu().numpy()
        masks = remove_small_components(masks, self.config.min_component_size, 2)
        return torch.from_numpy(masks).to(slices.device), levels, thresholds

    def calibrate(
        self,
        slices: Iterable[dict],
        *,
        guidance_scales: Sequence[float] = (),
        seed: int = 0,
        batch_size: int | None = None,
        noise: torch.Tensor | Callable | None = None,
    ) -> dict:
        """
        Chooses `guidance_scale`, `similarity_threshold` and `gap_scale` from slices with labels and without any mask,
        and puts them into the configuration.

        For every guidance scale w: `similarity_threshold` by the fewest wrong image labels, and `gap_scale`, the
        largest gap of the unhealthy slices. Then the w with the highest image-level accuracy, among equals that with
        the largest mean gap of the unhealthy slices (so we read the paper's figure; the authors' program does not
        choose w). `threshold` is emptied: it would be used instead of the method's own masks. Each w costs a forward
        process of every slice.

        Args:
            slices (iterable of `dict`, to be walked more than once):
                For each subject `image (N, C, H, W)` in [-1, 1], `brain (N, H, W)`, `label (N,)` (1 unhealthy, 0
                healthy, -1 unknown) and `slice (N,)`, numbers in the volume, which the random numbers depend on.
                Slices without brain or label do not count.
            guidance_scales (`Sequence[float]`, *optional*): Candidates of w; the configuration's own by default.
            seed, batch_size, noise: As of a call.

        Returns:
            `dict`: `policy` ("labels"), `slices` and `anomalous_slices` (their numbers), `candidates` (a record for
            each w), `image_accuracy` of the chosen one, and `values`, what went into the configuration.

        Raises:
            ValueError: There are no healthy slices, or no unhealthy ones.
        """
        labels, candidates = [], []
        for item in slices:
            empty = ~np.asarray(item["brain"], bool).any((1, 2))
            labels.append(torch.from_numpy(np.where(empty, -1, item["label"])))
        labels = torch.cat(labels)
        for scale in map(float, guidance_scales or (self.config.guidance_scale,)):
            # Values of a former calibration need not fit.
            chosen = {"guidance_scale": scale, "similarity_threshold": None, "gap_scale": None}
            self.check_inputs(**self.default_settings() | chosen)
            details = []
            for item in slices:
                images, brain = (
                    torch.as_tensor(item[name], device=self._execution_device) for name in ("image", "brain")
                )
                numbers = [int(number) for number in item["slice"]]
                results = self.map_slices(
                    images, brain.bool(), numbers, batch_size=batch_size, seed=seed, noise=noise, **chosen
                )
                details.append(results.details)
            similarity, gap = (torch.cat([one[name].cpu() for one in details]) for name in ("similarity", "gap"))
            threshold, wrong = similarity_threshold(similarity, labels)
            unhealthy = gap[labels == 1]
            candidates.append(
                {
                    "guidance_scale": scale,
                    "similarity_threshold": threshold,
                    "gap_scale": unhealthy.amax(0).tolist(),
                    "mean_gap": float(unhealthy.mean()),
                    "wrong_labels": wrong,
                    "image_accuracy": 1 - wrong / int((labels >= 0).sum()),
                }
            )
        best = max(candidates, key=lambda one: (one["image_accuracy"], one["mean_gap"]))
        names = ("guidance_scale", "similarity_threshold", "gap_scale")
        values = {name: best[name] for name in names} | {"threshold": None}
        self.register_to_config(**values)
        return {
            "policy": "labels",
            "slices": int((labels >= 0).sum()),
            "anomalous_slices": int((labels == 1).sum()),
            "candidates": candidates,
            "image_accuracy": best["image_accuracy"],
            "values": values,
        }

    def check_inputs(self, **settings) -> None:
        """Raises a `ValueError` that names the argument."""
        check_integer("forward_steps", settings["forward_steps"], 1, self.scheduler.config.num_train_timesteps)
        check_integer("stride", settings["stride"], 1, settings["forward_steps"])
        # Without guidance there is no gap.
        check_number("guidance_scale", settings["guidance_scale"], above=0)
        check_choices(
            settings,
            forward_process=FORWARD_PROCESSES,
            index_mode=INDEX_MODES,
            unguided_branch=UNGUIDED_BRANCHES,
            quantile_region=QUANTILE_REGIONS,
            gate_by_label=(False, True),
        )
        channels = self.modality_channels(settings["modalities"])
        if settings["similarity_threshold"] is not None:
            check_number("similarity_threshold", settings["similarity_threshold"], least=-1, most=1)
        scale, quantiles = settings["gap_scale"], settings["quantile_range"]
        if scale is not None and (len(scale) != len(channels) or not all(value > 0 for value in scale)):
            compared = ", ".join(self.processor.config.modalities[channel] for channel in channels)
            raise ValueError(f"`gap_scale` must have one value above 0 for each of {compared}, got {tuple(scale)}.")
        if len(quantiles) != 2 or not 0 <= quantiles[0] <= quantiles[1] <= 1:
            raise ValueError(
                f"`quantile_range` must be two values, 0 <= lowest <= highest <= 1, got {tuple(quantiles)}."
            )
