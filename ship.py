"""Makes a checkpoint that comes with the package, `checkpoints/NAME`, of a trained pipeline or component.

python eval.py --model run/pipeline --data heads_flair --output_dir healthy_synthetic      # its healthy threshold
python ship.py --model run/pipeline --name anoddpm-flair --purpose "Lesions in FLAIR" --default true \\
    --synthetic healthy_synthetic/report.json --real healthy_real/report.json --reports lesions/report.json \\
    --shares '{brain_extractor: brain-extractor}' --reproduce 'accelerate launch train.py --config heads_flair.yaml'

Weights become float16. The threshold is that of the healthy slices of the report `--synthetic`. Evaluate the shipped
checkpoint by its name, then ship again with the reports: the folder is made anew, as a whole.
"""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from anodiff.configs import parse_options
from anodiff.running import run_script


# What a user does after a stop.
GO_ON = "The same command begins anew."

SOURCES = (
    "Billot, Greve, Puonti, Thielscher, Van Leemput, Fischl, Dalca, Iglesias: SynthSeg: Segmentation of brain MRI scans of"
    " any contrast and resolution without retraining. Medical Image Analysis 86, 102789, 2023"
)
POPULATION = (
    "Images generated from the label maps that come with SynthSeg (https://github.com/BBillot/SynthSeg,"
    " data/training_label_maps, Apache-2.0); no scan of anybody was seen in training"
)
NOTICE = f"""{{name}}, a checkpoint of anodiff
Copyright 2026 The anodiff authors

Licensed under the Apache License, Version 2.0.

The weights were trained on images that anodiff generated from label maps of SynthSeg, and on nothing else; no scan was
seen in training. The label maps are those in data/training_label_maps of https://github.com/BBillot/SynthSeg, Apache
License 2.0:

{SOURCES}.
"""
# Of a report: metric to its name in the record of a checkpoint.
METRICS = {
    "voxel_average_precision": "AP",
    "dice_healthy": "Dice at the threshold of healthy slices",
    "slice_auroc": "slice AUROC",
}


@dataclass
class ShipOptions:
    """One checkpoint."""

    model: str = ""
    """Folder of the trained pipeline, or of a component alone, such as a brain extractor."""
    name: str = ""
    """Name of the checkpoint."""
    purpose: str = ""
    """What it is for, in one line."""
    modality: str | None = None
    """Another name of the one modality than the pipeline has: what a network for any contrast is to be used for."""
    inference: dict[str, Any] = field(default_factory=dict)
    """Inference values instead of the pipeline's: noise_level, sign, median_size, ..."""
    default: bool = False
    """Whether a scan of its modality gets it where no model is named."""
    synthetic: str | None = None
    """Report of eval.py whose validation split holds healthy synthetic slices: its healthy threshold is stored in the
    pipeline."""
    real: str | None = None
    """The same of healthy real slices: its threshold is recorded beside the other."""
    reports: list[str] = field(default_factory=list)
    """Reports of eval.py that go into the card."""
    figures: str | None = None
    """JSON file of other figures for card and record, such as ones with intervals: a list of `{"data": "in words",
    "rows": {"this checkpoint": {"AP": [0.6, 0.5, 0.7]}, "plain intensity": {"AP": [0.5]}}}`."""
    shares: dict[str, str] = field(default_factory=dict)
    """Components that lie in the folders of other shipped checkpoints, with the names of these: {unet: anoddpm-any}."""
    reproduce: list[str] = field(default_factory=list)
    """Commands that train it anew."""
    output: str = "checkpoints"
    """Folder of the shipped checkpoints."""


def main(argv: list[str] | None = None) -> int:
    """Makes one checkpoint folder; returns 0."""
    options = parse_options(ShipOptions, argv, prog="ship.py", description=__doc__)
    for option in ("model", "name", "purpose"):
        if not getattr(options, option):
            raise ValueError(f"`--{option}` is missing.")

    from anodiff.files import check_name, making_folder, read_json
    from anodiff.hub.shipped import RECORD

    check_name("a checkpoint", options.name)
    if not Path(options.model).is_dir():
        raise FileNotFoundError(f"There is no folder {options.model}.")
    folder = Path(options.output, options.name)
    if folder.is_dir() and not (folder / RECORD).is_file():
        raise FileExistsError(f"{folder} is no shipped checkpoint: its place is needed, move it away.")
    reports = {path: read_json(path) for path in (*options.reports, options.synthetic, options.real) if path}
    figures = read_json(options.figures) if options.figures else []
    folder.parent.mkdir(parents=True, exist_ok=True)
    is_pipeline = Path(options.model, "model_index.json").is_file()
    with making_folder(folder) as unfinished:
        if is_pipeline:
            ship_pipeline(options, reports, figures, unfinished)
        else:
            ship_component(options, figures, unfinished)
        shutil.rmtree(folder, ignore_errors=True)  # the new one is complete
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"{folder}: {size / 1e6:.2f} MB")
    return 0


def ship_pipeline(options: ShipOptions, reports: dict[str, dict], figures: list, folder: Path) -> None:
    """Writes the files of a pipeline into the folder."""
    import torch
    import yaml

    from anodiff import AnomalyPipeline, VolumeProcessor
    from anodiff.checks import check_keys
    from anodiff.files import read_json, read_text, write_json, write_text
    from anodiff.hub.model_card import NOT_EVALUATED, add_evaluation, make_card
    from anodiff.hub.publishing import complete_folder
    from anodiff.hub.shipped import RECORD

    settings = VolumeProcessor.from_pretrained(Path(options.model, "processor")).settings()
    if options.modality:
        settings["modalities"] = [options.modality]
    processor = VolumeProcessor.from_dict(settings)
    pipeline = AnomalyPipeline.from_pretrained(
        options.model, dtype=torch.float16, processor=processor, **options.inference
    )
    check_keys("inference", options.inference, pipeline.config, type(pipeline).__name__)
    modalities = pipeline.processor.config.modalities
    if len(modalities) != 1:
        raise ValueError(f"`model` must be a pipeline of one modality, got {', '.join(modalities)}.")
    for path in Path(options.output).glob(f"*/{RECORD}") if options.default else ():
        other = read_json(path)
        if other["default"] and other["modality"] == modalities[0] and path.parent.name != options.name:
            raise ValueError(f"`default`: {path.parent.name} is the default for {modalities[0]} already.")
    add_shared(pipeline, options)
    thresholds = read_thresholds(options, reports)
    if "synthetic" in thresholds:
        pipeline.register_to_config(threshold=thresholds["synthetic"]["threshold"])
    check_finite(pipeline.components, options.model)
    pipeline.save_pretrained(folder)

    records = {}
    for name in ("config.yaml", "recipe.yaml"):
        path = Path(options.model, name)
        if path.is_file():
            shutil.copy(path, folder)
            records[name] = yaml.safe_load(read_text(path))
    card = make_card(
        pipeline,
        repo_id=options.name,
        config=records.get("config.yaml"),
        recipe={**records.get("recipe.yaml", {}), "license": "apache-2.0"},
        population=POPULATION,
        training=describe_training(options),
        limits=limits(thresholds),
        licence="apache-2.0",
    )
    if figures:
        card.text = card.text.replace(NOT_EVALUATED, tables(figures))
    for path in options.reports:
        card = add_evaluation(card, reports[path], repo_id=options.name)
    complete_folder(folder, str(card))
    mode = f", {pipeline.config.mode}" if "mode" in pipeline.config else ""
    record = {
        "purpose": options.purpose,
        "method": type(pipeline).__name__.removesuffix("Pipeline") + mode,
        "modality": modalities[0],
        "default": options.default,
        "thresholds": thresholds,
        "figures": [*figures, *(figure(reports[path], options.name) for path in options.reports)],
        "reproduce": options.reproduce,
        "shares": options.shares,
    }
    write_text(folder / "NOTICE", NOTICE.format(name=options.name))
    write_json(folder / RECORD, record)
    leave_shared(folder, options)


def ship_component(options: ShipOptions, figures: list, folder: Path) -> None:
    """Writes the files of a component alone into the folder: its configuration and weights lie at the top."""
    import torch

    import anodiff
    from anodiff.files import read_json, write_json, write_text
    from anodiff.hub.shipped import RECORD

    for option in ("default", "synthetic", "real", "reports", "shares"):
        if getattr(options, option):
            raise ValueError(f"`{option}` belongs to pipelines, and {options.model} has no model_index.json.")
    kind = read_json(Path(options.model, "config.json"))["_class_name"]
    component = getattr(anodiff, kind).from_pretrained(options.model, dtype=torch.float16)
    check_finite({kind: component}, options.model)
    component.save_pretrained(folder)
    index = folder / "config.json"
    write_json(index, {key: value for key, value in read_json(index).items() if key != "_name_or_path"})
    card = (
        f"---\nlicense: apache-2.0\ntags:\n- anodiff\n- medical-imaging\nlibrary_name: diffusers\n---\n\n# {options.name}\n\n"
        f"{options.purpose.rstrip('.')}. A `{kind}` of anodiff; pipelines take it as a component.\n\n"
        "**Research use only. This is not a medical device.**\n\n## Training data\n\n"
        f"{POPULATION}.\n\n{describe_training(options)}\n\n## Evaluation\n\n{tables(figures)}\n\n"
        f"## Licence\n\nWeights: apache-2.0. Label maps: {SOURCES}.\n"
    )
    record = {
        **{"purpose": options.purpose, "method": kind, "modality": None, "default": False},
        **{"thresholds": {}, "figures": figures, "reproduce": options.reproduce, "shares": {}},
    }
    write_text(folder / "README.md", card)
    write_text(folder / "NOTICE", NOTICE.format(name=options.name))
    write_json(folder / RECORD, record)


def read_thresholds(options: ShipOptions, reports: dict[str, dict]) -> dict[str, dict]:
    """Returns the healthy thresholds of the reports, by `synthetic` and `real`, with their data and policy."""
    from anodiff.hub.model_card import own_result

    thresholds = {}
    for kind in ("synthetic", "real"):
        path = getattr(options, kind)
        if path is not None:
            report = reports[path]
            value = own_result(report, options.name)["metrics"]["threshold_healthy"]
            if value is None:
                raise ValueError(f"{path} has no healthy threshold: its validation split holds no healthy slice.")
            # Of all its policies; docs/training_and_evaluation.md has them.
            policy = report["protocol"]["threshold_policy"].partition("healthy: ")[2].partition(";")[0]
            thresholds[kind] = {"threshold": value, "data": report["data"]["name"], "policy": policy}
    return thresholds


def add_shared(pipeline, options: ShipOptions) -> None:
    """Gives the pipeline those components that it shares and has none of its own of."""
    import torch

    import anodiff
    from anodiff.files import read_json
    from anodiff.hub.shipped import component_folder

    for component, owner in options.shares.items():
        if component not in pipeline.components:
            raise ValueError(
                f"`shares` must name components of {type(pipeline).__name__}, {', '.join(pipeline.components)}, got"
                f" {component}."
            )
        if pipeline.components[component] is None:
            place = component_folder(Path(options.output, owner), component)
            if place is None:
                raise FileNotFoundError(f"`shares`: there is no {component} in {Path(options.output, owner)}.")
            kind = read_json(place / "config.json")["_class_name"]
            loaded = getattr(anodiff, kind).from_pretrained(place, dtype=torch.float16)
            pipeline.register_modules(**{component: loaded})


def leave_shared(folder: Path, options: ShipOptions) -> None:
    """Removes from the folder what lies in the folders of other checkpoints, if it is the same there."""
    from anodiff.files import sha256
    from anodiff.hub.shipped import component_folder

    for component, owner in options.shares.items():
        place = component_folder(Path(options.output, owner), component)
        for path in sorted((folder / component).iterdir()):
            if place is None or not (place / path.name).is_file() or sha256(place / path.name) != sha256(path):
                raise ValueError(
                    f"`shares`: {path.name} of the `{component}` of {options.model} is not that of {owner}."
                )
        shutil.rmtree(folder / component)


def check_finite(components: dict, source: str) -> None:
    """Raises a `ValueError` if a weight is not finite, or was too large for float16."""
    import torch

    for name, component in components.items():
        if isinstance(component, torch.nn.Module):
            for key, weight in component.state_dict().items():
                if not torch.isfinite(weight).all():
                    raise ValueError(f"{key} of the `{name}` of {source} is not finite in float16.")


def describe_training(options: ShipOptions) -> str:
    """Returns the part of the card that says how to train the checkpoint anew, and how the validation went."""
    from anodiff.files import read_text
    from anodiff.hub.model_card import CURVE, describe_curve

    parts = []
    if options.reproduce:
        lines = "\n".join(options.reproduce)
        parts.append(f"To train it anew, with the label maps of SynthSeg:\n\n```bash\n{lines}\n```")
    curve = Path(options.model, CURVE)
    if curve.is_file():
        parts.append(describe_curve([json.loads(line) for line in read_text(curve).splitlines()]))
    return "\n\n".join(parts)


def limits(thresholds: dict[str, dict]) -> list[str]:
    """Returns what the card says of training on generated images, and of the thresholds."""
    found = [
        "It has learnt from generated images. Their texture is simpler than that of scans, so residuals on real texture are"
        " larger than on the images that it was trained on, also where nothing is wrong."
    ]
    kinds = {
        "synthetic": "generated images, in use",
        "real": "scans; `threshold=` of a call and `--threshold` take it",
    }
    for kind, values in thresholds.items():
        text = (
            f"Threshold that {values['policy']} exceed, {kinds[kind]} ({values['data']}): {values['threshold']:.6g}."
        )
        found.append(text)
    return found


def figure(report: dict, name: str) -> dict:
    """Returns what the record of a checkpoint keeps of a report: metrics of the checkpoint and of the plain intensity,
    with their intervals."""
    from anodiff.hub.model_card import own_result
    from anodiff.hub.shipped import THIS

    def with_ends(metrics: dict, key: str) -> list[float]:
        found = [metrics.get(f"{key}{end}") for end in ("", "_low", "_high")]
        return found[:1] if None in found else found

    rows = {THIS: own_result(report, name)["metrics"]}
    rows |= {row["name"]: row["metrics"] for row in report["results"] if row["kind"] == "baseline"}
    data = report["data"]
    return {
        "data": f"{data['name']}, {data['split']}, {data['subjects']} subjects, {data['slices']} slices",
        "rows": {
            row: {title: with_ends(metrics, key) for key, title in METRICS.items() if metrics.get(key) is not None}
            for row, metrics in rows.items()
        },
    }


def tables(figures: list[dict]) -> str:
    """Returns figures as the tables of a card."""
    from anodiff.hub.shipped import describe_metrics

    parts = []
    for one in figures:
        titles = list(dict.fromkeys(title for metrics in one["rows"].values() for title in metrics))
        lines = [f"{one['data']}:", "", f"| | {' | '.join(titles)} |", "| --- |" + " --- |" * len(titles)]
        for row, metrics in one["rows"].items():
            texts = describe_metrics(metrics)
            lines.append(f"| {row} | {' | '.join(texts.get(title, '') for title in titles)} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts) or "Not evaluated."


if __name__ == "__main__":
    sys.exit(run_script(main, GO_ON))
