"""What decides a plan: of the data, and of the checkpoints that could be evaluated on them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

import anodiff

from ..data.prepared import list_splits, load_prepared
from ..files import read_json
from ..hub.model_index import fetch, read_model_index
from ..hub.shipped import list_shipped
from .plan import Counts, Facts


def read_facts(data: str) -> Facts:
    """Reads the facts of a prepared data set: a folder, an id on the Hub, or the name of a phantom."""
    splits, settings = {}, {}
    for name in list_splits(data):
        split = load_prepared(data, name)
        settings, labels = split.processor_settings, split.labels
        splits[name] = Counts(
            healthy=int((labels == 0).sum()),
            anomalous=int((labels == 1).sum()),
            unknown=int((labels == -1).sum()),
            unannotated=int(((labels != 0) & (split.annotations == 0)).sum()),
            annotations=int(np.max(split.annotations, initial=0)),
        )
    return Facts({key: list(value) if isinstance(value, tuple) else value for key, value in settings.items()}, splits)


def find_shipped(facts: Facts) -> dict[str, str | None]:
    """Returns the pipelines that come with the package for a modality of the data, each with the reason why it cannot be
    evaluated on them, or `None`."""
    modalities = facts.processor["modalities"]
    return {
        name: find_misfit(name, facts) for name, record in list_shipped().items() if record["modality"] in modalities
    }


def describe_given(models: Sequence[str], facts: Facts) -> dict[str, tuple[str, str, str | None]]:
    """Returns the models of the user as [`~plan.make_plan`] takes them. The name of a row holds that of the folder or
    repository, and a digest of the whole, as several may end alike."""
    given = {}
    for model in models:
        path = Path(model)
        short = path.resolve().parent.name if path.is_dir() and path.resolve().name == "pipeline" else path.name
        kind = read_model_index(model).get("_class_name")
        if kind not in anodiff.__all__:
            reason = f"it is a {kind}, and no pipeline of anodiff"
        elif getattr(anodiff, kind).task != "anomaly-detection":
            reason = "it makes several segmentations, which have no anomaly map to rank: evaluate it alone"
        else:
            reason = find_misfit(model, facts)
        given[f"{short}-{hashlib.sha256(model.encode()).hexdigest()[:8]}"] = (model, kind, reason)
    return given


def find_misfit(model: str, facts: Facts) -> str | None:
    """Returns which other settings than those of the data a model needs, or `None`."""
    path = fetch(model, "processor/processor_config.json")
    if path is None:
        return "it has no processor"
    own = read_json(path)
    needs = [f"`{key}` {own[key]}" for key, value in facts.processor.items() if key in own and own[key] != value]
    return f"it needs data prepared with {', '.join(needs)}" if needs else None
