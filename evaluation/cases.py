"""What is stored of a subject between computing and scoring, a file for each subject and method, and what its slices
are called."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np

from ..data.prepared import PreparedSplit
from ..pipelines.postprocessing import PostProcessing


# N slices, E members of an ensemble, A annotations, H x W pixels.


def slice_numbers(split: PreparedSplit, subject: str, slices: np.ndarray) -> np.ndarray:
    """Returns the numbers that the random numbers of a subject's slices depend on, `(N,)`: `slices`, those of the
    slices in their volume, as in a call of the pipeline. A picture, a subject of one slice, has the number of its row
    in the split: all pictures are slice 0 of their own volume, and what a method draws by chance would count in every
    one of them."""
    is_picture = split.subject_info[subject]["network_shape"][2] == 1
    return np.asarray(split.subject_rows(subject)) if is_picture else slices


class _Stored:
    """A dataclass of arrays as a file of numpy's; `None` is not written."""

    compressed: ClassVar[bool] = False

    def save(self, folder: Path) -> None:
        """Writes `folder/SUBJECT.npz`."""
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


@dataclass(frozen=True)
class Case(_Stored):
    """
    One subject under a method that makes anomaly maps.

    Args:
        subject (`str`): Name.
        maps (`np.ndarray` of shape `(N, H, W)`): Post-processed anomaly maps.
        brain (`np.ndarray` of shape `(N, H, W)`): bool.
        mask (`np.ndarray` of shape `(N, H, W)`, *optional*): bool, where a reference mask exists.
        labels (`np.ndarray` of shape `(N,)`): 1 anomalous slice, 0 healthy, -1 unknown.
        slice_scores (`np.ndarray` of shape `(N,)`): Score of each slice.
        volume_score (`float`): Score of the subject.
        own_mask (`np.ndarray` of shape `(N, H, W)`, *optional*):
            bool, the segmentation of a method that chooses its thresholds itself.
        own_labels (`np.ndarray` of shape `(N,)`, *optional*):
            With `own_mask`: 1 where the method calls a slice anomalous, else 0.
        error (`np.ndarray` of shape `(N, H, W)`, *optional*):
            Absolute difference of slice and reconstruction, mean over modalities, on [0, 1]; for the protocol `sadm`.
        foreground (`np.ndarray` of shape `(N, H, W)`, *optional*):
            bool, where the protocol `anofpdm` measures AUROC and AUPRC.
    """

    subject: str
    maps: np.ndarray
    brain: np.ndarray
    mask: np.ndarray | None
    labels: np.ndarray
    slice_scores: np.ndarray
    volume_score: float
    own_mask: np.ndarray | None = None
    own_labels: np.ndarray | None = None
    error: np.ndarray | None = None
    foreground: np.ndarray | None = None

    @property
    def label(self) -> int:
        """1 for a subject with an anomalous slice, 0 if all of its slices are healthy, -1 if that is not known."""
        if (self.labels == 1).any():
            return 1
        return 0 if (self.labels == 0).all() else -1


@dataclass(frozen=True)
class EnsembleCase(_Stored):
    """
    One subject with annotations under a method that makes several masks of it.

    Args:
        subject (`str`): Name.
        group (`str`): Subjects of one group, a patient, are drawn together for an interval.
        slices (`np.ndarray` of shape `(N,)`): Numbers of the slices in their volume.
        annotations (`np.ndarray` of shape `(N, A, H, W)`): bool.
        masks (`np.ndarray` of shape `(N, E, H, W)`): bool.
        mean, deviation (`np.ndarray` of shape `(N, H, W)`): float32, of the members, which need not be masks.
    """

    compressed: ClassVar[bool] = True
    subject: str
    group: str
    slices: np.ndarray
    annotations: np.ndarray
    masks: np.ndarray
    mean: np.ndarray
    deviation: np.ndarray


def make_case(item: dict, maps: np.ndarray, postprocessing: PostProcessing, **optional) -> Case:
    """Returns the case of a subject from the columns of its rows and its name, `item`, filtered maps `(N, H, W)`,
    float32, what says how scores are made of maps, and the optional values of a [`Case`]."""
    # Several annotators: a voxel counts as lesion where at least half of them say so.
    mask = item["mask"].mean(1) >= 0.5 if item["mask"].shape[1] and (item["label"] >= 0).all() else None
    brain = item["brain"]
    return Case(
        subject=item["subject"],
        maps=maps,
        brain=brain,
        mask=mask,
        labels=item["label"],
        slice_scores=postprocessing.score_slices(maps, brain),
        volume_score=postprocessing.score(maps, brain),
        **optional,
    )


class Needs(NamedTuple):
    """
    What a protocol needs beside maps or masks.

    Args:
        settings (`dict`): Settings instead of the checkpoint's, of the methods that have them.
        details (`dict[str, Callable]`):
            Name of an optional value of [`Case`] to the function that makes it, of slices `(N, C, H, W)`, their
            reconstruction or `None`, and the range of their values; it may return `None`.
        baselines (`Callable`):
            From the settings of the processor to a dict, name of a row to the function that makes its maps
            `(N, H, W)`, float32, of slices and their brain masks.
    """

    settings: dict = {}
    details: dict[str, Callable] = {}
    baselines: Callable[[dict], dict[str, Callable]] = lambda processor: {}


class Scores(NamedTuple):
    """What a protocol says of one method: `metrics`, `None` where undefined, `records` with values of each test case
    (of ensembles: of each image), and what else the row of the report holds."""

    metrics: dict[str, float | None]
    records: list[dict]
    more: dict = {}
