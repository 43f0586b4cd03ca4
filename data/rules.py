"""Rules of a recipe: which slices of a volume are kept, and how subjects are divided."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .readers.subjects import SPLITS, Subject


TRAIN_RULES = ("all", "healthy_by_mask", "healthy_by_label")
MASK_RULES = ("nearest", "linear")
SPLIT_ORDERS = ("hash", "shuffle")


@dataclass(frozen=True)
class SliceRule:
    """Which slices of a volume are kept, and what counts as lesion in them. A slice without any brain is never kept.

    Args:
        min_brain (`float`, defaults to 0.0): Smallest fraction of the slice's pixels that must be brain, 0 to 1.
        first, last (`int`, *optional*): First and last slice, counted on the network's grid from 0, both included.
        step (`int`, defaults to 1): Take every `step`-th slice from `first` on.
        min_sum (`float`, defaults to 0.0):
            Take the slices from the first to the last whose intensities sum to more than this: mean over modalities, each in units
            of the processor's `quantile` of its voxels > 0, summed over the slice's pixels on the input's grid. 0 for no limits;
            AnoFPDM 0.5.
        masks (`str`, defaults to `"nearest"`):
            How a mask comes to the network's grid: `"nearest"` voxel, or `"linear"` interpolation above 1/2, as the images are
            interpolated (AnoFPDM; a lesion smaller than about a network pixel may vanish, and its slice is healthy then).
        train (`str`, defaults to `"all"`):
            What is kept of the training split. `"healthy_by_mask"`: slices that no lesion touches, at the mask's own resolution
            (a lesion smaller than a network pixel counts). `"healthy_by_label"`: slices of subjects with label 0. `"all"`.
    """

    min_brain: float = 0.0
    first: int | None = None
    last: int | None = None
    step: int = 1
    min_sum: float = 0.0
    masks: str = "nearest"
    train: str = "all"

    def __post_init__(self):
        for name, allowed in (("train", TRAIN_RULES), ("masks", MASK_RULES)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"`slices.{name}` must be one of {', '.join(allowed)}, got {getattr(self, name)!r}.")
        for name in ("first", "last", "step"):
            value = getattr(self, name)
            if not isinstance(value, int) and not (value is None and name != "step"):
                raise ValueError(f"`slices.{name}` must be an integer, got {value!r}.")
        for name in ("min_brain", "min_sum"):
            if not isinstance(getattr(self, name), (int, float)):
                raise ValueError(f"`slices.{name}` must be a number, got {getattr(self, name)!r}.")
        if self.min_sum < 0:
            raise ValueError(f"`slices.min_sum` must not be negative, got {self.min_sum}.")
        if not 0 <= self.min_brain <= 1:
            raise ValueError(f"`slices.min_brain` must be between 0 and 1, got {self.min_brain}.")
        if self.step < 1:
            raise ValueError(f"`slices.step` must be at least 1, got {self.step}.")
        if (self.first or 0) < 0 or (self.last is not None and self.last < (self.first or 0)):
            raise ValueError(f"`slices` must have 0 <= first <= last, got first {self.first}, last {self.last}.")


@dataclass(frozen=True)
class SplitRule:
    """How subjects are divided: as the data set says, or by fractions of the groups.

    Args:
        fractions (`dict[str, float]`, *optional*):
            Split to its share of the groups; they sum to 1. Neither the file system nor the order of the subjects matters.
        seed (`int`, defaults to 0): Of the fractions.
        order (`str`, defaults to `"hash"`):
            Order that the groups are dealt in: `"hash"`, that of their hashes with the seed, which adding a group does not change;
            `"shuffle"`, AnoFPDM's: the sorted names shuffled by Python's `random`, each share rounded down and the last split
            taking the rest.
    """

    fractions: dict[str, float] | None = None
    seed: int = 0
    order: str = "hash"

    def __post_init__(self):
        if self.order not in SPLIT_ORDERS:
            raise ValueError(f"`split.order` must be one of {', '.join(SPLIT_ORDERS)}, got {self.order!r}.")
        if self.fractions is None:
            return
        if not isinstance(self.fractions, dict):
            raise ValueError(
                f"`split.fractions` must give splits their shares, {{train: 0.7, ...}}, got {self.fractions!r}."
            )
        unknown = [name for name in self.fractions if name not in SPLITS]
        if unknown:
            raise ValueError(f"`split.fractions` must name {', '.join(SPLITS)}, got {', '.join(unknown)}.")
        if min(self.fractions.values(), default=0) < 0 or abs(sum(self.fractions.values()) - 1) > 1e-6:
            raise ValueError(f"`split.fractions` must be numbers >= 0 that sum to 1, got {self.fractions}.")

    def assign(self, subjects: Sequence[Subject]) -> dict[str, str]:
        """Subject name to split; a group is in one split only.

        Raises:
            ValueError: A group is divided, a subject has no split, or a split would get no group.
        """
        if self.fractions is None:
            split_of_group: dict[str, str] = {}
            for subject in subjects:
                if subject.split is None:
                    raise ValueError(
                        f"Subject {subject.name} has no split: give `split.fractions`, or let the reader find the splits."
                    )
                if split_of_group.setdefault(subject.group, subject.split) != subject.split:
                    raise ValueError(
                        f"Group {subject.group} is in two splits, {split_of_group[subject.group]} and {subject.split} (subject"
                        f" {subject.name}): what is learnt from it would be tested on it."
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
            groups.sort(key=self._hash)
            ends = np.rint(np.cumsum(shares) * len(groups)).astype(int)
        split_of_group = {}
        for name, start, end in zip(self.fractions, [0, *ends], ends, strict=False):
            if self.fractions[name] > 0 and start == end:
                raise ValueError(f"`split.fractions` leaves no group for {name}: there are {len(groups)} groups.")
            split_of_group |= dict.fromkeys(groups[start:end], name)
        return {subject.name: split_of_group[subject.group] for subject in subjects}

    def _hash(self, group: str) -> bytes:
        return hashlib.sha256(f"{self.seed}:{group}".encode()).digest()
