from __future__ import annotations

import numpy as np
import torch
from diffusers import UNet2DModel

from ..schedulers.scheduling_cimd import SAMPLERS, CIMDScheduler
from ..volumes.processor import VolumeProcessor
from .base import NOT_FINITE, AnomalyPipeline, PreparedSlices, resolve_seed, slice_generator
from .output import CIMDOutput
from .postprocessing import median_filter


# N slices, E ensemble members, C modalities, H x W pixels, B items (a member of a slice) of a batch.

SETTINGS = ("num_ensemble", "num_inference_steps", "sampler", "median_size")


class CIMDPipeline(AnomalyPipeline):
    r"""
    CIMD, collectively intelligent medical diffusion: a diffusion model of masks, given the image, is sampled several times; each sample
    is one segmentation that an expert might have drawn, and their spread imitates that of the experts.

    UNet evaluations per slice: `num_ensemble` x `num_inference_steps` (16 x 1000). Not deterministic in itself, but fixed by the seed:
    a member is the same however many there are. Training needs masks, at best several annotations of each image.

    Paper: Rahman, Valanarasu, Hacihaliloglu, Patel, "Ambiguous Medical Image Segmentation using Diffusion Models", CVPR 2023, arXiv
    2304.04745.

    In the authors' program the latent variable of the paper never enters the network, so that this is its sampling: ancestral steps
    with a learned variance. Their program saves what it samples; masks are cut at 0.5 here, the middle of the trained 0 and 1.

    Args:
        unet ([`~diffusers.UNet2DModel`] or [`UNet2DHeadsModel`]):
            C + 1 channels in, the image and the noised mask, and 2 out: the noise of the mask, and what the variance is made of.
        scheduler ([`CIMDScheduler`]): Noise and steps of the mask.
        processor ([`VolumeProcessor`]): From volumes to slices and back. The authors' images lie in [0, 1].
        num_ensemble (`int`, defaults to 16): Members, E. The authors' script has 5 by default, later papers report 16.
        num_inference_steps (`int`, *optional*): Steps of a member, 2 to T. Defaults to the whole chain, as the authors do.
        sampler (`str`, defaults to `"ddpm"`):
            `"ddpm"`, or `"ddim"` without noise in its steps, so that members differ by their start alone; the authors' own DDIM does
            not work.
        threshold (`float`, defaults to 0.5): Of the members' masks, at least 0 and below 1.
        median_size (`int`, defaults to 0):
            Side of a median filter of every member in network pixels, 0 for none. The authors suggest one against speckle, without a
            size.
    """

    task = "segmentation"
    model_cpu_offload_seq = "unet"

    def __init__(
        self,
        unet: UNet2DModel,
        scheduler: CIMDScheduler,
        processor: VolumeProcessor,
        num_ensemble: int = 16,
        num_inference_steps: int | None = None,
        sampler: str = "ddpm",
        threshold: float = 0.5,
        median_size: int = 0,
    ):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler, processor=processor)
        self.register_to_config(
            num_ensemble=num_ensemble,
            num_inference_steps=num_inference_steps,
            sampler=sampler,
            threshold=threshold,
            median_size=median_size,
        )
        self.check_inputs(**self.default_settings(), threshold=threshold)

    @torch.no_grad()
    def __call__(
        self,
        volume,
        *,
        num_ensemble: int | None = None,
        num_inference_steps: int | None = None,
        sampler: str | None = None,
        median_size: int | None = None,
        threshold: float | None = None,
        brain_mask=None,
        generator: int | torch.Generator | None = None,
        batch_size: int = 16,
        noise: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> CIMDOutput | tuple | list:
        """
        Args:
            volume:
                Path, nibabel image, `(X, Y)` or `(X, Y, Z)` array, PIL image, dict of modalities, tensor `(N, C, H, W)` that is already
                processed, or a list of volumes, which gives a list of results. Volumes are segmented slice by slice.
            num_ensemble, num_inference_steps, sampler, median_size, threshold (*optional*): Instead of the checkpoint's.
            brain_mask (*optional*): Mask of the volume, same kinds as the volume: nothing is marked outside it.
            generator (`int` or `torch.Generator`, *optional*): Seed; `None` is 0. Every member of every slice has its own generator.
            batch_size (`int`, defaults to 16): Members and slices that share one evaluation. Does not change the result.
            noise (`torch.Tensor` of shape `(N, E, 1 + steps, H, W)`, *optional*):
                Replaces every draw: the start, then the noise of each step, that of the last one unused.
            return_dict (`bool`, defaults to `True`): Whether to return a [`CIMDOutput`] or a tuple.

        Returns:
            [`CIMDOutput`], a tuple, or a list of either.

        Example:

        ```py
        >>> from anodiff import CIMDPipeline

        >>> pipe = CIMDPipeline.from_pretrained("owner/cimd-lidc")
        >>> result = pipe("nodule.png", num_ensemble=16, num_inference_steps=50)
        >>> result.save("out/")
        ```
        """
        given = dict(
            num_ensemble=num_ensemble,
            num_inference_steps=num_inference_steps,
            sampler=sampler,
            median_size=median_size,
        )
        if isinstance(volume, list):
            if brain_mask is not None:
                raise ValueError("Masks of a list of volumes go into dicts, under the key 'brain'.")
            shared = dict(
                threshold=threshold,
                generator=generator,
                batch_size=batch_size,
                noise=noise,
                return_dict=return_dict,
            )
            return [self(item, **given, **shared) for item in volume]

        # 0. Resolve defaults: what the checkpoint was tuned to.
        settings = {**self.default_settings(), **{key: value for key, value in given.items() if value is not None}}
        threshold = self.config.threshold if threshold is None else threshold

        # 1. Check.
        self.check_inputs(**settings, threshold=threshold, batch_size=batch_size)
        if noise is not None and generator is not None:
            raise ValueError("Give either `noise` or `generator`, not both.")
        seed = resolve_seed(generator)

        # 2. Prepare: slices (N, C, H, W), brain (N, H, W).
        prepared = self.prepare_volume(volume, brain_mask)

        # 3. Sample: members (N, E, H, W) in [0, 1], 0 outside the brain.
        rows = torch.nonzero(prepared.brain.flatten(1).any(1)).flatten()
        members = torch.zeros(len(prepared.slices), settings["num_ensemble"], *prepared.slices.shape[2:])
        members[rows.cpu()] = self.compute_members(
            prepared.slices[rows], rows.tolist(), seed=seed, batch_size=batch_size, noise=noise, **settings
        ).cpu()
        members *= prepared.brain[:, None].cpu()

        # 4., 5. Back onto the grid of the input, masks and what the members have in common.
        record = {**settings, "threshold": threshold, "seed": None if noise is not None else seed}
        output = self._finish(prepared, members, threshold, record)
        self.maybe_free_model_hooks()
        return output if return_dict else output.to_tuple()

    def default_settings(self) -> dict:
        """The checkpoint's values of what `compute_members` needs to be told."""
        return {name: self.config[name] for name in SETTINGS}

    @torch.no_grad()
    def compute_members(
        self,
        slices: torch.Tensor,
        indices: list[int],
        *,
        num_ensemble: int | None = None,
        num_inference_steps: int | None = None,
        sampler: str | None = None,
        median_size: int | None = None,
        seed: int = 0,
        batch_size: int = 16,
        noise: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        The method itself: slices `(N, C, H, W)` to the maps of their members `(N, E, H, W)`, float32 in [0, 1]; what is above the
        threshold is the member's mask. Values that are not given are the checkpoint's.

        `indices` are the slices' numbers in their volume, which their random numbers depend on; `noise` is indexed by them.
        """
        settings = self.default_settings()
        num_ensemble = settings["num_ensemble"] if num_ensemble is None else num_ensemble
        num_inference_steps = settings["num_inference_steps"] if num_inference_steps is None else num_inference_steps
        sampler = settings["sampler"] if sampler is None else sampler
        median_size = settings["median_size"] if median_size is None else median_size

        self.scheduler.set_timesteps(num_inference_steps, device=slices.device)
        timesteps = self.scheduler.timesteps
        wanted = (num_ensemble, 1 + len(timesteps), *slices.shape[2:])
        if noise is not None and tuple(noise.shape[1:]) != wanted:
            raise ValueError(
                f"`noise` must have the shape (N, members, 1 + steps, H, W), for each slice {wanted}, got {tuple(noise.shape[1:])}."
            )
        count = len(slices) * num_ensemble
        members = torch.zeros(count, 1, *slices.shape[2:], device=slices.device)
        batches = -(-count // batch_size)
        with self.progress_bar(total=batches * len(timesteps)) as progress, self.autocast():
            for begin in range(0, count, batch_size):
                end = min(begin + batch_size, count)
                numbers, ensemble = zip(*(divmod(item, num_ensemble) for item in range(begin, end)), strict=True)
                keys = [(indices[number], member) for number, member in zip(numbers, ensemble, strict=True)]
                images = slices[list(numbers)]  # (B, C, H, W)
                shape = (end - begin, 1, *slices.shape[2:])
                if noise is None:
                    generators = [slice_generator(seed, index, member, slices.device) for index, member in keys]
                    sample = self.scheduler.draw_noise(shape, timesteps[0], generators, slices.device)
                    draws = {"generator": generators}
                else:
                    drawn = torch.stack([noise[key] for key in keys]).to(slices)  # (B, 1 + steps, H, W)
                    sample = drawn[:, :1]
                for step, t in enumerate(timesteps):
                    if noise is not None:
                        draws = {"variance_noise": drawn[:, step + 1, None]}
                    model_output = self.predict_noise(torch.cat([images, sample], dim=1), t.expand(len(sample)))
                    sample = self.scheduler.step(model_output, t, sample, **draws, sampler=sampler).prev_sample
                    progress.update()
                members[begin:end] = sample
        if not torch.isfinite(members).all():
            raise ValueError(NOT_FINITE)
        # Masks are trained as 0 and 1; what the scheduler's range leaves beyond them cannot change a mask.
        members = members[:, 0].clamp(0.0, 1.0)
        if median_size > 1:
            filtered = median_filter(members.cpu().numpy(), median_size, 2)
            members = torch.from_numpy(filtered).to(members.device)
        return members.unflatten(0, (len(slices), num_ensemble))

    def check_inputs(
        self,
        num_ensemble: int,
        num_inference_steps: int | None,
        sampler: str,
        median_size: int,
        threshold: float,
        batch_size: int = 1,
    ) -> None:
        """Raises a `ValueError` that names the argument."""
        steps = self.scheduler.config.num_train_timesteps
        if sampler not in SAMPLERS:
            raise ValueError(f"`sampler` must be one of {', '.join(SAMPLERS)}, got {sampler!r}.")
        for name, value, least, most in (
            ("num_ensemble", num_ensemble, 1, None),
            ("num_inference_steps", steps if num_inference_steps is None else num_inference_steps, 2, steps),
            ("median_size", median_size, 0, None),
            ("batch_size", batch_size, 1, None),
        ):
            if not isinstance(value, int) or value < least or (most is not None and value > most):
                limit = f"of at least {least}" if most is None else f"between {least} and {most}"
                raise ValueError(f"`{name}` must be an integer {limit}, got {value!r}.")
        if median_size and not median_size % 2:
            raise ValueError(f"`median_size` must be odd, or 0 for no filter, got {median_size}.")
        if isinstance(threshold, bool) or not isinstance(threshold, (int, float)) or not 0 <= threshold < 1:
            raise ValueError(f"`threshold` must be at least 0 and below 1, got {threshold!r}.")

    def _finish(self, prepared: PreparedSlices, members: torch.Tensor, threshold: float, settings: dict) -> CIMDOutput:
        """Members `(N, E, H, W)` on the grid of the input, and their summary."""
        processed, maps = prepared.processed, members.movedim(1, 0)  # (E, N, H, W)
        if processed is not None:
            source = processed.source
            maps = np.stack([source.as_given(self.processor.postprocess(one, processed)) for one in maps])
            maps = torch.from_numpy(maps)
        summary = summarize_members(maps, threshold)
        if processed is not None:
            summary = {name: values.numpy() for name, values in summary.items()}
            return CIMDOutput(**summary, settings=settings, source=source)
        return CIMDOutput(**summary, settings=settings)


def summarize_members(maps: torch.Tensor, threshold: float) -> dict[str, torch.Tensor]:
    """The arrays of a [`CIMDOutput`] from the maps of its members, `(E, ...)` float32."""
    masks = maps > threshold
    count = masks.sum(0)
    share = count / len(masks)
    return {
        "member_masks": masks.to(torch.uint8),
        "member_maps": maps,
        "mean_map": maps.mean(0),
        "std_map": maps.std(0, correction=0),
        "probability_map": share,
        "agreement": torch.maximum(share, 1 - share),
        "majority_mask": (2 * count > len(masks)).to(torch.uint8),
    }
