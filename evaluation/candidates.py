"""The models of an evaluation: which protocol scores them, how they are loaded and described, and how values that were
found go into their folders."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path
from types import ModuleType

import huggingface_hub
import torch
import yaml

import anodiff

from ..checks import check_choice, check_keys
from ..data.card import describe_population
from ..data.prepared import PreparedSplit
from ..files import read_json, read_text, write_json, write_text
from ..hub.model_card import describe_calibration
from ..hub.model_index import fetch, read_model_index
from ..pipelines.base import AnomalyPipeline
from ..pipelines.postprocessing import PostProcessing
from .options import EvalOptions
from .protocols import PROTOCOLS
from .scoring import sweep_thresholds


def choose_protocol(options: EvalOptions) -> ModuleType:
    """Returns the protocol that the options name; for models that the default does not score the first one that does.
    Raises a `ValueError` if it does not score these models, they are of several tasks, or it has no use for
    `sweep`."""
    check_choice("protocol", options.protocol, PROTOCOLS)
    protocol = PROTOCOLS[options.protocol]
    classes = {model: read_model_index(model).get("_class_name") for model in options.model}
    foreign = [f"{model} ({name})" for model, name in classes.items() if name not in anodiff.__all__]
    if foreign:
        raise ValueError(f"`model` must name pipelines of anodiff, got {', '.join(foreign)}.")
    tasks = {model: getattr(anodiff, name).task for model, name in classes.items()}
    if len(set(tasks.values())) > 1:
        named = ", ".join(f"{model} ({task})" for model, task in tasks.items())
        raise ValueError(f"Models of different tasks are evaluated apart, got {named}.")
    task = next(iter(tasks.values()), protocol.TASK)
    if options.protocol == EvalOptions.protocol:
        protocol = next(module for module in PROTOCOLS.values() if module.TASK == task)
    elif protocol.TASK != task:
        fitting = ", ".join(name for name, module in PROTOCOLS.items() if module.TASK == task)
        raise ValueError(f"`protocol` must be one of {fitting} for models of the task {task}, got {options.protocol}.")
    if options.sweep is not None:
        sweep_thresholds(options.sweep)
        if protocol.SWEEP is None:
            able = ", ".join(name for name, module in PROTOCOLS.items() if module.SWEEP is not None)
            raise ValueError(f"`sweep` needs one of the protocols {able}; the others have no grid of thresholds.")
    return protocol


def load_pipeline(model: str, options: EvalOptions, device: torch.device, split: PreparedSplit) -> AnomalyPipeline:
    """Loads a checkpoint that fits the data, with the values that the options put into the place of its own."""
    pipeline = AnomalyPipeline.from_pretrained(model).to(device)
    pipeline.processor.check_equal(split.processor_settings, f"{model} was trained with")
    check_keys("inference", options.inference, pipeline.default_settings(), type(pipeline).__name__)
    if options.filter_order is not None and "filter_order" not in pipeline.config:
        raise ValueError(f"`filter_order` is no option of {type(pipeline).__name__}: leave it out.")
    # Built anew, so that its constructor checks the values.
    config = {key: value for key, value in pipeline.config.items() if not key.startswith("_")}
    settings = config | pipeline.components | postprocessing_changes(options) | options.inference
    pipeline = type(pipeline)(**settings)
    pipeline.set_progress_bar_config(disable=True)
    if options.fast:
        pipeline.enable_fast_inference(mixed_precision=options.mixed_precision)
    elif options.mixed_precision is not None:
        pipeline.enable_fast_inference(mixed_precision=options.mixed_precision, channels_last=False, compile=False)
    return pipeline


def postprocessing_changes(options: EvalOptions) -> dict:
    """Returns the values of [`PostProcessing`] that the options give."""
    values = {field.name: getattr(options, field.name) for field in fields(PostProcessing)}
    return {name: value for name, value in values.items() if value is not None}


def store_values(folder: Path, values: dict) -> None:
    """Puts values of the pipeline's configuration into a checkpoint folder and the table of its card."""
    index, card = folder / "model_index.json", folder / "README.md"
    write_json(index, read_json(index) | values)
    if card.exists():
        text = read_text(card)
        for name, value in values.items():
            told = describe_calibration(value) if name == "calibration" else value
            if name == "calibration" and f"| `{name}` |" not in text:  # a card of an earlier version has no such row
                text = re.sub(r"^(\| `threshold` \|.*\|)$", rf"\1\n| `{name}` | |", text, count=1, flags=re.M)
            text = re.sub(rf"^\| `{name}` \|.*\|$", lambda _, n=name, t=told: f"| `{n}` | {t} |", text, flags=re.M)
        write_text(card, text)


def describe_model(model: str, pipeline: AnomalyPipeline, options: EvalOptions) -> dict:
    """Returns what a row of the report says of its model: method and folder as tables call it, the id and commit of a
    repository or the name of a folder, and who it was trained on, from the recipe of the training data, which travels
    with the weights."""
    method, name, commit = type(pipeline).__name__.removesuffix("Pipeline"), model, None
    if Path(model).is_dir():
        # Where it lies is nobody's business.
        path = Path(model).resolve()
        name = path.parent.name if path.name == "pipeline" else path.name
    else:
        cached = huggingface_hub.try_to_load_from_cache(model, "model_index.json")
        commit = Path(cached).parent.name if isinstance(cached, str) else None
    recipe = fetch(model, "recipe.yaml")
    population = "not recorded in the checkpoint; state it with --training_population"
    if recipe is not None:
        try:
            population = describe_population(yaml.safe_load(read_text(recipe)))
        except (yaml.YAMLError, AttributeError, KeyError, TypeError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"recipe.yaml of {model} is not that of a prepared data set: {reason}.") from None
    return {
        "name": f"{method} ({name.split('/')[-1]})",
        "kind": "pipeline",
        "model": name,
        "commit": commit,
        "training_population": options.training_population or population,
    }
