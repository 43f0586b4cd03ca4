"""Writes the networks of a pipeline as files that run without this library: ONNX, or programs of `torch.export`."""

from __future__ import annotations

import inspect
import logging
import warnings
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel

import anodiff

from ..checks import check_choice, check_integer
from ..files import read_json, replacing, write_json
from ..hub.configuration import plain
from ..pipelines.base import AnomalyPipeline
from ..pipelines.pipeline_anoddpm import AnoDDPMPipeline
from ..pipelines.slices import Noise
from ..schedulers.process import DiffusionProcess


FORMATS = {"onnx": "onnx", "torch_export": "pt2"}
PRECISIONS = ("float32", "float16")
# Largest deviation from the network in PyTorch, of outputs whose deviation is about 1, that an export may have.
TOLERANCES = {"float32": 1e-4, "float16": 2e-2}
# Components that are no networks of the method: one works on whole volumes, the other is a table.
LEFT_OUT = ("brain_extractor", "healthy_maps")
RECORD = "export.json"
NOISE = "noise.npy"


# B items of a batch, C channels, H x W pixels, K draws, N slices.


def export_networks(
    pipeline: AnomalyPipeline,
    folder: Path,
    file_format: str = "onnx",
    precision: str = "float32",
    noise_slices: int = 0,
    model: str = "",
) -> dict:
    """
    Writes every network of a pipeline into a folder, with a batch of any size (programs of `torch.export` at most 63,
    where networks of diffusers branch), and checks each file against the network in PyTorch, on the CPU.

    Beside them `export.json` holds what a program needs to use them: names, shapes and types of inputs and outputs,
    the table abar of the scheduler, the values of scheduler, processor, method and post-processing.

    Args:
        folder (`Path`): Must not hold an export.
        file_format (`str`): `"onnx"`, for onnxruntime and others, or `"torch_export"`, for `torch.export.load`.
        precision (`str`): `"float32"` or, of ONNX, `"float16"`: half as large; inputs and outputs stay float32.
        noise_slices (`int`): Store the noise, too, that the pipeline draws for the first N slices of a volume with the
            seed 0: `noise.npy (K, N, C, H, W)`. Of AnoDDPM with `mode="one_shot"`.
        model (`str`): Name of the checkpoint, for the record.

    Returns:
        `dict`: What `export.json` holds.

    Raises:
        ValueError: An argument is wrong, or a file does not give what the network gives.
        FileExistsError: The folder holds an export.
    """
    check_choice("format", file_format, tuple(FORMATS))
    check_choice("precision", precision, PRECISIONS)
    check_integer("noise_slices", noise_slices, 0)
    if precision != "float32" and file_format != "onnx":
        raise ValueError("`precision` float16 is there for the format onnx alone.")
    if (folder / RECORD).exists():
        raise FileExistsError(f"{folder} holds an export already: choose another folder, or remove it.")
    size = pipeline.processor.config.size
    if size is None:
        raise ValueError("`size` of the processor is null: a network of no fixed size cannot be exported.")
    noise = _draw_noise(pipeline, size, noise_slices) if noise_slices else None
    folder.mkdir(parents=True, exist_ok=True)
    networks = {}
    for name, network in list_networks(pipeline).items():
        path = folder / f"{name}.{FORMATS[file_format]}"
        steps = pipeline.scheduler.config.get("num_train_timesteps", 1)
        inputs = make_inputs(network, size, 2, steps)
        wrapped = _Output(network, inputs).eval()
        with replacing(path) as unfinished:
            run = _WRITERS[file_format](wrapped, inputs, unfinished, precision)
            deviation = _deviation(wrapped, run, network, size, steps)
        if not deviation <= TOLERANCES[precision]:
            path.unlink()
            raise ValueError(
                f"{path.name} deviates from {name} in PyTorch by {deviation:.2g} of the outputs' standard deviation;"
                f" at most {TOLERANCES[precision]:g} is allowed. It was removed."
            )
        networks[name] = _describe(path, wrapped, inputs) | {"deviation": deviation}
    if noise is not None:
        with replacing(folder / NOISE) as unfinished, open(unfinished, "wb") as file:
            np.save(file, noise)
    scheduler = pipeline.scheduler
    record = {
        "anodiff": anodiff.__version__,
        "model": model,
        "pipeline": type(pipeline).__name__,
        "format": file_format,
        "precision": precision,
        "networks": networks,
        "noise": None if noise is None else {"file": NOISE, "shape": list(noise.shape), "seed": 0},
        "scheduler": _own_values(scheduler.config),
        "alphas_cumprod": scheduler.alphas_cumprod if isinstance(scheduler, DiffusionProcess) else None,
        "processor": _own_values(pipeline.processor.config),
        "settings": pipeline.default_settings(),
        "postprocessing": vars(pipeline.postprocessing),
        "threshold": pipeline.config.get("threshold"),
    }
    write_json(folder / RECORD, plain(record))
    return read_json(folder / RECORD)


def _own_values(config: Mapping) -> dict:
    return {key: value for key, value in config.items() if not key.startswith("_")}


def list_networks(pipeline: AnomalyPipeline) -> dict[str, torch.nn.Module]:
    """Returns the networks of the method by their names in the pipeline."""
    components = pipeline.components.items()
    return {name: value for name, value in components if isinstance(value, torch.nn.Module) and name not in LEFT_OUT}


def make_inputs(network: torch.nn.Module, size: tuple[int, int], items: int, steps: int) -> dict[str, torch.Tensor]:
    """Returns random inputs of a network for B `items` of `size (H, W)`, by the names of its arguments; of the timesteps
    0 to `steps - 1` the first item has the last one."""
    config, draws = network.config, torch.Generator().manual_seed(items)
    channels = config.num_channels if isinstance(network, PreTrainedModel) else config.in_channels
    images = torch.randn(items, channels, *size, generator=draws)
    timesteps = torch.randint(0, steps, (items,), generator=draws)
    timesteps[0] = steps - 1
    makers: dict[str, Callable[[], torch.Tensor | None]] = {
        "sample": lambda: images,
        "pixel_values": lambda: images,
        "image": lambda: images,
        "reconstruction": lambda: images.flip(0),
        "timestep": lambda: timesteps,
        "class_labels": lambda: _make_labels(config, items, draws),
    }
    names = [name for name in inspect.signature(network.forward).parameters if name in makers]
    inputs = {name: makers[name]() for name in names}
    return {name: value for name, value in inputs.items() if value is not None}


def _make_labels(config: Mapping, items: int, draws: torch.Generator) -> torch.Tensor | None:
    """Labels or vectors that the network is conditioned on; `None` where it is on none."""
    if config.get("condition_dim") is not None:
        return torch.randn(items, config.condition_dim, generator=draws)
    return torch.arange(items) % config.num_class_embeds if config.get("num_class_embeds") else None


class _Output(torch.nn.Module):
    """A network that returns its first output as a tensor."""

    def __init__(self, network: torch.nn.Module, names: Iterable[str]):
        super().__init__()
        self.network, self.names = network, tuple(names)

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        return self.network(**dict(zip(self.names, inputs, strict=True)), return_dict=False)[0]


def _write_onnx(network: _Output, inputs: dict, path: Path, precision: str) -> Callable[[dict], np.ndarray]:
    """Writes an ONNX file; returns the function that evaluates it."""
    try:
        import onnxruntime
        import onnxscript  # noqa: F401  (the exporter of torch needs it)
    except ImportError as error:
        raise ValueError(f"the format onnx needs {error.name}: pip install anodiff[onnx].") from error
    import onnx

    program = _quietly(
        torch.onnx.export,
        network,
        tuple(inputs.values()),
        dynamo=True,
        verbose=False,
        input_names=list(inputs),
        output_names=["output"],
        dynamic_shapes=_any_batch(inputs),
    )
    model = program.model_proto
    if precision == "float16":
        from onnxruntime.transformers.float16 import convert_float_to_float16

        model = convert_float_to_float16(model, keep_io_types=True)
    onnx.save(model, path)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return lambda values: session.run(None, {name: value.numpy() for name, value in values.items()})[0]


def _write_program(network: _Output, inputs: dict, path: Path, precision: str) -> Callable[[dict], np.ndarray]:
    """Writes a program of `torch.export`; returns the function that evaluates it."""
    program = _quietly(torch.export.export, network, tuple(inputs.values()), dynamic_shapes=_any_batch(inputs))
    with open(path, "wb") as file:
        torch.export.save(program, file)
    loaded = torch.export.load(path).module()
    return lambda values: loaded(*values.values()).numpy()


_WRITERS = {"onnx": _write_onnx, "torch_export": _write_program}


def _any_batch(inputs: dict) -> dict:
    return {"inputs": tuple({0: torch.export.Dim.AUTO} for _ in inputs)}


def _quietly(function: Callable, *arguments, **named):
    """Calls one of torch's exporters without what it says of itself."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            return function(*arguments, **named)
    finally:
        logging.disable(level)


@torch.no_grad()
def _deviation(wrapped: _Output, run: Callable, network: torch.nn.Module, size: tuple[int, int], steps: int) -> float:
    """Largest deviation of a file's outputs for batches of one and of several items, of their standard deviation."""
    largest = 0.0
    for items in (1, 3):
        inputs = make_inputs(network, size, items, steps)
        wanted = wrapped(*inputs.values()).numpy()
        # A network that has not been trained may give zeros.
        largest = max(largest, float(np.abs(run(inputs) - wanted).max() / max(wanted.std(), 1e-3)))
    return largest


def _describe(path: Path, network: _Output, inputs: dict[str, torch.Tensor]) -> dict:
    """What a program must know of a file: "B" is the batch."""

    def shape(tensor: torch.Tensor) -> list:
        return ["B", *tensor.shape[1:]]

    with torch.no_grad():
        output = network(*inputs.values())
    return {
        "file": path.name,
        "bytes": path.stat().st_size,
        "inputs": {
            name: {"shape": shape(value), "type": str(value.dtype).removeprefix("torch.")}
            for name, value in inputs.items()
        },
        "output": shape(output),
    }


def _draw_noise(pipeline: AnomalyPipeline, size: tuple[int, int], slices: int) -> np.ndarray:
    settings = pipeline.default_settings()
    level = settings.get("noise_level")
    if not isinstance(pipeline, AnoDDPMPipeline) or settings["mode"] != "one_shot" or not isinstance(level, int):
        raise ValueError(
            "`noise_slices` stores the noise of an AnoDDPMPipeline with `mode` one_shot and one `noise_level`; this is"
            f" a {type(pipeline).__name__}. Leave it out."
        )
    numbers = torch.arange(slices)
    like = torch.empty(slices, pipeline.processor.channels, *size)
    make = partial(pipeline.scheduler.draw_noise, size=like.shape[1:], timesteps=torch.full((slices,), level - 1))
    draws = range(settings["num_draws"])
    return np.stack([Noise(0, None, numbers, draw, torch.device("cpu"))(make, like).numpy() for draw in draws])
