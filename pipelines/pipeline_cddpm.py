from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from diffusers import UNet2DModel
from transformers import PreTrainedModel

from ..models.unet_2d_conditioned import ConditionedUNet2DModel
from ..schedulers.scheduling_anoddpm import AnoDDPMScheduler
from ..volumes.processor import VolumeProcessor
from .base import AnomalyPipeline, SliceResults
from .one_step import check_timesteps, draw_fields
from .output import AnomalyOutput
from .ssim import ssim_map


MAP_TYPES = ("residual", "ssim")
SETTINGS = ("timesteps", "map_type", "shared_noise")


# N slices of one volume, C modalities, H x W pixels, K timesteps, E values of a condition, B items (a timestep of a slice) of a batch.


class CDDPMPipeline(AnomalyPipeline):
    r"""
    cDDPM, reconstruction guided by the image: a slice is noised once for each of a few timesteps, and a denoiser that knows the code of
    the clean slice predicts the slice in a single evaluation. There is no reverse chain, although the authors speak of a DDPM. Without an
    `encoder` it is their unconditional DDPM_2D.

    UNet evaluations per slice: one for each of `timesteps` (3), and one of the encoder. Not deterministic in itself, but fixed by the
    seed. Training needs healthy images only, no masks.

    Paper: Behrendt, Bhattacharya, Mieling, Maack, Krüger, Opfer, Schlaefer, "Guided Reconstruction with Conditioned Diffusion Models for
    Unsupervised Anomaly Detection in Brain MRIs", Computers in Biology and Medicine 186 (2025) 109660, arXiv 2312.04215.

    Maps are on the scale of slices in [0, 1], whatever the processor's `value_range`, never min-max scaled.

    Args:
        unet ([`ConditionedUNet2DModel`] or [`~diffusers.UNet2DModel`]):
            Predicts the slice, in [-1, 1], from the noised slice. With an encoder a [`ConditionedUNet2DModel`].
        scheduler ([`AnoDDPMScheduler`]): Noise and schedule. The authors': `beta_schedule="cosine"` and 2-D simplex noise, `z=None`.
        processor ([`VolumeProcessor`]): From volumes to slices and back.
        encoder ([`~transformers.ResNetForImageClassification`], *optional*):
            Gives E values, its logits, of a slice in [0, 1]. Any image classifier of transformers does.
        timesteps (`tuple[int, ...]`, defaults to `(249, 499, 749)`):
            0-based; the authors call them 250, 500 and 750. The reconstruction is the mean over them. DDPM_2D: `(499,)`.
        map_type (`str`, defaults to `"residual"`):
            `"residual"`: absolute difference of slice and reconstruction. `"ssim"`: 1 - structural similarity in three dimensions
            ([`~pipelines.ssim.ssim_map`]), which sees the slices with brain of one volume. Modalities are averaged.
        shared_noise (`bool`, defaults to `False`):
            The same field for all slices at one timestep, as the authors (who also round it to float16); else each slice has its own.
        threshold, median_size, median_dimensions, erosion, min_component_size, slice_score, filter_order:
            See [`AnomalyPipeline`] and [`PostProcessing`]. The authors: median of 5 x 5 x 5, `erosion` H // 25, so 3 at 96 px, components
            of 7 voxels and fewer removed; with `"ssim"` (SADM) the median alone.
    """

    model_cpu_offload_seq = "encoder->unet"
    _optional_components = ["encoder"]

    def __init__(
        self,
        unet: ConditionedUNet2DModel | UNet2DModel,
        scheduler: AnoDDPMScheduler,
        processor: VolumeProcessor,
        encoder: PreTrainedModel | None = None,
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
    ):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler, processor=processor, encoder=encoder)
        wanted = unet.config.get("condition_dim")
        given = None if encoder is None else encoder.config.num_labels
        if wanted != given:
            raise ValueError(
                f"`encoder` must give as many values as `unet.condition_dim` says, {wanted or 'none'}; it gives {given or 'none'}."
            )
        self.register_to_config(
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
        self.check_inputs(**self.default_settings())
        _ = self.postprocessing  # checks its values

    @property
    def whole_volumes(self) -> bool:
        """Similarity is computed across slices."""
        return self.config.map_type == "ssim"

    @torch.no_grad()
    def __call__(
        self,
        volume,
        *,
        timesteps: list[int] | None = None,
        map_type: str | None = None,
        shared_noise: bool | None = None,
        threshold: float | None = None,
        brain_mask=None,
        generator: int | torch.Generator | None = None,
        batch_size: int = 16,
        noise: torch.Tensor | Callable | None = None,
        return_dict: bool = True,
    ) -> AnomalyOutput | tuple | list:
        """
        Args:
            volume:
                Path, nibabel image, `(X, Y)` or `(X, Y, Z)` array, PIL image, dict of modalities, tensor `(N, C, H, W)` that is already
                processed, or a list of volumes, which gives a list of results.
            timesteps, map_type, shared_noise, threshold (*optional*): Instead of the checkpoint's.
            brain_mask (*optional*): Mask of the volume, same kinds as the volume.
            generator (`int` or `torch.Generator`, *optional*): Seed; `None` is 0. Slice and timestep have generators of their own.
            batch_size (`int`, defaults to 16): Slices and timesteps that share one evaluation. Does not change the result.
            noise (`torch.Tensor` or callable, *optional*):
                Replaces every draw. Tensor `(K, N, C, H, W)`: the noise of the K timesteps, in their order, for all N slices. Callable:
                `noise(draws, items, shape)` with a list of numbers below K, a list of slice numbers as long, and the shape wanted.
            return_dict (`bool`, defaults to `True`): Whether to return an [`AnomalyOutput`] or a tuple.

        Example:

        ```py
        >>> from anodiff import CDDPMPipeline

        >>> pipe = CDDPMPipeline.from_pretrained("owner/cddpm-t2")
        >>> result = pipe("scan_t2.nii.gz")
        >>> result.save("out/")
        ```
        """
        given = dict(timesteps=timesteps, map_type=map_type, shared_noise=shared_noise)
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
        return {name: self.config[name] for name in SETTINGS}

    @torch.no_grad()
    def compute_maps(
        self,
        slices: torch.Tensor,
        indices: list[int],
        *,
        timesteps: list[int],
        map_type: str,
        shared_noise: bool,
        seed: int,
        batch_size: int,
        noise: torch.Tensor | Callable | None = None,
    ) -> SliceResults:
        """
        The method itself: slices `(N, C, H, W)` to maps `(N, H, W)` and mean reconstructions `(N, C, H, W)`, unfiltered.

        `indices` are the slices' numbers in their volume, which their random numbers depend on. For `"ssim"` the slices must be those of
        one volume in their order; a slice that is left out is taken to be no gap.
        """
        slices = self.processor.to_unit(slices)
        total = torch.zeros_like(slices)
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
            total.index_add_(0, rows, reconstructions)
        reconstruction = total / len(timesteps)
        maps = self.difference(slices, reconstruction, map_type)
        return SliceResults(maps, self.processor.from_unit(reconstruction))

    @torch.no_grad()
    def iterate_reconstructions(
        self,
        slices: torch.Tensor,
        indices: list[int],
        *,
        timesteps: list[int],
        shared_noise: bool,
        seed: int,
        batch_size: int,
        noise: torch.Tensor | Callable | None = None,
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """
        The reconstructions of N slices from K timesteps, in K * N / `batch_size` full batches: all slices from the first timestep, then
        all from the second one, and so on. The encoder sees each slice once, before.

        Args:
            slices (`torch.Tensor` of shape `(N, C, H, W)`): In [0, 1], see [`~VolumeProcessor.to_unit`].
            indices (`list[int]`): The slices' numbers in their volume.
            timesteps, shared_noise, seed, batch_size, noise: As of `compute_maps`.

        Yields:
            `tuple`: numbers of the timesteps, below K, `(B,)`; rows of the slices, below N, `(B,)`; reconstructions `(B, C, H, W)`, float32
            in the range of `slices`, about [0, 1], not limited.
        """
        device, count = slices.device, len(timesteps) * len(slices)
        with self.progress_bar(total=-(-count // batch_size)) as progress, self.autocast():
            features = self.encode(slices, batch_size)
            for begin in range(0, count, batch_size):
                items = [divmod(item, len(slices)) for item in range(begin, min(begin + batch_size, count))]
                numbers = torch.tensor([number for number, _ in items], device=device)
                rows = torch.tensor([row for _, row in items], device=device)
                steps = torch.tensor([timesteps[number] for number, _ in items], device=device)

                # x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) n with x_0 in [-1, 1], (B, C, H, W)
                original = 2.0 * slices[rows] - 1.0
                keys = [(indices[row], number) for number, row in items]
                drawn = draw_fields(self.scheduler, keys, timesteps, seed, original, shared_noise, noise)
                sample = self.scheduler.add_noise(original, drawn, steps)

                # This network predicts x_0.
                prediction = self.predict_noise(sample, steps, None if features is None else features[rows])
                progress.update()
                yield numbers, rows, (prediction + 1.0) / 2.0

    def encode(self, slices: torch.Tensor, batch_size: int) -> torch.Tensor | None:
        """The codes `(N, E)` of slices `(N, C, H, W)` in [0, 1]; `None` without an encoder."""
        if self.encoder is None:
            return None
        features = torch.empty(
            len(slices), self.encoder.config.num_labels, dtype=self.unet.dtype, device=slices.device
        )
        for start in range(0, len(slices), batch_size):
            rows = slice(start, start + batch_size)
            features[rows] = self.encoder(slices[rows].to(self.encoder.dtype)).logits.to(features.dtype)
        return features

    def difference(self, slices: torch.Tensor, reconstruction: torch.Tensor, map_type: str) -> torch.Tensor:
        """Maps `(N, H, W)` of slices and reconstructions `(N, C, H, W)`, both in [0, 1], unfiltered."""
        if map_type == "residual":
            return (slices - reconstruction).abs().mean(1)
        similarity = torch.stack(
            [ssim_map(*pair) for pair in zip(slices.unbind(1), reconstruction.unbind(1), strict=True)]
        )
        # At most 1 but for rounding.
        return (1.0 - similarity).mean(0).clamp(min=0.0).to(slices)

    def check_inputs(self, timesteps: list[int], map_type: str, shared_noise: bool, batch_size: int = 1) -> None:
        """Raises a `ValueError` that names the argument."""
        check_timesteps(timesteps, self.scheduler.config.num_train_timesteps)
        for name, value, allowed in (("map_type", map_type, MAP_TYPES), ("shared_noise", shared_noise, (False, True))):
            if value not in allowed:
                raise ValueError(f"`{name}` must be one of {', '.join(map(str, allowed))}, got {value!r}.")
        if not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"`batch_size` must be an integer of at least 1, got {batch_size!r}.")
