from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from diffusers import ModelMixin, UNet2DModel

from ..schedulers.scheduling_anofpdm import AnoFPDMScheduler
from ..volumes.processor import VolumeProcessor
from .base import NOT_FINITE, AnomalyPipeline, SliceResults, slice_generator
from .output import AnomalyOutput
from .postprocessing import median_filter, remove_small_components
from .running_maps import RunningMaps


# N slices, B of them in a batch, C channels, M of them compared, S steps of the forward process, H x W pixels.

HEALTHY, NULL = 0, 2  # class labels of the network; 1 is unhealthy
FORWARD_PROCESSES = ("ddim", "random")
INDEX_MODES = ("original", "aligned")
UNGUIDED_BRANCHES = ("healthy", "none")
QUANTILE_REGIONS = ("image", "foreground")
FORWARD_SETTINGS = (
    "forward_steps",
    "guidance_scale",
    "forward_process",
    "index_mode",
    "stride",
    "unguided_branch",
    "modalities",
)
MASK_SETTINGS = ("similarity_threshold", "gap_scale", "quantile_range", "quantile_region", "gate_by_label")


class AnoFPDMPipeline(AnomalyPipeline):
    r"""
    AnoFPDM: carry a slice through the forward process of a diffusion model and compare, at each step, two one-shot predictions of
    the clean slice: G, guided towards "healthy", and U, without guidance. The gap between the two says whether the slice is unhealthy,
    up to which step t_e the squared errors of G are averaged to a map, and at which quantile the map is cut.

    UNet evaluations per slice: 3 S - 1 with S = `forward_steps` (1799), two of three in one batch; 2 S with
    `index_mode="aligned"` or `forward_process="random"`; a `stride` divides S. Not deterministic in itself, but fixed by the seed.
    Training and calibration need a label for each slice, healthy or not, no masks.

    Paper: Che, Rafsani, Shah, Rahman Siddiquee, Wu, "AnoFPDM: Anomaly Detection with Forward Process of Diffusion Models for Brain
    MRI", arXiv 2404.15683, WACV 2025 workshops.

    Label and mask need the calibrated values `similarity_threshold` and `gap_scale`; without them there is the map alone. They
    belong to one network and one set of the other values: calibrate again after a change. How the three results come about:

    - the map is the mean over modalities. It is filtered once, where every pipeline's map is, as [`PostProcessing`] says;
    - the mask is chosen here. The threshold is a quantile of the map *before* the median; what is cut is the same map after a median
      of `median_size` in the slice, mirrored at the border as the authors do it. Then components of fewer than `min_component_size`
      pixels of the slice go (the authors keep 41 and more). What lies outside the brain is part of this median, but not of the
      filtered map, so that the two may differ at the rim of the brain;
    - a `threshold`, if there is one, replaces this mask by `anomaly_map > threshold`, as in every pipeline.

    Details of each slice: `similarity`; `t_e`, `gap` (its largest value) and `first_step_used` (1 where t_e is 0 and the map is the error
    of that step, for which the original divides by 0) per modality; if calibrated also `label` (0 or 1), `quantile` per modality and
    `mask_threshold`.

    Args:
        unet ([`~diffusers.UNet2DModel`] or [`~diffusers.ModelMixin`]):
            Predicts the noise for class labels 0 (healthy), 1 (unhealthy) and 2 (none): `UNet2DModel(num_class_embeds=3)`, or
            the original's own network.
        scheduler ([`AnoFPDMScheduler`]): Schedule and DDIM steps.
        processor ([`VolumeProcessor`]): From volumes to slices and back, `value_range` (-1, 1).
        forward_steps (`int`, defaults to 600): S: the timesteps 0, ..., S - 1, at most T.
        guidance_scale (`float`, defaults to 2.0): w of (1 + w) eps(healthy) - w eps(null). The authors: 2 BraTS21, 30 ATLAS.
        forward_process (`str`, defaults to `"ddim"`):
            `"ddim"`: the slice is noised once, to t = 0, and encoded from there without a class. `"random"`: noised anew at every
            step.
        index_mode (`str`, defaults to `"original"`):
            Of the encoding: `"original"` moves with the timestep t *before* it predicts at t, so that predictions see a sample of t + 1
            (the authors' numbers), `"aligned"` afterwards: a third less work, other numbers, see docs/results.md.
        stride (`int`, defaults to 1):
            Walk every k-th timestep only: k times faster. The map bears it; the similarity, and so label and mask, does not (measured in
            docs/results.md). Best with `"aligned"`: the shift of `"original"` is one step of the grid, so it grows with the stride.
        unguided_branch (`str`, defaults to `"healthy"`):
            Class of U: `"healthy"` as in the authors' program, or `"none"` as in the paper's wording.
        modalities (`tuple[str, ...]`, *optional*):
            Names of those that are compared; the network sees all. Defaults to all of them. The authors: flair and t2 of BraTS21.
        similarity_threshold (`float`, *optional*): A slice is unhealthy where the curves' similarity is at most this.
        gap_scale (`tuple[float, ...]`, *optional*): Largest gap of unhealthy slices, one per compared modality.
        quantile_range (`tuple[float, float]`, defaults to (0.90, 0.98)):
            Quantile of the map for a gap of `gap_scale` and above, and for none; between them in 100 steps.
        quantile_region (`str`, defaults to `"image"`):
            Pixels that the quantile is taken of: all of the `"image"`, as the authors do, or its `"foreground"`, where the mean of the
            channels exceeds -0.95 (the authors' rule for their metrics). Mind that `quantile_range` fits the image.
        gate_by_label (`bool`, defaults to `True`): Whether slices with the label healthy have an empty mask.
        threshold, median_size, median_dimensions, erosion, min_component_size, slice_score:
            See [`AnomalyPipeline`] and [`PostProcessing`].
    """

    model_cpu_offload_seq = "unet"

    def __init__(
        self,
        unet: UNet2DModel | ModelMixin,
        scheduler: AnoFPDMScheduler,
        processor: VolumeProcessor,
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
    ):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler, processor=processor)
        if tuple(processor.config.value_range) != (-1.0, 1.0):
            raise ValueError(
                "`processor` must have the `value_range` (-1, 1), which the predictions are limited to, got"
                f" {tuple(processor.config.value_range)}."
            )
        self.register_to_config(
            forward_steps=forward_steps,
            guidance_scale=guidance_scale,
            forward_process=forward_process,
            index_mode=index_mode,
            stride=stride,
            unguided_branch=unguided_branch,
            modalities=modalities,
            similarity_threshold=similarity_threshold,
            gap_scale=gap_scale,
            quantile_range=quantile_range,
            quantile_region=quantile_region,
            gate_by_label=gate_by_label,
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
            forward_steps, guidance_scale, forward_process, index_mode, stride, unguided_branch, modalities, similarity_threshold,
            gap_scale, quantile_range, quantile_region, gate_by_label, threshold (*optional*):
                Instead of the checkpoint's.
            brain_mask (*optional*): Mask of the volume, same kinds as the volume.
            generator (`int` or `torch.Generator`, *optional*):
                Seed; `None` is 0. Every slice has a generator of its own, with `forward_process="random"` one for each timestep.
            batch_size (`int`, defaults to 16):
                Slices (and timesteps of `"random"`) that are evaluated together, each with two labels. Does not change the result.
            noise (`torch.Tensor` or callable, *optional*):
                Replaces every draw. Tensor `(K, N, C, H, W)`: K = 1 for `"ddim"`, the noise of t = 0; for `"random"` that of every step,
                the lowest timestep first. Callable: `noise(draws, items, shape)` with a list of numbers below K, a list of slice
                numbers as long, and the shape wanted.
            return_dict (`bool`, defaults to `True`): Whether to return an [`AnomalyOutput`] or a tuple.

        Returns:
            [`AnomalyOutput`], a tuple, or a list of either. `reconstruction` is `None`.

        Example:

        ```py
        >>> from anodiff import AnoFPDMPipeline

        >>> pipe = AnoFPDMPipeline.from_pretrained("owner/anofpdm-brats21").to("cuda")
        >>> result = pipe({"flair": "flair.nii.gz", "t1": "t1.nii.gz", "t1ce": "t1ce.nii.gz", "t2": "t2.nii.gz"})
        >>> result.slice_details["label"], result.slice_details["t_e"]
        ```
        """
        given = dict(
            forward_steps=forward_steps,
            guidance_scale=guidance_scale,
            forward_process=forward_process,
            index_mode=index_mode,
            stride=stride,
            unguided_branch=unguided_branch,
            modalities=modalities,
            similarity_threshold=similarity_threshold,
            gap_scale=gap_scale,
            quantile_range=quantile_range,
            quantile_region=quantile_region,
            gate_by_label=gate_by_label,
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
        return {name: self.config[name] for name in (*FORWARD_SETTINGS, *MASK_SETTINGS)}

    @torch.no_grad()
    def compute_maps(
        self,
        slices: torch.Tensor,
        indices: list[int],
        *,
        seed: int,
        batch_size: int,
        noise: torch.Tensor | Callable | None = None,
        similarity_threshold: float | None,
        gap_scale: list[float] | None,
        quantile_range: list[float] | tuple[float, float],
        quantile_region: str,
        gate_by_label: bool,
        **forward_settings,
    ) -> SliceResults:
        """
        The method itself: slices `(N, C, H, W)` to maps `(N, H, W)`, unfiltered, and, where it is calibrated, masks `(N, H, W)`, which
        are complete. `indices` are the slices' numbers in their volume, which their random numbers depend on.

        There are masks if `gap_scale` is known, and `similarity_threshold` too unless masks are not gated.
        """
        statistics = self._walk_all(slices, indices, seed=seed, batch_size=batch_size, noise=noise, **forward_settings)
        modality_maps = statistics["modality_maps"]
        details = {name: statistics[name] for name in ("similarity", "t_e", "gap")}
        details["first_step_used"] = (statistics["t_e"] == 0).long()
        masks = None
        if similarity_threshold is not None:
            details["label"] = (details["similarity"] <= similarity_threshold).long()
        if gap_scale is not None and (similarity_threshold is not None or not gate_by_label):
            masks, details["quantile"], details["mask_threshold"] = self.segment(
                modality_maps,
                details["gap"],
                slices,
                gap_scale=gap_scale,
                quantile_range=quantile_range,
                quantile_region=quantile_region,
            )
            if gate_by_label:
                masks &= details["label"].bool()[:, None, None]
        return SliceResults(modality_maps.mean(1), masks=masks, details=details)

    @torch.no_grad()
    def slice_statistics(
        self,
        slices: torch.Tensor,
        indices: list[int],
        *,
        seed: int = 0,
        batch_size: int = 16,
        noise: torch.Tensor | Callable | None = None,
        **settings,
    ) -> dict[str, torch.Tensor]:
        """
        What the calibration needs to know of slices `(N, C, H, W)`. Neither masks nor labels are read, and no calibrated value.

        `settings` are values of [`~AnoFPDMPipeline.default_settings`] instead of the checkpoint's.

        Returns:
            `dict[str, torch.Tensor]`: `similarity` `(N,)`, `gap` `(N, M)` (the largest of each modality's curve) and `t_e` `(N, M)`, and
            the curves over the S steps: `guided_error_curve`, `unguided_error_curve` and `gap_curve`, `(N, S, M)`.
        """
        # Calibrated values are what comes next: those of a former calibration need not fit.
        settings = {**self.default_settings(), **settings, "similarity_threshold": None, "gap_scale": None}
        self.check_inputs(**settings, batch_size=batch_size)
        forward_settings = {name: settings[name] for name in FORWARD_SETTINGS}
        statistics = self._walk_all(slices, indices, seed=seed, batch_size=batch_size, noise=noise, **forward_settings)
        del statistics["modality_maps"]
        return statistics

    def segment(
        self,
        modality_maps: torch.Tensor,
        gap: torch.Tensor,
        slices: torch.Tensor,
        *,
        gap_scale: list[float] | None,
        quantile_range: list[float] | tuple[float, float],
        quantile_region: str,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """
        Cuts the maps of modalities `(N, M, H, W)` where the largest gaps `(N, M)` say.

        Returns:
            `tuple` of masks `(N, H, W)`, bool, not gated by any label; levels of the quantiles `(N, M)`; thresholds `(N,)`, the means of
            the modalities' quantiles.

        Raises:
            ValueError: `gap_scale` is not known.
        """
        if gap_scale is None:
            raise ValueError(
                "A mask of AnoFPDM needs `gap_scale`, which this checkpoint does not have: calibrate it on slices with labels, or"
                " give a `threshold` of the map."
            )
        # A table of 101 levels and an index that is truncated after float32 rounding, both as in the original: ratios of 0.53 and
        # 0.59 get the levels of 0.52 and 0.58.
        ratio = (gap / torch.tensor(gap_scale, dtype=gap.dtype, device=gap.device)).clamp(0.0, 1.0)
        position = (ratio.round(decimals=2) * 100).long()
        levels = torch.linspace(*quantile_range, 101).flip(0).to(gap.device)[position]

        # Quantiles of the maps with linear interpolation, each map at its own level. Pixels outside the region are sorted to the end.
        pixels = modality_maps.flatten(2)
        count = pixels.shape[2]
        counts = torch.full_like(levels, count)
        if quantile_region == "foreground":
            inside = slices.mean(1).flatten(1) > -0.95
            pixels = pixels.masked_fill(~inside[:, None], torch.inf)
            counts = inside.sum(1, keepdim=True).expand_as(levels)
        rank = (levels * (counts - 1)).clamp(min=0)
        below = rank.floor().long()
        neighbours = torch.stack([below, (below + 1).clamp(max=count - 1)], 2)
        low, high = pixels.sort(2).values.gather(2, neighbours).unbind(2)
        # The upper neighbour of the last pixel of the region may be infinite.
        values = torch.where(rank == below, low, torch.lerp(low, high, rank - below))
        thresholds = values.mean(1)

        maps = modality_maps.mean(1).cpu().numpy()
        if self.config.median_size > 1:
            maps = median_filter(maps, self.config.median_size, 2, border="mirror")
        masks = maps >= thresholds[:, None, None].cpu().numpy()
        masks = remove_small_components(masks, self.config.min_component_size, 2)
        return torch.from_numpy(masks).to(slices.device), levels, thresholds

    @torch.no_grad()
    def walk(
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
        seed: int,
        batch_size: int,
        noise: torch.Tensor | Callable | None = None,
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """The forward process of one batch of slices `(B, C, H, W)`: for every step x_t `(B, C, H, W)` and the predictions G_t and U_t of
        the compared modalities, `(B, M, H, W)` each."""
        self.scheduler.set_timesteps(forward_steps, slices.device, stride=stride)
        grid = self.scheduler.timesteps.flip(0)
        numbers = grid.tolist()
        # On the device once: no step waits for the host.
        channels = torch.tensor(self._channels(modalities), device=slices.device)
        # Steps of the random process do not wait for each other: several share a batch if the slices leave room.
        together = max(1, batch_size // len(slices)) if forward_process == "random" else 1
        sample = null_output = previous = None
        for first in range(0, len(numbers), together):
            draws = range(first, min(first + together, len(numbers)))
            # Items are ordered by step, then by slice.
            timesteps = grid[draws.start : draws.stop].repeat_interleave(len(slices))
            null = torch.full_like(timesteps, NULL)
            if first == 0 or forward_process == "random":
                # x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) n
                images = slices.repeat(len(draws), 1, 1, 1)
                keys = [(draw, index) for draw in draws for index in indices]
                if noise is None:
                    generators = [slice_generator(seed, index, numbers[draw], slices.device) for draw, index in keys]
                    drawn = self.scheduler.draw_noise(images.shape, timesteps, generators, slices.device)
                else:
                    chosen = [draw for draw, _ in keys], [index for _, index in keys]
                    drawn = noise(*chosen, tuple(images.shape)) if callable(noise) else noise[chosen]
                sample = self.scheduler.add_noise(images, drawn.to(images), timesteps)
            elif index_mode == "original":
                # From t to the next timestep, and yet the predictions below say t.
                sample = self.scheduler.encode_step(self.predict_noise(sample, timesteps, null), timesteps, sample)
            else:
                sample = self.scheduler.encode_step(null_output, previous, sample)

            # Both labels in one batch, (2B, C, H, W).
            labels = torch.cat([torch.full_like(timesteps, HEALTHY), null])
            both = self.predict_noise(torch.cat([sample, sample]), timesteps.repeat(2), labels)
            healthy_output, null_output = both.chunk(2)
            previous = timesteps
            guided = (1.0 + guidance_scale) * healthy_output - guidance_scale * null_output
            unguided = healthy_output if unguided_branch == "healthy" else null_output
            guided, unguided = (
                self.scheduler.predict_original_sample(output[:, channels], timesteps, sample[:, channels])
                for output in (guided, unguided)
            )
            yield from zip(*(part.split(len(slices)) for part in (sample, guided, unguided)), strict=True)

    def check_inputs(
        self,
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
        batch_size: int = 1,
    ) -> None:
        """Raises a `ValueError` that names the argument."""
        for name, value, allowed in (
            ("forward_process", forward_process, FORWARD_PROCESSES),
            ("index_mode", index_mode, INDEX_MODES),
            ("unguided_branch", unguided_branch, UNGUIDED_BRANCHES),
            ("quantile_region", quantile_region, QUANTILE_REGIONS),
            ("gate_by_label", gate_by_label, (False, True)),
        ):
            if value not in allowed:
                raise ValueError(f"`{name}` must be one of {', '.join(map(str, allowed))}, got {value!r}.")
        steps = self.scheduler.config.num_train_timesteps
        for name, value, most in (
            ("forward_steps", forward_steps, steps),
            ("stride", stride, forward_steps),
            ("batch_size", batch_size, None),
        ):
            if not isinstance(value, int) or value < 1 or (most is not None and value > most):
                limit = "of at least 1" if most is None else f"between 1 and {most}"
                raise ValueError(f"`{name}` must be an integer {limit}, got {value!r}.")
        if not guidance_scale > 0:
            raise ValueError(
                f"`guidance_scale` must be above 0, got {guidance_scale}: without guidance there is no gap."
            )
        known = self.processor.config.modalities
        compared = known if modalities is None else modalities
        if (
            isinstance(compared, str)
            or not compared
            or len(set(compared)) < len(compared)
            or set(compared) - set(known)
        ):
            raise ValueError(f"`modalities` must be different ones of {', '.join(known)}, got {modalities!r}.")
        if similarity_threshold is not None and not -1 <= similarity_threshold <= 1:
            raise ValueError(f"`similarity_threshold` must be between -1 and 1, got {similarity_threshold}.")
        if gap_scale is not None and (len(gap_scale) != len(compared) or not all(scale > 0 for scale in gap_scale)):
            raise ValueError(
                f"`gap_scale` must have one value above 0 for each of {', '.join(compared)}, got {tuple(gap_scale)}."
            )
        if len(quantile_range) != 2 or not 0 <= quantile_range[0] <= quantile_range[1] <= 1:
            raise ValueError(
                f"`quantile_range` must be two values, 0 <= lowest <= highest <= 1, got {tuple(quantile_range)}."
            )

    def _channels(self, modalities: list[str] | None) -> list[int]:
        known = list(self.processor.config.modalities)
        return [known.index(name) for name in (known if modalities is None else modalities)]

    def _walk_all(
        self, slices: torch.Tensor, indices: list[int], *, batch_size: int, **settings
    ) -> dict[str, torch.Tensor]:
        """What is left of the forward processes of N slices, batch by batch: per modality the map, largest gap and t_e, and curves."""
        num_steps = -(-settings["forward_steps"] // settings["stride"])
        channels = self._channels(settings["modalities"])
        original = slices[:, channels]
        shape, curves = original.shape[:2], (len(slices), num_steps, len(channels))
        statistics = {
            "modality_maps": torch.zeros_like(original),
            "similarity": original.new_zeros(len(slices)),
            "t_e": original.new_zeros(shape, dtype=torch.int64),
            "gap": original.new_zeros(shape),
            "guided_error_curve": original.new_zeros(curves),
            "unguided_error_curve": original.new_zeros(curves),
            "gap_curve": original.new_zeros(curves),
        }
        batches = range(0, len(slices), batch_size)
        with self.progress_bar(total=len(batches) * num_steps) as progress, self.autocast():
            for start in batches:
                rows = slice(start, start + batch_size)
                running = RunningMaps(original[rows], num_steps)
                walked = self.walk(slices[rows], indices[rows], batch_size=batch_size, **settings)
                for step, (_, guided, unguided) in enumerate(walked):
                    running.update(step, guided, unguided)
                    progress.update()
                # A step that is NaN is never the best one, and would go unnoticed.
                if not torch.isfinite(running.total).all():
                    raise ValueError(NOT_FINITE)
                statistics["modality_maps"][rows] = running.maps
                statistics["similarity"][rows] = running.similarity()
                statistics["t_e"][rows] = running.best_step * settings["stride"]
                statistics["gap"][rows] = running.best_gap
                statistics["guided_error_curve"][rows] = running.guided_error
                statistics["unguided_error_curve"][rows] = running.unguided_error
                statistics["gap_curve"][rows] = running.gap
        return statistics
