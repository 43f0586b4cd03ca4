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
from ..schedulers.scheduling_andi import NOISE_TYPES, ANDiScheduler
from ..volumes.processor import VolumeProcessor
from .base import AnomalyPipeline
from .modalities import check_modalities, hide_missing
from .slices import Noise, SliceResults


AGGREGATIONS = ("geometric", "arithmetic", "prob")
MODALITY_REDUCTIONS = ("max", "mean")


# N slices, K draws per slice (timesteps, or chains of them), B items (a draw of a slice) of a batch, C modalities,
# H x W pixels.


class ANDiPipeline(AnomalyPipeline):
    r"""
    ANDi, aggregated normative diffusion: noise a slice once for each timestep of a middle range, compare the true mean
    of the reverse transition with the one that the network predicts, and aggregate the squared differences over
    timesteps by a geometric mean. Nothing is reconstructed, and no evaluation depends on another one.

    UNet evaluations per slice: `stop - start` (125), or `num_timesteps`. Not deterministic in itself, but fixed by the
    seed. Training needs healthy images only, no masks.

    Paper: Frotscher, Kapoor, Wolfers, Baumgartner, "Unsupervised Anomaly Detection using Aggregated Normative
    Diffusion", arXiv 2312.01904.

    Maps are on the absolute scale of the deviations: exp(mean log d_t) with the geometric mean, never min-max scaled.

    Args:
        unet ([`~diffusers.UNet2DModel`] or [`ANDiUNet2DModel`]): Predicts the noise, or v if the scheduler says so.
        scheduler ([`ANDiScheduler`]): Schedule, deviations and the noise of the training.
        processor ([`VolumeProcessor`]): From volumes to slices and back.
        start (`int`, defaults to 75), stop (`int`, defaults to 200):
            The timesteps `start`, ..., `stop` - 1, with 1 <= `start` < `stop` <= T. UAD-IMAG: 26 and 126.
        num_timesteps (`int`, *optional*):
            Evaluate that many of them only, evenly spread: faster, noisier. Defaults to all of them, as the authors
            do.
        noise_type (`str`, defaults to `"gaussian"`):
            `"gaussian"`, also for a network that was trained with pyramid noise, or `"pyramid"`, one for each image.
            The authors found Gaussian noise far better at test time.
        aggregation (`str`, defaults to `"geometric"`):
            Over timesteps: `"geometric"` or `"arithmetic"` mean of d_t, or `"prob"`, 1 - product of exp(-d_t / (2
            beta_t)).
        modality_reduction (`str`, defaults to `"max"`): `"max"` or `"mean"` of the maps of the modalities.
        normative_blocks (`bool`, defaults to `False`):
            The authors' unpublished variant: chains of steps without noise from each noised slice, compared at their
            ends. As many evaluations, but those of a chain wait for each other.
        block_length (`int`, defaults to 25):
            A chain ends at the multiples of it, and at 1. The first one begins at `stop` - 1, each other below the end
            before it; what lies below the lowest end is not compared.
        zero_background (`bool`, defaults to `False`):
            Set pixels that have exactly the lowest value of the processor's range to 0 before modalities are reduced
            (UAD-IMAG).
        optional_modalities (`list[str]`, *optional*):
            Modalities that the network does without, where others are there; a training with
            `objective.modality_dropout` names them. Of a volume that lacks some the network sees none of them, not even
            noise, and the map is that of the others.
        present_modalities (`list[str]`, *optional*):
            Those that count as there; all that a volume has by default.
        threshold, median_size, median_dimensions, erosion, min_component_size, slice_score, sign, weighting,
        normalization, healthy_maps, calibration:
            See [`AnomalyPipeline`] and [`PostProcessing`]. ANDi: median of 5 x 5 x 5.
    """

    model_cpu_offload_seq = "unet"
    sees_neighbours = True

    @register_to_config
    def __init__(
        self,
        unet: UNet2DModel | ANDiUNet2DModel,
        scheduler: ANDiScheduler,
        processor: VolumeProcessor,
        brain_extractor: BrainExtractor | None = None,
        healthy_maps: HealthyMapsModel | None = None,
        start: int = 75,
        stop: int = 200,
        num_timesteps: int | None = None,
        noise_type: str = "gaussian",
        aggregation: str = "geometric",
        modality_reduction: str = "max",
        normative_blocks: bool = False,
        block_length: int = 25,
        zero_background: bool = False,
        threshold: float | None = None,
        median_size: int = 5,
        median_dimensions: int = 3,
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
        start: int | None = None,
        stop: int | None = None,
        num_timesteps: int | None = None,
        noise_type: str | None = None,
        aggregation: str | None = None,
        modality_reduction: str | None = None,
        normative_blocks: bool | None = None,
        block_length: int | None = None,
        zero_background: bool | None = None,
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

        Draws of a slice: the noise of each of the K timesteps, or of the chains' first ones, the highest first.

        Returns:
            [`AnomalyOutput`], a tuple, or a list or an iterator of either. `reconstruction` is `None`.

        Example:

        ```py
        >>> from anodiff import ANDiPipeline

        >>> pipe = ANDiPipeline.from_pretrained("owner/andi-flair")
        >>> result = pipe("scan_flair.nii.gz")
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
        start: int,
        stop: int,
        num_timesteps: int | None,
        noise_type: str,
        aggregation: str,
        modality_reduction: str,
        normative_blocks: bool,
        block_length: int,
        zero_background: bool,
        present_modalities: list[str] | None,
        seed: int = 0,
        batch_size: int = 16,
        noise: torch.Tensor | Callable | None = None,
    ) -> SliceResults:
        """
        Computes the method itself: slices `(N, C, H, W)` to maps `(N, H, W)`, unfiltered, and no reconstruction.

        `indices` are the slices' numbers in their volume, which their random numbers depend on.
        """
        # K chains, from their first timestep so many steps down; without blocks each timestep is a chain of one step.
        self.scheduler.set_timesteps(num_timesteps, start=start, stop=stop)
        tops, lengths = self.scheduler.timesteps, torch.ones_like(self.scheduler.timesteps)
        if normative_blocks:
            ends = block_ends(tops, block_length)
            tops = torch.cat([tops[:1], ends[:-1] - 1])
            lengths = tops - ends + 1

        numbers, device = torch.tensor(indices), slices.device
        draw_noise = partial(
            self.scheduler.draw_noise, size=slices.shape[1:], noise_type=noise_type, normalize="per_image"
        )
        total = torch.zeros_like(slices)
        # Items are ordered by draw, then by slice: a slice's sums are added in the same order for every batch size.
        groups = [(steps, torch.nonzero(lengths == steps).flatten()) for steps in lengths.unique().tolist()]
        evaluations = sum(-(-len(draws) * len(slices) // batch_size) * steps for steps, draws in groups)
        with self.progress_bar(total=evaluations) as progress:
            for steps, draws_of_group in groups:
                items = torch.cartesian_prod(draws_of_group, torch.arange(len(slices)))
                for draws, rows in (batch.T for batch in items.split(batch_size) if len(batch)):
                    drawing = Noise(seed, noise, numbers[rows], draws, device)
                    rows, timesteps = send(rows, device), send(tops[draws], device)
                    original = slices[rows]
                    error = self.chain_error(
                        original, drawing(draw_noise, original), timesteps, steps, present_modalities, progress
                    )

                    # d_t = (mu_q - mu_theta)^2, (B, C, H, W)
                    deviation = self.scheduler.deviation(error)
                    if aggregation == "geometric":
                        deviation = deviation.log()
                    elif aggregation == "prob":
                        deviation = self.scheduler.surprise(deviation, timesteps)
                    # Running sums only: memory does not depend on the number of timesteps.
                    total.index_add_(0, rows, deviation)

        # Neighbours are compared with the slices, and are no part of their maps.
        slices, total = self.processor.middle(slices), self.processor.middle(total)
        if aggregation == "prob":
            maps = -torch.expm1(-total)
        else:
            maps = total / len(tops)
            maps = maps.exp() if aggregation == "geometric" else maps
        if zero_background:
            maps = maps.masked_fill(slices == self.processor.config.value_range[0], 0.0)
        maps = maps[:, self.modality_channels(present_modalities)]
        return SliceResults(maps.amax(1) if modality_reduction == "max" else maps.mean(1))

    def chain_error(
        self,
        original: torch.Tensor,
        noise: torch.Tensor,
        timesteps: torch.Tensor,
        steps: int,
        present: list[str] | None,
        progress,
    ) -> torch.Tensor:
        """Computes mu_q - mu_theta, `(B, C, H, W)`, at the end of a chain of `steps` steps without noise, which begins
        at t = `timesteps`, `(B,)`, with slices `original` that are noised to it. The network sees the modalities that
        are `present`; the values of the others mean nothing."""
        # x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) n
        sample = self.scheduler.add_noise(original, noise, timesteps)
        model_output = self.predict_noise(hide_missing(self, sample, present), timesteps)
        error = self.scheduler.mean_error(model_output, timesteps, sample, original, noise)
        progress.update()
        for _ in range(steps - 1):
            # The predicted chain, and its distance from the true one.
            sample = self.scheduler.predicted_mean(model_output, timesteps, sample)
            timesteps = timesteps - 1
            model_output = self.predict_noise(hide_missing(self, sample, present), timesteps)
            error = self.scheduler.carry_error(error, timesteps)
            error = error + self.scheduler.mean_error(model_output, timesteps, sample, original)
            progress.update()
        return error

    def check_inputs(self, **settings) -> None:
        """Raises a `ValueError` that names the argument."""
        start, stop, steps = settings["start"], settings["stop"], self.scheduler.config.num_train_timesteps
        check_modalities(self, settings["present_modalities"])
        check_integer("start", start, 1, steps - 1)
        check_integer("stop", stop, start + 1, steps)
        check_choices(
            settings,
            noise_type=NOISE_TYPES,
            aggregation=AGGREGATIONS,
            modality_reduction=MODALITY_REDUCTIONS,
            normative_blocks=(False, True),
            zero_background=(False, True),
        )
        if settings["num_timesteps"] is not None:
            check_integer("num_timesteps", settings["num_timesteps"], 1, stop - start)
        check_integer("block_length", settings["block_length"], 1, steps)
        if not settings["normative_blocks"]:
            return
        if settings["num_timesteps"] not in (None, stop - start):
            raise ValueError(
                f"`num_timesteps` must be {stop - start}, all from `start` to `stop` - 1, with `normative_blocks`, whose"
                f" chains walk every timestep, got {settings['num_timesteps']}."
            )
        if settings["aggregation"] == "prob":
            raise ValueError("`aggregation` must be geometric or arithmetic with `normative_blocks`, got 'prob'.")
        if not len(block_ends(torch.arange(start, stop), settings["block_length"])):
            raise ValueError(
                f"`block_length` must have a multiple from `start` to `stop` - 1, {start} to {stop - 1}, where a chain ends, got"
                f" {settings['block_length']}."
            )


def block_ends(timesteps: torch.Tensor, block_length: int) -> torch.Tensor:
    """Returns those of the timesteps `(K,)` at which the authors' blocks end: the multiples of `block_length`, and
    1."""
    return timesteps[(timesteps % block_length == 0) | (timesteps == 1)]
