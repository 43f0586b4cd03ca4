"""The report of an evaluation, and what people read of it: the Markdown table."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from types import ModuleType

import numpy as np
from accelerate import Accelerator

import anodiff

from ..data.prepared import PreparedSplit
from ..pipelines.base import device_name
from ..schedulers.draws import DRAWS_VERSION
from .metrics import NUM_RESAMPLES
from .options import EvalOptions
from .sections import (
    comparison_section,
    guarantee_section,
    join_settings,
    lesion_section,
    metric_cell,
    protocol_section,
    split_settings,
    strata_section,
    table,
)


def make_report(
    options: EvalOptions,
    kind: ModuleType,
    protocols: list[ModuleType],
    split: PreparedSplit,
    rows: list[dict],
    accelerator: Accelerator,
) -> dict:
    """Returns the report of scored rows as `report.json` holds it. `kind` is the module `maps` or `ensembles`,
    `protocols` are those whose columns the rows have, `split` is what was scored."""
    settings, subjects = split.processor_settings, kind.choose_subjects(split)
    labels = split.labels[np.concatenate([split.subject_rows(subject) for subject in subjects])]
    label_definition, samples = kind.describe_samples(split, rows)
    texts = {
        field: "".join(protocol.TEXT.get(field, "") for protocol in protocols).format(healthy_fpr=options.healthy_fpr)
        for field in ("unit_of_averaging", "threshold_policy")
    }
    shared, differing = split_settings(rows)
    postprocessing = [f"every row: {join_settings(shared)}"] if shared else []
    postprocessing += [f"{name}: {join_settings(own)}" for name, own in differing if own]
    groups = len({split.subject_info[subject]["group"] for subject in subjects})
    populations = [f"{row['name']}: {row['training_population']}" for row in rows if row["kind"] == "pipeline"]
    return {
        "anodiff": anodiff.__version__,
        **kind.HEAD,
        "data": {
            "name": data_name(options.data),
            "split": options.split,
            "subjects": len(subjects),
            "slices": len(labels),
            "anomalous_slices": int((labels == 1).sum()),
        },
        "protocol": {
            "training_population": "; ".join(populations) or "no model was evaluated",
            "modality": ", ".join(settings["modalities"]),
            **texts,
            "geometry": f"network grid {settings['size']}, plane {settings['plane']},"
            f" slices {split.recipe.get('slices', {})}",
            "preprocessing": ", ".join(
                f"{key} {settings[key]}" for key in ("intensity", "value_range", "clip", "resize", "brain_mask")
            ),
            "postprocessing": "; ".join(postprocessing),
            "label_definition": label_definition,
            "samples": samples,
        },
        "intervals": describe_intervals(len(subjects), groups),
        "results": rows,
        "seed": options.seed,
        "draws": DRAWS_VERSION,
        "device": device_name(accelerator.device),
        "processes": accelerator.num_processes,
        "versions": {name: version(name) for name in ("torch", "diffusers", "accelerate", "numpy")},
    }


def data_name(data: str) -> str:
    """Returns what a report calls a data set: the name of a folder without the path, or a Hub id, which stays whole, as
    results belong to that data set."""
    return Path(data).resolve().name if Path(data).exists() else data


def describe_intervals(subjects: int, groups: int) -> str:
    """Returns what the intervals of a report are, in words, for subjects of some groups."""
    whole = f"{subjects} subjects" if subjects == groups else f"{groups} groups (patients) of {subjects} subjects"
    if groups < 2:
        return f"none: one {'subject' if subjects == 1 else 'patient'} alone does not say how far others would differ"
    return (
        f"95 %, percentiles of {NUM_RESAMPLES} bootstrap samples of the {whole}; thresholds stay as they were chosen"
    )


def markdown(report: dict, columns: dict[str, str]) -> str:
    """Returns the report as Markdown: a table of every row under those of the `columns`, metric to title, that a row
    has, comparisons, lesions, strata and guarantees where there are any, the nine protocol fields, and the reliability of an
    ensemble."""
    data = report["data"]
    measured = {name for row in report["results"] for name in row["metrics"]}
    columns = {name: title for name, title in columns.items() if name in measured}
    rows = []
    for row in report["results"]:
        seconds = row.get("seconds_per_slice")
        cells = [metric_cell(row["metrics"], name) for name in columns]
        rows.append([row["name"], *cells, "" if seconds is None else f"{seconds:.3g}"])
    lines = [
        f"# {data['name']}, {data['split']}",
        "",
        f"{data['subjects']} subjects, {data['slices']} slices, {data['anomalous_slices']} of them anomalous.",
        "Research use, not a medical device.",
        "",
        *table(["", *columns.values(), "s per slice"], rows),
        f"Intervals in brackets: {report['intervals']}.",
        "",
        *comparison_section(report),
        *lesion_section(report),
        *strata_section(report),
        *guarantee_section(report),
        *protocol_section(report),
    ]
    versions = ", ".join(f"{name} {number}" for name, number in report["versions"].items())
    lines += [
        f"anodiff {report['anodiff']}, {versions}, {report['device']}, {report['processes']} process(es),"
        f" seed {report['seed']}, draws {report['draws']}.",
        "",
    ]
    first = report["results"][0]
    if "reliability" in first:
        curve = first["reliability"]["all"]
        lines += [
            f"## Reliability of {first['name']}",
            "",
            "Pixels by the share of the samples that mark them.",
            "",
        ]
        bins = zip(curve["predicted"], curve["observed"], curve["pixels"], strict=True)
        cells = [[f"{predicted:.3f}", f"{observed:.3f}", str(pixels)] for predicted, observed, pixels in bins]
        lines += table(["share of the samples", "share of the annotations", "pixels"], cells)
    return "\n".join(lines)
