from __future__ import annotations

import torch
from diffusers import UNet2DModel

from ..schedulers.scheduling_anofpdm import AnoFPDMScheduler
from ..volumes.processor import VolumeProcessor
from .base import AnomalyPipeline, SliceResults
from .output import AnomalyOutput


# Class labels of the network.
HEALTHY, NULL = 0, 2


class DDIBPipeline(AnomalyPipeline):
    r"""
    DDIB: translate a slice to its healthy counterpart. Its latent is found by DDIM's forward process without a class, and decoded
    with classifier-free guidance towards the class "healthy"; the map is the squared difference. As the authors of AnoFPDM run it,
    with the network of AnoFPDM.

    UNet evaluations per slice: 3 `forward_steps` (1350 with the defaults), two of three in one batch. Deterministic. Training needs
    an image label (healthy or not) of every slice, no masks.

    Paper: Su, Song, Meng, Ermon, "Dual Diffusion Implicit Bridges for Image-to-Image Translation", ICLR 2023; Che et al., "AnoFPDM:
    Anomaly Detection with Forward Process of Diffusion Models for Brain MRI", arXiv 2404.15683 (method card 6.2).

    Args:
        unet ([`~diffusers.UNet2DModel`]): Predicts the noise of a slice of class 0 (healthy), 1 (unhealthy) or 2 (none).
        scheduler ([`AnoFPDMScheduler`]): Betas and update rules.
        processor ([`VolumeProcessor`]): From volumes to slices and back.
        forward_steps (`int`, defaults to 450): Steps S of the way up and of the way down, 1 to T. BraTS21 450, ATLAS 300.
        guidance_scale (`float`, defaults to 1.1): w: the noise is (1 + w) eps(healthy) - w eps(none). BraTS21 1.1, ATLAS 1.3.
        modalities (`tuple[str, ...]`, *optional*): Those that the map is the mean of; all by default. BraTS21 flair and t2.
        threshold, median_size, median_dimensions, erosion, min_component_size, slice_score:
            See [`AnomalyPipeline`] and [`PostProcessing`]. The authors' thresholds belong to an older map: calibrate. They drop
            components of 40 pixels and fewer in each slice, a volume's are 3-D here.
    """

    deterministic = True
    model_cpu_offload_seq = "unet"

    def __init__(
        self,
        unet: UNet2DModel,
        scheduler: AnoFPDMScheduler,
        processor: VolumeProcessor,
        forward_steps: int = 450,
        guidance_scale: float = 1.1,
        modalities: list[str] | None = None,
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
        self.check_inputs(forward_steps, guidance_scale, modalities)
        self.register_to_config(
            forward_steps=forward_steps,
            guidance_scale=guidance_scale,
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
        forward_steps: int | None = None,
        guidance_scale: float | None = None,
        modalities: list[str] | None = None,
        threshold: float | None = None,
        brain_mask=None,
        generator: int | torch.Generator | None = None,
        batch_size: int = 16,
        return_dict: bool = True,
    ) -> AnomalyOutput | tuple | list:
        """
        Args:
            volume:
                Path, nibabel image, `(X, Y)` or `(X, Y, Z)` array, PIL image, dict of modalities, tensor `(N, C, H, W)` that is already
                processed, or a list of volumes, which gives a list of results.
            forward_steps, guidance_scale, modalities, threshold (*optional*): Instead of the checkpoint's.
            brain_mask (*optional*): Mask of the volume, same kinds as the volume.
            generator (*optional*): Changes nothing, since nothing is drawn; taken because every pipeline is called alike.
            batch_size (`int`, defaults to 16): Slices that share one evaluation (the way down: twice as many). Does not change the
                result.
            return_dict (`bool`, defaults to `True`): Whether to return an [`AnomalyOutput`] or a tuple.
        """
        given = dict(forward_steps=forward_steps, guidance_scale=guidance_scale, modalities=modalities)
        return self.run(
            volume,
            given,
            threshold=threshold,
            brain_mask=brain_mask,
            generator=generator,
            batch_size=batch_size,
            return_dict=return_dict,
        )

    def default_settings(self) -> dict:
        """The checkpoint's values of what `compute_maps` needs to be told."""
        return {name: self.config[name] for name in ("forward_steps", "guidance_scale", "modalities")}

    @torch.no_grad()
    def compute_maps(
        self,
        slices: torch.Tensor,
        indices: list[int],
        *,
        forward_steps: int,
        guidance_scale: float,
        modalities: list[str] | None,
        batch_size: int,
        seed: int = 0,
    ) -> SliceResults:
        """
        The method itself: slices `(N, C, H, W)` to maps `(N, H, W)` and translations `(N, C, H, W)`, unfiltered. The map is the
        mean of the squared differences of the chosen modalities. `indices` and `seed` change nothing.
        """
        self.scheduler.set_timesteps(forward_steps, device=slices.device)
        down = self.scheduler.timesteps
        translated = torch.empty_like(slices)
        batches = range(0, len(slices), batch_size)
        with self.progress_bar(total=2 * len(down) * len(batches)) as progress, self.autocast():
            for start in batches:
                sample = self.encode(slices[start : start + batch_size], progress)
                # Both classes of the guidance in one batch, (2B, C, H, W).
                labels = torch.tensor([HEALTHY, NULL], device=slices.device).repeat_interleave(len(sample))
                for t in down:
                    healthy, null = self.predict_noise(sample.repeat(2, 1, 1, 1), t.expand(len(labels)), labels).chunk(
                        2
                    )
                    model_output = (1 + guidance_scale) * healthy - guidance_scale * null
                    sample = self.scheduler.step(model_output, t, sample, return_dict=False)[0]
                    progress.update()
                translated[start : start + batch_size] = sample
        names = list(self.processor.config.modalities)
        channels = [names.index(name) for name in (modalities or names)]
        return SliceResults((slices - translated).square()[:, channels].mean(1), translated)

    def encode(self, slices: torch.Tensor, progress=None) -> torch.Tensor:
        """The latents of slices `(N, C, H, W)`, one step above the highest timestep of the scheduler's grid: DDIM's forward process
        from the slice itself, with the network's class "none". `progress` is told of every step."""
        sample = slices
        labels = torch.full((len(slices),), NULL, device=slices.device)
        for t in self.scheduler.timesteps.flip(0):
            model_output = self.predict_noise(sample, t.expand(len(sample)), labels)
            sample = self.scheduler.encode_step(model_output, t, sample)
            if progress is not None:
                progress.update()
        return sample

    def check_inputs(
        self, forward_steps: int, guidance_scale: float, modalities: list[str] | None, batch_size: int = 1
    ) -> None:
        """Raises a `ValueError` that names the argument."""
        highest = self.scheduler.config.num_train_timesteps
        if not isinstance(forward_steps, int) or not 1 <= forward_steps <= highest:
            raise ValueError(f"`forward_steps` must be an integer between 1 and {highest}, got {forward_steps!r}.")
        if guidance_scale < 0:
            raise ValueError(f"`guidance_scale` must not be negative, got {guidance_scale}.")
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
