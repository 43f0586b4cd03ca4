"""Find the brain in whole synthetic heads: the training objective of the brain extractor."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F

from ..checks import check_integer
from ..data.phantoms.label_maps import LabelMaps, read_label_maps
from ..models.brain_extractor import BrainExtractor, normalize_volumes
from ..volumes.processor import VolumeProcessor
from .head_volumes import draw_heads
from .objective import Batch, Objective
from .options import TrainOptions
from .samples import label_maps_folder


class BrainExtractorObjective(Objective):
    """
    Cross entropy plus soft Dice of brains in whole heads with skull, which are drawn from label maps as the training
    goes; no scan is read. Exports a [`BrainExtractor`] alone.

    Trained and averaged: the network. Labels: the maps'.

    Args:
        model ([`BrainExtractor`]): What is trained.
        processor ([`VolumeProcessor`]): Of no importance here.
        maps ([`LabelMaps`]): What heads are made of.
        size (`tuple[int, int, int]`, defaults to `(80, 96, 80)`): Voxels of a head's volume, along RAS axes.
    """

    columns = ("map",)
    trains_unet_alone = False
    unet_classes = (BrainExtractor,)
    objective_keys = ("size",)
    trains_on = validates_on = "all"
    draws_volumes = True

    def __init__(
        self,
        model: BrainExtractor,
        processor: VolumeProcessor,
        maps: LabelMaps,
        *,
        size: tuple[int, ...] = (80, 96, 80),
    ):
        super().__init__(model, None, processor)
        if len(size) != 3:
            raise ValueError(f"`objective.size` must be three numbers, X, Y and Z, got {size!r}.")
        for side in size:
            check_integer("objective.size", side, model.factor)
            if side % model.factor:
                raise ValueError(f"`objective.size` must have sides divisible by {model.factor}, got {size!r}.")
        self.maps, self.size = maps, tuple(size)

    @classmethod
    def check_options(cls, options: TrainOptions) -> None:
        """Checks the blocks and that `data.path` is a folder of label maps; see [`Objective.check_options`]."""
        super().check_options(options)
        label_maps_folder(options.data.path)
        if options.data.streaming:
            raise ValueError("`data.streaming` must be left out: heads are drawn on this machine.")

    @classmethod
    def from_options(cls, options: TrainOptions, processor: VolumeProcessor) -> BrainExtractorObjective:
        """Builds the network and reads the label maps; see [`Objective.from_options`]."""
        cls.check_options(options)
        maps = read_label_maps(label_maps_folder(options.data.path))
        return cls(cls.make_network(options, processor), processor, maps, **options.objective)

    @classmethod
    def network_arguments(cls, network: type, channels: int) -> dict[str, tuple[int, str]]:
        """Returns nothing: a network of one channel."""
        return {}

    def loss(self, model: torch.nn.Module, batch: Batch, keys: torch.Tensor) -> torch.Tensor:
        """Computes the loss of heads of the maps `map (N,)`; see [`Objective.loss`]."""
        volumes, brains = self.draw_volumes(batch, keys)
        return extraction_loss(model(volumes).float(), brains)

    def preview(self, model: torch.nn.Module, batch: Batch, keys: torch.Tensor) -> Batch:
        """Makes rows of the middle sagittal plane of each head, its brain, and what the network takes for it."""
        volumes, brains = self.draw_volumes(batch, keys)
        found = model(volumes).float().sigmoid()
        middle = self.size[0] // 2
        rows = {"head": volumes, "brain": brains, "found": found}
        return {title: 2 * row[:, :, middle].transpose(2, 3).flip(2) - 1 for title, row in rows.items()}

    def draw_volumes(self, batch: Batch, keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Draws normalised volumes and their brains, both `(N, 1, X, Y, Z)`."""
        self.maps = self.maps.to(keys.device)
        volumes, brains = draw_heads(self.maps, batch["map"], keys, self.size, self.model.config.spacing)
        return normalize_volumes(volumes), brains

    def export(self, model: torch.nn.Module, folder: str | Path) -> None:
        """Writes the network, in float16 as it needs no more; see [`Objective.export`]."""
        saved = BrainExtractor.from_config(model.config)
        saved.load_state_dict(model.state_dict())
        saved.half().save_pretrained(folder)


def extraction_loss(logits: torch.Tensor, brains: torch.Tensor) -> torch.Tensor:
    """Computes the loss of every sample, `(N,)`, from logits and brains `(N, 1, X, Y, Z)`: cross entropy of the voxels
    plus 1 - soft Dice."""
    entropy = F.binary_cross_entropy_with_logits(logits, brains, reduction="none").mean((1, 2, 3, 4))
    share = logits.sigmoid()
    overlap = (share * brains).sum((1, 2, 3, 4))
    total = share.sum((1, 2, 3, 4)) + brains.sum((1, 2, 3, 4))
    return entropy + 1 - (2 * overlap + 1) / (total + 1)
