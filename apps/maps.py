"""Finds anomalies in an uploaded scan, and writes what a visitor sees and takes home."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from .. import AnomalyPipeline
from ..evaluation.overview import draw_members, draw_overview
from ..files import check_name, read_text
from ..hub import shipped
from ..pipelines.output import AnomalyOutput, CIMDOutput
from ..reports.predictions import write_predictions
from ..volumes.scans import Scan, find_modality, find_scans


# The choice of the checkpoint that fits the name of the scan.
BY_NAME = "by the name of the file"
# How the brain mask of a result came about (`pipelines/brain.py`), in words.
_BRAIN = {
    "given": "as given",
    "extracted": "found by the brain extractor",
    "stripped": "none is needed: the skull is off already",
    "nonzero": "what is above the background",
    "none": "none, whole slices",
}


@dataclass(frozen=True)
class Findings:
    """Holds what was found in a scan: `facts`, names to values in words, the `page` with the viewer, as text, and the
    `archive`, a ZIP file of all results."""

    facts: dict[str, str]
    page: str
    archive: Path


def list_models(own: list[str]) -> list[str]:
    """Returns what a visitor can choose from: the models that were named, and the shipped pipelines."""
    pipelines = [name for name, record in shipped.list_shipped().items() if record["modality"] is not None]
    return [*own, *([BY_NAME] if pipelines else []), *pipelines]


@lru_cache(2)
def load_pipeline(model: str) -> AnomalyPipeline:
    """Loads a pipeline onto a GPU, where there is one."""
    pipeline = AnomalyPipeline.from_pretrained(model)
    return pipeline.to("cuda" if torch.cuda.is_available() else "cpu")


def find_anomalies(
    files: list[str],
    model: str,
    folder: Path,
    *,
    brain: str | None = None,
    seed: int = 0,
    say: Callable[[str], None] = lambda text: None,
) -> Findings:
    """
    Predicts one scan, and writes the results, a page and an archive of both into a folder.

    Args:
        files: The scan: one file, or one for each modality of the checkpoint, whose names say which is which.
        model: Folder, Hub id, name of a shipped checkpoint, or `BY_NAME`.
        folder: Where to; must not exist.
        brain: File with the brain mask, where the checkpoint needs one and does not find it itself.
        seed: Of the draws.
        say: Is told what is done next.

    Raises:
        ValueError: There is no scan in the files, or more than one, or the checkpoint does not fit.
    """
    if not files:
        raise ValueError("No scan is there yet: choose a file, or take the generated head.")
    folder.mkdir(parents=True)
    given = folder / "given"
    given.mkdir()
    for file in files:
        name = Path(file).name
        check_name("a file", name)
        if (given / name).exists():
            raise ValueError(f"Two files are called {name}: give the modalities different names.")
        shutil.copyfile(file, given / name)
    paths = [str(path) for path in given.iterdir()]
    modality = None
    if model == BY_NAME:
        modality = find_modality(paths)
        model, _ = shipped.choose_shipped(modality)
    say(f"Loading {model}")
    pipeline = load_pipeline(model)
    own = list(pipeline.processor.config.modalities)
    scan = _find_scan(paths, given, own if modality is None else [modality], pipeline.may_lack)
    volume = scan.volume
    if isinstance(volume, dict) and len(own) == 1:
        # A network for any contrast has another name for it.
        volume = dict(zip(own, volume.values(), strict=True))
    say("Looking at the scan")
    start = time.perf_counter()
    result = pipeline(volume, brain_mask=None if brain is None else Path(brain), generator=seed)
    seconds = time.perf_counter() - start

    say("Writing the results")
    plane = pipeline.processor.config.plane
    draw = draw_overview if isinstance(result, AnomalyOutput) else draw_members
    results = folder / "results"
    result.save(results / scan.name, lambda path: draw(result, path, scan.name, plane=plane))
    write_predictions(results / "report.html", [scan], [], plane=plane, model=model)
    archive = shutil.make_archive(str(folder / f"{scan.name}_results"), "zip", results)
    shutil.rmtree(given)
    return Findings(_describe(result, model, seconds), read_text(results / "report.html"), Path(archive))


def _find_scan(paths: list[str], folder: Path, modalities: list[str], optional: list[str]) -> Scan:
    """The one scan in the files of a folder."""
    scans, failed = find_scans(paths if len(paths) == 1 else [str(folder)], modalities, optional=optional)
    if failed:
        source, reason = failed[0]
        raise ValueError(f"{Path(source).name}: {reason}")
    if len(scans) > 1:
        raise ValueError(
            f"The files are {len(scans)} scans, and one is looked at at a time; this checkpoint takes one file for each"
            f" of {', '.join(modalities)}."
        )
    return scans[0]


def _describe(result: AnomalyOutput | CIMDOutput, model: str, seconds: float) -> dict[str, str]:
    """What the page says of a result."""
    source, facts = result.source, {"Checkpoint": model}
    if isinstance(result, AnomalyOutput):
        threshold, highest = result.settings["threshold"], int(np.argmax(result.pred_score))
        facts["Score of the scan"] = f"{result.volume_score:.4g}"
        facts["Highest score of a slice"] = f"{float(result.pred_score[highest]):.4g}, slice {highest}"
        facts["Threshold"] = "none in the checkpoint" if threshold is None else f"{threshold:.4g}"
        mask, what = result.pred_mask, "Above the threshold"
        if result.warnings is not None:
            facts["Warnings"] = " ".join(result.warnings)
    else:
        mask, what = result.majority_mask, f"In most of {len(result.member_masks)} members"
    if mask is not None:
        count = int(np.count_nonzero(mask))
        millilitres = count * abs(np.linalg.det(source.affine[:3, :3])) / 1000
        facts[what] = f"{count} pixels" if source.is_picture else f"{millilitres:.2f} ml"
    return facts | {"Brain mask": _BRAIN[result.settings["brain"]], "Time": f"{seconds:.1f} s"}
