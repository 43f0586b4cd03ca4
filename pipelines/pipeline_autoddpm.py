from __future__ import annotations

from collections.abc import Callable
from itertools import count

import torch
from diffusers import UNet2DModel

from ..models.unet_2d_andi import ANDiUNet2DModel
from ..schedulers.scheduling_anoddpm import AnoDDPMScheduler
from ..volumes.processor import VolumeProcessor
from .base import AnomalyPipeline, SliceResults, slice_generator
from .output import AnomalyOutput


MASK_DISTANCES = ("lpips", "residual")


class AutoDDPMPipeline(AnomalyPipeline):
    r"""
    AutoDDPM as the ANDi authors ran it: reconstruct a slice by partial diffusion, mask what differs, and make a second
    reconstruction that inpaints the mask and harmonises it with the rest, by resampling as in RePaint.

    UNet evaluations per slice: `noise_level` - 1 for the first reconstruction and (`inpainting_level` - 2) `resample` for the
    second (439 with the defaults), which slices with an empty mask do without. Not deterministic in itself, but fixed by the
    seed. Training needs healthy images only, no masks.

    Paper: Bercea, Neumayr, Rueckert, Schnabel, "Mask, Stitch, and Re-Sample: Enhancing Robustness and Generalizability in Anomaly
    Detection through Automatic Diffusion Models", ICML 2023 workshop IMLH. Constants: Frotscher et al., "Unsupervised Anomaly
    Detection using Aggregated Normative Diffusion" (ANDi), arXiv 2312.01904.

    Args:
        unet ([`~diffusers.UNet2DModel`]): Predicts the noise.
        scheduler ([`AnoDDPMScheduler`]): With `noise_type="gaussian"` and `variance_type="fixed_small"`, as the authors'.
        processor ([`VolumeProcessor`]): From volumes to slices and back, `value_range` (-1, 1).
        noise_level (`int`, defaults to 200): N, 2 to T - 1: the first reconstruction starts at t = N and walks N - 1, ..., 1.
        inpainting_level (`int`, defaults to 50): P, 3 to T - 1: the second starts at t = P and walks P - 1, ..., 1.
        resample (`int`, defaults to 5): How often the second repeats each step, one forward step between the repetitions.
        masking_threshold (`float`, defaults to 0.1411):
            The mask is where the mask map exceeds it. The authors' value is the 99th percentile of all mask maps of a data set
            under `mask_distance="lpips"`; find your own in the same way.
        quantile (`float`, defaults to 0.99): Quantile of the residual of a slice and modality that becomes 1.
        mask_distance (`str`, defaults to `"lpips"`):
            The mask map is the residual divided by its quantile, at most 1, times LPIPS (`"lpips"`, needs the package `lpips` and
            on first use its SqueezeNet weights, or `perceptual_distance`) or by itself (`"residual"`).
        threshold, median_size, median_dimensions, erosion, min_component_size, slice_score:
            See [`AnomalyPipeline`] and [`PostProcessing`]. The ANDi authors' median is 5 in 3-D.
    """

    model_cpu_offload_seq = "unet"
    _lpips: torch.nn.Module | None = None

    def __init__(
        self,
        unet: UNet2DModel | ANDiUNet2DModel,
        scheduler: AnoDDPMScheduler,
        processor: VolumeProcessor,
        noise_level: int = 200,
        inpainting_level: int = 50,
        resample: int = 5,
        masking_threshold: float = 0.1411,
        quantile: float = 0.99,
        mask_distance: str = "lpips",
        threshold: float | None = None,
        median_size: int = 5,
        median_dimensions: int = 3,
        erosion: int = 0,
        min_component_size: int = 0,
        slice_score: str = "mean",
    ):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler, processor=processor)
        self.check_inputs(noise_level, inpainting_level, resample, masking_threshold, quantile, mask_distance)
        if tuple(processor.config.value_range) != (-1.0, 1.0):
            raise ValueError(
                "`processor` must have the `value_range` (-1, 1), which both reconstructions are limited to, got"
                f" {tuple(processor.config.value_range)}."
            )
        self.register_to_config(
            noise_level=noise_level,
            inpainting_level=inpainting_level,
            resample=resample,
            masking_threshold=masking_threshold,
            quantile=quantile,
            mask_distance=mask_distance,
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
        noise_level: int | None = None,
        inpainting_level: int | None = None,
        resample: int | None = None,
        masking_threshold: float | None = None,
        quantile: float | None = None,
        mask_distance: str | None = None,
        perceptual_distance: Callable | None = None,
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
            noise_level, inpainting_level, resample, masking_threshold, quantile, mask_distance, threshold (*optional*):
                Instead of the checkpoint's.
            perceptual_distance (callable, *optional*):
                Instead of LPIPS: two stacks of pictures `(B, 3, H, W)` in the slices' own range to a map `(B, 1, H, W)` >= 0.
            brain_mask (*optional*): Mask of the volume, same kinds as the volume.
            generator (`int` or `torch.Generator`, *optional*): Seed; `None` is 0. Slice and stage have generators of their own.
            batch_size (`int`, defaults to 16): Slices that share one evaluation. Does not change the result.
            noise (`torch.Tensor` or callable, *optional*):
                Replaces every draw. Tensor `(draws, N, C, H, W)` for all N slices, in the order of use: forward noise and
                `noise_level` - 2 steps of the first reconstruction, forward noise of the second, then for t = P - 1, ..., 2 and each
                repetition the noise of the slice outside the mask, that of the reverse step and, but for the last repetition, that of the
                forward step. Callable: `noise(draw, items, shape)` with the number of the draw, the list of slices, and the shape
                wanted.
            return_dict (`bool`, defaults to `True`): Whether to return an [`AnomalyOutput`] or a tuple.
        """
        given = dict(
            noise_level=noise_level,
            inpainting_level=inpainting_level,
            resample=resample,
            masking_threshold=masking_threshold,
            quantile=quantile,
            mask_distance=mask_distance,
        )
        if perceptual_distance is not None and (mask_distance or self.config.mask_distance) == "residual":
            raise ValueError("`perceptual_distance` is not used with `mask_distance` 'residual': give one of the two.")
        return self.run(
            volume,
            given,
            threshold=threshold,
            brain_mask=brain_mask,
            generator=generator,
            batch_size=batch_size,
            noise=noise,
            perceptual_distance=perceptual_distance,
            return_dict=return_dict,
        )

    def default_settings(self) -> dict:
        """The checkpoint's values of what `compute_maps` needs to be told."""
        names = ("noise_level", "inpainting_level", "resample", "masking_threshold", "quantile", "mask_distance")
        return {name: self.config[name] for name in names}

    @torch.no_grad()
    def compute_maps(
        self,
        slices: torch.Tensor,
        indices: list[int],
        *,
        noise_level: int,
        inpainting_level: int,
        resample: int,
        masking_threshold: float,
        quantile: float,
        mask_distance: str,
        seed: int,
        batch_size: int,
        noise: torch.Tensor | Callable | None = None,
        perceptual_distance: Callable | None = None,
    ) -> SliceResults:
        """
        The method itself: slices `(N, C, H, W)` to maps `(N, H, W)` and reconstructions `(N, C, H, W)` in [-1, 1], unfiltered.

        `indices` are the slices' numbers in their volume, which their random numbers depend on. The map is the maximum over
        modalities of |slice - reconstruction| times the mask map.
        """
        if mask_distance == "lpips" and perceptual_distance is None:
            perceptual_distance = self.load_lpips(slices.device)
        mask_maps, inpainted = torch.empty_like(slices), slices.clone()
        pseudo_healthy, masks = torch.empty_like(slices), torch.empty_like(slices, dtype=torch.bool)

        # 1. Mask: what partial diffusion changes.
        rows = torch.arange(len(slices), device=slices.device)
        batches = [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
        with self.progress_bar(total=len(batches) * (noise_level - 1)) as progress, self.autocast():
            for rows in batches:
                draw = self._drawer(noise, rows, indices, seed, slices.device, first=0, stage=0)
                pseudo_healthy[rows] = self.reconstruct(slices[rows], noise_level, draw, progress)
        for rows in batches:
            mask_maps[rows], masks[rows] = self.make_mask(
                slices[rows], pseudo_healthy[rows], masking_threshold, quantile, perceptual_distance
            )

        # 2. Stitch, inpaint, harmonise: only slices that have something to inpaint, the others stay as they are.
        rows = torch.nonzero(masks.flatten(1).any(1)).flatten()
        batches = [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
        total = len(batches) * (inpainting_level - 2) * resample
        with self.progress_bar(total=total) as progress, self.autocast():
            for rows in batches:
                draw = self._drawer(noise, rows, indices, seed, slices.device, first=noise_level - 1, stage=1)
                inpainted[rows] = self.inpaint(
                    slices[rows], pseudo_healthy[rows], masks[rows], inpainting_level, resample, draw, progress
                )

        # 3. Map: limited to the range of images as the reconstruction is, so that values above it always differ.
        reconstruction = inpainted.clamp(-1.0, 1.0)
        return SliceResults(((slices - reconstruction).abs() * mask_maps).amax(1), reconstruction)

    def reconstruct(self, images: torch.Tensor, noise_level: int, draw: Callable, progress) -> torch.Tensor:
        """Partial diffusion of images `(B, C, H, W)`, not limited. `draw(sample, t)` gives the noise, `(B, C, H, W)`."""
        # Noised to t = N, but the first evaluation says N - 1; t = 0 is never done, and t = 1 adds no noise.
        sample = self.scheduler.add_noise(images, draw(images, noise_level), noise_level)
        self.scheduler.set_timesteps(noise_level, device=images.device)
        walked = self.scheduler.timesteps[:-1]
        for step, t in enumerate(walked, start=1):
            model_output = self.predict_noise(sample, t.expand(len(images)))
            variance_noise = draw(sample, t) if step < len(walked) else torch.zeros_like(sample)
            sample = self.scheduler.step(model_output, t, sample, variance_noise=variance_noise, return_dict=False)[0]
            progress.update()
        return sample

    @staticmethod
    def make_mask(
        images: torch.Tensor,
        pseudo_healthy: torch.Tensor,
        masking_threshold: float,
        quantile: float,
        perceptual_distance: Callable | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Mask map and dilated mask, `(B, C, H, W)` float and bool, of images and their reconstructions, both `(B, C, H, W)`.
        Without a `perceptual_distance` the mask map is the scaled residual alone.
        """
        residual = (images - pseudo_healthy).abs()
        scale = residual.flatten(2).quantile(quantile, dim=2)[..., None, None]
        # No residual is no anomaly: where more than the quantile is reconstructed perfectly the original divides 0 by 0.
        mask_map = torch.where(residual == 0, residual, residual / scale).clamp(0.0, 1.0)
        if perceptual_distance is not None:
            # One modality at a time, as a grey picture of three channels.
            pairs = zip(images.split(1, 1), pseudo_healthy.split(1, 1), strict=True)
            distances = [perceptual_distance(a.expand(-1, 3, -1, -1), b.expand(-1, 3, -1, -1)) for a, b in pairs]
            mask_map = torch.cat(distances, 1) * mask_map
        mask = (mask_map > masking_threshold).float()
        return mask_map, torch.nn.functional.max_pool2d(mask, 3, stride=1, padding=1) > 0

    def inpaint(
        self,
        images: torch.Tensor,
        pseudo_healthy: torch.Tensor,
        mask: torch.Tensor,
        inpainting_level: int,
        resample: int,
        draw: Callable,
        progress,
    ) -> torch.Tensor:
        """
        Second reconstruction, not limited: images outside the mask, harmonised pseudo-healthy tissue inside; all `(B, C, H, W)`.
        `draw(sample, t)` gives the noise.
        """
        # The original first sets masked pixels of the stitched image to 0, but nothing reads them there.
        sample = self.scheduler.add_noise(pseudo_healthy, draw(images, inpainting_level), inpainting_level)
        self.scheduler.set_timesteps(inpainting_level, device=images.device)
        for t in self.scheduler.timesteps[:-2]:  # P - 1, ..., 2
            for repetition in range(resample):
                # Healthy tissue at the level of t - 1 outside the mask, a reverse step inside; nothing is clipped here.
                healthy = self.scheduler.add_noise(images, draw(sample, t - 1), t - 1)
                model_output = self.predict_noise(sample, t.expand(len(images)))
                sample = self.scheduler.step(
                    model_output, t, sample, variance_noise=draw(sample, t), clip_sample=False, return_dict=False
                )[0]
                sample = torch.where(mask, sample, healthy)
                if repetition < resample - 1:
                    sample = self.scheduler.add_noise_step(sample, draw(sample, t - 1), t - 1)
                progress.update()
        # t = 1: no evaluation, the rest of the slice is put back as it is.
        return torch.where(mask, sample, images)

    def load_lpips(self, device: torch.device) -> Callable:
        """LPIPS (SqueezeNet, calibrated, one value per pixel) of the package `lpips`, loaded once."""
        if self._lpips is None:
            try:
                import lpips  # pyright: ignore[reportMissingImports]  (an extra)
            except (ImportError, RuntimeError) as error:  # torchvision beside another build of torch: RuntimeError
                raise ImportError(
                    "`mask_distance` 'lpips' needs the package lpips and a torchvision that fits the installed torch:"
                    ' `pip install "anodiff[autoddpm]"`. Or give a `perceptual_distance`, or choose `mask_distance`'
                    " 'residual' with a `masking_threshold` of its own."
                ) from error
            self._lpips = lpips.LPIPS(net="squeeze", spatial=True, verbose=False)
        network = self._lpips.to(device)
        # `normalize` expects [0, 1] and maps v to 2v - 1, although slices are in [-1, 1] already: the authors' masking
        # threshold was found that way.
        return lambda images, others: network(images, others, normalize=True)

    def check_inputs(
        self,
        noise_level: int,
        inpainting_level: int,
        resample: int,
        masking_threshold: float,
        quantile: float,
        mask_distance: str,
        batch_size: int = 1,
    ) -> None:
        """Raises a `ValueError` that names the argument."""
        last = self.scheduler.config.num_train_timesteps - 1
        for name, level, lowest in (("noise_level", noise_level, 2), ("inpainting_level", inpainting_level, 3)):
            if not isinstance(level, int) or not lowest <= level <= last:
                raise ValueError(f"`{name}` must be an integer between {lowest} and {last}, got {level!r}.")
        for name, value in (("resample", resample), ("batch_size", batch_size)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"`{name}` must be an integer of at least 1, got {value!r}.")
        if not masking_threshold >= 0:
            raise ValueError(f"`masking_threshold` must not be negative, got {masking_threshold}.")
        if not 0 < quantile <= 1:
            raise ValueError(f"`quantile` must be above 0 and at most 1, got {quantile}.")
        if mask_distance not in MASK_DISTANCES:
            raise ValueError(f"`mask_distance` must be one of {', '.join(MASK_DISTANCES)}, got {mask_distance!r}.")

    def _drawer(self, noise, rows, indices, seed, device, *, first: int, stage: int) -> Callable:
        """`draw(sample, t)`: the noises of one batch and stage one after the other, injected ones from number `first` on."""
        numbers = [indices[row] for row in rows.tolist()]
        if noise is None:
            generators = [slice_generator(seed, number, stage, device) for number in numbers]
            return lambda sample, t: self.scheduler.draw_noise(
                sample.shape, t, generators, sample.device, sample.dtype
            )
        order = count(first)

        def injected(sample: torch.Tensor, t) -> torch.Tensor:
            number = next(order)
            drawn = noise(number, numbers, tuple(sample.shape)) if callable(noise) else noise[number][numbers]
            return drawn.to(sample.device, sample.dtype)

        return injected
