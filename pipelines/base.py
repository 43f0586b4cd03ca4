"""What every pipeline of this library does alike: preparing a volume, the way from slices to maps, and the way of maps
back to the volume."""

from __future__ import annotations

import inspect
import logging
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import numpy as np
import torch

from ..checks import check_choice, check_integer, check_number
from ..hub.configuration import plain
from ..models.brain_extractor import BrainExtractor
from ..models.healthy_maps import HealthyMapsModel
from ..schedulers.draws import DRAWS_VERSION
from ..volumes.context import find_neighbours
from .batches import Batches, choose_batch_size
from .brain import find_brain
from .checkpoint import CheckpointPipeline
from .guarantee import add_claims, check_calibration
from .modalities import describe_missing, find_present, hide_missing
from .output import AnomalyOutput
from .postprocessing import PostProcessing, brightness_weights
from .progress import Progress
from .slices import PreparedSlices, SliceResults


logger = logging.getLogger(__name__)


# N slices of one or several volumes, C modalities, H x W pixels, B items of a batch, K draws of a slice.

NOT_FINITE = (
    "The network gave NaN or infinite values: the checkpoint is damaged, or float16 overflowed (use bf16 or float32)."
)
# What every call takes; anything else is an argument of the method.
CALL_ARGUMENTS = ("volume", "threshold", "brain_mask", "generator", "batch_size", "noise", "callback", "return_dict")
PRECISIONS = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Class labels of conditional networks, and of the classifier that guides one: no lesion, and no label; 1 is unhealthy.
HEALTHY, NULL = 0, 2


class AnomalyPipeline(CheckpointPipeline):
    r"""
    Base of all pipelines. `AnomalyPipeline.from_pretrained(folder_or_id)` gives the pipeline class that the checkpoint
    names.

    A pipeline's configuration holds `threshold` (of `pred_mask`; without one there is no mask), the values of
    [`PostProcessing`], and the method's own settings: the arguments of its `compute_maps`, which is the method itself,
    slices in, maps out. In a call each of them may be given, and is `None` for the checkpoint's value.

    `calibration`, the record of `eval.py --calibrate conformal`, adds to results how rare their scores are among
    healthy scans, and how probable a lesion is; it changes nothing else.

    The component `brain_extractor`, a [`BrainExtractor`], is optional: where the processor wants a brain mask and none is
    given, it makes one. A scan whose skull is off already is left alone. `settings["brain"]` of the result says how its
    mask came about.

    All calls share these arguments:

    Args:
        volume:
            Path, nibabel image, `(X, Y)` or `(X, Y, Z)` array or tensor, PIL image, dict of modalities, tensor `(N, C,
            H, W)` of the slices of one volume in their order, already processed; or several of these. A list gives a
            list of results. An iterator or generator, a `torch.utils.data.Dataset` or a column of a `datasets.Dataset`
            gives an iterator, which reads a volume and finds its result when it is asked for it: all of them never are
            in memory.
        threshold (`float`, *optional*):
            Of `pred_mask`, instead of the checkpoint's; it also replaces masks that the method makes itself.
        brain_mask (*optional*): Mask of the volume, same kinds as the volume.
        generator (`int` or `torch.Generator`, *optional*): Seed, that of a generator its initial one; `None` is 0.
        batch_size (`int`, *optional*):
            Items that share one evaluation of the network; does not change the result. By default 16 on a CPU, and on
            a GPU as many as fill it, which is measured once for a shape; where its memory does not suffice, fewer.
        noise (`torch.Tensor` or callable, *optional*):
            Replaces every draw: `(K, N, C, H, W)`, or `noise(draws, indices, shape)`; see [`Noise`].
        callback (callable, *optional*):
            `callback(done, total)` after every step of a volume ([`~pipelines.progress.Progress`] says what counts).
            What it raises ends the call.
        return_dict (`bool`, defaults to `True`): Whether to return an output object or a tuple.
    """

    # What it is for, in its card: maps of anomalies, or (`segmentation`) masks like those it was trained on.
    task = "anomaly-detection"
    # Whether a call draws nothing: `noise` is then no argument, and a seed changes nothing.
    deterministic = False
    # Whether its network can see the neighbours of a slice, too (`context` of the processor).
    sees_neighbours = False
    _optional_components = ["brain_extractor", "healthy_maps"]
    # Of pipelines that take no such components.
    brain_extractor: BrainExtractor | None = None
    healthy_maps: HealthyMapsModel | None = None
    # What `enable_fast_inference` chose, for the record of results.
    fast: dict | None = None

    def __init__(self):
        super().__init__()
        self.batches = Batches()
        self.progress = Progress()

    def check_configuration(self, *, inputs: int | None = None, outputs: Sequence[int] | None = None) -> None:
        """
        Checks what `__init__` was given: channels of the UNet, and every value as in a call.

        Args:
            inputs (`int`, *optional*): Channels that the UNet must take; by default those of the slices, for each
                modality one, and of their neighbours.
            outputs (sequence of `int`, *optional*): Numbers of channels that it may give; by default the same.

        Raises:
            ValueError: The channels or a value do not fit.
        """
        modalities, context = self.processor.config.modalities, self.processor.config.context
        if context and not self.sees_neighbours:
            raise ValueError(
                f"`processor` must have the `context` 0 for a {type(self).__name__}, which sees slices one by one, got"
                f" {context}."
            )
        inputs, outputs = inputs or self.processor.channels, outputs or (self.processor.channels,)
        unet = self.unet.config
        for name, allowed in (("in_channels", (inputs,)), ("out_channels", outputs)):
            if unet[name] not in allowed:
                seen = f" of {2 * context + 1} slices" if context else ""
                raise ValueError(
                    f"`unet` must have {' or '.join(map(str, allowed))} `{name}` for the modalities"
                    f" {', '.join(modalities)}{seen}, got {unet[name]}."
                )
        self.check_inputs(**self.default_settings())
        self.check_threshold(self.config.threshold)
        check_calibration(self.config.get("calibration"))
        postprocessing = self.postprocessing  # checks its values
        size, healthy_maps = self.processor.config.size, self.healthy_maps
        if healthy_maps is None and postprocessing.normalization == "healthy_maps":
            raise ValueError(
                "`normalization` healthy_maps needs the component `healthy_maps`, which `measure_healthy_maps` makes."
            )
        if healthy_maps is not None and tuple(healthy_maps.levels.shape[1:]) != (size and tuple(size)):
            raise ValueError(
                f"`healthy_maps` must have the `size` of the processor, {size}, got {tuple(healthy_maps.levels.shape[1:])}."
            )

    def check_value_range(self) -> None:
        """Raises a `ValueError` unless the processor brings slices to [-1, 1], which predictions of the clean slice
        are limited to."""
        value_range = tuple(self.processor.config.value_range)
        if value_range != (-1.0, 1.0):
            raise ValueError(
                f"`processor` must have the `value_range` (-1, 1), which the predictions are limited to, got {value_range}."
            )

    @property
    def may_lack(self) -> list[str]:
        """Returns the modalities that a volume may lack, if it has others."""
        return list(self.config.get("optional_modalities") or ())

    def modality_channels(self, modalities: Sequence[str] | None, what: str = "modalities") -> list[int]:
        """Returns the channels of the named modalities, in that order; of all for `None`. Raises a `ValueError` that
        calls them `what`, unless they are different ones of the processor's."""
        known = list(self.processor.config.modalities)
        if modalities is None:
            return list(range(len(known)))
        repeated = isinstance(modalities, str) or len(set(modalities)) < len(modalities)
        if repeated or not modalities or set(modalities) - set(known):
            raise ValueError(f"`{what}` must be different ones of {', '.join(known)}, got {modalities!r}.")
        return [known.index(name) for name in modalities]

    def check_inputs(self, **settings) -> None:
        """Raises a `ValueError` that names the argument, if a setting of `compute_maps` cannot be."""

    def check_threshold(self, threshold: float | None) -> None:
        """Raises a `ValueError` if the maps cannot be cut at `threshold`."""
        if threshold is not None:
            check_number("threshold", threshold)

    def default_settings(self) -> dict:
        """Returns the checkpoint's values of what `compute_maps` needs to be told: those of its arguments that the
        configuration holds."""
        names = inspect.signature(self.compute_maps).parameters
        return {name: self.config[name] for name in names if name in self.config}

    def looks_across_slices(self, **settings) -> bool:
        """Tells whether a map depends on other slices of its volume: `compute_maps` then gets those of one volume, and
        of no other."""
        return False

    def calibrate(self, slices, **arguments) -> dict:
        """Chooses settings from slices with labels, and puts them into the configuration; only methods with a
        calibration of their own do.

        Raises:
            ValueError: This method has none.
        """
        raise ValueError(
            f"{type(self).__name__} has no calibration of its own (`policy` labels): use healthy, yen or otsu."
        )

    @property
    def postprocessing(self) -> PostProcessing:
        """Returns the post-processing that the configuration holds; only some methods have a choice of
        `filter_order`."""
        names = [field.name for field in fields(PostProcessing)]
        return PostProcessing(**{name: self.config[name] for name in names if name in self.config})

    def enable_fast_inference(
        self,
        *,
        mixed_precision: str | None = None,
        channels_last: bool | None = None,
        compile: bool | None = None,
        cuda_graphs: bool = False,
    ) -> None:
        """
        Makes calls as fast as the device that the pipeline is on allows; the method stays as it is, but numbers change
        slightly (`docs/training_and_evaluation.md` says how much). What is not given is chosen: on a GPU bf16 weights,
        if it computes with them, channels_last and compiled; on a CPU float32 and channels_last.

        Args:
            mixed_precision (`"no"`, `"bf16"` or `"fp16"`, *optional*):
                Type of the networks' weights, `"no"` float32; sums and updates stay float32. Weights are rounded in
                place: load the checkpoint again to have them back, or to save it.
            channels_last (`bool`, *optional*): Memory format of the UNet.
            compile (`bool`, *optional*):
                Compile the UNet, for one size of batches that smaller ones are padded to; the first call takes a
                minute or more.
            cuda_graphs (`bool`, defaults to `False`):
                Replay what is compiled as a CUDA graph: for small batches, whose time is that of launching.
        """
        check_choice("mixed_precision", mixed_precision, (*PRECISIONS, None))
        device = self._execution_device
        gpu = device.type == "cuda"
        if mixed_precision is None and gpu and torch.cuda.is_bf16_supported(including_emulation=False):
            mixed_precision = "bf16"
        compile = gpu if compile is None else compile
        # Not compiled it is slower on a GPU, whose group norms convert it, and faster on a CPU.
        channels_last = (compile or not gpu) if channels_last is None else channels_last
        if cuda_graphs and not compile:
            raise ValueError("`cuda_graphs` replays what is compiled: leave it out, or `compile`.")
        for name, component in self.components.items():
            if (
                mixed_precision
                and isinstance(component, torch.nn.Module)
                and name not in ("brain_extractor", "healthy_maps")
            ):
                # Not its own method, which says that a type is better chosen while loading.
                torch.nn.Module.to(component, PRECISIONS[mixed_precision])
        self.unet.to(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
        if compile:
            # A graph for each shape of slices; with `fullgraph` it is an error if there are more.
            torch._dynamo.config.recompile_limit = 64
        self.batches = Batches(self.unet if compile else None, channels_last, cuda_graphs)
        self.fast = {"mixed_precision": mixed_precision or "no", "channels_last": channels_last, "compile": compile}

    def predict_noise(
        self,
        sample: torch.Tensor,
        timesteps: torch.Tensor | None = None,
        class_labels: torch.Tensor | None = None,
        *,
        unit: int | None = None,
    ) -> torch.Tensor:
        """Evaluates the network once: `(B, C, H, W)` and, unless it takes no timesteps, `(B,)`, with a conditional
        network also labels `(B,)`, to float32 `(B, C, H, W)`. `unit`: see [`~pipelines.batches.Batches`]."""
        more = [values for values in (timesteps, class_labels) if values is not None]
        # Not `unet.dtype`, which walks all modules at every evaluation.
        dtype = next(self.unet.parameters()).dtype
        output = self.batches.evaluate(self.unet, read_sample, sample.to(dtype), *more, unit=unit)
        # What follows reads it together with contiguous tensors.
        return output.to(sample.dtype, memory_format=torch.contiguous_format)

    def prepare_volume(self, volume: Any, brain_mask: Any = None) -> PreparedSlices:
        """Brings whatever a volume may be to slices on the device. A tensor `(N, C, H, W)` counts as processed: all of
        it is brain unless `brain_mask`, a bool tensor `(N, H, W)`, says otherwise; one `(X, Y)` or `(X, Y, Z)` is a
        volume as an array is. [`PreparedSlices`] are returned, so that several calls can share them."""
        if isinstance(volume, PreparedSlices) and brain_mask is None:
            return volume
        if isinstance(volume, torch.Tensor) and volume.ndim == 4:
            channels = len(self.processor.config.modalities)
            if volume.shape[1] != channels or volume.shape[0] == 0:
                raise ValueError(
                    f"A tensor must have the shape (N, {channels}, H, W) with N >= 1, got {tuple(volume.shape)}."
                )
            if not torch.isfinite(volume).all():
                raise ValueError("The tensor holds NaN or infinite values: replace them first.")
            origin = "none" if brain_mask is None else "given"
            if brain_mask is None:
                brain_mask = torch.ones(volume.shape[0], *volume.shape[2:], dtype=torch.bool)
            brain_mask = torch.as_tensor(brain_mask)
            if tuple(brain_mask.shape) != (volume.shape[0], *volume.shape[2:]):
                raise ValueError(
                    f"`brain_mask` must have the shape {(volume.shape[0], *volume.shape[2:])}, got {tuple(brain_mask.shape)}."
                )
            slices, brain, processed, made_mask = volume.float(), brain_mask.bool(), None, None
        else:
            given = brain_mask is not None or (isinstance(volume, Mapping) and "brain" in volume)
            origin, made_mask = "given" if given else self.processor.config.brain_mask, None
            if not given and origin == "given" and self.brain_extractor is not None:
                volume = self.processor.read(volume, self.may_lack)
                brain_mask, origin = find_brain(self.brain_extractor, volume)
                made_mask = brain_mask if origin == "extracted" else None
            processed = self.processor.preprocess(volume, brain_mask, self.may_lack)
            slices, brain = processed.slices, processed.brain
        device = self._execution_device
        return PreparedSlices(slices.to(device), brain.to(device), processed, origin, made_mask)

    @contextmanager
    def progress_bar(self, total: int) -> Iterator[Progress]:
        """Opens diffusers' bar for `total` more steps, which `update` of what it gives counts."""
        with super().progress_bar(total=total) as self.progress.bar:
            self.progress.total += total
            yield self.progress

    def __call__(self, volume: Any, **arguments: Any) -> Any:
        """
        Finds anomalies in a volume. Every pipeline lists its own arguments beside those of all.

        Returns:
            [`AnomalyOutput`], or with `return_dict=False` a tuple; of several volumes a list or an iterator of either.
        """
        raise NotImplementedError

    def run(self, call: dict) -> AnomalyOutput | tuple | list | Iterator:
        """
        Does what `__call__` of every pipeline does, from the volume or volumes to the results.

        Args:
            call (`dict`):
                The arguments of `__call__`, its `locals()`: what all pipelines take, and the method's own, `None` for
                the checkpoint's value.
        """
        several = each_volume(call["volume"], call["brain_mask"], lambda volume: self.run({**call, "volume": volume}))
        if several is not None:
            return several
        if call["callback"] is not None and not callable(call["callback"]):
            raise TypeError(f"`callback` must be a function of (done, total), got {type(call['callback']).__name__}.")
        self.progress, start = Progress(call["callback"]), time.perf_counter()
        try:
            output = self.find_anomalies(call)
            logger.info(
                "%s: %d steps in %.3g s; brain mask: %s.",
                type(self).__name__,
                self.progress.done,
                time.perf_counter() - start,
                output.settings["brain"],
            )
        finally:
            # Also where it ends halfway.
            self.progress = Progress()
            self.maybe_free_model_hooks()
        return output if call["return_dict"] else output.to_tuple()

    def find_anomalies(self, call: dict) -> AnomalyOutput:
        """Does what [`run`] says for one volume."""
        given = {name: value for name, value in call.items() if name not in ("self", *CALL_ARGUMENTS)}
        volume, threshold, brain_mask, generator, batch_size, noise = map(call.get, CALL_ARGUMENTS[:6])

        # 0. Resolve defaults: what the checkpoint was tuned to.
        defaults = self.default_settings()
        settings = {**defaults, **{name: plain(value) for name, value in given.items() if value is not None}}
        threshold, batch_size = self.config.threshold if threshold is None else plain(threshold), plain(batch_size)
        record = {**{name: settings[name] for name in defaults}, "threshold": threshold}

        # 1. Check.
        self.check_inputs(**settings)
        self.check_threshold(threshold)
        if batch_size is not None:
            check_integer("batch_size", batch_size, 1)
        if noise is not None and generator is not None:
            raise ValueError("Give either `noise` or `generator`, not both.")
        seed = resolve_seed(generator)
        if not self.deterministic:
            record |= {"seed": None if noise is not None else seed, "draws": DRAWS_VERSION}
        if self.fast is not None:
            record["fast"] = self.fast

        # 2. Prepare: slices (N, C, H, W), brain (N, H, W).
        prepared = self.prepare_volume(volume, brain_mask)
        record["brain"] = prepared.brain_origin
        present = find_present(self, prepared, settings.get("present_modalities"))
        if "present_modalities" in settings:
            settings["present_modalities"] = record["present_modalities"] = present

        # 3., 4. The maps of its slices, filtered.
        indices = list(range(len(prepared.slices)))
        results = self.map_slices(
            prepared.slices, prepared.brain, indices, batch_size=batch_size, seed=seed, noise=noise, **settings
        )

        # 5. Scores and masks, back onto the grid of the input.
        output = self.finish_volume(prepared, results, threshold, record)
        notes = describe_missing(self, present, threshold if call["threshold"] is None else None)
        if notes:
            output.warnings = notes
        if self.config.get("calibration") is not None:
            add_claims(output, self, prepared, results.maps, settings, None if noise is not None else seed)
        return output

    @torch.no_grad()
    def map_slices(
        self,
        slices: torch.Tensor,
        brain: torch.Tensor,
        indices: Sequence[int],
        *,
        volumes: Sequence[int] | None = None,
        batch_size: int | None = None,
        seed: int = 0,
        noise: torch.Tensor | Callable | None = None,
        **settings,
    ) -> SliceResults:
        """
        Computes the maps of slices: the only way to them, for calls, evaluations and calibrations alike.

        The method sees the slices that hold brain, with the `context` of the processor each beside its neighbours
        among them ([`~volumes.context.find_neighbours`]), whose channels are then part of what `compute_maps` takes,
        and not of what it returns. The others have the map 0, their own image as reconstruction, an empty mask, and
        NaN or -1 as details. Maps are weighted and filtered as the configuration says
        ([`PostProcessing`]), volume by volume, and are 0 outside the brain. What a method adds to filtered maps has
        the same weights, and its own masks hold no pixel whose weight is 0.

        Args:
            slices (`torch.Tensor` of shape `(N, C, H, W)`): In the processor's value range, on the pipeline's device.
            brain (`torch.Tensor` of shape `(N, H, W)`, bool): Where there is brain.
            indices (sequence of N `int`): The slices' numbers, which their random numbers depend on.
            volumes (sequence of `int`, *optional*):
                How many of the slices each volume has, in their order; one volume by default.
            batch_size, seed, noise: As of a call.
            settings: Arguments of `compute_maps` instead of the checkpoint's.

        Returns:
            [`SliceResults`]:
                of all N slices. `maps` is on the CPU, float32, with what a method adds to filtered maps; `added` is
                `None`.

        Raises:
            ValueError: The network gave NaN or infinite values.
        """
        volumes = [len(slices)] if volumes is None else list(volumes)
        self.batches.automatic = batch_size is None
        batch_size = batch_size or choose_batch_size((self.processor.channels, *slices.shape[2:]), slices.device)
        settings = {**self.default_settings(), **settings}
        if not self.deterministic:
            settings |= {"seed": seed, "noise": noise}
        slices = hide_missing(self, slices, settings.get("present_modalities"))
        results, volume_of = [], np.repeat(np.arange(len(volumes)), volumes)
        for rows in _rows_together(brain, volumes if self.looks_across_slices(**settings) else [len(slices)]):
            numbers, seen = [indices[row] for row in rows], slices[rows]
            if self.processor.config.context:
                near = find_neighbours(volume_of[rows], np.array(numbers), self.processor.config.context)
                seen = seen[torch.from_numpy(near)].flatten(1, 2)
            results.append(self.compute_maps(seen, numbers, batch_size=batch_size, **settings))
        rows = torch.nonzero(brain.flatten(1).any(1)).flatten()

        def to_all(values: Sequence[torch.Tensor | None], fill: torch.Tensor | float) -> torch.Tensor | None:
            if values[0] is None:
                return None
            values = torch.cat(values)
            fill = torch.as_tensor(fill, dtype=values.dtype, device=values.device)
            everything = fill.expand(len(slices), *values.shape[1:]).clone()
            everything[rows] = values
            return everything

        maps, reconstruction, masks, details, added = zip(*results, strict=True)
        maps, added, masks = to_all(maps, 0.0), to_all(added, 0.0), to_all(masks, False)
        if not torch.isfinite(maps).all() or (added is not None and not torch.isfinite(added).all()):
            raise ValueError(NOT_FINITE)
        weights = self.weigh(slices, brain, indices, volumes)
        if weights is not None:
            maps = maps * weights
            added = None if added is None else added * weights
            masks = None if masks is None else masks & (weights > 0)
        details = {name: [one[name] for one in details] for name in details[0]}
        return SliceResults(
            self.filter_maps(maps.float(), brain, None if added is None else added.float(), volumes).cpu(),
            to_all(reconstruction, slices),
            None if masks is None else masks & brain,
            {
                name: to_all(values, float("nan") if values[0].is_floating_point() else -1)
                for name, values in details.items()
            },
        )

    def weigh(
        self, slices: torch.Tensor, brain: torch.Tensor, indices: Sequence[int], volumes: Sequence[int]
    ) -> torch.Tensor | None:
        """Returns what the maps of one or several volumes are multiplied by, `(N, H, W)` float32, as the configuration
        says: weights by brightness ([`~pipelines.postprocessing.brightness_weights`]), over what healthy slices show
        at the same place. `None` if it says neither."""
        chosen = self.postprocessing
        by_brightness = chosen.sign != "both" or chosen.weighting != "none"
        if not by_brightness and chosen.normalization == "none":
            return None
        weights = torch.ones(brain.shape)
        if by_brightness:
            images = self.processor.to_unit(slices).float().cpu().numpy()
            weights = torch.from_numpy(brightness_weights(images, brain.cpu().numpy(), chosen.sign, chosen.weighting))
        if chosen.normalization == "healthy_maps":
            start = 0
            for count in volumes:
                rows = slice(start, start + count)
                start += count
                weights[rows] /= self.healthy_maps(brain[rows], indices[rows]).cpu()
        return weights.to(slices.device)

    def filter_maps(
        self, maps: torch.Tensor, brain: torch.Tensor, added: torch.Tensor | None, volumes: Sequence[int]
    ) -> torch.Tensor:
        """Filters maps `(N, H, W)` volume by volume, as the configuration says, and adds what a method adds to
        filtered maps."""
        filtered, start = [], 0
        for count in volumes:
            rows = slice(start, start + count)
            start += count
            extra = None if added is None else added[rows]
            filtered.append(self.postprocessing.filter(maps[rows], brain[rows], extra))
        return torch.cat(filtered)

    def finish_volume(
        self, prepared: PreparedSlices, results: SliceResults, threshold: float | None, settings: dict
    ) -> AnomalyOutput:
        """Scores the filtered maps of a volume, cuts them, and brings everything onto the grid of the input. A
        `threshold` wins over the method's own masks."""
        postprocessing, processed = self.postprocessing, prepared.processed
        maps, brain = results.maps.numpy(), prepared.brain.cpu().numpy()
        masks = None if results.masks is None else results.masks.cpu().numpy().astype(np.uint8)
        details = {name: values.cpu().numpy() for name, values in results.details.items()}
        slice_scores, volume_score = postprocessing.score_slices(maps, brain), postprocessing.score(maps, brain)
        if processed is None:
            if threshold is not None:
                masks = postprocessing.mask(maps, threshold).astype(np.uint8)
            return AnomalyOutput(
                anomaly_map=results.maps,
                pred_score=torch.from_numpy(slice_scores),
                volume_score=volume_score,
                pred_mask=None if masks is None else torch.from_numpy(masks),
                reconstruction=None if results.reconstruction is None else results.reconstruction.cpu(),
                slice_details=details or None,
                settings=settings,
            )
        source, geometry = processed.source, processed.geometry
        anomaly_map, reconstruction = self.processor.postprocess(results.maps, processed), None
        if threshold is not None:
            voxels_per_network_voxel = float(np.prod(geometry.step))
            masks = postprocessing.mask(anomaly_map, threshold, voxels_per_network_voxel).astype(np.uint8)
        elif masks is not None:
            masks = geometry.to_input(masks, nearest=True)
        if results.reconstruction is not None:
            channels = self.processor.postprocess_image(results.reconstruction, processed)
            given = [source.as_given(channel) for channel in channels]
            reconstruction = given[0] if len(given) == 1 else np.stack(given, axis=-1)
        return AnomalyOutput(
            anomaly_map=source.as_given(anomaly_map),
            pred_score=geometry.slices_to_input(slice_scores),
            volume_score=volume_score,
            pred_mask=None if masks is None else source.as_given(masks),
            reconstruction=reconstruction,
            slice_details={name: geometry.slices_to_input(values) for name, values in details.items()} or None,
            settings=settings,
            source=source,
            brain_mask=None if prepared.made_mask is None else prepared.made_mask.astype(np.uint8),
        )


def each_volume(volume: Any, brain_mask: Any, find: Callable[[Any], Any]) -> list | Iterator | None:
    """
    Applies `find` to several volumes: to a list at once, to whatever gives them one by one when the next result is
    asked for.

    Returns:
        a list or an iterator of what `find` gives; `None` for what is no several volumes.

    Raises:
        ValueError: There is a `brain_mask`, which can be that of one volume only.
    """
    named = isinstance(volume, (str, bytes, tuple))  # sequences, but not of volumes
    dataset = isinstance(volume, torch.utils.data.Dataset)
    if named or not (dataset or isinstance(volume, (Iterator, Sequence))):
        return None
    if brain_mask is not None:
        raise ValueError("Masks of several volumes go into dicts, under the key 'brain'.")
    if isinstance(volume, list):
        return [find(item) for item in volume]
    if dataset and not isinstance(volume, torch.utils.data.IterableDataset):
        # It need not say by an error where it ends.
        volume = map(volume.__getitem__, range(len(volume)))
    return map(find, volume)


def read_sample(network: Callable, *inputs: torch.Tensor) -> torch.Tensor:
    """Evaluates a network whose output has a `sample`."""
    return network(*inputs).sample


def read_logits(network: Callable, *inputs: torch.Tensor) -> torch.Tensor:
    """Evaluates a network whose output has `logits`."""
    return network(*inputs).logits


def device_name(device: torch.device) -> str:
    """Returns the name of the device, for the record of a measured time."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "CPU"


def resolve_seed(generator: int | torch.Generator | None) -> int:
    """Returns the integer that every draw is derived from; without a generator 0, so that the same scan gives the same
    map."""
    if generator is None:
        return 0
    if isinstance(generator, torch.Generator):
        return generator.initial_seed()
    if isinstance(generator, (int, np.integer)) and not isinstance(generator, bool) and generator >= 0:
        return int(generator)
    raise TypeError(f"`generator` must be an integer >= 0, a torch.Generator or None, got {generator!r}.")


def _rows_together(brain: torch.Tensor, parts: list[int]) -> list[list[int]]:
    """The rows of the slices with brain, `(N, H, W)` bool, part by part; parts without any are left out."""
    holds_brain = brain.flatten(1).any(1).cpu()
    rows = [part[holds_brain[part]].tolist() for part in torch.arange(len(brain)).split(parts)]
    # Without brain anywhere there are no maps, but something must say what kind of results there are.
    return [part for part in rows if part] or rows[:1]
