from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from diffusers import UNet2DModel
from diffusers.configuration_utils import register_to_config

from ..checks import check_choice, check_integer, check_number
from ..models.brain_extractor import BrainExtractor
from ..models.classifier_2d import NoisyClassifierModel
from ..models.healthy_maps import HealthyMapsModel
from ..schedulers.scheduling_anofpdm import AnoFPDMScheduler
from ..volumes.processor import VolumeProcessor
from .base import HEALTHY, AnomalyPipeline
from .slices import Noise, SliceResults


# N slices, B of them in a batch, C modalities, H x W pixels.


class ClassifierGuidedPipeline(AnomalyPipeline):
    r"""
    Classifier guidance: noise a slice part of the way and denoise it by DDIM steps, which the gradient of a classifier
    of noisy slices turns towards "healthy"; the map is the squared difference. As the authors of AnoFPDM run it.

    UNet evaluations per slice: `noise_level`, and as many evaluations and gradients of the classifier (200 each with
    the defaults). Not deterministic in itself, but fixed by the seed. Training of the classifier needs an image label
    (healthy or not) of every slice, no masks.

    Paper: Wolleb, Bieder, Sandkühler, Cattin, "Diffusion Models for Medical Anomaly Detection", MICCAI 2022; Che et
    al., "AnoFPDM: Anomaly Detection with Forward Process of Diffusion Models for Brain MRI", arXiv 2404.15683.

    Args:
        unet ([`~diffusers.UNet2DModel`]):
            Predicts the noise, unconditional. With 2C outputs (a learned variance) the first C count.
        classifier ([`NoisyClassifierModel`]): Logits of (healthy, unhealthy) of x_t.
        scheduler ([`AnoFPDMScheduler`]): Betas and update rules.
        processor ([`VolumeProcessor`]): From volumes to slices and back, `value_range` (-1, 1).
        noise_level (`int`, defaults to 200): Forward steps L, 1 to T: the slice is noised to t = L - 1.
        guidance_scale (`float`, defaults to 1000.0): Factor of the classifier's gradient. BraTS21 1000, ATLAS 500.
        clip_after_guidance (`bool`, defaults to `False`):
            Limit the guided x_0 estimate to [-1, 1] again. The authors limit it before the guidance only.
        modalities (`tuple[str, ...]`, *optional*):
            Those that the map is the mean of; all by default. BraTS21 flair and t2.
        threshold, median_size, median_dimensions, erosion, min_component_size, slice_score, sign, weighting,
        normalization, healthy_maps, calibration:
            See [`AnomalyPipeline`] and [`PostProcessing`]. The authors' thresholds belong to an older map: calibrate.
            They drop components of 40 pixels and fewer in each slice, a volume's are 3-D here.
    """

    model_cpu_offload_seq = "unet->classifier"

    @register_to_config
    def __init__(
        self,
        unet: UNet2DModel,
        classifier: NoisyClassifierModel,
        scheduler: AnoFPDMScheduler,
        processor: VolumeProcessor,
        brain_extractor: BrainExtractor | None = None,
        healthy_maps: HealthyMapsModel | None = None,
        noise_level: int = 200,
        guidance_scale: float = 1000.0,
        clip_after_guidance: bool = False,
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
            classifier=classifier,
            scheduler=scheduler,
            processor=processor,
            brain_extractor=brain_extractor,
            healthy_maps=healthy_maps,
        )
        channels = len(processor.config.modalities)
        self.check_configuration(outputs=(channels, 2 * channels))
        self.check_value_range()
        if classifier.config.in_channels != channels:
            raise ValueError(
                f"`classifier` must have {channels} `in_channels`, one for each modality, got"
                f" {classifier.config.in_channels}."
            )

    @torch.no_grad()
    def __call__(
        self,
        volume: Any,
        *,
        noise_level: int | None = None,
        guidance_scale: float | None = None,
        clip_after_guidance: bool | None = None,
        modalities: list[str] | None = None,
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

        Draws of a slice: one (K = 1), the noise of its highest timestep.

        Returns:
            [`AnomalyOutput`], a tuple, or a list or an iterator of either.

        Example:

        ```py
        >>> from anodiff import ClassifierGuidedPipeline

        >>> pipe = ClassifierGuidedPipeline.from_pretrained("owner/classifier-guided-atlas")
        >>> result = pipe("scan_t1.nii.gz")
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
        guidance_scale: float,
        clip_after_guidance: bool,
        modalities: list[str] | None,
        seed: int = 0,
        batch_size: int = 16,
        noise: torch.Tensor | Callable | None = None,
    ) -> SliceResults:
        """
        Computes the method itself: slices `(N, C, H, W)` to maps `(N, H, W)` and reconstructions `(N, C, H, W)`,
        unfiltered.

        `indices` are the slices' numbers in their volume, which their random numbers depend on. The map is the mean of
        the squared differences of the chosen modalities.
        """
        self.scheduler.set_timesteps(noise_level)
        down = self.scheduler.timesteps.tolist()
        numbers, device = torch.tensor(indices), slices.device
        draw_noise = partial(self.scheduler.draw_noise, size=slices.shape[1:])
        reconstruction = torch.empty_like(slices)
        batches = range(0, len(slices), batch_size)
        with self.progress_bar(total=len(down) * len(batches)) as progress:
            for start in batches:
                rows = slice(start, start + batch_size)
                drawn = Noise(seed, noise, numbers[rows], 0, device)(draw_noise, slices[rows])
                # x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) n, (B, C, H, W)
                sample = self.scheduler.add_noise(slices[rows], drawn, down[0])
                for t in down:
                    timesteps = torch.full((len(sample),), t, device=device)
                    sample = self.guided_step(sample, timesteps, guidance_scale, clip_after_guidance)
                    progress.update()
                reconstruction[rows] = sample
        channels = self.modality_channels(modalities)
        return SliceResults((slices - reconstruction).square()[:, channels].mean(1), reconstruction)

    @torch.no_grad()
    def guided_step(
        self, sample: torch.Tensor, timesteps: torch.Tensor, guidance_scale: float, clip_after_guidance: bool
    ) -> torch.Tensor:
        """Walks one DDIM step of x_t `(B, C, H, W)` at timesteps `(B,)` whose noise is eps - sqrt(1 - abar_t) s grad
        log p(healthy | x_t) (Dhariwal and Nichol, algorithm 2); eps fits the limited x_0 estimate."""
        model_output = self.predict_noise(sample, timesteps)[:, : sample.shape[1]]
        original = self.scheduler.predict_original_sample(model_output, timesteps, sample)
        gradient = guidance_scale * self.classifier_gradient(sample, timesteps)
        guidance = self.scheduler.gather("noise_scale", timesteps, sample) * gradient
        model_output = self.scheduler.predict_epsilon(original, timesteps, sample) - guidance
        return self.scheduler.step(
            model_output, timesteps, sample, clip_sample=clip_after_guidance, return_dict=False
        )[0]

    def classifier_gradient(self, sample: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """Computes the gradient of log p(healthy | x_t) by x_t, `(B, C, H, W)`."""
        # Not `classifier.dtype`, which walks all modules at every evaluation.
        dtype = next(self.classifier.parameters()).dtype

        def differentiate(classifier: torch.nn.Module, sample: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
            with torch.enable_grad():
                variable = sample.detach().requires_grad_()
                logits = classifier(variable.to(dtype), timesteps).logits
                score = logits.float().log_softmax(1)[:, HEALTHY].sum()
                return torch.autograd.grad(score, variable)[0]

        return self.batches.evaluate(self.classifier, differentiate, sample, timesteps)

    def check_inputs(self, **settings) -> None:
        """Raises a `ValueError` that names the argument."""
        check_integer("noise_level", settings["noise_level"], 1, self.scheduler.config.num_train_timesteps)
        check_number("guidance_scale", settings["guidance_scale"], least=0)
        check_choice("clip_after_guidance", settings["clip_after_guidance"], (False, True))
        self.modality_channels(settings["modalities"])
