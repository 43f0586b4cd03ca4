"""The contract of training objectives: what is trained, read, validated and exported."""

from __future__ import annotations

import inspect
from pathlib import Path

import torch

from ..checks import check_choice, check_keys
from ..pipelines.base import AnomalyPipeline
from ..schedulers.draws import fold_in, integers
from ..volumes.processor import VolumeProcessor
from .keys import NOISE, TIMESTEP
from .options import TrainOptions


# N slices, C channels, H x W pixels.

Batch = dict[str, torch.Tensor]

MODALITIES = "the number of modalities"

# Arguments of pipelines that are components, or follow from trained weights, not inference values.
COMPONENTS = {
    *("unet", "scheduler", "processor", "encoder", "classifier", "segmentation_network"),
    *("brain_extractor", "healthy_maps", "calibration", "optional_modalities"),
}


class Objective:
    r"""
    Base of the training objectives. The loop (`training/loop.py`) knows nothing else of a method.

    A subclass sets the class attributes, and implements `loss` and `preview`.

    Args:
        model (`torch.nn.Module`): What is trained, and averaged.
        scheduler: Noises the slices.
        processor ([`VolumeProcessor`]): Of the prepared data, exported with the weights.
        inference (`dict`, *optional*): Inference values of the pipeline that is exported.
    """

    # What a batch holds of the prepared data: `image`, and perhaps `mask`, `annotations`, `brain`, `label`.
    columns: tuple[str, ...] = ("image",)
    # Slices of the training split that it sees (`data.prepared.POPULATIONS`): "healthy" leaves out those that are
    # known to be anomalous, "annotated" those of subjects without annotation.
    trains_on = "healthy"
    # The same for the validation split, or "labelled", slices with a known label.
    validates_on = "healthy"
    # What a subject may lack (`lacks`), for the message about it.
    learns_from = "labels, healthy or unhealthy"
    # Whether it draws whole heads itself, of label maps; batches then hold a `map` and no image.
    draws_volumes = False
    # Optimizer steps on one batch; with more than one, `loss` takes the number of the `update`, too.
    updates_per_batch = 1
    # Whether the `unet` of its pipeline is all that it trains, so that `train.init_from` can name what it begins with.
    trains_unet_alone = True
    # Networks of the block `unet`, the first one by default.
    unet_classes: tuple[type, ...] = ()
    # Made of the blocks `scheduler` and `inference`, which must be empty for `None`.
    scheduler_class: type | None = None
    pipeline_class: type[AnomalyPipeline] | None = None
    # What the block `objective` takes.
    objective_keys: tuple[str, ...] = ()
    # Of them the key that must be there, folder or Hub id of what is trained before, and what that is.
    part: tuple[str, str] | None = None

    def __init__(self, model: torch.nn.Module, scheduler, processor: VolumeProcessor, inference: dict | None = None):
        self.model = model
        self.scheduler = scheduler
        self.processor = processor
        self.inference = inference or {}
        if self.pipeline_class is not None:
            self.make_pipeline(model)  # so that a wrong inference value is found before the training and not after it

    @classmethod
    def check_options(cls, options: TrainOptions) -> None:
        """Checks the names and keys in the blocks of a configuration; it runs before any data is made or read."""
        network, arguments = cls._choose_network(options)
        for block, given, target in (
            ("unet", arguments, network),
            ("scheduler", options.scheduler, cls.scheduler_class),
            ("inference", options.inference, cls.pipeline_class),
            ("processor", options.processor, VolumeProcessor),
        ):
            known = [] if target is None else [key for key in argument_names(target) if key not in COMPONENTS]
            check_keys(block, given, known, (target or cls).__name__)
        check_keys("objective", options.objective, cls.objective_keys, cls.__name__)
        if options.train.init_from is not None and not cls.trains_unet_alone:
            raise ValueError(
                f"`train.init_from` must not be given for the method {options.method}: it begins with the weights of a"
                " pipeline whose `unet` is all that is trained. Leave it out."
            )
        if options.train.gradient_checkpointing and not (network and network._supports_gradient_checkpointing):
            raise ValueError(
                f"`train.gradient_checkpointing` must be false for the method {options.method} with this network, which"
                " keeps its activations."
            )
        if options.processor.get("context") and not (cls.pipeline_class and cls.pipeline_class.sees_neighbours):
            raise ValueError(
                f"`processor.context` must be 0 for the method {options.method}, which sees slices one by one, got"
                f" {options.processor['context']!r}."
            )
        if options.processor.get("context") and options.data.streaming:
            raise ValueError(
                "`processor.context` needs the neighbours of a slice, which `data.streaming` does not bring together:"
                " leave `data.streaming` out."
            )
        if cls.part is not None and cls.part[0] not in options.objective:
            raise ValueError(f"`objective.{cls.part[0]}` must be the folder or Hub id of {cls.part[1]}.")

    @classmethod
    def lacks(cls, subject: dict) -> bool:
        """Tells whether a subject, a row of `subjects.parquet`, lacks what it learns from: a label, if it reads those."""
        return "label" in cls.columns and subject["label"] == -1

    @classmethod
    def from_options(cls, options: TrainOptions, processor: VolumeProcessor) -> Objective:
        """Builds network, scheduler and objective from the blocks of a configuration, which must fit the data."""
        cls.check_options(options)
        network, scheduler = cls.make_network(options, processor), cls.scheduler_class(**options.scheduler)
        return cls(network, scheduler, processor, options.inference, **options.objective)

    @classmethod
    def make_network(cls, options: TrainOptions, processor: VolumeProcessor) -> torch.nn.Module:
        """Builds the network of the block `unet`. What the data decide is filled in, and another value is an error."""
        network, unet = cls._choose_network(options)
        for key, (value, reason) in cls.network_arguments(network, processor.channels).items():
            if unet.setdefault(key, value) != value:
                seen = " of the slice and of its neighbours" if processor.config.context and "channels" in key else ""
                raise ValueError(f"`unet.{key}` must be {value}, {reason}{seen}, got {unet[key]}.")
        size = processor.config.size
        if size is not None and "sample_size" in argument_names(network):
            unet.setdefault("sample_size", size[0] if size[0] == size[1] else tuple(size))
        model = network(**unet)
        if options.train.gradient_checkpointing:
            model.enable_gradient_checkpointing()
        return model

    @classmethod
    def _choose_network(cls, options: TrainOptions) -> tuple[type | None, dict]:
        """Class, `None` if there is none to choose, and arguments of the block `unet`."""
        unet, networks = dict(options.unet), {network.__name__: network for network in cls.unet_classes}
        if not networks:
            return None, unet
        name = unet.pop("_class_name", cls.unet_classes[0].__name__)
        check_choice("unet._class_name", name, networks)
        return networks[name], unet

    @classmethod
    def network_arguments(cls, network: type, channels: int) -> dict[str, tuple[int, str]]:
        """Returns the arguments of a network that follow from the number of modalities: name to value and reason."""
        return {"in_channels": (channels, MODALITIES), "out_channels": (channels, MODALITIES)}

    def loss(self, model: torch.nn.Module, batch: Batch, keys: torch.Tensor) -> torch.Tensor:
        """
        Computes the loss of every sample, `(N,)`.

        Args:
            model (`torch.nn.Module`): `self.model` as accelerate wraps it: call it, do not read its attributes.
            batch (`dict[str, torch.Tensor]`): The columns, augmented: `image (N, C, H, W)` in the processor's value
                range, `mask (N, A, H, W)` uint8, `annotations (N,)`, `brain (N, H, W)`, `label (N,)`, 0 healthy, 1
                unhealthy, -1 unknown.
            keys (`torch.Tensor` of shape `(N, 2)`): What everything random is drawn from (`training/keys.py`).
        """
        raise NotImplementedError

    def preview(self, model: torch.nn.Module, batch: Batch, keys: torch.Tensor) -> Batch:
        """Makes the rows of a validation picture, title to images `(N, C, H, W)` in the processor's value range,
        without gradients; arguments as of `loss`."""
        raise NotImplementedError

    def make_pipeline(self, model: torch.nn.Module) -> AnomalyPipeline:
        """Returns the pipeline of the trained `model`."""
        return self.pipeline_class(model, self.scheduler, self.processor, **self.inference)

    def export(self, model: torch.nn.Module, folder: str | Path) -> AnomalyPipeline | None:
        """Writes a pipeline folder with the weights of `model`; returns the pipeline, or `None` for what is none."""
        pipeline = self.make_pipeline(model)
        pipeline.save_pretrained(folder)
        return pipeline

    def draw(
        self, images: torch.Tensor, keys: torch.Tensor, *, shared: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Draws uniform timesteps `(N,)` for images `(N, C, H, W)`, and noise of them, if `shared` that of the first
        image alone."""
        timesteps, count = draw_timesteps(keys, len(self.scheduler)), 1 if shared else len(images)
        return timesteps, self.scheduler.draw_noise(fold_in(keys[:count], NOISE), images.shape[1:], timesteps[:count])

    def noise_to(self, images: torch.Tensor, timestep: int, keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Noises images `(N, C, H, W)` to one timestep: timesteps `(N,)` and x_t."""
        timesteps = torch.full((len(images),), timestep, device=images.device)
        noise = self.scheduler.draw_noise(fold_in(keys, NOISE), images.shape[1:], timesteps)
        return timesteps, self.scheduler.add_noise(images, noise, timesteps)

    def comparison(
        self, images: torch.Tensor, sample: torch.Tensor, timestep: int, title: str, reconstruction: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """Returns the rows of a picture of a reconstruction, and its difference from the slice."""
        return {
            "slice": images,
            f"noised, t = {timestep}": sample,
            title: reconstruction,
            "difference": (images - reconstruction).abs() + self.processor.config.value_range[0],
        }


def draw_timesteps(keys: torch.Tensor, high: int, low: int = 0) -> torch.Tensor:
    """Draws a timestep from `low` to `high` - 1 for every key of `(N, 2)`, uniformly: `(N,)`."""
    return low + integers(fold_in(keys, TIMESTEP), high - low)


def argument_names(target: type) -> list[str]:
    """Returns the names of the arguments that a class takes."""
    return [name for name in inspect.signature(target.__init__).parameters if name != "self"]
