"""What the conversions of several programs need: weights in, configuration and preprocessing, a folder out."""

from __future__ import annotations

import inspect
import math
import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers.models.modeling_utils import ModelMixin

from ..checks import check_keys
from ..configs import packaged_config, read_yaml
from ..data.prepare import read_recipe
from ..hub.model_card import make_card
from ..hub.publishing import complete_folder
from ..pipelines.base import AnomalyPipeline
from ..training.objective_guided import ClassifierObjective
from ..volumes.processor import VolumeProcessor


def read_weights(checkpoint: str | os.PathLike, key: str | None) -> dict[str, torch.Tensor]:
    """Reads the state dict in a checkpoint, which it is itself or has under `key`; the `module.` of a run on several
    devices is cut off the names. Raises a `ValueError` if the file cannot be read, holds anything that could run code,
    or tensors that are not finite or not there."""
    try:
        # Only tensors are read: a pickle from elsewhere could run code.
        state = torch.load(checkpoint, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged or hostile file ends in any kind of error, with advice that we do not give
        if found := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise ValueError(
                f"{checkpoint} holds {found[1]}, which could run code, and is not opened. Save the weights alone with"
                " the program that made it: `torch.save(model.state_dict(), FILE)`."
            ) from None
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise ValueError(f"{checkpoint} is no checkpoint of PyTorch, or truncated or damaged.") from None
    if not isinstance(state, Mapping):
        raise ValueError(f"{checkpoint} must hold a state dict, name to tensor, got {type(state).__name__}.")
    keys = f"keys of the checkpoint: {', '.join(map(str, list(state)[:8])) or 'none'}"
    if key is not None:
        if not isinstance(state.get(key), Mapping):
            raise ValueError(f"{checkpoint} has no weights under `--key {key}`; {keys}.")
        state = state[key]
    others = [str(name) for name, tensor in state.items() if not isinstance(tensor, torch.Tensor)]
    if others or not state:
        raise ValueError(
            f"{checkpoint} holds more than weights ({', '.join(others[:8]) or 'and none of them'}): name the key that"
            f" they lie under with `--key`; {keys}."
        )
    for name, tensor in state.items():
        # A view may claim more numbers than the file has.
        if tensor.layout != torch.strided or tensor.nbytes > tensor.untyped_storage().nbytes():
            raise ValueError(f"{checkpoint}: {name} must be a dense tensor, whole in the file.")
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{checkpoint}: {name} holds NaN or infinite values; the weights are damaged.")
    return {str(name).removeprefix("module."): tensor for name, tensor in state.items()}


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
    return read_yaml(packaged_config(f"{name}.yaml"))


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
    """Writes a converted pipeline with its card, or a classifier, which is no pipeline, as a whole, and returns in
    words what it was."""
    out = Path(out).absolute()
    out.parent.mkdir(parents=True, exist_ok=True)
    # A folder of a temporary one: it has ordinary permissions, and appears when it is whole.
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as temporary:
        folder = Path(temporary) / out.name
        if isinstance(converted, ClassifierObjective):
            converted.export(converted.model, folder)
        else:
            converted.unet.eval()
            converted.save_pretrained(folder)
            complete_folder(folder, str(make_card(converted, config=config)))
        folder.rename(out)
    return "Classifier" if isinstance(converted, ClassifierObjective) else "Pipeline folder"
