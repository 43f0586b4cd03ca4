from __future__ import annotations

from collections.abc import Callable

import torch
from diffusers import UNet2DModel
from transformers import PreTrainedModel

from ..models.siamese_unet import SiameseUNet2DModel
from ..models.unet_2d_conditioned import ConditionedUNet2DModel
from ..schedulers.scheduling_anoddpm import AnoDDPMScheduler
from ..volumes.processor import VolumeProcessor
from .base import SliceResults
from .output import AnomalyOutput
from .pipeline_cddpm import CDDPMPipeline


# N slices of one volume, C modalities, H x W pixels, K timesteps, B items (a timestep of a slice) of a batch.


class SADMPipeline(CDDPMPipeline):
    r"""
    SADM, supervised anomaly detection by what a reconstruction leaves over: of every reconstruction of a [`CDDPMPipeline`] and the slice
    a segmentation network gives the probability that a pixel is anomalous. The score is the sum of the filtered 1 - SSIM map, which sees
    lesions of any kind, and the mean probability, which knows those that the network was trained with.

    UNet evaluations per slice: one for each of `timesteps` (3), as many of the segmentation network, and one of the encoder. Not
    deterministic in itself, but fixed by the seed. Training of the UNet and the encoder needs healthy images only; that of the segmentation
    network healthy images with synthetic anomalies, or images with lesion masks.

    Paper: Behrendt et al., "Combining Reconstruction-based Unsupervised Anomaly Detection with Supervised Segmentation for Brain MRIs",
    MIDL 2024 (PMLR 250), OpenReview iWfUcg4FrD.

    Args:
        unet, scheduler, processor, encoder, timesteps, map_type, shared_noise: As of [`CDDPMPipeline`].
        segmentation_network ([`SiameseUNet2DModel`]): Sees slices and reconstructions in [0, 1].
        residual_weight (`float`, *optional*):
            In [0, 1]: the score is `residual_weight` residual + (1 - `residual_weight`) probability, as in the paper's appendix
            (`lambda_cam`). By default it is the sum of both.
        threshold, median_size, median_dimensions, erosion, min_component_size, slice_score, filter_order:
            See [`AnomalyPipeline`] and [`PostProcessing`]. Median and erosion are of the residual alone. The authors: median of 5 x 5 x 5,
            no erosion, no component removed.
    """

    model_cpu_offload_seq = "encoder->unet->segmentation_network"

    def __init__(
        self,
        unet: ConditionedUNet2DModel | UNet2DModel,
        segmentation_network: SiameseUNet2DModel,
        scheduler: AnoDDPMScheduler,
        processor: VolumeProcessor,
        encoder: PreTrainedModel | None = None,
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
    ):
        channels = segmentation_network.config.in_channels
        if channels != len(processor.config.modalities):
            raise ValueError(
                f"`segmentation_network.in_channels` must be {len(processor.config.modalities)}, the number of modalities, got"
                f" {channels}."
            )
        # First, so that the parent checks it with its own values.
        self.register_to_config(residual_weight=residual_weight)
        super().__init__(
            unet,
            scheduler,
            processor,
            encoder,
            timesteps=timesteps,
            map_type=map_type,
            shared_noise=shared_noise,
            threshold=threshold,
            median_size=median_size,
            median_dimensions=median_dimensions,
            erosion=erosion,
            min_component_size=min_component_size,
            slice_score=slice_score,
            filter_order=filter_order,
        )
        self.register_modules(segmentation_network=segmentation_network)

    @torch.no_grad()
    def __call__(
        self,
        volume,
        *,
        timesteps: list[int] | None = None,
        map_type: str | None = None,
        shared_noise: bool | None = None,
        residual_weight: float | None = None,
        threshold: float | None = None,
        brain_mask=None,
        generator: int | torch.Generator | None = None,
        batch_size: int = 16,
        noise: torch.Tensor | Callable | None = None,
        return_dict: bool = True,
    ) -> AnomalyOutput | tuple | list:
        """
        Args:
            residual_weight (*optional*): Instead of the checkpoint's.
            volume, timesteps, map_type, shared_noise, threshold, brain_mask, generator, batch_size, noise, return_dict:
                As of [`CDDPMPipeline`].

        Example:

        ```py
        >>> from anodiff import SADMPipeline

        >>> pipe = SADMPipeline.from_pretrained("owner/sadm-t1")
        >>> result = pipe("scan_t1.nii.gz")
        >>> result.save("out/")
        ```
        """
        given = dict(
            timesteps=timesteps, map_type=map_type, shared_noise=shared_noise, residual_weight=residual_weight
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
        return {**super().default_settings(), "residual_weight": self.config.residual_weight}

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
        seed: int,
        batch_size: int,
        noise: torch.Tensor | Callable | None = None,
    ) -> SliceResults:
        """
        The method itself: slices `(N, C, H, W)` to the maps of the residual `(N, H, W)`, mean reconstructions `(N, C, H, W)`, and the mean
        probability `(N, H, W)`, which is added to the maps when these are filtered. `indices` and the order of the slices are those of
        [`CDDPMPipeline.compute_maps`].
        """
        slices = self.processor.to_unit(slices)
        reconstruction, probability = torch.zeros_like(slices), torch.zeros_like(slices[:, 0])
        # Sums only: memory does not depend on the number of timesteps.
        for _, rows, reconstructions in self.iterate_reconstructions(
            slices,
            indices,
            timesteps=timesteps,
            shared_noise=shared_noise,
            seed=seed,
            batch_size=batch_size,
            noise=noise,
        ):
            reconstruction.index_add_(0, rows, reconstructions)
            probability.index_add_(0, rows, self.segment(slices[rows], reconstructions))
        reconstruction /= len(timesteps)
        probability /= len(timesteps)

        maps = self.difference(slices, reconstruction, map_type)
        if residual_weight is not None:
            # The weight before the median is the weight after it.
            maps, probability = residual_weight * maps, (1.0 - residual_weight) * probability
        return SliceResults(maps, self.processor.from_unit(reconstruction), added=probability)

    def segment(self, slices: torch.Tensor, reconstructions: torch.Tensor) -> torch.Tensor:
        """Probability `(B, H, W)`, float32, of each pixel being anomalous, from slices and reconstructions `(B, C, H, W)` in [0, 1]."""
        dtype = self.segmentation_network.dtype
        with self.autocast():
            logits = self.segmentation_network(slices.to(dtype), reconstructions.to(dtype)).logits
        return logits[:, 0].float().sigmoid()

    def check_inputs(
        self,
        timesteps: list[int],
        map_type: str,
        shared_noise: bool,
        residual_weight: float | None,
        batch_size: int = 1,
    ) -> None:
        """Raises a `ValueError` that names the argument."""
        super().check_inputs(timesteps, map_type, shared_noise, batch_size)
        if residual_weight is not None and not 0 <= residual_weight <= 1:
            raise ValueError(f"`residual_weight` must be between 0 and 1, got {residual_weight}.")
