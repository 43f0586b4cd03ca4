from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import nibabel as nib
import numpy as np
import PIL.Image
import torch
from diffusers.utils import BaseOutput

from ..hub.configuration import plain
from ..volumes.dicom_output import write_parametric_map, write_segmentation
from ..volumes.results import (
    DICOM_FILES,
    DISPERSION_ARRAYS,
    ENSEMBLE_ARRAYS,
    IMAGE,
    MAP_ARRAYS,
    MASK,
    PICTURES,
    SCORES,
    SHARE,
    write_result,
)
from ..volumes.volume import InputVolume


@dataclass
class AnomalyOutput(BaseOutput):
    """
    What a pipeline finds in one volume. For a tensor input `(N, C, H, W)` the arrays are tensors on the network's
    grid.

    Args:
        anomaly_map (`np.ndarray` of the input's shape):
            Raw scores >= 0, float32, on the input's grid: comparable between slices and volumes of one checkpoint,
            never rescaled.
        pred_score (`np.ndarray` of shape `(N,)`):
            Score of every slice, indexed by the input's slices; 0 where a slice holds no brain.
        volume_score (`float`): The same rule over the whole volume.
        pred_mask (`np.ndarray` of the input's shape, *optional*):
            uint8, `anomaly_map > threshold`. `None` without a threshold.
        reconstruction (`np.ndarray` of the input's shape, *optional*):
            Pseudo-healthy image in the input's units; `(..., C)` for several modalities.
        slice_details (`dict[str, np.ndarray]`, *optional*):
            What else a method says of each slice, `(N, ...)` by the input's slices; NaN or -1 where a slice holds no
            brain.
        settings (`dict`): Every value that the result depends on, for the record.
        source ([`InputVolume`], *optional*): The input that results are written like; `None` for tensors.
        brain_mask (`np.ndarray` of the input's shape, *optional*):
            uint8, the brain, where the pipeline's brain extractor has found it.
        guarantee (`dict`, *optional*):
            Of a calibrated pipeline: what is promised of healthy scans, and how rare this scan is among them
            ([`~pipelines.guarantee.make_claims`]).
        probability_map (`np.ndarray` of the input's shape, *optional*):
            float32, probability of a lesion in [0, 1] at the prevalence of the calibration data, which had lesion
            masks.
        healthy_rank_map (`np.ndarray` of the input's shape, *optional*):
            float32, in [0, 1]: which share of healthy voxels has a lower score, at least; no probability of a lesion.
        warnings (`list[str]`, *optional*):
            What is to be known before the result is used, a sentence each: of a volume that lacks modalities.
    """

    anomaly_map: np.ndarray | torch.Tensor
    pred_score: np.ndarray | torch.Tensor
    volume_score: float
    pred_mask: np.ndarray | torch.Tensor | None = None
    reconstruction: np.ndarray | torch.Tensor | None = None
    slice_details: dict[str, np.ndarray] | None = None
    settings: dict | None = None
    source: InputVolume | None = None
    brain_mask: np.ndarray | None = None
    guarantee: dict | None = None
    probability_map: np.ndarray | torch.Tensor | None = None
    healthy_rank_map: np.ndarray | torch.Tensor | None = None
    warnings: list[str] | None = None

    def save(
        self, folder: str | os.PathLike, draw: Callable[[Path], None] | None = None, *, dicom: bool = True
    ) -> None:
        """
        Writes the result into `folder` (made if missing): `anomaly_map`, `pred_mask`, `reconstruction`, `brain_mask`,
        `probability_map` and `healthy_rank_map` as NIfTI with the affine of the input, or as PNG for a picture, and
        `result.json` with scores and settings.

        A PNG map has 16 bits; `result.json` holds the factor `anomaly_map_per_grey_level` that gives the raw score
        back. A reconstructed picture has 8 bits, 16 where the input exceeds 255; of several modalities each has its
        own `reconstruction_NAME.png`. An earlier result in `folder` is replaced, as a whole or not at all;
        `result.json` names the files and is written last.

        Args:
            folder (`str` or `os.PathLike`): Where to.
            draw (callable, *optional*): Writes a picture to the path that it is given: `overview.png` of the result.
            dicom (`bool`):
                Whether mask and maps of a DICOM series are written as DICOM objects of the same patient and study,
                too: `pred_mask_seg.dcm`, `anomaly_map_pm.dcm` and `probability_map_pm.dcm`.

        Raises:
            FileExistsError: A file that no earlier result wrote has a name that one of these would get.
            ValueError: A value of the record is none that JSON has, or this is the result of a tensor.
        """
        _write(folder, self.source, self, MAP_ARRAYS, "result", self.record(), draw, dicom)

    def record(self) -> dict:
        """Returns the scores, details of slices, settings and guarantee of the result, for its record."""
        record = {
            "volume_score": self.volume_score,
            "pred_score": self.pred_score,
            **{name: _no_nan(plain(values)) for name, values in (self.slice_details or {}).items()},
            "settings": self.settings,
        }
        if self.guarantee is not None:
            record["guarantee"] = self.guarantee
        if self.warnings is not None:
            record["warnings"] = self.warnings
        return record


@dataclass
class CIMDOutput(BaseOutput):
    """
    Several plausible segmentations of one volume, and how often each voxel belongs to one. For a tensor input `(N, C,
    H, W)` the arrays are tensors on the network's grid; E is the number of members.

    Deviation and agreement say how far the members are from each other: dispersion of this ensemble, not confidence of
    a diagnosis.

    Args:
        member_masks (`np.ndarray` of shape `(E, ...)`, the rest as the input):
            uint8, `member_maps > threshold`: each member is one plausible segmentation.
        member_maps (`np.ndarray` of shape `(E, ...)`):
            float32, what the members' masks are cut from, in [0, 1], mostly near its ends.
        mean_map (`np.ndarray` of the input's shape): float32, mean of the members' maps, in [0, 1].
        std_map (`np.ndarray` of the input's shape):
            float32, their standard deviation (of the population), in [0, 0.5].
        probability_map (`np.ndarray` of the input's shape):
            float32, share of the members whose mask holds the voxel, in [0, 1].
        agreement (`np.ndarray` of the input's shape): float32, share of the members on the larger side, in [0.5, 1].
        majority_mask (`np.ndarray` of the input's shape): uint8, where more than half of the members' masks are.
        settings (`dict`): Every value that the result depends on, for the record.
        source ([`InputVolume`], *optional*): The input that results are written like; `None` for tensors.
    """

    member_masks: np.ndarray | torch.Tensor
    member_maps: np.ndarray | torch.Tensor
    mean_map: np.ndarray | torch.Tensor
    std_map: np.ndarray | torch.Tensor
    probability_map: np.ndarray | torch.Tensor
    agreement: np.ndarray | torch.Tensor
    majority_mask: np.ndarray | torch.Tensor
    settings: dict | None = None
    source: InputVolume | None = None

    def save(
        self, folder: str | os.PathLike, draw: Callable[[Path], None] | None = None, *, dicom: bool = True
    ) -> None:
        """
        Writes the result into `folder` (made if missing), one file per array as NIfTI with the affine of the input,
        members along the fourth axis; or as PNG for a picture, one file per member (`member_masks_00.png`, ...); and
        `result.json` with the settings.

        PNG maps have 16 bits: 65535 is 1. Arguments and errors as of [`AnomalyOutput.save`]; in DICOM it is
        `majority_mask_seg.dcm` and `probability_map_pm.dcm`.
        """
        record = {"num_members": len(self.member_masks), "settings": self.settings}
        _write(folder, self.source, self, ENSEMBLE_ARRAYS, "result", record, draw, dicom)


@dataclass
class DispersionOutput(BaseOutput):
    """
    Maps of one volume from repeated draws, and how far they lie apart. For a tensor input `(N, C, H, W)` the arrays
    are tensors on the network's grid; E is the number of members.

    The deviation is dispersion of the draws, not confidence of a diagnosis: an error that all members share does not
    show.

    Args:
        member_maps (`np.ndarray` of shape `(E, ...)`, the rest as the input):
            float32, the raw scores >= 0 of each member.
        mean_map (`np.ndarray` of the input's shape): float32, their mean.
        dispersion (`np.ndarray` of the input's shape):
            float32, their standard deviation (of the population), in units of the score.
        pred_score (`np.ndarray` of shape `(E, N)`): Scores of the slices of each member.
        volume_score (`np.ndarray` of shape `(E,)`): Score of the volume of each member.
        seeds (`list[int]`): Seed of each member.
        first ([`AnomalyOutput`]): The whole result of the first seed, which is that of a plain call.
    """

    member_maps: np.ndarray | torch.Tensor
    mean_map: np.ndarray | torch.Tensor
    dispersion: np.ndarray | torch.Tensor
    pred_score: np.ndarray | torch.Tensor
    volume_score: np.ndarray | torch.Tensor
    seeds: list[int]
    first: AnomalyOutput

    def save(self, folder: str | os.PathLike, draw: Callable[[Path], None] | None = None) -> None:
        """
        Writes `member_maps`, `mean_map` and `dispersion` into `folder` (made if missing) as NIfTI with the affine of
        the input, members along the fourth axis; or as PNG for a picture, one file per member (`member_maps_00.png`,
        ...); and `dispersion.json` with seeds, scores and settings. `first.save(folder)` may go into the same folder.

        PNG maps have 16 bits; `dispersion.json` holds the factors that give raw scores back
        (`mean_map_per_grey_level`, ...). Arguments and errors as of [`AnomalyOutput.save`], with `dispersion.png` and
        `dispersion.json`.
        """
        record = {
            "seeds": self.seeds,
            "volume_score": self.volume_score,
            "pred_score": self.pred_score,
            "settings": {name: value for name, value in self.first.settings.items() if name != "seed"},
        }
        _write(folder, self.first.source, self, DISPERSION_ARRAYS, "dispersion", record, draw)


def _write(
    folder,
    source: InputVolume | None,
    result: BaseOutput,
    kinds: dict[str, str],
    file: str,
    record: dict,
    draw: Callable[[Path], None] | None,
    dicom: bool = False,
) -> None:
    """
    Writes the arrays of a result that there are, as NIfTI or pictures, its picture and its record, `file`.json.

    Members, the first axis of an array, lie along the fourth axis of a NIfTI file, and are a picture each.
    """
    if source is None:
        raise ValueError("A result of a tensor has no grid to be written on. Call with a volume to save the result.")
    writers: dict[str, Callable[[Path], object]] = {}
    for name, kind in kinds.items():
        array, of_members = getattr(result, name), name.startswith("member_")
        if array is None:
            continue
        if not source.is_picture:
            image = source.image(np.moveaxis(array, 0, -1) if of_members else array)
            writers[f"{name}.nii.gz"] = partial(nib.save, image)
            if dicom and source.series is not None and name in DICOM_FILES:
                write = write_segmentation if kind == MASK else write_parametric_map
                label = name.replace("_", " ")
                writers[DICOM_FILES[name]] = partial(write, series=source.series, array=array, label=label)
            continue
        if kind == SCORES:
            record[f"{name}_per_grey_level"] = float(array.max()) / 65535 or 1.0
            array = np.rint(array / record[f"{name}_per_grey_level"]).astype(np.uint16)
        elif kind == SHARE:
            array = np.rint(array * 65535).astype(np.uint16)
        elif kind == MASK:
            array = array * np.uint8(255)
        for stem, picture in _pictures(name, kind, array, source).items():
            writers[f"{stem}.png"] = PIL.Image.fromarray(picture).save
    if draw is not None:
        writers[f"{PICTURES[file]}.png"] = draw
    record = plain(record)
    try:
        json.dumps(record, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"Scores, details and settings of a result must be values that JSON has: {error}. Nothing was written."
        ) from error
    write_result(folder, file, record, writers)


def _pictures(name: str, kind: str, array: np.ndarray, source: InputVolume) -> dict[str, np.ndarray]:
    """File stems and pictures of an array: one, or one for each member or modality."""
    if name.startswith("member_"):
        return {f"{name}_{member:02d}": one for member, one in enumerate(array)}
    if kind != IMAGE:
        return {name: array}
    several, pictures = len(source.arrays) > 1, {}
    channels = np.moveaxis(array, -1, 0) if several else [array]
    for (modality, given), channel in zip(source.arrays.items(), channels, strict=True):
        levels = np.uint8 if given.max() <= 255 else np.uint16
        grey = np.clip(np.rint(channel), 0, np.iinfo(levels).max).astype(levels)
        pictures[f"{name}_{modality}" if several else name] = grey
    return pictures


def _no_nan(values):
    """JSON has no NaN: null instead."""
    if isinstance(values, list):
        return [_no_nan(value) for value in values]
    return None if values != values else values
