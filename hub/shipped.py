"""Finds the checkpoints that come with the package, says what they are for, and which one fits a scan. No torch here.

Each is a folder `checkpoints/NAME` with a pipeline, or a component alone, and `shipped.json`, its record. A component
that several pipelines share lies in one of their folders, and the records of the others name that."""

from __future__ import annotations

import importlib
import os
from collections.abc import Collection
from pathlib import Path

from ..files import read_json


SHIPPED = Path(__file__).parents[1] / "checkpoints"
RECORD = "shipped.json"
# The checkpoint's own row among its figures.
THIS = "this checkpoint"
# Modalities of a processor that takes any contrast; and what is no contrast of MRI, which such a network has never seen.
ANY = ("any", "image")
_NO_MRI = ("ct", "pet")


def list_shipped() -> dict[str, dict]:
    """Returns the records of the checkpoints that come with the package, by their names: `purpose`, `method`,
    `modality` (`"any"` or `"image"` for any contrast, `None` for a component), `default` (whether a scan of that modality gets it
    where no model is named), `thresholds`, `figures`, `shares` (component to the name of the checkpoint that has it).

    Each of the figures has `data`, in words, and `rows`: metrics of this checkpoint (`THIS`) and of others beside it,
    `{"AP": [value]}`, or with the ends of an interval `{"AP": [value, low, high]}`."""
    return {path.parent.name: read_json(path) for path in sorted(SHIPPED.glob(f"*/{RECORD}"))}


def locate(source: str | os.PathLike) -> str | os.PathLike:
    """
    Returns the folder of a checkpoint that comes with the package for its bare name, and any other source as it is: a
    folder of that name wins, and an id of the Hub (owner/name) is no bare name. No request is made.

    Raises:
        FileNotFoundError: A bare name that is neither.
    """
    if Path(source).is_dir() or len(Path(source).parts) != 1 or str(source) != Path(source).name:
        return source
    if (SHIPPED / source / RECORD).is_file():
        return SHIPPED / source
    raise FileNotFoundError(
        f"There is no folder {source}, and it is no id of the Hub (owner/name) nor one of the checkpoints that come with"
        f" anodiff: {', '.join(list_shipped()) or 'this installation has none'}."
    )


def shared_folders(folder: str | os.PathLike) -> dict[str, Path]:
    """
    Returns the folders of the components that a checkpoint folder shares with others beside it, by the components'
    names. A component of its own wins.

    Raises:
        FileNotFoundError: The other checkpoint, or the component in it, is not there.
    """
    folder, found = Path(folder), {}
    record = read_json(folder / RECORD) if (folder / RECORD).is_file() else {}
    for component, owner in record.get("shares", {}).items():
        if (folder / component).is_dir():
            continue
        place = component_folder(folder.parent / owner, component)
        if place is None:
            raise FileNotFoundError(
                f"{folder} shares its `{component}` with {owner}, which is not beside it: copy both, or save the"
                " pipeline with `save_pretrained`, which writes all of it."
            )
        found[component] = place
    return found


def component_folder(folder: Path, component: str) -> Path | None:
    """Returns where a component lies in the folder of the checkpoint that has it, which may hold nothing else; `None`
    if it does not lie there."""
    places = (folder / component, folder)
    return next((place for place in places if (place / "config.json").is_file()), None)


def load_shared(folder: str | os.PathLike, index: dict, given: Collection[str], dtype=None, device_map=None) -> dict:
    """
    Loads the components that a checkpoint folder shares with others.

    Args:
        folder (`str` or `os.PathLike`): The checkpoint's.
        index (`dict`): Its `model_index.json`, which names their classes.
        given (collection of `str`): Components that the caller has.
        dtype, device_map: As of `DiffusionPipeline.from_pretrained`.

    Returns:
        `dict`: Components by name.
    """
    components = {}
    for name, place in shared_folders(folder).items():
        if name not in given:
            library, kind = index[name]
            own = dtype.get(name, dtype.get("default")) if isinstance(dtype, dict) else dtype
            component_class = getattr(importlib.import_module(library), kind)
            components[name] = component_class.from_pretrained(place, dtype=own, device_map=device_map)
    return components


def choose_shipped(modality: str | None) -> tuple[str, str]:
    """
    Chooses the checkpoint that a scan of a modality gets where none is named: the default of that modality, or else
    the default for any contrast.

    Args:
        modality (`str`, *optional*): As of [`~volumes.scans.name_modality`]; `None` where nobody says it.

    Returns:
        its name, and the reason in words.

    Raises:
        ValueError: None fits.
    """
    defaults = {
        record["modality"]: name for name, record in list_shipped().items() if record["modality"] and record["default"]
    }
    if modality in defaults:
        return defaults[modality], f"it is the default for {modality}"
    general = next((defaults[name] for name in ANY if name in defaults), None)
    if general is not None and modality not in _NO_MRI:
        said = "the modality is not known" if modality is None else f"none is for {modality} alone"
        return general, f"it takes any contrast, and {said}"
    raise ValueError(
        f"No checkpoint that comes with anodiff fits {modality or 'a scan of unknown modality'}: their modalities are"
        f" {', '.join(defaults) or 'none'}. Name a model by `--model`, or the modality of the scan by `--modality`."
    )


def describe_metrics(metrics: dict[str, list[float]]) -> dict[str, str]:
    """Returns the metrics of a row of figures as text, as of [`add_interval`]."""
    return {name: add_interval(f"{value:.3f}", *interval) for name, (value, *interval) in metrics.items()}


def add_interval(text: str, low: float | None = None, high: float | None = None) -> str:
    """Returns the text of a value with its interval, `0.655 (0.60 to 0.70)`, a narrow one with a third decimal; without
    one the text."""
    if low is None or high is None:
        return text
    digits = 2 if high - low >= 0.05 else 3
    return f"{text} ({low:.{digits}f} to {high:.{digits}f})"


def add_samples(metric: str, title: str, rows: Collection[dict]) -> str:
    """Returns the title of a metric with the number of samples that the `rows` of a report have it from, `GED (8
    samples)`. Where rows have different numbers it says that they do not compare, `GED (4, 8 samples: do not compare)`;
    where no row is of an ensemble, or the metric does not depend on the samples, it is the title alone."""
    counts = sorted({row["metrics"]["num_samples"] for row in rows if "num_samples" in row["metrics"]})
    if not counts or metric in ("num_samples", "annotation_diversity"):
        return title
    unit = "sample" if counts == [1] else "samples"
    note = ": do not compare" if len(counts) > 1 else ""
    return f"{title} ({', '.join(map(str, counts))} {unit}{note})"
