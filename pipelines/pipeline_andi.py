from __future__ import annotations

from collections.abc import Callable

import torch
from diffusers import UNet2DModel

from ..models.unet_2d_andi import ANDiUNet2DModel
from ..schedulers.scheduling_andi import NOISE_TYPES, ANDiScheduler
from ..volumes.processor import VolumeProcessor
from .base import AnomalyPipeline, SliceResults, slice_generator
from .output import AnomalyOutput


AGGREGATIONS = ("geometric", "arithmetic", "prob")
MODALITY_REDUCTIONS = ("max", "mean")
SETTINGS = (
    "start",
    "stop",
    "num_timesteps",
    "noise_type",
    "aggregation",
    "modality_reduction",
    "normative_blocks",
    "block_length",
    "zero_background",
)


class ANDiPipeline(AnomalyPipeline):
    r"""
    ANDi, aggregated normative diffusion: noise a slice once for each timestep of a middle range, compare the true mean of the reverse
    transition with the one that the network predicts, and aggregate the squared differences over timesteps by a geometric mean.
    Nothing is reconstructed, and no evaluation depends on another one.

    UNet evaluations per slice: `stop - start` (125), or `num_timesteps`. Not deterministic in itself, but fixed by the seed.
    Training needs healthy images only, no masks.

    Paper: Frotscher, Kapoor, Wolfers, Baumgartner, "Unsupervised Anomaly Detection using Aggregated Normative Diffusion", arXiv
    2312.01904.

    Maps are on the absolute scale of the deviations: exp(mean log d_t) with the geometric mean, never min-max scaled.

    Args:
        unet ([`~diffusers.UNet2DModel`] or [`ANDiUNet2DModel`]): Predicts the noise, or v if the scheduler says so.
        scheduler ([`ANDiScheduler`]): Schedule, deviations and the noise of the training.
        processor ([`VolumeProcessor`]): From volumes to slices and back.
        start (`int`, defaults to 75), stop (`int`, defaults to 200):
            The timesteps `start`, ..., `stop` - 1, with 1 <= `start` < `stop` <= T. UAD-IMAG: 26 and 126.
        num_timesteps (`int`, *optional*):
            Evaluate that many of them only, evenly spread: faster, noisier. Defaults to all of them, as the authors do.
        noise_type (`str`, defaults to `"gaussian"`):
            `"gaussian"`, also for a network that was trained with pyramid noise, or `"pyramid"`, one for each image. The authors found
            Gaussian noise far better at test time.
        aggregation (`str`, defaults to `"geometric"`):
            Over timesteps: `"geometric"` or `"arithmetic"` mean of d_t, or `"prob"`, 1 - product of exp(-d_t / (2 beta_t)).
        modality_reduction (`str`, defaults to `"max"`): `"max"` or `"mean"` of the maps of the modalities.
        normative_blocks (`bool`, defaults to `False`):
            The authors' unpublished variant: chains of `block_length` steps without noise from each noised slice, compared at their
            ends. As many evaluations, but those of a chain wait for each other.
        block_length (`int`, defaults to 25): Steps of a chain. The uppermost one takes what is left over and may be shorter.
        zero_background (`bool`, defaults to `False`):
            Set pixels that have exactly the lowest value of the processor's range to 0 before modalities are reduced (UAD-IMAG).
        threshold, median_size, median_dimensions, erosion, min_component_size, slice_score:
            See [`AnomalyPipeline`] and [`PostProcessing`]. ANDi: median of 5 x 5 x 5.
    """

    model_cpu_offload_seq = "unet"

    def __init__(
        self,
        unet: UNet2DModel | ANDiUNet2DModel,
        scheduler: ANDiScheduler,
        processor: VolumeProcessor,
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
    ):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler, processor=processor)
        self.register_to_config(
            start=start,
            stop=stop,
            num_timesteps=num_timesteps,
            noise_type=noise_type,
            aggregation=aggregation,
            modality_reduction=modality_reduction,
            normative_blocks=normative_blocks,
            block_length=block_length,
            zero_background=zero_background,
            threshold=threshold,
            median_size=median_size,
            median_dimensions=median_dimensions,
            erosion=erosion,
            min_component_size=min_component_size,
            slice_score=slice_score,
        )
        self.check_inputs(**self.default_settings())
        _ = self.postprocessing  # checks its values

    @torch.no_grad()
    def __call__(
        self,
        volume,
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
            start, stop, num_timesteps, noise_type, aggregation, modality_reduction, normative_blocks, block_length, zero_background,
            threshold (*optional*):
                Instead of the checkpoint's.
            brain_mask (*optional*): Mask of the volume, same kinds as the volume.
            generator (`int` or `torch.Generator`, *optional*): Seed; `None` is 0. Slice and timestep have generators of their own.
            batch_size (`int`, defaults to 16): Slices and timesteps that share one evaluation. Does not change the result.
            noise (`torch.Tensor` or callable, *optional*):
                Replaces every draw. Tensor `(K, N, C, H, W)`: the noise of the K timesteps (with `normative_blocks`: of the chains'
                first timesteps), the highest one first, for all N slices. Callable: `noise(draws, items, shape)` with a list of
                numbers below K, a list of slice numbers as long, and the shape wanted.
            return_dict (`bool`, defaults to `True`): Whether to return an [`AnomalyOutput`] or a tuple.

        Returns:
            [`AnomalyOutput`], a tuple, or a list of either. `reconstruction` is `None`.

        Example:

        ```py
        >>> from anodiff import ANDiPipeline

        >>> pipe = ANDiPipeline.from_pretrained("owner/andi-flair")
        >>> result = pipe("scan_flair.nii.gz")
        >>> result.save("out/")
        ```
        """
        given = dict(
            start=start,
            stop=stop,
            num_timesteps=num_timesteps,
            noise_type=noise_type,
            aggregation=aggregation,
            modality_reduction=modality_reduction,
            normative_blocks=normative_blocks,
            block_length=block_length,
            zero_background=zero_background,
        )
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
        return {name: self.config[name] for name in SETTINGS}

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
        seed: int,
        batch_size: int,
        noise: torch.Tensor | Callable | None = None,
    ) -> SliceResults:
        """
        The method itself: slices `(N, C, H, W)` to maps `(N, H, W)`, unfiltered, and no reconstruction.

        `indices` are the slices' numbers in their volume, which their random numbers depend on.
        """
        # N slices, K draws per slice (timesteps, or chains), B items per batch. Items are ordered by draw, then by slice: the
        # sums of a slice are added up in the same order for every batch size.
        self.scheduler.set_timesteps(num_timesteps, start=start, stop=stop)
        grid = self.scheduler.timesteps
        length = block_length if normative_blocks else 1
        rest = len(grid) % length
        # First timesteps of the chains and their length; without blocks every timestep is a chain of 1.
        groups = [(grid[:rest][:1], rest), (grid[rest::length], length)]
        groups = [(tops, steps) for tops, steps in groups if len(tops)]
        evaluations = sum(-(-len(tops) * len(slices) // batch_size) * steps for tops, steps in groups)

        total = torch.zeros_like(slices)
        first_draw = 0
        with self.progress_bar(total=evaluations) as progress, self.autocast():
            for tops, steps in groups:
                count = len(tops) * len(slices)
                all_timesteps = tops.repeat_interleave(len(slices)).to(slices.device)
                all_rows = torch.arange(len(slices), device=slices.device).repeat(len(tops))
                tops = tops.tolist()
                for begin in range(0, count, batch_size):
                    end = min(begin + batch_size, count)
                    rows, timesteps = all_rows[begin:end], all_timesteps[begin:end]
                    draws, numbers = zip(*(divmod(item, len(slices)) for item in range(begin, end)), strict=True)

                    # x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) n, (B, C, H, W)
                    original = slices[rows]
                    if noise is None:
                        keys = [(indices[number], tops[draw]) for draw, number in zip(draws, numbers, strict=True)]
                        generators = [slice_generator(seed, index, t, slices.device) for index, t in keys]
                        drawn = self.scheduler.draw_noise(
                            original.shape,
                            timesteps,
                            generators,
                            slices.device,
                            noise_type=noise_type,
                            normalize="per_image",
                        )
                    else:
                        chosen = [first_draw + draw for draw in draws], [indices[number] for number in numbers]
                        drawn = noise(*chosen, tuple(original.shape)) if callable(noise) else noise[chosen]
                        drawn = drawn.to(original)
                    sample = self.scheduler.add_noise(original, drawn, timesteps)

                    # d_t = (mu_q - mu_theta)^2, (B, C, H, W)
                    model_output = self.predict_noise(sample, timesteps)
                    error = self.scheduler.mean_error(model_output, timesteps, sample, original, drawn)
                    progress.update()
                    for _ in range(steps - 1):
                        # Both chains of a block, without noise: the predicted one, and its distance from the true one.
                        sample = self.scheduler.predicted_mean(model_output, timesteps, sample)
                        timesteps = timesteps - 1
                        model_output = self.predict_noise(sample, timesteps)
                        error = self.scheduler.carry_error(error, timesteps) + self.scheduler.mean_error(
                            model_output, timesteps, sample, original
                        )
                        progress.update()
                    deviation = self.scheduler.deviation(error)

                    # Running sums only: memory does not depend on the number of timesteps.
                    if aggregation == "geometric":
                        deviation = deviation.log()
                    elif aggregation == "prob":
                        deviation = self.scheduler.surprise(deviation, timesteps)
                    total.index_add_(0, rows, deviation)
                first_draw += len(tops)

        if aggregation == "prob":
            maps = -torch.expm1(-total)
        else:
            maps = total / first_draw
            maps = maps.exp() if aggregation == "geometric" else maps
        if zero_background:
            maps = maps.masked_fill(slices == self.processor.config.value_range[0], 0.0)
        return SliceResults(maps.amax(1) if modality_reduction == "max" else maps.mean(1))

    def check_inputs(
        self,
        start: int,
        stop: int,
        num_timesteps: int | None,
        noise_type: str,
        aggregation: str,
        modality_reduction: str,
        normative_blocks: bool,
        block_length: int,
        zero_background: bool,
        batch_size: int = 1,
    ) -> None:
        """Raises a `ValueError` that names the argument."""
        steps = self.scheduler.config.num_train_timesteps
        if not (isinstance(start, int) and isinstance(stop, int) and 1 <= start < stop <= steps):
            raise ValueError(
                f"`start` and `stop` must be integers with 1 <= start < stop <= {steps}, got {start!r} and {stop!r}. t = 0 has no"
                " reverse transition."
            )
        for name, value, allowed in (
            ("noise_type", noise_type, NOISE_TYPES),
            ("aggregation", aggregation, AGGREGATIONS),
            ("modality_reduction", modality_reduction, MODALITY_REDUCTIONS),
            ("normative_blocks", normative_blocks, (False, True)),
            ("zero_background", zero_background, (False, True)),
        ):
            if value not in allowed:
                raise ValueError(f"`{name}` must be one of {', '.join(map(str, allowed))}, got {value!r}.")
        for name, value, most in (
            ("num_timesteps", num_timesteps, stop - start),
            ("block_length", block_length, steps),
            ("batch_size", batch_size, None),
        ):
            if value is None and name == "num_timesteps":
                continue
            if not isinstance(value, int) or value < 1 or (most is not None and value > most):
                limit = "of at least 1" if most is None else f"between 1 and {most}"
                raise ValueError(f"`{name}` must be an integer {limit}, got {value!r}.")
        if normative_blocks and num_timesteps is not None:
            raise ValueError("`num_timesteps` must be None with `normative_blocks`: a chain walks every timestep.")
        if normative_blocks and aggregation == "prob":
            raise ValueError("`aggregation` must be geometric or arithmetic with `normative_blocks`, got 'prob'.")
