"""Writes the model card of a pipeline: everything in it comes from the pipeline, its training run and its
evaluation."""

from __future__ import annotations

import importlib.metadata
import inspect
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from .. import __version__
from ..files import read_text
from .shipped import ANY, add_interval, add_samples


# Without these, a number cannot be compared with anybody's.
PROTOCOL_FIELDS = (
    "training_population",
    "modality",
    "unit_of_averaging",
    "threshold_policy",
    "geometry",
    "preprocessing",
    "postprocessing",
    "label_definition",
    "samples",
)
MRI_MODALITIES = {"t1", "t1c", "t1ce", "t1gd", "t2", "t2w", "t1w", "flair", "pd"}
NOT_EVALUATED = "Not evaluated."
END_OF_EVALUATIONS = "<!-- end of evaluations -->"
# What a report lists beside its metrics: it belongs into the card, not into a leaderboard.
NO_METRIC = re.compile(r"threshold_.*|conformal_.*|direction|num_samples|.*_(low|high)")
# What stays in the report: a card has the lesions and surfaces of two policies.
ONLY_IN_REPORT = re.compile(
    r"surface_dice_.*|froc_recall_.*|hausdorff_95_(undefined_.*|oracle|healthy|yen|own)"
    r"|(lesion_recall|false_positives)_(oracle|yen|own)"
)
# Validation losses of the training, in the folder of a pipeline: a line `{"step": 100, "validation_loss": 0.5}` each.
CURVE = "validation.jsonl"
LIBRARIES = ("torch", "diffusers", "huggingface_hub", "numpy", "nibabel", "scipy")


def make_card(
    pipeline,
    *,
    repo_id: str | None = None,
    config: dict | None = None,
    recipe: dict | None = None,
    population: str | None = None,
    data_summary: dict[str, dict[str, int]] | None = None,
    evaluation: dict | None = None,
    training: str | None = None,
    limits: Sequence[str] = (),
    picture: tuple[str, str] | None = None,
    licence: str = "other",
) -> ModelCard:
    """
    Writes the card of a pipeline. Method (from its docstring), preprocessing and inference values are read off it.

    Args:
        pipeline ([`AnomalyPipeline`]): The pipeline.
        repo_id (`str`, *optional*):
            Where the card will live; the quick start loads it from there, without one from the folder it is run in.
        config (`dict`, *optional*): Resolved configuration of the training run.
        recipe (`dict`, *optional*): Recipe of the prepared training data: reader, slices, split, ... and `license`.
        population (`str`, *optional*): Which slices of whom it was trained on, in words.
        data_summary (`dict`, *optional*): Counts per split, such as `{"train": {"subjects": 20, "slices": 900}}`.
        evaluation (`dict`, *optional*): Report of `eval.py`; [`add_evaluation`] adds more of them.
        training (`str`, *optional*): A sentence on steps, time and hardware of the training.
        limits (sequence of `str`): What else is to be known before it is used, a sentence each.
        picture (`tuple[str, str]`, *optional*):
            File in the repository and what it shows. Nothing but phantoms and images that everybody may see.
        licence (`str`): Of the weights, an identifier of the Hub (https://hf.co/docs/hub/repositories-licenses).
    """
    class_name = type(pipeline).__name__
    name = repo_id.split("/")[-1] if repo_id else class_name
    method, paper = _method_text(type(pipeline))
    processor, context = pipeline.processor.settings(), pipeline.processor.config.context
    if context:
        processor["context"] = context
    modalities = processor["modalities"]
    strips = pipeline.components.get("brain_extractor") is not None
    inference = {
        key: value
        for key, value in pipeline.config.items()
        if not key.startswith("_") and key not in pipeline.components
    }
    if inference.get("calibration") is not None:
        inference["calibration"] = describe_calibration(inference["calibration"])

    tags = ["anodiff", pipeline.task, "medical-imaging", "diffusion"]
    tags += ["brain-mri"] if MRI_MODALITIES.issuperset(modalities) else []
    tags += [modality for modality in modalities if modality not in ANY]
    card_data = ModelCardData(
        library_name="diffusers",
        pipeline_tag="image-segmentation",
        license=licence,
        tags=tags,
        model_name=name,
        anodiff_version=__version__,
    )
    card = ModelCard.from_template(
        card_data,
        template_path=str(Path(__file__).with_name("model_card_template.md")),
        name=name,
        class_name=class_name,
        segments=pipeline.task == "segmentation",
        learns_lesions="segmentation_network" in pipeline.components,
        method=method,
        paper=paper,
        source=repo_id or ".",
        volume=_quick_start_volume(modalities, processor["brain_mask"] == "given" and not strips),
        strips=strips,
        recipe=recipe or {},
        counts=data_summary or {},
        population=population,
        processor=processor,
        inference=inference,
        cell=_cell,
        evaluation=NOT_EVALUATED,
        training=training,
        limits=limits,
        picture=picture,
        config=yaml.safe_dump(config, sort_keys=False, allow_unicode=True).strip() if config else None,
        licence=licence if licence != "other" else "none was chosen; ask whoever published them",
        versions=", ".join([f"anodiff {__version__}", *(f"{x} {importlib.metadata.version(x)}" for x in LIBRARIES)]),
        library_version=__version__,
    )
    return card if evaluation is None else add_evaluation(card, evaluation, repo_id=repo_id)


def add_evaluation(
    card: ModelCard, evaluation: dict, *, repo_id: str | None = None, picture: str | None = None
) -> ModelCard:
    """
    Returns a card with an evaluation in the text and in the metadata, which the given card gets as well. An earlier
    one of the same data set and split is replaced; everything else stays as it is, whoever wrote it.

    Args:
        card (`ModelCard`): A card of this library, or anybody's.
        evaluation (`dict`):
            Report of `eval.py`. Every row stands in the card; the row of this pipeline, which is its only pipeline or
            the one whose `model` is `repo_id`, also in the metadata (`model-index`).
        repo_id (`str`, *optional*): Where the card lives.
        picture (`str`, *optional*): File in the repository that shows cases of the report, as of [`make_card`].

    Raises:
        ValueError: `evaluation` lacks a protocol field, or holds several pipelines and none is `repo_id`.
    """
    missing = [field for field in PROTOCOL_FIELDS if field not in evaluation["protocol"]]
    if missing:
        raise ValueError(
            f"`evaluation` lacks the protocol field(s) {', '.join(missing)}: evaluate again with eval.py."
        )
    own, results, data = own_result(evaluation, repo_id), evaluation["results"], evaluation["data"]
    # One row per metric and one column per model: there are many metrics, and a baseline does not have all of them.
    table = {
        add_samples(metric, metric.replace("_", " "), results): [
            add_interval(_number(metrics.get(metric)), *(metrics.get(f"{metric}_{end}") for end in ("low", "high")))
            for metrics in (row["metrics"] for row in results)
        ]
        for metric in dict.fromkeys(metric for row in results for metric in row["metrics"])
        if not metric.endswith(("_low", "_high")) and not ONLY_IN_REPORT.fullmatch(metric)
    }
    table["seconds per slice"] = [_number(row.get("seconds_per_slice")) for row in results]
    hardware = f" on {evaluation['device']}" if evaluation.get("device") else ""
    section = jinja2.Template(read_text(Path(__file__).with_name("evaluation_template.md"))).render(
        evaluation=evaluation,
        data=data,
        speed=f"Inference takes {own['seconds_per_slice']:.3g} s per slice{hardware}.",
        settings=", ".join(f"`{key}` {_cell(value)}" for key, value in own.get("settings", {}).items()),
        models=[_cell(row["name"]) + ("" if row["kind"] == "pipeline" else f" ({row['kind']})") for row in results],
        table=table,
        picture=picture,
        protocol={key.replace("_", " "): _cell(value) for key, value in evaluation["protocol"].items()},
    )

    text = card.text
    start = f"<!-- evaluation of {data['name']}, {data['split']} -->"
    earlier = re.compile(re.escape(start) + ".*?<!-- end of evaluation -->", re.DOTALL)
    if earlier.search(text):
        text = earlier.sub(lambda _: section, text)
    else:
        if END_OF_EVALUATIONS not in text:
            text = f"{text.rstrip()}\n\n## Evaluation\n\n{END_OF_EVALUATIONS}\n"
        text = text.replace(f"{NOT_EVALUATED}\n\n{END_OF_EVALUATIONS}", END_OF_EVALUATIONS)
        text = text.replace(END_OF_EVALUATIONS, f"{section}\n\n{END_OF_EVALUATIONS}")
    if repo_id:
        # A card that was made before the pipeline had an address.
        text = move_card(text, ".", repo_id)
    metadata = card.data
    others = [
        result
        for result in metadata.eval_results or []
        if (result.dataset_name, result.dataset_split) != (data["name"], data["split"])
    ]
    metadata.eval_results = others + _eval_results(evaluation, own)
    if repo_id or metadata.get("model_name") is None:
        metadata.model_name = (repo_id or own["name"]).split("/")[-1]
    return ModelCard(f"---\n{metadata.to_yaml()}\n---\n{text}")


def describe_calibration(record: dict) -> str:
    """Returns the record of a conformal calibration in one line, for the table of a card."""
    told = [
        f"{unit}s at most {record['alpha']:g} above {guarantee['threshold']:.4g} (n = {guarantee['n']}, {guarantee['population']})"
        for unit, guarantee in record["guarantees"].items()
    ]
    if record["probability"] is not None:
        told.append(f"probability of a lesion at the prevalence {record['probability']['prevalence']:.3g}")
    return f"on {record['data']}, {record['split']}: {'; '.join(told)}; in expectation, and for scans like these only"


def describe_curve(curve: Sequence[dict]) -> str:
    """Returns the validation losses of a training, lines of [`CURVE`], as the table of a card: at most a dozen of them,
    the first, the last and the lowest among them."""
    lowest = min(range(len(curve)), key=lambda number: curve[number]["validation_loss"])
    spread = {round(number * (len(curve) - 1) / 10) for number in range(11)}
    rows = [
        f"| {curve[number]['step']} | {_number(curve[number]['validation_loss'])} |"
        for number in sorted(spread | {lowest})
    ]
    head = (
        "Validation loss of the averaged weights, on fixed slices with fixed noise:"
        f" lowest at step {curve[lowest]['step']}, {_number(curve[lowest]['validation_loss'])}."
    )
    return "\n".join([head, "", "| step | validation loss |", "| --- | --- |", *rows])


def move_card(text: str, source: str, target: str) -> str:
    """Returns the text of a card whose quick start loads `target` instead of `source`."""
    text = text.replace(f'.from_pretrained("{source}")', f'.from_pretrained("{target}")')
    return text.replace(f"predict --model {source} ", f"predict --model {target} ")


def _method_text(pipeline_class: type) -> tuple[str, str]:
    """Returns the part of a class docstring above its arguments, and its paper."""
    text = inspect.getdoc(pipeline_class).split("\nArgs:")[0]
    # [`~module.Name`] links to a page of documentation; a card has none.
    text = re.sub(r"\[`~?(?:[\w.]+\.)?(\w+)`\]", r"`\1`", text)
    paragraphs = text.strip().split("\n\n")
    paper = next((paragraph for paragraph in paragraphs if paragraph.startswith("Paper:")), None)
    if paper is None:
        raise ValueError(f"The docstring of {pipeline_class.__name__} needs a paragraph that begins with `Paper:`.")
    return "\n\n".join(paragraphs), " ".join(paper.removeprefix("Paper:").split())


def _quick_start_volume(modalities: list[str], needs_brain_mask: bool) -> str:
    if len(modalities) == 1 and not needs_brain_mask:
        return '"scan.nii.gz"' if modalities[0] in ANY else f'"scan_{modalities[0]}.nii.gz"'
    names = [*modalities, "brain"] if needs_brain_mask else modalities
    return "{" + ", ".join(f'"{name}": "scan_{name}.nii.gz"' for name in names) + "}"


def own_result(evaluation: dict, repo_id: str | None) -> dict:
    """Returns the row of a report that is of this pipeline: its only pipeline, or the one whose `model` is `repo_id`;
    raises a `ValueError` if there is none."""
    pipelines = [row for row in evaluation["results"] if row["kind"] == "pipeline"]
    own = pipelines if len(pipelines) == 1 else [row for row in pipelines if row["model"] == repo_id]
    if len(own) != 1:
        raise ValueError(
            f"`evaluation` must hold this pipeline alone, or once under the name {repo_id}; it holds"
            f" {', '.join(row['model'] for row in pipelines) or 'none'}."
        )
    return own[0]


def _eval_results(evaluation: dict, row: dict) -> list[EvalResult]:
    data = evaluation["data"]
    return [
        EvalResult(
            task_type="image-segmentation",
            task_name=evaluation.get("task", "Anomaly detection"),
            dataset_type=data["name"],
            dataset_name=data["name"],
            dataset_split=data["split"],
            metric_type=metric,
            metric_name=add_samples(metric, metric.replace("_", " "), [row]),
            metric_value=value,
            # Once per data set; as arguments of a metric it would be repeated for each.
            dataset_args=dict(evaluation["protocol"]),
        )
        for metric, value in row["metrics"].items()
        if value is not None
        and math.isfinite(value)
        and not NO_METRIC.fullmatch(metric)
        and not ONLY_IN_REPORT.fullmatch(metric)
    ]


def _number(value: float | None) -> str:
    if isinstance(value, int):
        return str(value)
    return "-" if value is None else f"{value:.3g}" if 0 < abs(value) < 1e-3 else f"{value:.3f}"


def _cell(value: Any) -> str:
    """Returns a value as the text of a table's cell: one line, its own bars escaped."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return " ".join(text.split()).replace("|", "\\|")
