from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers.configuration_utils import register_to_config

from ..checks import check_integer
from ..models.brain_extractor import BrainExtractor
from ..models.healthy_maps import HealthyMapsModel
from ..models.unet_2d_dae import DAEUNet2DModel
from ..schedulers.scheduling_dae import DAEScheduler
from ..volumes.processor import VolumeProcessor
from .base import AnomalyPipeline
from .slices import SliceResults


# A window of the foreground that is filled by more than this counts as its inside (the ANDi authors' value).
FILLED = 0.95


class DAEPipeline(AnomalyPipeline):
    r"""
    Denoising autoencoder: reconstruct a slice with a network that has learnt to remove coarse noise from healthy
    slices, and removes what it has not seen, too. The slice goes in as it is; the map is the absolute difference,
    without the rim of the brain.

    UNet evaluations per slice: 1. Deterministic. Training needs healthy images only, no masks.

    Paper: Kascenas, Pugeault, O'Neil, "Denoising Autoencoders for Unsupervised Anomaly Detection in Brain MRI", MIDL
    2022, as run by the authors of ANDi (Frotscher et al., arXiv 2312.01904).

    Args:
        unet ([`DAEUNet2DModel`]): Predicts the slice.
        scheduler ([`DAEScheduler`]): Noise of the training; says what is foreground.
        processor ([`VolumeProcessor`]):
            From volumes to slices and back. The network sees [0, 1] whatever the processor's `value_range`, background
            0, so that one prepared data set serves all methods.
        rim_window (`int`, defaults to 5):
            Odd side of the window that must be filled by foreground (more than 95 %) for a pixel to count; 1 keeps the
            rim.
        threshold, median_size, median_dimensions, erosion, min_component_size, slice_score, sign, weighting,
        normalization, healthy_maps, calibration:
            See [`AnomalyPipeline`] and [`PostProcessing`]. The ANDi authors' median is 5 in 3-D.
    """

    deterministic = True
    model_cpu_offload_seq = "unet"

    @register_to_config
    def __init__(
        self,
        unet: DAEUNet2DModel,
        scheduler: DAEScheduler,
        processor: VolumeProcessor,
        brain_extractor: BrainExtractor | None = None,
        healthy_maps: HealthyMapsModel | None = None,
        rim_window: int = 5,
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
        if processor.config.intensity == "mean_std":
            raise ValueError(
                "`processor` must map the background to the lower end of `value_range`, which `intensity` 'mean_std'"
                " does not: choose another."
            )

    @torch.no_grad()
    def __call__(
        self,
        volume: Any,
        *,
        rim_window: int | None = None,
        threshold: float | None = None,
        brain_mask: Any = None,
        generator: int | torch.Generator | None = None,
        batch_size: int | None = None,
        callback: Callable[[int, int], None] | None = None,
        return_dict: bool = True,
    ) -> Any:
        """
        Finds anomalies in a volume; arguments as of this class and of [`AnomalyPipeline`]. Nothing is drawn:
        `generator` changes nothing.

        Returns:
            [`AnomalyOutput`], a tuple, or a list or an iterator of either.

        Example:

        ```py
        >>> from anodiff import DAEPipeline

        >>> pipe = DAEPipeline.from_pretrained("owner/dae-brats")
        >>> result = pipe({"flair": "flair.nii.gz", "t1": "t1.nii.gz"})
        >>> result.save("out/")
        ```
        """
        return self.run(locals())

    @torch.no_grad()
    def compute_maps(
        self, slices: torch.Tensor, indices: list[int], *, rim_window: int, batch_size: int = 16
    ) -> SliceResults:
        """
        Computes the method itself: slices `(N, C, H, W)` to maps `(N, H, W)` and reconstructions `(N, C, H, W)`,
        unfiltered.

        The map is the maximum over modalities of |slice - reconstruction| inside the foreground. `indices` change
        nothing.
        """
        slices = self.processor.to_unit(slices)
        reconstruction = torch.empty_like(slices)
        batches = range(0, len(slices), batch_size)
        with self.progress_bar(total=len(batches)) as progress:
            for start in batches:
                rows = slice(start, start + batch_size)
                reconstruction[rows] = self.predict_noise(slices[rows])
                progress.update()

        # Beyond the slice there is no foreground: zeros are counted.
        foreground = self.scheduler.foreground(slices).to(slices.dtype)
        filled = torch.nn.functional.avg_pool2d(foreground, rim_window, stride=1, padding=rim_window // 2)
        maps = ((slices - reconstruction).abs() * (filled > FILLED)).amax(1)
        return SliceResults(maps, self.processor.from_unit(reconstruction))

    def check_inputs(self, **settings) -> None:
        """Raises a `ValueError` that names the argument."""
        check_integer("rim_window", settings["rim_window"], 1)
        if settings["rim_window"] % 2 == 0:
            raise ValueError(f"`rim_window` must be odd, got {settings['rim_window']}.")
