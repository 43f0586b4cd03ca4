"""What every pipeline of this library does alike: loading the right class, preparing a volume, finishing the maps."""

from __future__ import annotations

import os
import platform
import shutil
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, fields
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import torch
from diffusers import DiffusionPipeline

from ..hub.model_index import check_processor, read_model_index
from ..volumes.processor import ProcessedVolume
from ..volumes.volume import InputVolume
from .output import AnomalyOutput
from .postprocessing import PostProcessing


NOT_FINITE = (
    "The network gave NaN or infinite values: the checkpoint is damaged, or float16 overflowed (use bf16 or float32)."
)
AUTOCAST_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class PreparedSlices:
    """Slices of one volume on the pipeline's device: `slices` (N, C, H, W), `brain` (N, H, W) bool, and where they came from
    (`None` for a tensor)."""

    slices: torch.Tensor
    brain: torch.Tensor
    processed: ProcessedVolume | None


class SliceResults(NamedTuple):
    """
    What a method makes of N slices, unfiltered and on the network's grid.

    Args:
        maps (`torch.Tensor` of shape `(N, H, W)`): Scores >= 0.
        reconstruction (`torch.Tensor` of shape `(N, C, H, W)`, *optional*): Pseudo-healthy slices, if the method makes any.
        masks (`torch.Tensor` of shape `(N, H, W)`, bool, *optional*): The method's own segmentation, if it chooses its thresholds itself.
        details (`dict[str, torch.Tensor]`): What else it says of each slice, `(N, ...)`.
        added (`torch.Tensor` of shape `(N, H, W)`, *optional*): Scores >= 0 that are added to the maps once these are filtered.
    """

    maps: torch.Tensor
    reconstruction: torch.Tensor | None = None
    masks: torch.Tensor | None = None
    details: dict[str, torch.Tensor] = MappingProxyType({})
    added: torch.Tensor | None = None


class AnomalyPipeline(DiffusionPipeline):
    r"""
    Base of all pipelines. `AnomalyPipeline.from_pretrained(folder_or_id)` gives the pipeline class that the checkpoint names.

    A pipeline's configuration holds `threshold` (of `pred_mask`; without one there is no mask) and the values of
    [`PostProcessing`]. Its `compute_maps` is the method itself, slices in, maps out.
    """

    # What it is for, in its card: maps of anomalies, or (`segmentation`) masks like those it was trained on.
    task = "anomaly-detection"
    # Whether a call draws nothing: `noise` is then no argument, and a seed changes nothing.
    deterministic = False
    # Whether a map depends on other slices of its volume: `compute_maps` then wants those of one volume, and of no other.
    whole_volumes = False
    _autocast_dtype: torch.dtype | None = None

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs):
        """As `DiffusionPipeline.from_pretrained`; on this base class it returns the subclass that the checkpoint names.

        Raises:
            FileNotFoundError: There is no such folder or repository, or no pipeline in it.
            ValueError: The checkpoint is no pipeline of this library, has no processor, or was made by a newer version.
        """
        import anodiff

        known = ("cache_dir", "force_download", "token", "local_files_only", "revision")
        hub_arguments = {key: kwargs[key] for key in known if key in kwargs}
        index = read_model_index(pretrained_model_name_or_path, **hub_arguments)
        name = index.get("_class_name")
        if cls is not AnomalyPipeline:
            if name != cls.__name__:
                raise ValueError(
                    f"{pretrained_model_name_or_path} holds a {name}, not a {cls.__name__}; `AnomalyPipeline.from_pretrained`"
                    " loads whatever pipeline of this library a checkpoint names."
                )
            if "processor" not in kwargs:
                check_processor(pretrained_model_name_or_path, index, **hub_arguments)
            return super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        pipelines = [public for public in anodiff.__all__ if public.endswith("Pipeline") and public != cls.__name__]
        if name not in pipelines:
            raise ValueError(
                f"{pretrained_model_name_or_path} holds a {name}, which is no pipeline of anodiff {anodiff.__version__}"
                f" ({', '.join(pipelines)})."
            )
        return getattr(anodiff, name).from_pretrained(pretrained_model_name_or_path, **kwargs)

    def save_pretrained(self, save_directory: str | os.PathLike, *, push_to_hub: bool = False, **kwargs) -> None:
        """As `DiffusionPipeline.save_pretrained`. With `push_to_hub=True` and `repo_id` the folder gets a card and is pushed; the
        other arguments of [`push_to_hub`] are taken as well."""
        hub_arguments = ("repo_id", "card", "licence", "private", "token", "commit_message")
        pushing = {key: kwargs.pop(key) for key in hub_arguments if key in kwargs}
        super().save_pretrained(str(save_directory), **kwargs)
        if push_to_hub:
            self._push(save_directory, **{"repo_id": Path(save_directory).name, **pushing})

    def push_to_hub(
        self,
        repo_id: str,
        *,
        card: str | None = None,
        licence: str = "other",
        private: bool | None = None,
        token: str | None = None,
        commit_message: str = "Upload with anodiff",
        variant: str | None = None,
    ) -> str:
        """
        Pushes weights, scheduler, processor, configuration and card as one repository, which is created if need be.

        Args:
            repo_id (`str`): `"owner/name"`.
            card (`str`, *optional*):
                Text of `README.md`. By default the one that the repository has, or one made of this pipeline
                ([`~hub.model_card.make_card`]).
            licence (`str`): Of the weights, for a card that is made.
            private (`bool`, *optional*): Visibility of a new repository; the account's default if not given.
            token (`str`, *optional*): Write token; by default `HF_TOKEN`, or that of `hf auth login`.
            commit_message (`str`): Title of the commit.
            variant (`str`, *optional*): Part of the names of the weight files, such as `"fp16"`.

        Returns:
            `str`: URL of the repository.

        Raises:
            PublishingError: The push failed; the message names the folder that everything was saved to.
        """
        folder = tempfile.mkdtemp(prefix=f"{type(self).__name__}-")
        self.save_pretrained(folder, variant=variant)
        url = self._push(folder, repo_id, card, licence, private, token, commit_message)
        shutil.rmtree(folder)
        return url

    def _push(
        self,
        folder: str | os.PathLike,
        repo_id: str,
        card: str | None = None,
        licence: str = "other",
        private: bool | None = None,
        token: str | None = None,
        commit_message: str = "Upload with anodiff",
    ) -> str:
        from ..hub.model_card import make_card
        from ..hub.publishing import complete_folder, push_folder, read_card

        # A card that somebody has written, or that holds results, is not replaced by a bare one.
        card = card or read_card(repo_id, token=token) or str(make_card(self, repo_id=repo_id, licence=licence))
        complete_folder(folder, card)
        return push_folder(folder, repo_id, private=private, token=token, commit_message=commit_message)

    def enable_fast_inference(
        self, *, channels_last: bool = False, autocast: str | None = None, compile: bool = False
    ) -> None:
        """
        Speed options that keep the method as it is but change numbers slightly.

        Args:
            channels_last (`bool`): Memory format of the network; about 1e-6 of the map's maximum.
            autocast (`"bf16"` or `"fp16"`, *optional*): Precision of the network; sums and updates stay float32.
            compile (`bool`): `torch.compile` the network; the first call takes a minute or more.
        """
        if autocast is not None and autocast not in AUTOCAST_TYPES:
            raise ValueError(f"`autocast` must be one of {', '.join(AUTOCAST_TYPES)} or None, got {autocast!r}.")
        self._autocast_dtype = None if autocast is None else AUTOCAST_TYPES[autocast]
        if channels_last:
            self.unet.to(memory_format=torch.channels_last)
        if compile:
            self.unet.compile()

    @property
    def postprocessing(self) -> PostProcessing:
        """The post-processing that the configuration holds; only some methods have a choice of `filter_order`."""
        names = [field.name for field in fields(PostProcessing)]
        return PostProcessing(**{name: self.config[name] for name in names if name in self.config})

    def autocast(self):
        """Context of all evaluations of a call. Opened once: autocast then converts the weights once, and everything between two
        evaluations is elementwise and stays float32."""
        device = self._execution_device.type
        return torch.autocast(device, self._autocast_dtype) if self._autocast_dtype else nullcontext()

    def predict_noise(
        self, sample: torch.Tensor, timesteps: torch.Tensor, class_labels: torch.Tensor | None = None
    ) -> torch.Tensor:
        """One evaluation of the network: `(B, C, H, W)` and `(B,)`, with a conditional network also labels `(B,)`, to float32
        `(B, C, H, W)`."""
        labels = () if class_labels is None else (class_labels,)
        return self.unet(sample.to(self.unet.dtype), timesteps, *labels).sample.to(sample.dtype)

    def prepare_volume(self, volume, brain_mask=None) -> PreparedSlices:
        """Brings whatever a volume may be to slices on the device. A tensor `(N, C, H, W)` counts as processed: all of it is
        brain unless `brain_mask`, a bool tensor `(N, H, W)`, says otherwise. [`PreparedSlices`] are returned, so that several calls
        can share them."""
        if isinstance(volume, PreparedSlices) and brain_mask is None:
            return volume
        if isinstance(volume, torch.Tensor):
            channels = len(self.processor.config.modalities)
            if volume.ndim != 4 or volume.shape[1] != channels or volume.shape[0] == 0:
                raise ValueError(
                    f"A tensor must have the shape (N, {channels}, H, W) with N >= 1, got {tuple(volume.shape)}."
                )
            if not torch.isfinite(volume).all():
                raise ValueError("The tensor holds NaN or infinite values.")
            if brain_mask is None:
                brain_mask = torch.ones(volume.shape[0], *volume.shape[2:], dtype=torch.bool)
            brain_mask = torch.as_tensor(brain_mask)
            if tuple(brain_mask.shape) != (volume.shape[0], *volume.shape[2:]):
                raise ValueError(
                    f"`brain_mask` must have the shape {(volume.shape[0], *volume.shape[2:])}, got {tuple(brain_mask.shape)}."
                )
            slices, brain, processed = volume.float(), brain_mask.bool(), None
        else:
            processed = self.processor.preprocess(volume, brain_mask)
            slices, brain = processed.slices, processed.brain
        return PreparedSlices(slices.to(self._execution_device), brain.to(self._execution_device), processed)

    def run(
        self,
        volume,
        given: dict,
        *,
        threshold: float | None,
        brain_mask,
        generator: int | torch.Generator | None,
        batch_size: int,
        noise: torch.Tensor | Callable | None = None,
        return_dict: bool,
        **arguments,
    ) -> AnomalyOutput | tuple | list:
        """A call of any pipeline, from the volume to the result. `given` are the method's arguments as they were passed, `None` for the
        checkpoint's value; `arguments` go to `compute_maps` beside them."""
        if isinstance(volume, list):
            if brain_mask is not None:
                raise ValueError("Masks of a list of volumes go into dicts, under the key 'brain'.")
            shared = dict(
                threshold=threshold, brain_mask=None, generator=generator, batch_size=batch_size, noise=noise
            )
            return [self.run(item, given, return_dict=return_dict, **shared, **arguments) for item in volume]

        # 0. Resolve defaults: what the checkpoint was tuned to.
        settings = {**self.default_settings(), **{key: value for key, value in given.items() if value is not None}}
        threshold = self.config.threshold if threshold is None else threshold
        record = {**settings, "threshold": threshold}

        # 1. Check.
        self.check_inputs(**settings, batch_size=batch_size)
        if noise is not None and generator is not None:
            raise ValueError("Give either `noise` or `generator`, not both.")
        if not self.deterministic:
            seed = resolve_seed(generator)
            arguments = {"seed": seed, "noise": noise, **arguments}
            record["seed"] = None if noise is not None else seed

        # 2. Prepare: slices (N, C, H, W), brain (N, H, W).
        prepared = self.prepare_volume(volume, brain_mask)

        # 3., 4., 5. The maps of slices with brain (`compute_maps`), post-processing, and back onto the grid of the input.
        output = self.map_volume(prepared, threshold, record, batch_size=batch_size, **arguments, **settings)
        return output if return_dict else output.to_tuple()

    def map_volume(
        self, prepared: PreparedSlices, threshold: float | None, settings: dict, **arguments
    ) -> AnomalyOutput:
        """Computes the slices that hold brain, with `arguments` of `compute_maps`, and finishes the volume. Slices without brain have
        the map 0, their own image as reconstruction, an empty mask, and NaN or -1 as details."""
        rows = torch.nonzero(prepared.brain.flatten(1).any(1)).flatten()
        results = self.compute_maps(prepared.slices[rows], rows.tolist(), **arguments)

        def to_all(values: torch.Tensor, fill: torch.Tensor) -> torch.Tensor:
            everything = fill.to(values).expand(len(prepared.slices), *values.shape[1:]).clone()
            everything[rows] = values
            return everything

        nothing = torch.zeros(())
        results = SliceResults(
            to_all(results.maps, nothing),
            None if results.reconstruction is None else to_all(results.reconstruction, prepared.slices),
            None if results.masks is None else to_all(results.masks, nothing),
            {
                name: to_all(values, torch.tensor(float("nan") if values.is_floating_point() else -1))
                for name, values in results.details.items()
            },
            None if results.added is None else to_all(results.added, nothing),
        )
        output = self.finish_volume(prepared, results, threshold, settings)
        self.maybe_free_model_hooks()
        return output

    def finish_volume(
        self, prepared: PreparedSlices, results: SliceResults, threshold: float | None, settings: dict
    ) -> AnomalyOutput:
        """Filters maps as the checkpoint says, scores them, and brings everything onto the grid of the input. A `threshold` wins over
        the method's own masks."""
        maps, reconstruction, masks, details, added = results
        details = {name: values.cpu().numpy() for name, values in details.items()}
        masks = None if masks is None else masks & prepared.brain
        brain = prepared.brain.cpu().numpy()
        if not torch.isfinite(maps).all() or (added is not None and not torch.isfinite(added).all()):
            raise ValueError(NOT_FINITE)
        postprocessing = self.postprocessing
        filtered = postprocessing.filter(
            maps.cpu().numpy(), brain, None if added is None else added.float().cpu().numpy()
        )
        slice_scores = postprocessing.score_slices(filtered, brain)
        volume_score = postprocessing.score(filtered, brain)
        if prepared.processed is None:
            anomaly_map = torch.from_numpy(filtered)
            mask = None if masks is None else masks.cpu().numpy().astype(np.uint8)
            if threshold is not None:
                mask = postprocessing.mask(filtered, threshold).astype(np.uint8)
            return AnomalyOutput(
                anomaly_map=anomaly_map,
                pred_score=torch.from_numpy(slice_scores),
                volume_score=volume_score,
                pred_mask=None if mask is None else torch.from_numpy(mask),
                reconstruction=None if reconstruction is None else reconstruction.cpu(),
                slice_details=details or None,
                settings=settings,
            )
        processed = prepared.processed
        source: InputVolume = processed.source
        anomaly_map = self.processor.postprocess(torch.from_numpy(filtered), processed)
        mask = None
        if threshold is None and masks is not None:
            mask = source.as_given(processed.geometry.to_input(masks.cpu().numpy().astype(np.uint8), nearest=True))
        elif threshold is not None:
            voxels_per_network_voxel = float(np.prod(processed.geometry.step))
            mask = postprocessing.mask(anomaly_map, threshold, voxels_per_network_voxel).astype(np.uint8)
            mask = source.as_given(mask)
        if reconstruction is not None:
            channels = self.processor.postprocess_image(reconstruction, processed)
            given = [source.as_given(channel) for channel in channels]
            reconstruction = given[0] if len(given) == 1 else np.stack(given, axis=-1)
        return AnomalyOutput(
            anomaly_map=source.as_given(anomaly_map),
            pred_score=processed.geometry.slices_to_input(slice_scores),
            volume_score=volume_score,
            pred_mask=mask,
            reconstruction=reconstruction,
            slice_details={name: processed.geometry.slices_to_input(values) for name, values in details.items()}
            or None,
            settings=settings,
            source=source,
        )


def device_name(device: torch.device) -> str:
    """What a time was measured on."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "CPU"


def resolve_seed(generator: int | torch.Generator | None) -> int:
    """The integer that every draw is derived from; no generator is seed 0, so that the same scan gives the same map."""
    if generator is None:
        return 0
    if isinstance(generator, torch.Generator):
        return generator.initial_seed()
    if isinstance(generator, (int, np.integer)) and not isinstance(generator, bool) and generator >= 0:
        return int(generator)
    raise TypeError(f"`generator` must be an integer >= 0, a torch.Generator or None, got {generator!r}.")


def slice_generator(seed: int, index: int, draw: int, device: torch.device) -> torch.Generator:
    """The generator of one draw of one slice: depends on nothing else, so neither batches nor processes change it."""
    key = np.random.SeedSequence([seed, index, draw]).generate_state(1, np.uint64)[0]
    return torch.Generator(device).manual_seed(int(key))
