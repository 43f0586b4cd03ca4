from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import UNet2DModel
from diffusers.configuration_utils import register_to_config

from ..checks import check_integer, check_number
from ..models.brain_extractor import BrainExtractor
from ..models.healthy_maps import HealthyMapsModel
from ..models.unet_2d_anofpdm import AnoFPDMUNet2DModel
from ..schedulers.scheduling_anofpdm import AnoFPDMScheduler
from ..volumes.processor import VolumeProcessor
from .base import HEALTHY, NULL, AnomalyPipeline
from .slices import SliceResults


# N slices, B of them in a batch, C modalities, H x W pixels.


class DDIBPipeline(AnomalyPipeline):
    r"""
    DDIB: translate a slice to its healthy counterpart. Its latent is found by DDIM's forward process without a class,
    and decoded with classifier-free guidance towards the class "healthy"; the map is the squared difference. As the
    authors of AnoFPDM run it, with the network of AnoFPDM.

    UNet evaluations per slice: 3 `forward_steps` (1350 with the defaults), two of three in one batch. Deterministic.
    Training needs an image label (healthy or not) of every slice, no masks.

    Paper: Su, Song, Meng, Ermon, "Dual Diffusion Implicit Bridges for Image-to-Image Translation", ICLR 2023; Che et
    al., "AnoFPDM: Anomaly Detection with Forward Process of Diffusion Models for Brain MRI", arXiv 2404.15683.

    Args:
        unet ([`~diffusers.UNet2DModel`] or [`AnoFPDMUNet2DModel`]):
            Predicts the noise of a slice of class 0 (healthy), 1 (unhealthy) or 2 (none).
        scheduler ([`AnoFPDMScheduler`]): Betas and update rules.
        processor ([`VolumeProcessor`]): From volumes to slices and back, `value_range` (-1, 1).
        forward_steps (`int`, defaults to 450):
            Steps S of the way up and of the way down, 1 to T. BraTS21 450, ATLAS 300.
        guidance_scale (`float`, defaults to 1.1):
            w: the noise is (1 + w) eps(healthy) - w eps(none). BraTS21 1.1, ATLAS 1.3.
        modalities (`tuple[str, ...]`, *optional*):
            Those that the map is the mean of; all by default. BraTS21 flair and t2.
        threshold, median_size, median_dimensions, erosion, min_component_size, slice_score, sign, weighting,
        normalization, healthy_maps, calibration:
            See [`AnomalyPipeline`] and [`PostProcessing`]. The authors' thresholds belong to an older map: calibrate.
            They drop components of 40 pixels and fewer in each slice, a volume's are 3-D here.
    """

    deterministic = True
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
        forward_steps: int = 450,
        guidance_scale: float = 1.1,
        modalities: list[str] | None = None,
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
        modalities: list[str] | None = None,
        threshold: float | None = None,
        brain_mask: Any = None,
        generator: int | torch.Generator | None = None,
        batch_size: int | None = None,
        callback: Callable[[int, int], None] | None = None,
        return_dict: bool = True,
    ) -> Any:
        """
        Finds anomalies in a volume; arguments as of this class and of [`AnomalyPipeline`]. Nothing is drawn.

        Returns:
            [`AnomalyOutput`], a tuple, or a list or an iterator of either. `reconstruction` is the translation.

        Example:

        ```py
        >>> from anodiff import DDIBPipeline

        >>> pipe = DDIBPipeline.from_pretrained("owner/ddib-brats21")
        >>> result = pipe({"flair": "flair.nii.gz", "t1": "t1.nii.gz", "t1ce": "t1ce.nii.gz", "t2": "t2.nii.gz"})
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
        modalities: list[str] | None,
        batch_size: int = 16,
    ) -> SliceResults:
        """
        Computes the method itself: slices `(N, C, H, W)` to maps `(N, H, W)` and translations `(N, C, H, W)`,
        unfiltered.

        The map is the mean of the squared differences of the chosen modalities. `indices` change nothing.
        """
        self.scheduler.set_timesteps(forward_steps)
        down = self.scheduler.timesteps.tolist()
        translated = torch.empty_like(slices)
        batches = range(0, len(slices), batch_size)
        with self.progress_bar(total=2 * len(down) * len(batches)) as progress:
            for start in batches:
                sample = slices[start : start + batch_size]
                healthy, null = (torch.full((len(sample),), label, device=slices.device) for label in (HEALTHY, NULL))

                # DDIM's forward process from the slice itself, without a class, to above the highest timestep.
                for t in reversed(down):
                    timesteps = torch.full_like(null, t)
                    sample = self.scheduler.encode_step(self.predict_noise(sample, timesteps, null), timesteps, sample)
                    progress.update()

                # Back, guided. Both classes share a batch, (2B, C, H, W).
                labels = torch.cat([healthy, null])
                for t in down:
                    timesteps = torch.full_like(labels, t)
                    outputs = self.predict_noise(sample.repeat(2, 1, 1, 1), timesteps, labels, unit=len(sample))
                    of_healthy, of_null = outputs.chunk(2)
                    model_output = (1 + guidance_scale) * of_healthy - guidance_scale * of_null
                    sample = self.scheduler.step(model_output, timesteps[: len(sample)], sample, return_dict=False)[0]
                    progress.update()
                translated[start : start + batch_size] = sample
        slices, translated = map(self.processor.middle, (slices, translated))
        channels = self.modality_channels(modalities)
        return SliceResults((slices - translated).square()[:, channels].mean(1), translated)

    def check_inputs(self, **settings) -> None:
        """Raises a `ValueError` that names the argument."""
        check_integer("forward_steps", settings["forward_steps"], 1, self.scheduler.config.num_train_timesteps)
        check_number("guidance_scale", settings["guidance_scale"], least=0)
        self.modality_channels(settings["modalities"])
