"""Checkpoints as an evaluation sees them: loaded with its values, named in its table, and with calibrated values stored in them."""

from __future__ import annotations

import json
import re
from dataclasses import fields
from pathlib import Path

import huggingface_hub
import torch
import yaml

from ..data.card import describe_population
from ..data.prepared import PreparedSplit
from ..pipelines.base import AnomalyPipeline
from ..pipelines.postprocessing import PostProcessing
from .calibration import CALIBRATION_POLICIES, LabelledSlices, calibrate
from .options import EvalOptions


def load_pipeline(model: str, options: EvalOptions, device: torch.device) -> AnomalyPipeline:
    """A checkpoint with the values that the options put into the place of its own."""
    pipeline = AnomalyPipeline.from_pretrained(model).to(device)
    unknown = sorted(set(options.inference) - set(pipeline.default_settings()))
    if unknown:
        known = ", ".join(pipeline.default_settings())
        raise ValueError(f"`inference` has no key {', '.join(unknown)}; {type(pipeline).__name__} takes {known}.")
    if options.filter_order is not None and "filter_order" not in pipeline.config:
        raise ValueError(f"`filter_order` is no option of {type(pipeline).__name__}: leave it out.")
    # Built anew, so that its constructor checks the values.
    settings = _own_settings(pipeline) | postprocessing_changes(options) | options.inference
    pipeline = type(pipeline)(**pipeline.components, **settings)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.enable_fast_inference(autocast=options.mixed_precision)
    return pipeline


def postprocessing_changes(options: EvalOptions) -> dict:
    values = {field.name: getattr(options, field.name) for field in fields(PostProcessing)}
    return {name: value for name, value in values.items() if value is not None}


def _own_settings(pipeline: AnomalyPipeline) -> dict:
    components = pipeline.components
    return {key: value for key, value in pipeline.config.items() if key not in components and not key.startswith("_")}


def check_calibrate(options: EvalOptions) -> None:
    if options.calibrate is None:
        if options.guidance_scales or options.calibration_slices:
            raise ValueError("`guidance_scales` and `calibration_slices` belong to `calibrate labels`.")
        return
    if options.calibration_slices and options.calibrate != "labels":
        raise ValueError(f"`calibration_slices` belongs to `calibrate labels`, got it with {options.calibrate}.")
    if options.calibrate not in CALIBRATION_POLICIES:
        raise ValueError(f"`calibrate` must be one of {', '.join(CALIBRATION_POLICIES)}, got {options.calibrate!r}.")
    if options.validation_split == "none":
        raise ValueError("`calibrate` needs a validation split, got `validation_split` none.")
    if options.set_threshold:
        raise ValueError("Give either `calibrate` or `set_threshold`: both store a threshold in the checkpoint.")
    _check_own_settings("calibrate", options)


def calibrate_checkpoint(
    model: str, slices: LabelledSlices, split: PreparedSplit, options: EvalOptions, device
) -> dict:
    pipeline = load_pipeline(model, options, device)
    pipeline.processor.check_equal(split.processor_settings, f"{model} was trained with")
    record = calibrate(
        pipeline,
        slices,
        options.calibrate,
        guidance_scales=options.guidance_scales,
        healthy_fpr=options.healthy_fpr,
        seed=options.seed,
        batch_size=options.batch_size,
    )
    _store_values(Path(model), record["values"])
    return record


def check_set_threshold(options: EvalOptions) -> None:
    if options.set_threshold is None:
        return
    if options.set_threshold not in ("validation", "healthy"):
        raise ValueError(f"`set_threshold` must be validation or healthy, got {options.set_threshold!r}.")
    _check_own_settings("set_threshold", options)


def _check_own_settings(option: str, options: EvalOptions) -> None:
    """What is stored in a checkpoint must have been found with its own settings."""
    if options.inference or postprocessing_changes(options):
        raise ValueError(f"`{option}` needs the checkpoint's own settings: leave `inference` and post-processing out.")
    remote = [model for model in options.model if not Path(model).is_dir()]
    if remote:
        raise ValueError(f"`{option}` needs checkpoint folders, got {', '.join(remote)}.")


def set_threshold(folder: Path, threshold: float | None) -> None:
    if threshold is None:
        raise ValueError("`set_threshold`: the validation split does not allow this policy, no threshold was stored.")
    _store_values(folder, {"threshold": threshold})


def _store_values(folder: Path, values: dict) -> None:
    """Puts values of the pipeline's configuration into a checkpoint folder and the table of its card."""
    index = folder / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | values, indent=2) + "\n")
    card = folder / "README.md"
    if card.exists():
        text = card.read_text()
        for name, value in values.items():
            text = re.sub(rf"^\| `{name}` \|.*\|$", f"| `{name}` | {value} |", text, flags=re.M)
        card.write_text(text)


def describe_model(model: str, pipeline: AnomalyPipeline, options: EvalOptions) -> dict:
    """What a row of the report says of its model: method and folder as tables call it, which version, who it was trained on."""
    method = type(pipeline).__name__.removesuffix("Pipeline")
    path = Path(model)
    return {
        "name": f"{method} ({path.parent.name if path.name == 'pipeline' else path.name})",
        "kind": "pipeline",
        "model": model,
        "commit": _commit(model),
        "training_population": options.training_population or training_population(model),
    }


def _commit(model: str) -> str | None:
    """The commit of a Hub model that was loaded; `None` for a folder."""
    if Path(model).is_dir():
        return None
    cached = huggingface_hub.try_to_load_from_cache(model, "model_index.json")
    return Path(cached).parent.name if isinstance(cached, str) else None


def training_population(model: str) -> str:
    """Who a checkpoint was trained on, from the recipe of its training data, which travels with the weights."""
    path = Path(model) / "recipe.yaml"
    if not Path(model).is_dir():
        try:
            path = Path(huggingface_hub.hf_hub_download(model, "recipe.yaml"))
        except huggingface_hub.errors.EntryNotFoundError:
            pass
    if not path.is_file():
        return "not recorded in the checkpoint; state it with --training_population"
    return describe_population(yaml.safe_load(path.read_text()))
