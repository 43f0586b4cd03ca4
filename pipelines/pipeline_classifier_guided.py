from __future__ import annotations

import torch
from diffusers import UNet2DModel

from ..models.classifier_2d import NoisyClassifierModel
from ..schedulers.scheduling_anofpdm import AnoFPDMScheduler
from ..volumes.processor import VolumeProcessor
from .base import AnomalyPipeline, SliceResults, slice_generator
from .output import AnomalyOutput


HEALTHY = 0  # class of the classifier


class ClassifierGuidedPipeline(AnomalyPipeline):
    r"""
    Classifier guidance: noise a slice part of the way and denoise it by DDIM steps, which the gradient of a classifier of noisy
    slices turns towards "healthy"; the map is the squared difference. As the authors of AnoFPDM run it.

    UNet evaluations per slice: `noise_level`, and as many evaluations and gradients of the classifier (200 each with the defaults).
    Not deterministic in itself, but fixed by the seed. Training of the classifier needs an image label (healthy or not) of every
    slice, no masks.

    Paper: Wolleb, Bieder, Sandkühler, Cattin, "Diffusion Models for Medical Anomaly Detection", MICCAI 2022; Che et al., "AnoFPDM:
    Anomaly Detection with Forward Process of Diffusion Models for Brain MRI", arXiv 2404.15683 (method card 6.4).

    Args:
        unet ([`~diffusers.UNet2DModel`]): Predicts the noise, unconditional. With 2C outputs (a learned variance) the first C count.
        classifier ([`NoisyClassifierModel`]): Logits of (healthy, unhealthy) of x_t.
        scheduler ([`AnoFPDMScheduler`]): Betas and update rules.
        processor ([`VolumeProcessor`]): From volumes to slices and back.
        noise_level (`int`, defaults to 200): Forward steps L, 1 to T: the slice is noised to t = L - 1.
        guidance_scale (`float`, defaults to 1000.0): Factor of the classifier's gradient. BraTS21 1000, ATLAS 500.
        clip_after_guidance (`bool`, defaults to `False`):
            Limit the guided x_0 estimate to [-1, 1] again. The authors limit it before the guidance only.
        modalities (`tuple[str, ...]`, *optional*): Those that the map is the mean of; all by default. BraTS21 flair and t2.
        threshold, median_size, median_dimensions, erosion, min_component_size, slice_score:
            See [`AnomalyPipeline`] and [`PostProcessing`]. The authors' thresholds belong to an older map: calibrate. They drop
            components of 40 pixels and fewer in each slice, a volume's are 3-D here.
    """

    model_cpu_offload_seq = "unet->classifier"

    def __init__(
        self,
        unet: UNet2DModel,
        classifier: NoisyClassifierModel,
        scheduler: AnoFPDMScheduler,
        processor: VolumeProcessor,
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
    ):
        super().__init__()
        self.register_modules(unet=unet, classifier=classifier, scheduler=scheduler, processor=processor)
        if tuple(processor.config.value_range) != (-1.0, 1.0):
            raise ValueError(
                "`processor` must have the `value_range` (-1, 1), which the predictions are limited to, got"
                f" {tuple(processor.config.value_range)}."
            )
        self.check_inputs(noise_level, guidance_scale, clip_after_guidance, modalities)
        self.register_to_config(
            noise_level=noise_level,
            guidance_scale=guidance_scale,
            clip_after_guidance=clip_after_guidance,
            modalities=modalities,
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
        guidance_scale: float | None = None,
        clip_after_guidance: bool | None = None,
        modalities: list[str] | None = None,
        threshold: float | None = None,
        brain_mask=None,
        generator: int | torch.Generator | None = None,
        batch_size: int = 16,
        noise: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> AnomalyOutput | tuple | list:
        """
        Args:
            volume:
                Path, nibabel image, `(X, Y)` or `(X, Y, Z)` array, PIL image, dict of modalities, tensor `(N, C, H, W)` that is already
                processed, or a list of volumes, which gives a list of results.
            noise_level, guidance_scale, clip_after_guidance, modalities, threshold (*optional*): Instead of the checkpoint's.
            brain_mask (*optional*): Mask of the volume, same kinds as the volume.
            generator (`int` or `torch.Generator`, *optional*): Seed; `None` is 0. Every slice has a generator of its own.
            batch_size (`int`, defaults to 16): Slices that share one evaluation. Does not change the result.
            noise (`torch.Tensor` of shape `(N, C, H, W)`, *optional*): Replaces the draws, one for each of the N slices.
            return_dict (`bool`, defaults to `True`): Whether to return an [`AnomalyOutput`] or a tuple.
        """
        given = dict(
            noise_level=noise_level,
            guidance_scale=guidance_scale,
            clip_after_guidance=clip_after_guidance,
            modalities=modalities,
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
        names = ("noise_level", "guidance_scale", "clip_after_guidance", "modalities")
        return {name: self.config[name] for name in names}

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
        seed: int,
        batch_size: int,
        noise: torch.Tensor | None = None,
    ) -> SliceResults:
        """
        The method itself: slices `(N, C, H, W)` to maps `(N, H, W)` and reconstructions `(N, C, H, W)`, unfiltered.

        `indices` are the slices' numbers in their volume, which their random numbers depend on. The map is the mean of the squared
        differences of the chosen modalities.
        """
        self.scheduler.set_timesteps(noise_level, device=slices.device)
        timesteps = self.scheduler.timesteps
        reconstruction = torch.empty_like(slices)
        batches = range(0, len(slices), batch_size)
        with self.progress_bar(total=len(timesteps) * len(batches)) as progress, self.autocast():
            for start in batches:
                rows = slice(start, start + batch_size)
                original, numbers = slices[rows], indices[rows]
                if noise is None:
                    generators = [slice_generator(seed, number, 0, slices.device) for number in numbers]
                    drawn = self.scheduler.draw_noise(
                        original.shape, timesteps[0], generators, slices.device, slices.dtype
                    )
                else:
                    drawn = noise[numbers].to(original)
                sample = self.scheduler.add_noise(original, drawn, timesteps[0])
                for t in timesteps:
                    sample = self.guided_step(sample, t, guidance_scale, clip_after_guidance)
                    progress.update()
                reconstruction[rows] = sample
        names = list(self.processor.config.modalities)
        channels = [names.index(name) for name in (modalities or names)]
        return SliceResults((slices - reconstruction).square()[:, channels].mean(1), reconstruction)

    @torch.no_grad()
    def guided_step(
        self, sample: torch.Tensor, t: torch.Tensor, guidance_scale: float, clip_after_guidance: bool
    ) -> torch.Tensor:
        """One DDIM step of x_t `(B, C, H, W)` whose noise is eps - sqrt(1 - abar_t) s grad log p(healthy | x_t) (Dhariwal and Nichol,
        algorithm 2); eps fits the limited x_0 estimate."""
        timesteps = t.expand(len(sample))
        model_output = self.predict_noise(sample, timesteps)[:, : sample.shape[1]]
        original = self.scheduler.predict_original_sample(model_output, t, sample)
        gradient = guidance_scale * self.classifier_gradient(sample, timesteps)
        # `add_noise` of nothing: sqrt(1 - abar_t) times the gradient.
        guidance = self.scheduler.add_noise(torch.zeros_like(sample), gradient, t)
        model_output = self.scheduler.predict_epsilon(original, t, sample) - guidance
        return self.scheduler.step(model_output, t, sample, clip_sample=clip_after_guidance, return_dict=False)[0]

    def classifier_gradient(self, sample: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """Gradient of log p(healthy | x_t) by x_t, `(B, C, H, W)`."""
        with torch.enable_grad():
            variable = sample.detach().requires_grad_()
            logits = self.classifier(variable.to(self.classifier.dtype), timesteps).logits
            score = logits.float().log_softmax(1)[:, HEALTHY].sum()
            return torch.autograd.grad(score, variable)[0]

    def check_inputs(
        self,
        noise_level: int,
        guidance_scale: float,
        clip_after_guidance: bool,
        modalities: list[str] | None,
        batch_size: int = 1,
    ) -> None:
        """Raises a `ValueError` that names the argument."""
        highest = self.scheduler.config.num_train_timesteps
        if not isinstance(noise_level, int) or not 1 <= noise_level <= highest:
            raise ValueError(f"`noise_level` must be an integer between 1 and {highest}, got {noise_level!r}.")
        if guidance_scale < 0:
            raise ValueError(f"`guidance_scale` must not be negative, got {guidance_scale}.")
        if not isinstance(clip_after_guidance, bool):
            raise ValueError(f"`clip_after_guidance` must be one of False, True, got {clip_after_guidance!r}.")
        known = self.processor.config.modalities
        compared = known if modalities is None else modalities
        if (
            isinstance(compared, str)
            or not compared
            or len(set(compared)) < len(compared)
            or set(compared) - set(known)
        ):
            raise ValueError(f"`modalities` must be different ones of {', '.join(known)}, got {modalities!r}.")
        if not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"`batch_size` must be an integer of at least 1, got {batch_size!r}.")
