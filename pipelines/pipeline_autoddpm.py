from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import count
from typing import Any

import torch
from diffusers import UNet2DModel
from diffusers.configuration_utils import register_to_config

from ..checks import check_choices, check_integer, check_number
from ..models.brain_extractor import BrainExtractor
from ..models.healthy_maps import HealthyMapsModel
from ..models.unet_2d_andi import ANDiUNet2DModel
from ..schedulers.devices import send
from ..schedulers.scheduling_anoddpm import AnoDDPMScheduler
from ..volumes.processor import VolumeProcessor
from .base import AnomalyPipeline
from .batches import CPU_ITEMS
from .slices import Noise, SliceResults


MASK_DISTANCES = ("lpips", "residual")


# N slices, B of them in a batch, C modalities, H x W pixels.


class AutoDDPMPipeline(AnomalyPipeline):
    r"""
    AutoDDPM as the ANDi authors ran it: reconstruct a slice by partial diffusion, mask what differs, and make a second
    reconstruction that inpaints the mask and harmonises it with the rest, by resampling as in RePaint.

    UNet evaluations per slice: `noise_level` - 1 for the first reconstruction and (`inpainting_level` - 2) `resample`
    for the second (439 with the defaults), which slices with an empty mask do without. Not deterministic in itself,
    but fixed by the seed. Training needs healthy images only, no masks.

    Paper: Bercea, Neumayr, Rueckert, Schnabel, "Mask, Stitch, and Re-Sample: Enhancing Robustness and Generalizability
    in Anomaly Detection through Automatic Diffusion Models", ICML 2023 workshop IMLH. Constants: Frotscher et al.,
    "Unsupervised Anomaly Detection using Aggregated Normative Diffusion" (ANDi), arXiv 2312.01904.

    Args:
        unet ([`~diffusers.UNet2DModel`]): Predicts the noise.
        scheduler ([`AnoDDPMScheduler`]):
            With `noise_type="gaussian"` and `variance_type="fixed_small"`, as the authors'.
        processor ([`VolumeProcessor`]): From volumes to slices and back, `value_range` (-1, 1).
        noise_level (`int`, defaults to 200):
            N, 2 to T - 1: the first reconstruction starts at t = N and walks N - 1, ..., 1.
        inpainting_level (`int`, defaults to 50): P, 3 to T - 1: the second starts at t = P and walks P - 1, ..., 1.
        resample (`int`, defaults to 5):
            How often the second repeats each step, one forward step between the repetitions.
        masking_threshold (`float`, defaults to 0.1411):
            The mask is where the mask map exceeds it. The authors' value is the 99th percentile of all mask maps of a
            data set under `mask_distance="lpips"`; find your own in the same way.
        quantile (`float`, defaults to 0.99): Quantile of the residual of a slice and modality that becomes 1.
        mask_distance (`str`, defaults to `"lpips"`):
            The mask map is the residual divided by its quantile, at most 1, times LPIPS (`"lpips"`, needs the package
            `lpips` and on first use its SqueezeNet weights, or `perceptual_distance`) or by itself (`"residual"`).
        threshold, median_size, median_dimensions, erosion, min_component_size, slice_score, sign, weighting,
        normalization, healthy_maps, calibration:
            See [`AnomalyPipeline`] and [`PostProcessing`]. The ANDi authors' median is 5 in 3-D.
    """

    model_cpu_offload_seq = "unet"
    sees_neighbours = True
    _lpips: torch.nn.Module | None = None

    @register_to_config
    def __init__(
        self,
        unet: UNet2DModel | ANDiUNet2DModel,
        scheduler: AnoDDPMScheduler,
        processor: VolumeProcessor,
        brain_extractor: BrainExtractor | None = None,
        healthy_maps: HealthyMapsModel | None = None,
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
        noise_level: int | None = None,
        inpainting_level: int | None = None,
        resample: int | None = None,
        masking_threshold: float | None = None,
        quantile: float | None = None,
        mask_distance: str | None = None,
        perceptual_distance: Callable | None = None,
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

        Draws of a slice, in the order of use: forward noise and `noise_level` - 2 steps of the first reconstruction;
        forward noise of the second, then for t = P - 1, ..., 2 and each repetition the noise of the slice outside the
        mask, that of the reverse step and, but for the last repetition, that of the forward step.

        Args:
            perceptual_distance (callable, *optional*):
                Instead of LPIPS: two stacks of pictures `(B, 3, H, W)` in the slices' own range to a map
                `(B, 1, H, W)` >= 0.

        Returns:
            [`AnomalyOutput`], a tuple, or a list or an iterator of either.

        Example:

        ```py
        >>> from anodiff import AutoDDPMPipeline

        >>> pipe = AutoDDPMPipeline.from_pretrained("owner/autoddpm-brats")
        >>> result = pipe({"flair": "flair.nii.gz", "t1": "t1.nii.gz"})
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
        noise_level: int,
        inpainting_level: int,
        resample: int,
        masking_threshold: float,
        quantile: float,
        mask_distance: str,
        perceptual_distance: Callable | None = None,
        seed: int = 0,
        batch_size: int = 16,
        noise: torch.Tensor | Callable | None = None,
    ) -> SliceResults:
        """
        Computes the method itself: slices `(N, C, H, W)` to maps `(N, H, W)` and reconstructions `(N, C, H, W)` in
        [-1, 1], unfiltered.

        `indices` are the slices' numbers in their volume, which their random numbers depend on. The map is the maximum
        over modalities of |slice - reconstruction| times the mask map.
        """
        if mask_distance == "lpips" and perceptual_distance is None:
            perceptual_distance = self.load_lpips(slices.device)
        numbers, device = torch.tensor(indices), slices.device
        mask_maps, inpainted = torch.empty_like(slices), slices.clone()
        pseudo_healthy, masks = torch.empty_like(slices), torch.empty_like(slices, dtype=torch.bool)

        # 1. Mask: what partial diffusion changes.
        batches = [slice(start, start + batch_size) for start in range(0, len(slices), batch_size)]
        with self.progress_bar(total=len(batches) * (noise_level - 1)) as progress:
            for rows in batches:
                drawing = Noise(seed, noise, numbers[rows], 0, device)
                pseudo_healthy[rows] = self.reconstruct(slices[rows], noise_level, drawing, progress)
        # LPIPS looks at a slice once: small batches, which any memory holds, cost little.
        for rows in (slice(start, start + CPU_ITEMS) for start in range(0, len(slices), CPU_ITEMS)):
            mask_maps[rows], masks[rows] = self.make_mask(
                slices[rows], pseudo_healthy[rows], masking_threshold, quantile, perceptual_distance
            )

        # 2. Stitch, inpaint, harmonise: only slices that have something to inpaint, the others stay as they are.
        masked = torch.nonzero(masks.flatten(1).any(1).cpu()).flatten()
        batches = [masked[start : start + batch_size] for start in range(0, len(masked), batch_size)]
        total = len(batches) * (inpainting_level - 2) * resample
        with self.progress_bar(total=total) as progress:
            for rows in batches:
                drawing = Noise(seed, noise, numbers[rows], noise_level - 1, device)
                rows = send(rows, device)
                inpainted[rows] = self.inpaint(
                    slices[rows], pseudo_healthy[rows], masks[rows], inpainting_level, resample, drawing, progress
                )

        # 3. Map, without the neighbours: limited to the range of images as the reconstruction is, so that values above it always differ.
        reconstruction = inpainted.clamp(-1.0, 1.0)
        slices, reconstruction, mask_maps = map(self.processor.middle, (slices, reconstruction, mask_maps))
        return SliceResults(((slices - reconstruction).abs() * mask_maps).amax(1), reconstruction)

    def reconstruct(self, images: torch.Tensor, noise_level: int, drawing: Noise, progress) -> torch.Tensor:
        """Reconstructs images `(B, C, H, W)` by partial diffusion, not limited."""
        # Noised to t = N, but the first evaluation says N - 1; t = 0 is never done, and t = 1 adds no noise.
        timesteps = torch.full((len(images),), noise_level, device=images.device)
        sample = self.scheduler.add_noise(images, self.draw(drawing, images, timesteps, 0), timesteps)
        for step in range(1, noise_level):
            timesteps = timesteps - 1
            model_output = self.predict_noise(sample, timesteps)
            drawn = torch.zeros_like(sample)
            if step < noise_level - 1:
                drawn = self.draw(drawing, sample, timesteps, step)
            sample = self.scheduler.step(model_output, timesteps, sample, drawn).prev_sample
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
        Makes the mask map and the dilated mask, `(B, C, H, W)` float and bool, of images and their reconstructions,
        both `(B, C, H, W)`. Without a `perceptual_distance` the mask map is the scaled residual alone.
        """
        residual = (images - pseudo_healthy).abs()
        scale = residual.flatten(2).quantile(quantile, dim=2)[..., None, None]
        # No residual is no anomaly: where more than the quantile is perfect, the original divides 0 by 0.
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
        drawing: Noise,
        progress,
    ) -> torch.Tensor:
        """
        Makes the second reconstruction, not limited: images outside the mask, harmonised pseudo-healthy tissue inside;
        all `(B, C, H, W)`. Its draws are numbered from the first one of `drawing` on.
        """
        # The original first sets masked pixels of the stitched image to 0, but nothing reads them there.
        number = count()
        timesteps = torch.full((len(images),), inpainting_level, device=images.device)
        drawn = self.draw(drawing, images, timesteps, next(number))
        sample = self.scheduler.add_noise(pseudo_healthy, drawn, timesteps)
        for _ in range(inpainting_level - 2):  # t = P - 1, ..., 2
            timesteps = timesteps - 1
            lower = timesteps - 1
            for repetition in range(resample):
                # Healthy tissue at the level of t - 1 outside the mask, an unclipped reverse step inside.
                healthy = self.scheduler.add_noise(images, self.draw(drawing, sample, lower, next(number)), lower)
                model_output = self.predict_noise(sample, timesteps)
                drawn = self.draw(drawing, sample, timesteps, next(number))
                sample = self.scheduler.step(model_output, timesteps, sample, drawn, clip_sample=False).prev_sample
                sample = torch.where(mask, sample, healthy)
                if repetition < resample - 1:
                    drawn = self.draw(drawing, sample, lower, next(number))
                    sample = self.scheduler.add_noise_step(sample, drawn, lower)
                progress.update()
        # t = 1: no evaluation, the rest of the slice is put back as it is.
        return torch.where(mask, sample, images)

    def draw(self, drawing: Noise, sample: torch.Tensor, timesteps: torch.Tensor, step: int) -> torch.Tensor:
        """Draws the noise of number `step` for images `(B, C, H, W)` at timesteps `(B,)`."""
        make = partial(self.scheduler.draw_noise, size=sample.shape[1:], timesteps=timesteps)
        return drawing(make, sample, step)

    def load_lpips(self, device: torch.device) -> Callable:
        """Loads LPIPS (SqueezeNet, calibrated, one value per pixel) of the package `lpips`, once."""
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

    def check_inputs(self, **settings) -> None:
        """Raises a `ValueError` that names the argument."""
        last = self.scheduler.config.num_train_timesteps - 1
        check_integer("noise_level", settings["noise_level"], 2, last)
        check_integer("inpainting_level", settings["inpainting_level"], 3, last)
        check_integer("resample", settings["resample"], 1)
        check_number("masking_threshold", settings["masking_threshold"], least=0)
        check_number("quantile", settings["quantile"], above=0, most=1)
        check_choices(settings, mask_distance=MASK_DISTANCES)
        if settings["mask_distance"] == "residual" and "perceptual_distance" in settings:
            raise ValueError("`perceptual_distance` is not used with `mask_distance` 'residual': give one of the two.")
