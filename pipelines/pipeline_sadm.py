from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import UNet2DModel
from diffusers.configuration_utils import register_to_config
from transformers import PreTrainedModel

from ..checks import check_choices, check_number
from ..models.brain_extractor import BrainExtractor
from ..models.healthy_maps import HealthyMapsModel
from ..models.siamese_unet import SiameseUNet2DModel
from ..models.unet_2d_conditioned import ConditionedUNet2DModel
from ..schedulers.scheduling_anoddpm import AnoDDPMScheduler
from ..volumes.processor import VolumeProcessor
from .base import AnomalyPipeline, read_logits
from .mahalanobis import MAHALANOBIS
from .one_step import check_encoder, check_map_type, check_timesteps, difference_maps, iterate_reconstructions
from .slices import SliceResults


# N slices, C modalities, H x W pixels, K timesteps, B items (a timestep of a slice) of a batch.


class SADMPipeline(AnomalyPipeline):
    r"""
    SADM, supervised anomaly detection by what a reconstruction leaves over: of every reconstruction of a
    [`CDDPMPipeline`] and the slice a segmentation network gives the probability that a pixel is anomalous. The score
    is the sum of the filtered 1 - SSIM map, which sees lesions of any kind, and the mean probability, which knows
    those that the network was trained with.

    UNet evaluations per slice: one for each of `timesteps` (3), as many of the segmentation network, and one of the
    encoder. Not deterministic in itself, but fixed by the seed. Training of the UNet and the encoder needs healthy
    images only; that of the segmentation network healthy images with synthetic anomalies, or images with lesion masks.

    Paper: Behrendt et al., "Combining Reconstruction-based Unsupervised Anomaly Detection with Supervised Segmentation
    for Brain MRIs", MIDL 2024 (PMLR 250), OpenReview iWfUcg4FrD.

    Args:
        unet, scheduler, processor, encoder, timesteps, map_type, shared_noise: As of [`CDDPMPipeline`].
        segmentation_network ([`SiameseUNet2DModel`]): Sees slices and reconstructions in [0, 1].
        residual_weight (`float`, *optional*):
            In [0, 1]: the score is `residual_weight` residual + (1 - `residual_weight`) probability, as in the paper's
            appendix (`lambda_cam`). By default it is the sum of both.
        threshold, median_size, median_dimensions, erosion, min_component_size, slice_score, filter_order, sign,
        weighting, normalization, healthy_maps, calibration:
            See [`AnomalyPipeline`] and [`PostProcessing`]. Median and erosion are of the residual alone. The authors:
            median of 5 x 5 x 5, no erosion, no component removed.
    """

    model_cpu_offload_seq = "encoder->unet->segmentation_network"
    _optional_components = ["encoder", "brain_extractor", "healthy_maps"]

    @register_to_config
    def __init__(
        self,
        unet: ConditionedUNet2DModel | UNet2DModel,
        segmentation_network: SiameseUNet2DModel,
        scheduler: AnoDDPMScheduler,
        processor: VolumeProcessor,
        encoder: PreTrainedModel | None = None,
        brain_extractor: BrainExtractor | None = None,
        healthy_maps: HealthyMapsModel | None = None,
        timesteps: tuple[int, ...] | list[int] = (249, 499, 749),
        map_type: str = "ssim",
        shared_noise: bool = False,
        residual_weight: float | None = None,
        threshold: float | None = None,
        median_size: int = 5,
        median_dimensions: int = 3,
        erosion: int = 0,
        min_component_size: int = 0,
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
            segmentation_network=segmentation_network,
            scheduler=scheduler,
            processor=processor,
            encoder=encoder,
            brain_extractor=brain_extractor,
            healthy_maps=healthy_maps,
        )
        self.check_configuration()
        check_encoder(unet, encoder)
        modalities, channels = processor.config.modalities, segmentation_network.config.in_channels
        if channels != len(modalities):
            raise ValueError(
                f"`segmentation_network.in_channels` must be {len(modalities)}, the number of modalities, got"
                f" {channels}."
            )

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
        residual_weight: float | None = None,
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
        >>> from anodiff import SADMPipeline

        >>> pipe = SADMPipeline.from_pretrained("owner/sadm-t1")
        >>> result = pipe("scan_t1.nii.gz")
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
        residual_weight: float | None,
        seed: int = 0,
        batch_size: int = 16,
        noise: torch.Tensor | Callable | None = None,
    ) -> SliceResults:
        """
        Computes the method itself: slices `(N, C, H, W)` to the maps of the residual `(N, H, W)`, mean reconstructions
        `(N, C, H, W)`, and the mean probability `(N, H, W)`, which is added to the maps when these are filtered.
        `indices` and the order of the slices are those of [`CDDPMPipeline.compute_maps`].
        """
        slices = self.processor.to_unit(slices)
        reconstruction, probability = torch.zeros_like(slices), torch.zeros_like(slices[:, 0])
        # Sums only: memory does not depend on the number of timesteps. A distribution needs them all.
        kept = slices.new_zeros(len(timesteps) if map_type in MAHALANOBIS else 0, *slices.shape)
        for draws, rows, reconstructions in iterate_reconstructions(
            self, slices, indices, timesteps, shared_noise, seed, batch_size, noise
        ):
            reconstruction.index_add_(0, rows, reconstructions)
            if len(kept):
                kept[draws, rows] = reconstructions
            probability.index_add_(0, rows, self.segment(slices[rows], reconstructions))
        reconstruction /= len(timesteps)
        probability /= len(timesteps)

        maps = difference_maps(slices, reconstruction, map_type, kept)
        if residual_weight is not None:
            # The weight before the median is the weight after it.
            maps, probability = residual_weight * maps, (1.0 - residual_weight) * probability
        return SliceResults(maps, self.processor.from_unit(reconstruction), added=probability)

    def segment(self, slices: torch.Tensor, reconstructions: torch.Tensor) -> torch.Tensor:
        """Computes the probability `(B, H, W)`, float32, that a pixel is anomalous, from slices and reconstructions
        `(B, C, H, W)` in [0, 1]."""
        dtype = next(self.segmentation_network.parameters()).dtype
        logits = self.batches.evaluate(
            self.segmentation_network, read_logits, slices.to(dtype), reconstructions.to(dtype)
        )
        return logits[:, 0].float().sigmoid()

    def check_inputs(self, **settings) -> None:
        """Raises a `ValueError` that names the argument."""
        check_timesteps(settings["timesteps"], len(self.scheduler))
        check_map_type(settings["map_type"], settings["timesteps"])
        check_choices(settings, shared_noise=(False, True))
        if settings["residual_weight"] is not None:
            check_number("residual_weight", settings["residual_weight"], least=0, most=1)
