"""Finds what stands on both sides of a split: groups (patients) with one name, and slices that are nearly the same
picture."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import PIL.Image
import scipy.fft

from ..files import replacing
from .prepared import PreparedSplit, list_splits, load_prepared


# N slices, P pixels of a thumbnail.

_MAX_DISTANCE = 10  # bits of 64 in which the hashes of a pair may differ
_MIN_CORRELATION = 0.97  # of the pixels of a pair
_MIN_BRAIN = 0.02  # slices with a smaller share look all alike and are passed over
_THUMBNAIL = 32
_BATCH = 256
_BLOCK = 2048


@dataclass(frozen=True)
class Leak:
    """Describes one finding.

    Args:
        kind: `"group"`: subjects of one group (or one name) in two splits. `"slices"`: pictures that are nearly the
            same.
        set_a, split_a, subject_a, set_b, split_b, subject_b: Where; `subject_a` holds the group's name for `"group"`.
        slices: Slices of `subject_a` that have a twin in `subject_b`; 0 for a group.
        slice_a, slice_b: The most similar pair, on the networks' grids; -1 for a group.
        distance: Bits of 64 in which its hashes differ; -1 for a group.
        correlation: Of its pixels; 0 for a group.
    """

    kind: str
    set_a: str
    split_a: str
    subject_a: str
    set_b: str
    split_b: str
    subject_b: str
    slices: int = 0
    slice_a: int = -1
    slice_b: int = -1
    distance: int = -1
    correlation: float = 0.0

    def __str__(self) -> str:
        where_a, where_b = f"{self.split_a} of {self.set_a}", f"{self.split_b} of {self.set_b}"
        if self.kind == "group":
            return f"group {self.subject_a} is in {where_a} and in {where_b}"
        return (
            f"{self.slices} slice{'s' if self.slices > 1 else ''} of {self.subject_a} in {where_a} nearly equal slices"
            f" of {self.subject_b} in {where_b}: slices {self.slice_a} and {self.slice_b} differ in {self.distance} of"
            f" 64 bits and correlate by {self.correlation:.4f}"
        )


def find_leaks(paths: Sequence[str | Path]) -> list[Leak]:
    """
    Compares the splits of prepared data sets (folders, ids on the Hub, names of phantoms) with each other: what has
    different names (train and test) must share nothing, be it in one data set or in several. What is alike within
    train, or within test, is no leak. Returns groups first, then pairs of subjects, the most slices first.

    A slice is cut to the box of its brain and brought to 32 x 32 pixels (the mean of its modalities), so that it is
    found again after a shift, a margin or a change of size. Pairs whose 64-bit perceptual hashes (signs of the lowest
    8 x 8 cosine frequencies about their median) differ in few bits are confirmed by the correlation of their pixels:
    registered brains of different people have similar hashes. A mirrored slice, or one turned by 90 degrees, is not
    found.
    """
    splits = {(str(path), name): load_prepared(path, name) for path in paths for name in list_splits(path)}
    if len({name for _, name in splits}) < 2:
        found = ", ".join(f"{name} of {path}" for path, name in splits)
        raise ValueError(f"There is nothing to compare: two different splits are needed, and there is only {found}.")
    groups = {
        key: {row["group"] for row in split.subject_info.values()} | set(split.subject_info)
        for key, split in splits.items()
    }
    leaks, sides = [], list(splits)
    signatures = {key: _Signatures(split) for key, split in splits.items()}
    alike: list[Leak] = []
    for index, a in enumerate(sides):
        for b in sides[index + 1 :]:
            if a[1] == b[1]:
                continue
            leaks += [Leak("group", *a, name, *b, name) for name in sorted(groups[a] & groups[b])]
            alike += _compare(a, signatures[a], b, signatures[b])
    return leaks + sorted(alike, key=lambda leak: (-leak.slices, leak.subject_a, leak.subject_b))


def write_leaks(leaks: Sequence[Leak], path: str | Path) -> None:
    """Writes findings as CSV, whole or not at all; without any, the header only."""
    with replacing(path) as unfinished, open(unfinished, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Leak)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(map(asdict, leaks))


def hash_pictures(thumbnails: np.ndarray) -> np.ndarray:
    """Returns perceptual hashes `(N, 64)` bool of pictures `(N, 32, 32)`."""
    low = scipy.fft.dctn(thumbnails, axes=(1, 2), norm="ortho")[:, :8, :8].reshape(len(thumbnails), 64)
    # The first is the mean grey value, which says nothing of the picture.
    return low > np.median(low[:, 1:], axis=1, keepdims=True)


class _Signatures:
    """Holds hashes and thumbnails of the slices of a split that have enough brain."""

    def __init__(self, split: PreparedSplit):
        thumbnails, kept = [np.zeros((0, _THUMBNAIL, _THUMBNAIL), np.float32)], []
        for start in range(0, len(split), _BATCH):
            rows = np.arange(start, min(start + _BATCH, len(split)))
            batch = split.read_rows(rows, ("image", "brain"))
            for row, image, brain in zip(rows, batch["image"].mean(1), batch["brain"], strict=True):
                if brain.mean() < _MIN_BRAIN:
                    continue
                inside = np.argwhere(brain)
                (top, left), (bottom, right) = inside.min(0), inside.max(0) + 1
                picture = PIL.Image.fromarray(np.ascontiguousarray(image, dtype=np.float32)).resize(
                    (_THUMBNAIL, _THUMBNAIL), PIL.Image.Resampling.BILINEAR, box=(left, top, right, bottom)
                )
                if np.asarray(picture).std() > 1e-6:
                    thumbnails.append(np.asarray(picture)[None])
                    kept.append(row)
        pictures = np.concatenate(thumbnails)
        # +1 and -1: a product of two hashes is 64 - 2 x distance.
        self.hashes = np.where(hash_pictures(pictures), 1.0, -1.0).astype(np.float32)
        flat = pictures.reshape(len(pictures), -1) - pictures.mean((1, 2))[:, None]
        self.pixels = (flat / np.linalg.norm(flat, axis=1, keepdims=True)).astype(np.float32)
        batch = split.read_rows(kept, ("subject", "slice"))
        self.subjects, self.slices = batch["subject"], batch["slice"]


def _compare(a: tuple[str, str], one: _Signatures, b: tuple[str, str], other: _Signatures) -> list[Leak]:
    found: dict[tuple[str, str], list[tuple[float, int, int, int]]] = {}
    for start in range(0, len(one.hashes), _BLOCK):
        bits = (64 - one.hashes[start : start + _BLOCK] @ other.hashes.T) / 2
        for i, j in np.argwhere(bits <= _MAX_DISTANCE):
            similarity = float(one.pixels[start + i] @ other.pixels[j])
            if similarity >= _MIN_CORRELATION:
                pair = (str(one.subjects[start + i]), str(other.subjects[j]))
                where = (int(one.slices[start + i]), int(other.slices[j]))
                found.setdefault(pair, []).append((similarity, int(bits[i, j]), *where))
    leaks = []
    for (subject_a, subject_b), pairs in found.items():
        similarity, bits_apart, slice_a, slice_b = max(pairs, key=lambda pair: (pair[0], -pair[1]))
        count = len({pair[2] for pair in pairs})
        where = (*a, subject_a, *b, subject_b)
        leaks.append(Leak("slices", *where, count, slice_a, slice_b, bits_apart, round(min(similarity, 1.0), 6)))
    return leaks
