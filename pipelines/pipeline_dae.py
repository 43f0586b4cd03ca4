from __future__ import annotations

import torch

from ..models.unet_2d_dae import DAEUNet2DModel
from ..schedulers.scheduling_dae import DAEScheduler
from ..volumes.processor import VolumeProcessor
from .base import AnomalyPipeline, SliceResults
from .output import AnomalyOutput


# A window of the foreground that is filled by more than this counts as its inside (the ANDi authors' value).
FILLED = 0.95


class DAEPipeline(AnomalyPipeline):
    r"""
    Denoising autoencoder: a network that has learnt to remove coarse noise from healthy slices removes what it has not seen, too.
    The slice goes in as it is; the map is the absolute difference, without the rim of the brain.

    UNet evaluations per slice: 1. Deterministic. Training needs healthy images only, no masks.

    Paper: Kascenas, Pugeault, O'Neil, "Denoising Autoencoders for Unsupervised Anomaly Detection in Brain MRI", MIDL 2022, as run
    by the authors of ANDi (Frotscher et al., arXiv 2312.01904).

    Args:
        unet ([`DAEUNet2DModel`]): Predicts the slice.
        scheduler ([`DAEScheduler`]): Noise of the training; says what is foreground.
        processor ([`VolumeProcessor`]):
            From volumes to slices and back. The network sees [0, 1] whatever the processor's `value_range`, background 0, so that one
            prepared data set serves all methods.
        rim_window (`int`, defaults to 5):
            Odd side of the window that must be filled by foreground (more than 95 %) for a pixel to count; 1 keeps the rim.
        threshold, median_size, median_dimensions, erosion, min_component_size, slice_score:
            See [`AnomalyPipeline`] and [`PostProcessing`]. The ANDi authors' median is 5 in 3-D.
    """

    deterministic = True
    model_cpu_offload_seq = "unet"

    def __init__(
        self,
        unet: DAEUNet2DModel,
        scheduler: DAEScheduler,
        processor: VolumeProcessor,
        rim_window: int = 5,
        threshold: float | None = None,
        median_size: int = 5,
        median_dimensions: int = 3,
        erosion: int = 0,
        min_component_size: int = 0,
        slice_score: str = "mean",
    ):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler, processor=processor)
        self.check_inputs(rim_window)
        if processor.config.intensity == "mean_std":
            raise ValueError(
                "`processor` must map the background to the lower end of `value_range`; with `intensity` 'mean_std' it does not."
            )
        self.register_to_config(
            rim_window=rim_window,
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
        rim_window: int | None = None,
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
            rim_window, threshold (*optional*): Instead of the checkpoint's.
            brain_mask (*optional*): Mask of the volume, same kinds as the volume.
            generator (*optional*): Changes nothing, since nothing is drawn; taken because every pipeline is called alike.
            batch_size (`int`, defaults to 16): Slices that share one evaluation. Does not change the result.
            return_dict (`bool`, defaults to `True`): Whether to return an [`AnomalyOutput`] or a tuple.
        """
        given = {"rim_window": rim_window}
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
        return {"rim_window": self.config.rim_window}

    @torch.no_grad()
    def compute_maps(
        self,
        slices: torch.Tensor,
        indices: list[int],
        *,
        rim_window: int,
        batch_size: int,
        seed: int = 0,
    ) -> SliceResults:
        """
        The method itself: slices `(N, C, H, W)` to maps `(N, H, W)` and reconstructions `(N, C, H, W)`, unfiltered. The map is
        the maximum over modalities of |slice - reconstruction| inside the foreground. `indices` and `seed` change nothing.
        """
        slices = self.processor.to_unit(slices)
        reconstruction = torch.empty_like(slices)
        batches = range(0, len(slices), batch_size)
        with self.progress_bar(total=len(batches)) as progress, self.autocast():
            for start in batches:
                rows = slice(start, start + batch_size)
                reconstruction[rows] = self.unet(slices[rows].to(self.unet.dtype)).sample.to(slices.dtype)
                progress.update()

        # Beyond the slice there is no foreground: zeros are counted.
        foreground = self.scheduler.foreground(slices).to(slices.dtype)
        filled = torch.nn.functional.avg_pool2d(foreground, rim_window, stride=1, padding=rim_window // 2)
        maps = ((slices - reconstruction).abs() * (filled > FILLED)).amax(1)
        return SliceResults(maps, self.processor.from_unit(reconstruction))

    def check_inputs(self, rim_window: int, batch_size: int = 1) -> None:
        """Raises a `ValueError` that names the argument."""
        if not isinstance(rim_window, int) or rim_window < 1 or rim_window % 2 == 0:
            raise ValueError(f"`rim_window` must be an odd integer of at least 1, got {rim_window!r}.")
        if not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"`batch_size` must be an integer of at least 1, got {batch_size!r}.")
