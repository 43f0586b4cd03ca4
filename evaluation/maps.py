"""An evaluation of anomaly maps: which splits and subjects, what a case is made of, baselines, and what the report
says of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path
from types import ModuleType

import numpy as np

from ..checks import check_choice, check_number
from ..data.prepared import PreparedSplit
from ..pipelines.base import AnomalyPipeline
from ..pipelines.postprocessing import PostProcessing
from ..pipelines.slices import SliceResults
from .baselines import intensity_map, inverted_map, slice_statistics
from .calibration import CALIBRATION_POLICIES
from .candidates import postprocessing_changes
from .cases import Case, make_case
from .options import EvalOptions
from .pictures import draw_cases
from .protocols import pooled


# Its columns stand in every report.
OWN_PROTOCOL = pooled
# What a report says of itself before everything else.
HEAD = {}
CASE = Case


def check_options(options: EvalOptions) -> None:
    """Raises a `ValueError` for values that could not be found or stored in the checkpoints."""
    if options.calibrate is None and (options.guidance_scales or options.calibration_slices):
        raise ValueError("`guidance_scales` and `calibration_slices` belong to `calibrate labels`.")
    if options.calibrate is not None:
        check_choice("calibrate", options.calibrate, (*CALIBRATION_POLICIES, "conformal"))
        if options.calibration_slices and options.calibrate != "labels":
            raise ValueError(f"`calibration_slices` belongs to `calibrate labels`, got it with {options.calibrate}.")
        if options.validation_split == "none":
            raise ValueError("`calibrate` needs a validation split, got `validation_split` none.")
        check_number("alpha", options.alpha, above=0, below=1)
        if options.set_threshold and options.calibrate != "conformal":
            raise ValueError("Give either `calibrate` or `set_threshold`: both store a threshold in the checkpoint.")
    check_choice("set_threshold", options.set_threshold, ("validation", "healthy", None))
    option = "calibrate" if options.calibrate else "set_threshold" if options.set_threshold else None
    # What is stored in a checkpoint must have been found with its own settings.
    if option and (options.inference or postprocessing_changes(options)):
        raise ValueError(f"`{option}` needs the checkpoint's own settings: leave `inference` and post-processing out.")
    remote = [model for model in options.model if not Path(model).is_dir()]
    if option and remote:
        raise ValueError(f"`{option}` needs checkpoint folders, got {', '.join(remote)}.")


def name_splits(options: EvalOptions) -> dict[str, str]:
    """Returns the names of the splits that cases are made of, by their part in the evaluation."""
    validation = {} if options.validation_split == "none" else {"validation": options.validation_split}
    return {"test": options.split, **validation}


def choose_subjects(split: PreparedSplit) -> list[str]:
    """Returns the subjects that take part: all."""
    return split.subjects


def describe_settings(pipeline: AnomalyPipeline) -> dict:
    """Returns the settings that a row of the report names."""
    return {**asdict(pipeline.postprocessing), **pipeline.default_settings()}


def make_case_of(
    item: dict, results: SliceResults, rows: slice, pipeline: AnomalyPipeline, protocol: ModuleType
) -> Case:
    """Returns the case of the subject `item`, whose slices are some `rows` of the results."""
    optional = {}
    if results.masks is not None:
        optional["own_mask"] = results.masks[rows].cpu().numpy()
        labels = results.details.get("label", results.masks.flatten(1).any(1))[rows]
        optional["own_labels"] = (labels == 1).cpu().numpy().astype(np.int64)
    reconstruction = None if results.reconstruction is None else results.reconstruction[rows].cpu().numpy()
    value_range = pipeline.processor.config.value_range
    for name, make in protocol.NEEDS.details.items():
        optional[name] = make(item["image"], reconstruction, value_range)
    return make_case(item, results.maps[rows].numpy(), pipeline.postprocessing, **optional)


def make_baselines(
    splits: dict[str, PreparedSplit], rows: list[dict], protocol: ModuleType, options: EvalOptions
) -> Iterator[tuple[dict, Callable[[dict], Case]]]:
    """Yields the rows of the plain and the inverted intensity of each modality and of the protocol's own baselines,
    each with the function that makes the case of a subject. The post-processing is that of the first model, but for
    what maps are multiplied and divided by."""
    settings = rows[0]["settings"] if rows else asdict(PostProcessing(**postprocessing_changes(options)))
    values = {field.name: settings[field.name] for field in fields(PostProcessing)}
    postprocessing = PostProcessing(**values | {"sign": "both", "weighting": "none", "normalization": "none"})
    processor = splits["test"].processor_settings
    value_range = processor["value_range"]
    makers: dict[str, Callable] = {}
    for channel, modality in enumerate(processor["modalities"]):
        plain = partial(intensity_map, channel=channel, value_range=value_range)
        makers |= {
            f"intensity of {modality}": plain,
            f"intensity of {modality} over its median": partial(plain, over_median=True),
            f"inverted intensity of {modality}": partial(inverted_map, channel=channel, value_range=value_range),
        }
    makers |= protocol.NEEDS.baselines(processor)

    def make_baseline(make: Callable, item: dict) -> Case:
        maps = postprocessing.filter(make(item["image"], item["brain"]), item["brain"])
        details = {key: of(item["image"], None, value_range) for key, of in protocol.NEEDS.details.items()}
        return make_case(item, maps, postprocessing, **details)

    for name, make in makers.items():
        yield {"name": name, "kind": "baseline", "settings": asdict(postprocessing)}, partial(make_baseline, make)


def make_statistics(splits: dict[str, PreparedSplit]) -> list[dict]:
    """Returns the scored rows of statistics of slices that know nothing of anatomy."""
    values: dict[str, dict[str, list]] = {}
    for split_name, split in splits.items():
        for subject in split.subjects:
            item = split.read_subject(subject)
            for name, statistic in slice_statistics(item["image"], item["brain"]).items():
                groups = np.full(len(statistic), split.subject_info[subject]["group"])
                values.setdefault(name, {}).setdefault(split_name, []).append((statistic, item["label"], groups))
    rows = []
    for name, by_split in values.items():
        parts = {
            key: tuple(np.concatenate(part) for part in zip(*pairs, strict=True)) for key, pairs in by_split.items()
        }
        metrics = pooled.score_statistic(parts["test"], parts.get("validation"))
        rows.append({"name": name, "kind": "statistic", "settings": {}, "metrics": metrics, "subjects": []})
    return rows


def describe_samples(split: PreparedSplit, rows: list[dict]) -> tuple[str, str]:
    """Returns what counts as anomalous, and how many of what were scored."""
    annotations = max(split.subject_info[subject]["annotations"] for subject in split.subjects)
    voxel = "mask > 0" if annotations == 1 else f"at least half of {annotations} annotations"
    labels = f"voxel: {voxel}; a slice is anomalous with one annotated pixel, a subject with one such slice"
    anomalous = int((split.labels == 1).sum())
    samples = f"{len(split.subjects)} subjects, {len(split)} slices, {anomalous} of them anomalous"
    return labels if annotations else "given per subject, no masks", samples


def draw(report: dict, rows: list[tuple[dict, Path]], split: PreparedSplit, output_dir: Path) -> None:
    """Draws `cases.png` of rows, each with the folder of its cases."""
    draw_cases(report, rows, split, output_dir / "cases.png")
