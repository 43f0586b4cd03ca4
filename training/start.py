"""The weights that a training begins with, where it goes on from those of a finished pipeline."""

from __future__ import annotations

import dataclasses
import json

import torch

from ..pipelines.base import AnomalyPipeline
from .finite import check_part
from .objective import COMPONENTS, Objective, argument_names
from .options import TrainOptions


def take_start(options: TrainOptions, objective_class: type[Objective]) -> tuple[TrainOptions, AnomalyPipeline]:
    """
    Loads the pipeline of `train.init_from`, and returns the options with its network, scheduler and inference values
    in their blocks, where they are recorded and compared like those that a configuration gives.

    Its threshold and what it divides maps by are left out: they belong to the weights that are about to change.

    Raises:
        ValueError: It is of another method, or a block gives a network or scheduler that differs from its own.
    """
    name = options.train.init_from
    pipeline, wanted = AnomalyPipeline.from_pretrained(name), objective_class.pipeline_class
    if type(pipeline) is not wanted:
        raise ValueError(
            f"`train.init_from` {name} holds a {type(pipeline).__name__}, but the method {options.method} trains a"
            f" {wanted.__name__}: name one of that class, or change `method`."
        )
    blocks, differences = {}, []
    for block in ("unet", "scheduler"):
        part, given = getattr(pipeline, block), getattr(options, block)
        own = _plain({key: value for key, value in part.config.items() if not key.startswith("_")})
        if block == "unet":
            own = {"_class_name": type(part).__name__, **own}
        differences += [
            f"`{block}.{key}` is {own.get(key)!r} there and {value!r} here"
            for key, value in _plain(given).items()
            if key not in own or own[key] != value
        ]
        blocks[block] = own
    context = pipeline.processor.config.context
    if options.processor.get("context", context) != context:
        differences.append(f"`processor.context` is {context} there and {options.processor['context']!r} here")
    if differences:
        raise ValueError(
            f"`train.init_from` {name} differs from the configuration: {'; '.join(differences)}. Leave these out:"
            " network and scheduler are those of the pipeline."
        )
    if context:
        blocks["processor"] = {**options.processor, "context": context}
    left_out = {*COMPONENTS, "threshold", "normalization"}
    settings = {key: pipeline.config[key] for key in argument_names(wanted) if key not in left_out}
    blocks["inference"] = {**_plain(settings), **options.inference}
    return dataclasses.replace(options, **blocks), pipeline


def load_start(objective: Objective, pipeline: AnomalyPipeline, name: str) -> None:
    """Gives the network of an objective the weights of the pipeline that is called `name`, whose processor must be
    that of the data. Its brain extractor, if it has one, goes with the result."""
    check_part(pipeline.unet, "train.init_from", name)
    objective.processor.check_equal(pipeline.processor.settings(), f"the pipeline of `train.init_from` {name}")
    network: torch.nn.Module = objective.make_pipeline(objective.model).unet
    network.load_state_dict(pipeline.unet.state_dict())
    extractor = pipeline.components.get("brain_extractor")
    if extractor is not None:
        objective.inference = {**objective.inference, "brain_extractor": extractor}


def _plain(values: dict) -> dict:
    return json.loads(json.dumps(values))
