"""Maps of volumes that lack modalities which the network was trained to do without."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..checks import check_choice


# N slices, C modalities, H x W pixels.


def check_modalities(pipeline, present: Sequence[str] | None) -> None:
    """Raises a `ValueError` unless `optional_modalities` of the configuration are those of the processor, and the
    network does without all that are not among `present`."""
    if pipeline.config.optional_modalities is not None:
        pipeline.modality_channels(pipeline.config.optional_modalities, "optional_modalities")
    pipeline.modality_channels(present, "present_modalities")
    known = pipeline.processor.config.modalities
    needed = [name for name in known if present is not None and name not in (*present, *pipeline.may_lack)]
    if needed:
        raise ValueError(
            f"`present_modalities` must hold {', '.join(needed)}, which this checkpoint does not do without, got"
            f" {list(present)!r}. Training with `objective.modality_dropout` makes checkpoints that do without some."
        )


def find_present(pipeline, prepared, wanted: Sequence[str] | None) -> list[str] | None:
    """
    Returns the modalities that a map is made of, in the processor's order; `None` for all of them.

    Args:
        prepared ([`~pipelines.slices.PreparedSlices`]): Of the volume; a tensor has all modalities.
        wanted (sequence of `str`, *optional*): Those that count as there; all that the volume has by default.

    Raises:
        ValueError: The volume lacks one of the wanted ones.
    """
    known = list(pipeline.processor.config.modalities)
    given = known if prepared.processed is None else list(prepared.processed.source.arrays)
    for name in wanted or ():
        check_choice("present_modalities", name, given)
    present = [name for name in known if name in (wanted or given)]
    return None if present == known else present


def describe_missing(pipeline, present: Sequence[str] | None, threshold: float | None) -> list[str]:
    """
    Returns what is to be said of a map that is made of the modalities `present`: which are missing, and what was
    measured on all of them.

    Args:
        threshold (`float`, *optional*): Of the checkpoint, if the mask was cut at it.
    """
    if present is None:
        return []
    missing = [name for name in pipeline.processor.config.modalities if name not in present]
    notes = [f"Without {', '.join(missing)}: the map is made of {', '.join(present)} alone."]
    if threshold is not None:
        notes.append(
            f"The threshold {threshold:g} was set with all modalities: `anodiff eval --inference.present_modalities"
            f" '[{','.join(present)}]'` measures one for these, and `threshold` takes it."
        )
    if pipeline.postprocessing.normalization != "none":
        notes.append("The map is divided by healthy maps that were measured with all modalities.")
    return notes


def hide_missing(pipeline, slices: torch.Tensor, present: Sequence[str] | None) -> torch.Tensor:
    """Returns what the network sees of slices `(N, C, H, W)`, noised or not: the lowest value of the processor's range,
    without noise, in the channels of all modalities that are not `present`."""
    if present is None:
        return slices
    hidden = torch.full_like(slices, pipeline.processor.config.value_range[0])
    count = len(pipeline.processor.config.modalities)
    # One by one, as a list of indices would be waited for on a GPU. Channels of neighbouring slices follow each other.
    for channel in pipeline.modality_channels(present):
        hidden[:, channel::count] = slices[:, channel::count]
    return hidden
