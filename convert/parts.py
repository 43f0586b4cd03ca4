"""What the conversions of several programs need: weights in, configuration and preprocessing, a folder out."""

from __future__ import annotations

import inspect
import math
import os
from typing import Any

import torch
import yaml
from diffusers.models.modeling_utils import ModelMixin

from ..checks import check_keys
from ..configs import packaged_config
from ..data.prepare import read_recipe
from ..hub.model_card import make_card
from ..hub.publishing import complete_folder
from ..pipelines.base import AnomalyPipeline
from ..training.objective_guided import ClassifierObjective
from ..volumes.processor import VolumeProcessor


def read_weights(checkpoint: str | os.PathLike, key: str | None) -> dict[str, torch.Tensor]:
    """Reads the state dict in a checkpoint, which it is itself or has under `key`; the `module.` of a run on several
    devices is cut off the names."""
    # Only tensors are read: a pickle from elsewhere could run code.
    state = torch.load(checkpoint, map_location="cpu", weights_only=True)
    if key is not None and key not in state:
        raise SystemExit(f"error: {checkpoint} has no key {key!r}; it has {', '.join(map(str, list(state)[:8]))}.")
    state = state if key is None else state[key]
    return {name.removeprefix("module."): tensor for name, tensor in state.items()}


def read_part(state: dict[str, torch.Tensor], name: str) -> dict[str, torch.Tensor]:
    """Returns the weights of the network that has the parameter `name`, under that network's own names; none, if no
    network has it."""
    prefix = next((own.removesuffix(name) for own in state if own.endswith(name)), None)
    if prefix is None:
        return {}
    return {own.removeprefix(prefix): tensor for own, tensor in state.items() if own.startswith(prefix)}


def transpose_kernels(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Transposes the weights of a network that was trained on transposed images. The originals cut volumes as
    `array[:, :, k]`, so that H is the axis from right to left; our slices have it along W. Nothing knows which axis is
    which but the kernels, and the classifier's embedding of the positions (after one of the mean)."""
    transposed = {}
    for name, tensor in state.items():
        if name.endswith("positional_embedding"):
            side = math.isqrt(tensor.shape[1] - 1)
            grid = tensor[:, 1:].unflatten(1, (side, side)).mT.flatten(1)
            tensor = torch.cat([tensor[:, :1], grid], 1)
        transposed[name] = tensor.mT.contiguous() if tensor.ndim == 4 else tensor
    return transposed


def read_config(name: str) -> dict[str, Any]:
    """Reads a configuration of the package, such as `"andi_flair"`."""
    return yaml.safe_load(packaged_config(f"{name}.yaml").read_text())


def read_processor(recipe: str) -> VolumeProcessor:
    """Returns the preprocessing that a recipe of the package, such as `"brats21_andi"`, prepares data with."""
    return VolumeProcessor.from_dict(read_recipe(recipe)["processor"])


def make_network(
    network_class: type[ModelMixin],
    given: dict[str, Any],
    authors: dict[str, Any],
    processor: VolumeProcessor,
    **sizes,
) -> ModelMixin:
    """Returns a network with random weights for slices of the preprocessing. Arguments that are `given` on the command
    line win over those of the `authors`, and `sizes`, which follow from the weights, over all others."""
    check_keys("unet", given, inspect.signature(network_class).parameters, network_class.__name__)
    arguments = {"sample_size": processor.config.size[0], **authors, **given, **sizes}
    arguments.pop("_class_name", None)
    return network_class(**arguments)


def add_network(config: dict[str, Any], model: ModelMixin) -> dict[str, Any]:
    """Returns a configuration that names the class and the arguments of `model`, and no objective: nothing was trained
    here."""
    used = {key: value for key, value in model.config.items() if not key.startswith("_")}
    return {**config, "unet": {"_class_name": type(model).__name__, **used}, "objective": {}}


def write_folder(
    converted: AnomalyPipeline | ClassifierObjective, config: dict[str, Any] | None, out: str | os.PathLike
) -> str:
    """Writes a converted pipeline with its card, or a classifier, which is no pipeline, and returns in words what it
    was."""
    if isinstance(converted, ClassifierObjective):
        converted.export(converted.model, out)
        return "Classifier"
    converted.unet.eval()
    converted.save_pretrained(out)
    complete_folder(out, str(make_card(converted, config=config)))
    return "Pipeline folder"
