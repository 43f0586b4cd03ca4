"""Rules of a recipe: which slices of a volume are kept, and how subjects are divided."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..checks import check_choice, check_integer, check_number
from .layout import SPLITS
from .readers.subjects import Subject


TRAIN_RULES = ("all", "healthy_by_mask", "healthy_by_label")
MASK_RULES = ("nearest", "linear")
SPLIT_ORDERS = ("hash", "shuffle")


@dataclass(frozen=True)
class SliceRule:
    """Says which slices of a volume are kept, and what counts as lesion in them. A slice without any brain is never
    kept.

    Args:
        min_brain: Smallest fraction of the slice's pixels that must be brain, 0 to 1.
        first, last: First and last slice, counted on the network's grid from 0, both included.
        step: Take every `step`-th slice from `first` on.
        min_sum: Take the slices from the first to the last whose intensities sum to more than this: mean over
            modalities, each in units of the processor's `quantile` of its voxels > 0, summed over the slice's pixels
            on the input's grid. 0 for no limits; AnoFPDM 0.5.
        masks: How a mask comes to the network's grid: `"nearest"` voxel, or `"linear"` interpolation above 1/2, as the
            images are interpolated (AnoFPDM; a lesion smaller than about a network pixel may vanish, and its slice is
            healthy then).
        train: What is kept of the training split. `"healthy_by_mask"`: slices that no lesion touches, at the mask's
            own resolution (a lesion smaller than a network pixel counts). `"healthy_by_label"`: slices of subjects
            with label 0. `"all"`.
    """

    min_brain: float = 0.0
    first: int | None = None
    last: int | None = None
    step: int = 1
    min_sum: float = 0.0
    masks: str = "nearest"
    train: str = "all"

    def __post_init__(self):
        check_choice("slices.train", self.train, TRAIN_RULES)
        check_choice("slices.masks", self.masks, MASK_RULES)
        check_number("slices.min_brain", self.min_brain, least=0, most=1)
        check_number("slices.min_sum", self.min_sum, least=0)
        check_integer("slices.step", self.step, 1)
        if self.first is not None:
            check_integer("slices.first", self.first, 0)
        if self.last is not None:
            check_integer("slices.last", self.last, self.first or 0)


@dataclass(frozen=True)
class SplitRule:
    """Says how subjects are divided: as the data set says, or by fractions of the groups.

    Args:
        fractions: Split to its share of the groups; they sum to 1. Neither the file system nor the order of the
            subjects matters.
        seed: Of the fractions.
        order: Order that the groups are dealt in: `"hash"`, that of their hashes with the seed, which adding a group
            does not change; `"shuffle"`, AnoFPDM's: the sorted names shuffled by Python's `random`, each share rounded
            down and the last split taking the rest.
    """

    fractions: dict[str, float] | None = None
    seed: int = 0
    order: str = "hash"

    def __post_init__(self):
        check_choice("split.order", self.order, SPLIT_ORDERS)
        if self.fractions is None:
            return
        if not isinstance(self.fractions, dict):
            raise ValueError(
                f"`split.fractions` must give splits their shares, {{train: 0.7, ...}}, got {self.fractions!r}."
            )
        unknown = [name for name in self.fractions if name not in SPLITS]
        if unknown:
            raise ValueError(f"`split.fractions` must name {', '.join(SPLITS)}, got {', '.join(map(str, unknown))}.")
        for name, share in self.fractions.items():
            check_number(f"split.fractions.{name}", share)
        if min(self.fractions.values(), default=0) < 0 or abs(sum(self.fractions.values()) - 1) > 1e-6:
            raise ValueError(f"`split.fractions` must be numbers >= 0 that sum to 1, got {self.fractions}.")

    def assign(self, subjects: Sequence[Subject]) -> dict[str, str]:
        """Returns the split of every subject, by its name; raises if a group is divided, a subject has no split, or a
        split would get no group."""
        if self.fractions is None:
            split_of_group: dict[str, str] = {}
            for subject in subjects:
                if subject.split is None:
                    raise ValueError(
                        f"Subject {subject.name} has no split: give `split.fractions`, or let the reader find the"
                        " splits."
                    )
                if split_of_group.setdefault(subject.group, subject.split) != subject.split:
                    raise ValueError(
                        f"Group {subject.group} is in two splits, {split_of_group[subject.group]} and {subject.split}"
                        f" (subject {subject.name}): what is learnt from it would be tested on it."
                    )
            return {subject.name: subject.split for subject in subjects}
        given = [subject.name for subject in subjects if subject.split is not None]
        if given:
            raise ValueError(
                f"`split.fractions` is given, but the data set has splits (subject {given[0]}). Drop one."
            )
        groups = sorted({subject.group for subject in subjects})
        shares = np.array(list(self.fractions.values()))
        if self.order == "shuffle":
            random.Random(self.seed).shuffle(groups)
            ends = np.cumsum([*(int(share * len(groups)) for share in shares[:-1]), len(groups)])
            ends = np.minimum(ends, len(groups))
        else:
            groups.sort(key=lambda group: hashlib.sha256(f"{self.seed}:{group}".encode()).digest())
            ends = np.rint(np.cumsum(shares) * len(groups)).astype(int)
        split_of_group = {}
        for name, start, end in zip(self.fractions, [0, *ends], ends, strict=False):
            if self.fractions[name] > 0 and start == end:
                raise ValueError(f"`split.fractions` leaves no group for {name}: there are {len(groups)} groups.")
            split_of_group |= dict.fromkeys(groups[start:end], name)
        return {subject.name: split_of_group[subject.group] for subject in subjects}
