"""What is stored of a subject between computing and scoring, a file for each subject and method, and what its slices
are called."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np

from ..data.prepared import PreparedSplit
from ..files import check_name
from ..pipelines.postprocessing import PostProcessing


# N slices, E members of an ensemble, A annotations, H x W pixels.


def slice_numbers(split: PreparedSplit, subject: str, slices: np.ndarray) -> np.ndarray:
    """Returns the numbers that the random numbers of a subject's slices depend on, `(N,)`: `slices`, their numbers in
    the volume, as in a call of the pipeline. A picture, a subject of one slice, has the number of its row in the
    split: all pictures are slice 0 of their own volume, and would share their noise."""
    is_picture = split.subject_info[subject]["network_shape"][2] == 1
    return np.asarray(split.subject_rows(subject)) if is_picture else slices


def slice_spacing(split: PreparedSplit, subject: str, slices: np.ndarray) -> np.ndarray | None:
    """Returns the distance of the kept `slices` (numbers in the volume) and of the rows and columns of a subject on the
    network's grid, `(3,)` in mm; the first is the most frequent one where slices are missing. `None` for a picture, whose
    pixels have no known size."""
    info = split.subject_info[subject]
    if info["network_shape"][2] == 1:
        return None
    sizes = np.linalg.norm(np.reshape(info["network_affine"], (4, 4))[:3, :3], axis=0)[::-1].copy()
    if len(slices) > 1:
        sizes[0] *= np.bincount(np.diff(slices)).argmax()
    return sizes


class _Stored:
    """A dataclass of arrays as a file of numpy's; `None` is not written."""

    compressed: ClassVar[bool] = False

    def save(self, folder: Path) -> None:
        """Writes `folder/SUBJECT.npz`; raises a `ValueError` for a subject whose name leads out of `folder`."""
        check_name("a subject", self.subject)
        # A picture's name holds the folders it came from.
        path = folder / f"{self.subject}.npz"
        path.parent.mkdir(parents=True, exist_ok=True)
        write = np.savez_compressed if self.compressed else np.savez
        write(path, **{name: value for name, value in vars(self).items() if value is not None})

    @classmethod
    def load(cls, path: Path):
        """Reads what [`save`] wrote."""
        with np.load(path, allow_pickle=False) as arrays:
            values = {name: arrays[name] if arrays[name].ndim else arrays[name].item() for name in arrays.files}
        return cls(**{field.name: values.get(field.name) for field in fields(cls)})

    def find_differences(self, item: dict) -> list[str]:
        """Returns the names of the stored values that are of the data, not of the method, and that are not those of a
        subject, `item` as an evaluation reads it."""
        expected = self.of_data(item)
        return [name for name, value in expected.items() if not np.array_equal(getattr(self, name), value)]

    @staticmethod
    def of_data(item: dict) -> dict:
        """Returns the values of the data as the case of a subject holds them, `item` as an evaluation reads it."""
        raise NotImplementedError


@dataclass(frozen=True)
class Case(_Stored):
    """One subject under a method that makes anomaly maps."""

    subject: str
    maps: np.ndarray
    """`(N, H, W)`, post-processed."""
    brain: np.ndarray
    """`(N, H, W)`, bool, as all masks."""
    mask: np.ndarray | None
    """`(N, H, W)`, where a reference exists."""
    labels: np.ndarray
    """`(N,)`: 1 anomalous slice, 0 healthy, -1 unknown."""
    slice_scores: np.ndarray
    volume_score: float
    group: str | None = None
    """Subjects of one group, a patient, are drawn together for an interval; `None` for one of its own."""
    spacing: np.ndarray | None = None
    """`(3,)`, distance of slices, rows and columns in mm; `None` if it is not known."""
    own_mask: np.ndarray | None = None
    """`(N, H, W)`, of a method that chooses its thresholds itself."""
    own_labels: np.ndarray | None = None
    """`(N,)`, with `own_mask`: 1 where the method calls a slice anomalous, else 0."""
    error: np.ndarray | None = None
    """`(N, H, W)`, absolute difference of slice and reconstruction, mean over modalities, on [0, 1]; for `sadm`."""
    foreground: np.ndarray | None = None
    """`(N, H, W)`, where the protocol `anofpdm` measures AUROC and AUPRC."""

    @property
    def label(self) -> int:
        """1 for a subject with an anomalous slice, 0 if all of its slices are healthy, -1 if that is not known."""
        if (self.labels == 1).any():
            return 1
        return 0 if (self.labels == 0).all() else -1

    @property
    def drawn_with(self) -> str:
        """What is drawn as a whole for an interval: the group, or else the subject."""
        return self.subject if self.group is None else self.group

    @staticmethod
    def of_data(item: dict) -> dict:
        """Returns brain, reference mask, labels and group of a subject."""
        # Several annotators: a voxel counts as lesion where at least half of them say so.
        mask = item["mask"].mean(1) >= 0.5 if item["mask"].shape[1] and (item["label"] >= 0).all() else None
        return {"brain": item["brain"], "mask": mask, "labels": item["label"], "group": item["group"]}


@dataclass(frozen=True)
class EnsembleCase(_Stored):
    """One subject with annotations under a method that makes several masks of it."""

    compressed: ClassVar[bool] = True
    subject: str
    group: str
    """Subjects of one group, a patient, are drawn together for an interval."""
    slices: np.ndarray
    """`(N,)`, numbers of the slices in their volume."""
    annotations: np.ndarray
    """`(N, A, H, W)`, bool."""
    masks: np.ndarray
    """`(N, E, H, W)`, bool."""
    mean: np.ndarray
    """`(N, H, W)`, float32, of the members, which need not be masks; so is `deviation`."""
    deviation: np.ndarray

    @staticmethod
    def of_data(item: dict) -> dict:
        """Returns group, slices and annotations of a subject."""
        return {"group": item["group"], "slices": item["slice"], "annotations": item["mask"] > 0}


def make_case(item: dict, maps: np.ndarray, postprocessing: PostProcessing, **optional) -> Case:
    """Returns the case of a subject, `item` as an evaluation reads it, from filtered maps `(N, H, W)`, float32, and
    the optional values of a [`Case`]."""
    return Case(
        subject=item["subject"],
        maps=maps,
        **Case.of_data(item),
        slice_scores=postprocessing.score_slices(maps, item["brain"]),
        volume_score=postprocessing.score(maps, item["brain"]),
        spacing=item["spacing"],
        **optional,
    )


class Needs(NamedTuple):
    """What a protocol needs beside maps or masks."""

    settings: dict = {}
    """Settings instead of the checkpoint's, of the methods that have them."""
    details: dict[str, Callable] = {}
    """Name of an optional value of [`Case`] to the function that makes it, of slices `(N, C, H, W)`, their
    reconstruction or `None`, and the range of their values; it may return `None`."""
    baselines: Callable[[dict], dict[str, Callable]] = lambda processor: {}
    """From the settings of the processor to a dict, name of a row to the function that makes its maps `(N, H, W)`,
    float32, of slices and their brain masks."""


class Tally(NamedTuple):
    """What is kept of the scores of one method's test cases, to compare methods and to score some of the cases alone."""

    subjects: list[str]
    """Of the cases with a reference: those with a mask, and healthy ones; all values below are in this order."""
    groups: list[str]
    masked: list[bool]
    overlaps: dict[str, np.ndarray]
    """Of each policy, `(N, 2)`: voxels that prediction and reference share, and the sum of both."""
    lesions: dict[str, np.ndarray]
    """Of each policy, `(N, 4)`: [`~evaluation.metrics.LesionCounts`]."""
    resamples: dict[str, np.ndarray]
    """Of each metric that methods are compared by: its value in each resample of the groups."""
    num_groups: dict[str, int]
    """Of each of these metrics: how many groups it has values of."""


class Scores(NamedTuple):
    """What a protocol says of one method: `metrics`, `None` where undefined, `records` with values of each test case
    (of ensembles: of each image), what else the row of the report holds, and what methods are compared by."""

    metrics: dict[str, float | None]
    records: list[dict]
    more: dict = {}
    tally: Tally | None = None
