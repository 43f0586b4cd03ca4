"""What a prediction can be told. No torch here: `--help` must be fast."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, fields
from typing import Any

from ..checks import check_choice


@dataclass
class PredictOptions:
    """Which scans, which model, where to."""

    scans: list[str] = field(default_factory=list)
    """Files, folders, patterns in quotes, tables (.tsv) with a row per subject, or - for a list in standard input."""
    model: str = ""
    """Pipeline folder, Hub id, or name of a checkpoint that comes with the package (`anodiff models` lists them); by
    default the one of these that fits the modality."""
    modality: str | None = None
    """What the scans are, flair, t1, t2, ..., where no model is named and their names do not say it."""
    output: str = "outputs/predict"
    """Folder that gets one folder per scan (also -o)."""
    brain: str | None = None
    """Name of the brain mask that lies beside each scan, such as brain.nii.gz."""
    atlas: str | None = None
    """Image of labels on the grid of the scans, for a table by region: the name of a file beside each scan, such as
    aparc.nii.gz, or the path (./atlas.nii.gz) of one for all of them."""
    atlas_names: str | None = None
    """Names of the labels: a TSV file with the columns index and name."""
    threshold: float | None = None
    """Threshold of the mask instead of the checkpoint's."""
    inference: dict[str, Any] = field(default_factory=dict)
    """Inference values instead of the checkpoint's: noise_level, mode, num_draws, ..."""
    seed: int = 0
    """Seed of the draws."""
    dispersion: int = 0
    """Draws, 2 or more, with this seed and the following ones: their maps, mean and deviation are written too; 0 for
    none."""
    batch_size: int | None = None
    """Slices and draws that share one evaluation of the network; by default 16 on a CPU, and on a GPU as many as fill
    it."""
    fast: bool = False
    """What is fastest on this device: on a GPU bf16 weights and a compiled network, which pays for many scans, on a CPU
    another memory format."""
    mixed_precision: str | None = None
    """no, bf16 or fp16: type of the networks' weights, instead of what `fast` chooses; no is float32."""
    device: str | None = None
    """cuda, cuda:1, cpu, ...; a GPU where there is one."""
    overwrite: bool = False
    """Replace results that are already there."""
    skip_existing: bool = False
    """Leave out scans whose results are there, whole and of the same images, whatever options they were made with."""
    shard: str | None = None
    """The part of the scans that this command takes, such as 2/8, for job arrays; all parts go into one folder."""
    dicom_output: bool = True
    """Write masks and maps of DICOM series as DICOM objects, too; they hold the patient's name as the series does."""
    report: str = "html"
    """html for report.html, a page with all scans in a viewer, or none."""

    def check(self) -> None:
        """Raises a `ValueError` for options that cannot be meant together, before anything is loaded."""
        if self.model and self.modality:
            raise ValueError("`--modality` chooses a model where none is named: leave it out with `--model`.")
        if not self.scans:
            raise ValueError("no scan given: files, or folders of scans.")
        if self.dispersion < 0 or self.dispersion == 1:
            raise ValueError(f"`--dispersion` must be 0, for none, or at least 2, got {self.dispersion}.")
        if self.overwrite and self.skip_existing:
            raise ValueError("`--overwrite` replaces results, and `--skip_existing` keeps them: give one of them.")
        if self.atlas_names is not None and self.atlas is None:
            raise ValueError("`--atlas_names` names the regions of `--atlas`: give both.")
        check_choice("report", self.report, ("html", "none"))
        self.part()

    def part(self) -> tuple[int, int]:
        """Returns which part of the scans is meant, and of how many: `(1, 1)` without `--shard`."""
        match = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", "1/1" if self.shard is None else self.shard)
        number, count = map(int, match.groups()) if match else (0, 0)
        if not 1 <= number <= count:
            raise ValueError(f"`--shard` must be NUMBER/COUNT, from 1/COUNT to COUNT/COUNT, got {self.shard!r}.")
        return number, count


# What the level `group` of a BIDS data set reads.
_OF_GROUPS = ("places", "participant_label", "session_label", "run_label", "acquisition_label", "brain")


@dataclass
class BidsOptions:
    """Which data set, where to, which scans, which model."""

    places: list[str] = field(default_factory=list)
    participant_label: list[str] = field(default_factory=list)
    """Participants, with or without sub-; all by default."""
    session_label: list[str] = field(default_factory=list)
    """Sessions, with or without ses-; all by default."""
    run_label: list[str] = field(default_factory=list)
    """Runs, of images that have a run."""
    acquisition_label: list[str] = field(default_factory=list)
    """Acquisitions (acq), of images that have one."""
    model: str = ""
    """Pipeline folder, Hub id, or name of a checkpoint that comes with the package (`anodiff models` lists them); by
    default the one of these that fits the modality."""
    modality: str | None = None
    """Which images are meant, flair, t1, t2, ..., where no model says it and the data set has several."""
    brain: str | None = None
    """Data set of derivatives with the brain mask of each scan on its grid, NAME_desc-brain_mask.nii.gz."""
    threshold: float | None = None
    """Threshold of the mask instead of the checkpoint's."""
    seed: int = 0
    """Seed of the draws."""
    batch_size: int | None = None
    """Slices and draws that share one evaluation of the network; by default 16 on a CPU, and on a GPU as many as fill
    it."""
    fast: bool = False
    """What is fastest on this device: on a GPU bf16 weights and a compiled network, which pays for many scans, on a CPU
    another memory format."""
    device: str | None = None
    """cuda, cuda:1, cpu, ...; a GPU where there is one."""
    overwrite: bool = False
    """Replace results that are already there."""
    skip_existing: bool = False
    """Leave out scans whose results are there, whole and of the same images, whatever options they were made with."""

    def check(self, level: str) -> None:
        """Raises a `ValueError` for options that cannot be meant together, or not at a level, before anything is
        loaded."""
        if self.overwrite and self.skip_existing:
            raise ValueError("`--overwrite` replaces results, and `--skip_existing` keeps them: give one of them.")
        others = [one for one in fields(self) if one.name not in _OF_GROUPS]
        unused = [f"`--{one.name}`" for one in others if getattr(self, one.name) != one.default]
        if level == "group" and unused:
            raise ValueError(f"{', '.join(unused)}: for `participant` only, as `group` reads results as they are.")
