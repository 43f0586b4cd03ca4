"""An evaluation of ensembles of segmentations: which splits and subjects, what a case is made of, baselines, and what
the report says of them. The names are those of `maps.py`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import ModuleType

import numpy as np

from ..data.prepared import PreparedSplit, load_prepared
from ..pipelines.base import AnomalyPipeline
from ..pipelines.slices import SliceResults
from .cases import EnsembleCase
from .options import EvalOptions
from .pictures import draw_ensemble_cases, draw_reliability
from .protocols import ensemble


# N slices, E members, A annotations, H x W pixels.

OWN_PROTOCOL = ensemble
HEAD = {"task": "Ambiguous segmentation"}
CASE = EnsembleCase

MEMBERS = 16  # of the baselines where no model says how many


def check_options(options: EvalOptions) -> None:
    """Raises a `ValueError` for settings of anomaly maps, which would change nothing."""
    names = "calibrate calibration_slices guidance_scales set_threshold median_dimensions erosion min_component_size"
    names += " slice_score sign weighting normalization strata"
    given = {name: vars(options)[name] for name in names.split()}
    wrong = [name for name, value in given.items() if value not in (None, [])]
    if wrong:
        raise ValueError(f"Ensembles of segmentations have no `{'`, `'.join(wrong)}`: leave it out.")


def name_splits(options: EvalOptions) -> dict[str, str]:
    """Returns the name of the split that cases are made of: nothing is chosen on a validation split."""
    return {"test": options.split}


def choose_subjects(split: PreparedSplit) -> list[str]:
    """Returns the subjects with annotations, at least one."""
    chosen = [subject for subject in split.subjects if split.subject_info[subject]["annotations"]]
    if not chosen:
        raise ValueError("The split that is to be evaluated has no annotations to compare with.")
    return chosen


def describe_settings(pipeline: AnomalyPipeline) -> dict:
    """Returns the settings that a row of the report names."""
    return {**pipeline.default_settings(), "threshold": pipeline.config.threshold}


def make_case_of(
    item: dict, results: SliceResults, rows: slice, pipeline: AnomalyPipeline, protocol: ModuleType
) -> EnsembleCase:
    """Returns the case of the subject `item`, whose slices are some `rows` of the results."""
    members = results.maps[rows].numpy()
    return _make_case(item, members > pipeline.config.threshold, members)


def make_baselines(
    splits: dict[str, PreparedSplit], rows: list[dict], protocol: ModuleType, options: EvalOptions
) -> Iterator[tuple[dict, Callable[[dict], EnsembleCase]]]:
    """Yields the rows of two baselines that see no image, each with the function that makes the case of a subject:
    level sets of the rate at which training annotations mark a pixel, and random training annotations. They have as
    many members as the first model."""
    training, test = load_prepared(options.data, "train"), splits["test"]
    count = rows[0]["settings"]["num_ensemble"] if rows else MEMBERS
    annotated = np.flatnonzero(training.annotations)
    if not annotated.size:
        raise ValueError("The training split has no annotations to make baselines of: `--baselines false`.")
    rate = 0.0
    for first in range(0, annotated.size, 256):
        chosen = annotated[first : first + 256]
        # What is not there is zeros.
        marked = training.read_rows(chosen, ("mask",))["mask"].sum(1) / training.annotations[chosen, None, None]
        rate = rate + marked.sum(0) / annotated.size
    levels = rate > (np.arange(count)[:, None, None] + 0.5) / count

    def random_annotation(row: int) -> np.ndarray:
        rng = np.random.default_rng([options.seed, row])
        chosen = rng.choice(annotated, count)
        masks = training.read_rows(chosen, ("mask",))["mask"]
        return masks[np.arange(count), rng.integers(training.annotations[chosen])] > 0

    def make_baseline(draw: Callable[[int], np.ndarray], item: dict) -> EnsembleCase:
        masks = np.stack([draw(row) for row in test.subject_rows(item["subject"])])
        return _make_case(item, masks, masks)

    for name, draw in (
        ("mean annotation rate", lambda row: levels),
        ("random training annotation", random_annotation),
    ):
        row = {"name": name, "kind": "baseline", "settings": {"num_ensemble": count}}
        yield row, partial(make_baseline, draw)


def make_statistics(splits: dict[str, PreparedSplit]) -> list[dict]:
    """Returns no rows: there are no scores of slices."""
    return []


def describe_samples(split: PreparedSplit, rows: list[dict]) -> tuple[str, str]:
    """Returns what the masks are compared with, and how many of what were scored."""
    annotations = [split.subject_info[subject]["annotations"] for subject in choose_subjects(split)]
    raters = " to ".join(map(str, sorted({min(annotations), max(annotations)})))
    labels = (
        f"{raters} annotations as they are, empty ones included; two empty masks agree (IoU 1); GED over all"
        " ordered pairs with themselves (V-statistic)"
    )
    images = rows[0]["subjects"]
    samples = ", ".join(f"{row['name']}: {row['metrics']['num_samples']}" for row in rows)
    groups = len({image["group"] for image in images})
    return labels, f"{groups} groups, {len(images)} images; samples per image: {samples}"


def draw(report: dict, rows: list[tuple[dict, Path]], split: PreparedSplit, output_dir: Path) -> None:
    """Draws `cases.png` of the first row and `reliability.png` of all rows, each with the folder of its cases."""
    draw_ensemble_cases(report, *rows[0], split, output_dir / "cases.png")
    draw_reliability([row for row, _ in rows], output_dir / "reliability.png")


def _make_case(item: dict, masks: np.ndarray, members: np.ndarray) -> EnsembleCase:
    """The case of a subject from masks and members, `(N, E, H, W)`."""
    return EnsembleCase(
        subject=item["subject"],
        **EnsembleCase.of_data(item),
        masks=masks,
        mean=members.mean(1).astype(np.float32),
        deviation=members.std(1).astype(np.float32),
    )
