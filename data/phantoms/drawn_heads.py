"""Slices of synthetic heads that are drawn when a training asks for them, a new head for every slice."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from ...checks import check_choice, check_integer
from ...schedulers.draws import fold_in, integers, make_keys
from ...volumes.processor import BRAIN_LEVEL, VolumeProcessor
from .head_draws import HeadDraws
from .heads import CONTRASTS, HEADS, make_slices
from .label_maps import read_label_maps, split_maps


# What `data.path` of a training begins with, before the folder of label maps.
DRAWN = "heads:"
# Numbers that keys of heads are made of with a seed, one for each split, apart from those of `write_heads`.
_STREAMS = {"train": 21, "validation": 22, "test": 23}
_CHOICE, _PLACE = 31, 32
# Planes, rows and columns, and their distance in mm, of the coarse volume that a head is measured on.
_PLANES, _PLANE_DISTANCE, _COARSE_SIZE, _COARSE_SPACING = 17, 10.0, (38, 30), 6.0
# A slice has at least this share of the area of the largest one.
_LEAST_AREA = 0.2
# In mm.
_THINNEST, _THICKEST = 1.0, 6.5
# Of a slice's thickness, whatever it is: a slice must not depend on the others of its batch.
_SAMPLES = 5


class DrawnHeads:
    """
    Draws healthy slices of synthetic heads by number, as `processor` would make them of the whole head: cut to the
    brain's bounding box, brought to the network's size, brightness by the median of the brain.

    Training, validation and test draw from different label maps where there are three or more.

    Args:
        folder: Of label maps, see [`~data.phantoms.label_maps.read_label_maps`].
        processor ([`VolumeProcessor`]):
            Its modalities name the contrasts, of `CONTRASTS`; each is a channel, and with its `context` those of the
            neighbouring slices are, too. Slices lie side by side; one without brain is replaced by the next one towards
            the middle.
        split (`str`): `"train"`, `"validation"` or `"test"`.
        seed (`int`): Of the heads.
        count (`int`): Slices that there are, numbered from 0; a training draws as many as it takes.
        device: Where they are made.

    Raises:
        ValueError: The processor asks for what cannot be drawn.
    """

    def __init__(
        self,
        folder: str | Path,
        processor: VolumeProcessor,
        split: str,
        *,
        seed: int = 0,
        count: int = 256,
        device: torch.device | str = "cpu",
    ):
        check_choice("split", split, _STREAMS)
        check_integer("count", count, 1)
        config = processor.config
        wanted = {"plane": "axial", "spacing": None, "crop": "brain", "resize": "fit", "intensity": "brain_median"}
        different = [name for name, value in wanted.items() if config[name] != value]
        unknown = [name for name in config.modalities if name not in CONTRASTS]
        if different or unknown or config.size is None:
            raise ValueError(
                "Heads are drawn for a `processor` with"
                f" {', '.join(f'`{name}` {value}' for name, value in wanted.items())}, a `size`, and `modalities` of"
                f" {', '.join(CONTRASTS)}; got {', '.join(f'{name} {config[name]}' for name in different) or 'those'},"
                f" size {config.size}, modalities {', '.join(config.modalities)}. Make a data set for other"
                " processors: preprocess.py --heads."
            )
        self.split, self.seed, self.processor = split, seed, processor
        self.device = torch.device(device)
        maps = read_label_maps(folder)
        numbers = split_maps(len(maps))[split]
        self._first, self._count = numbers[0], len(numbers)
        self.maps = maps.to(self.device)
        self.labels = np.zeros(count, np.int64)
        self.processor_settings = processor.settings()
        self.modalities = tuple(config.modalities)
        self.subjects = list(maps.names[self._first : self._first + self._count])
        digest = hashlib.sha256(maps.tissues.numpy().tobytes() + repr(maps.names).encode()).hexdigest()
        self.recipe = {
            "source": f"{HEADS} of anodiff, {', '.join(self.modalities)}, label maps {Path(folder).resolve().name}",
            "license": "apache-2.0",
            "processor": self.processor_settings,
            "slices": {"train": "healthy_by_label"},
            "label_maps": digest,
        }
        self.subject_info = {}

    def __len__(self) -> int:
        return len(self.labels)

    def count_rows(self, population: str = "all") -> int:
        """Returns the number of slices of one of `data.prepared.POPULATIONS`: all are healthy, none is annotated."""
        return 0 if population == "annotated" else len(self)

    def rows_of(self, population: str) -> np.ndarray:
        """Returns the numbers of the slices of a population, int64, rising."""
        return np.arange(self.count_rows(population))

    def read_rows(self, rows: Sequence[int], columns: Sequence[str]) -> dict[str, np.ndarray]:
        """Draws the slices with these numbers, as [`~data.prepared.PreparedSplit.read_rows`] reads them."""
        return {name: values.cpu().numpy() for name, values in self.draw(rows, columns).items()}

    @torch.no_grad()
    def draw(self, numbers: Sequence[int], columns: Sequence[str] = ("image",)) -> dict[str, torch.Tensor]:
        """
        Draws the slices with these numbers, 0 and more, whatever `count` is.

        Returns:
            `dict` with those of `columns` that there are, on the device: `image (N, C, H, W)` float32 in the
            processor's value range, C its `channels`, `mask (N, 1, H, W)` uint8 without any lesion, `brain (N, H, W)`
            bool, `label (N,)` int64, 0.
        """
        config, count, context = self.processor.config, len(numbers), self.processor.config.context
        keys = make_keys(self.seed, list(numbers), _STREAMS[self.split], self.device)
        chosen = self._first + integers(fold_in(keys, _CHOICE), self._count)
        draws, options = HeadDraws(keys), {"contrasts": self.modalities, "mask_errors": True}
        positions, spacing, centre, median = self._measure(chosen, draws, options)
        u = draws.of(_PLACE, 1).uniform(1)
        thickness = _THINNEST + (_THICKEST - _THINNEST) * u
        heads = make_slices(
            self.maps,
            chosen,
            draws,
            positions[:, None] + torch.arange(-context, context + 1, device=self.device) * thickness,
            size=tuple(config.size),
            spacing=spacing,
            centre=centre,
            thickness=thickness[:, 0],
            samples=_SAMPLES,
            **options,
        )
        images = heads.images * heads.brain[:, None] / median[..., None, None, None] * BRAIN_LEVEL
        planes, brain = list(images.unbind(2)), heads.brain[:, context]
        for step in (-1, 1):
            for plane in range(context + step, context + step * (context + 1), step):
                empty = ~heads.brain[:, plane].flatten(1).any(1)
                planes[plane] = torch.where(empty[:, None, None, None], planes[plane - step], planes[plane])
        images = torch.cat(planes, 1)
        made = {
            "image": self.processor.from_unit(images.clamp(0, 1) if config.clip else images),
            "mask": torch.zeros(count, 1, *config.size, dtype=torch.uint8, device=self.device),
            "brain": brain,
            "label": torch.zeros(count, dtype=torch.long, device=self.device),
        }
        return {name: made[name] for name in columns if name in made}

    def _measure(self, chosen: torch.Tensor, draws: HeadDraws, options: dict) -> tuple[torch.Tensor, ...]:
        """Measures whole heads on a coarse grid: a random position `(N,)` of a slice in each, size `(N,)` and centre
        `(N, 2)` of the slice's pixels, all in mm, and the median brightness `(N, C)` of the brain."""
        planes = (torch.arange(_PLANES, device=self.device) - (_PLANES - 1) / 2) * _PLANE_DISTANCE
        coarse = make_slices(
            self.maps,
            chosen,
            draws,
            planes.expand(len(draws), -1),
            size=_COARSE_SIZE,
            spacing=_COARSE_SPACING,
            **options,
        )
        brain = coarse.brain
        area = brain.flatten(2).sum(2)
        weights = (area > _LEAST_AREA * area.amax(1, keepdim=True)).float().cumsum(1)
        u = draws.of(_PLACE).uniform(2)
        plane = torch.searchsorted(weights, u[:, :1] * weights[:, -1:], right=True).clamp(max=_PLANES - 1)[:, 0]
        positions = planes[plane] + (u[:, 1] - 0.5) * _PLANE_DISTANCE

        # The bounding box over all planes, rows from anterior, columns from the right.
        ends, middles = [], []
        for axis, length in ((2, _COARSE_SIZE[0]), (1, _COARSE_SIZE[1])):
            there = brain.any(1).any(axis)
            first = there.float().argmax(1)
            last = length - 1 - there.flip(1).float().argmax(1)
            ends.append((last - first + 1) * _COARSE_SPACING)
            middles.append(((length - 1) / 2 - (first + last) / 2) * _COARSE_SPACING)
        height, width = self.processor.config.size
        spacing = torch.maximum(ends[0] / height, ends[1] / width)
        values = coarse.images.masked_fill(~brain[:, None] | (coarse.images <= 0), torch.nan).flatten(2)
        return positions, spacing, torch.stack(middles, 1), values.nanmedian(2).values
