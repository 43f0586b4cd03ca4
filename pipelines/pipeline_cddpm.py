from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import UNet2DModel
from diffusers.configuration_utils import register_to_config
from transformers import PreTrainedModel

from ..checks import check_choices
from ..models.brain_extractor import BrainExtractor
from ..models.healthy_maps import HealthyMapsModel
from ..models.unet_2d_conditioned import ConditionedUNet2DModel
from ..schedulers.scheduling_anoddpm import AnoDDPMScheduler
from ..volumes.processor import VolumeProcessor
from .base import AnomalyPipeline
from .mahalanobis import MAHALANOBIS
from .one_step import check_encoder, check_map_type, check_timesteps, difference_maps, iterate_reconstructions
from .slices import SliceResults


# N slices, C modalities, H x W pixels, K timesteps, E values of a condition.


class CDDPMPipeline(AnomalyPipeline):
    r"""
    cDDPM, reconstruction guided by the image: a slice is noised once for each of a few timesteps, and a denoiser that
    knows the code of the clean slice predicts the slice in a single evaluation. There is no reverse chain, although
    the authors speak of a DDPM. Without an `encoder` it is their unconditional DDPM_2D.

    UNet evaluations per slice: one for each of `timesteps` (3), and one of the encoder. Not deterministic in itself,
    but fixed by the seed. Training needs healthy images only, no masks.

    Paper: Behrendt, Bhattacharya, Mieling, Maack, Krüger, Opfer, Schlaefer, "Guided Reconstruction with Conditioned
    Diffusion Models for Unsupervised Anomaly Detection in Brain MRIs", Computers in Biology and Medicine 186 (2025)
    109660, arXiv 2312.04215.

    Maps are on the scale of slices in [0, 1], whatever the processor's `value_range`, never min-max scaled.

    Args:
        unet ([`ConditionedUNet2DModel`] or [`~diffusers.UNet2DModel`]):
            Predicts the slice, in [-1, 1], from the noised slice. With an encoder a [`ConditionedUNet2DModel`].
        scheduler ([`AnoDDPMScheduler`]):
            Noise and schedule. The authors': `beta_schedule="cosine"` and 2-D simplex noise, `z=None`.
        processor ([`VolumeProcessor`]): From volumes to slices and back.
        encoder ([`~transformers.ResNetForImageClassification`], *optional*):
            Gives E values, its logits, of a slice in [0, 1]. Any image classifier of transformers does.
        timesteps (`tuple[int, ...]`, defaults to `(249, 499, 749)`):
            0-based; the authors call them 250, 500 and 750. The reconstruction is the mean over them. DDPM_2D:
            `(499,)`.
        map_type (`str`, defaults to `"residual"`):
            `"residual"`: absolute difference of slice and reconstruction. `"ssim"`: 1 - structural similarity in three
            dimensions ([`~pipelines.ssim.ssim_map`]), which sees the slices with brain of one volume. `"mahalanobis"`
            and `"mahalanobis_pixel"`: distance from the distribution of the reconstructions, of all `timesteps`
            ([`~pipelines.mahalanobis.mahalanobis_distance`]). Modalities are averaged.
        shared_noise (`bool`, defaults to `False`):
            The same field for all slices at one timestep, as the authors (who also round it to float16); else each
            slice has its own.
        threshold, median_size, median_dimensions, erosion, min_component_size, slice_score, filter_order, sign,
        weighting, normalization, healthy_maps, calibration:
            See [`AnomalyPipeline`] and [`PostProcessing`]. The authors: median of 5 x 5 x 5, `erosion` H // 25, so 3
            at 96 px, components of 7 voxels and fewer removed; with `"ssim"` (SADM) the median alone.
    """

    model_cpu_offload_seq = "encoder->unet"
    _optional_components = ["encoder", "brain_extractor", "healthy_maps"]

    @register_to_config
    def __init__(
        self,
        unet: ConditionedUNet2DModel | UNet2DModel,
        scheduler: AnoDDPMScheduler,
        processor: VolumeProcessor,
        encoder: PreTrainedModel | None = None,
        brain_extractor: BrainExtractor | None = None,
        healthy_maps: HealthyMapsModel | None = None,
        timesteps: tuple[int, ...] | list[int] = (249, 499, 749),
        map_type: str = "residual",
        shared_noise: bool = False,
        threshold: float | None = None,
        median_size: int = 5,
        median_dimensions: int = 3,
        erosion: int = 3,
        min_component_size: int = 8,
        slice_score: str = "mean",
        filter_order: str = "erosion_first",
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
            encoder=encoder,
            brain_extractor=brain_extractor,
            healthy_maps=healthy_maps,
        )
        self.check_configuration()
        check_encoder(unet, encoder)

    def looks_across_slices(self, **settings) -> bool:
        """Tells whether a map depends on other slices of its volume: similarity is computed across them."""
        return settings["map_type"] == "ssim"

    @torch.no_grad()
    def __call__(
        self,
        volume: Any,
        *,
        timesteps: list[int] | None = None,
        map_type: str | None = None,
        shared_noise: bool | None = None,
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

        Draws of a slice: the noise of each of the K `timesteps`, in their order; with `shared_noise` those of slice 0
        are drawn only.

        Returns:
            [`AnomalyOutput`], a tuple, or a list or an iterator of either.

        Example:

        ```py
        >>> from anodiff import CDDPMPipeline

        >>> pipe = CDDPMPipeline.from_pretrained("owner/cddpm-t2")
        >>> result = pipe("scan_t2.nii.gz")
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
        timesteps: list[int],
        map_type: str,
        shared_noise: bool,
        seed: int = 0,
        batch_size: int = 16,
        noise: torch.Tensor | Callable | None = None,
    ) -> SliceResults:
        """
        Computes the method itself: slices `(N, C, H, W)` to maps `(N, H, W)` and mean reconstructions `(N, C, H, W)`,
        unfiltered.

        `indices` are the slices' numbers in their volume, which their random numbers depend on. For `"ssim"` the
        slices must be those of one volume in their order; they are compared as if no slice were missing between them.
        """
        slices = self.processor.to_unit(slices)
        total = torch.zeros_like(slices)
        # Sums only: memory does not depend on the number of timesteps. A distribution needs them all.
        kept = slices.new_zeros(len(timesteps) if map_type in MAHALANOBIS else 0, *slices.shape)
        for draws, rows, reconstructions in iterate_reconstructions(
            self, slices, indices, timesteps, shared_noise, seed, batch_size, noise
        ):
            total.index_add_(0, rows, reconstructions)
            if len(kept):
                kept[draws, rows] = reconstructions
        reconstruction = total / len(timesteps)
        maps = difference_maps(slices, reconstruction, map_type, kept)
        return SliceResults(maps, self.processor.from_unit(reconstruction))

    def check_inputs(self, **settings) -> None:
        """Raises a `ValueError` that names the argument."""
        check_timesteps(settings["timesteps"], len(self.scheduler))
        check_map_type(settings["map_type"], settings["timesteps"])
        check_choices(settings, shared_noise=(False, True))
