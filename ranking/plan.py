"""What a benchmark will do, decided before anything runs: its rows, and why a method is none of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..configs import packaged_config, read_yaml


# Grids up to this side have the networks as configured, for 64 px; larger ones have a level more for every doubling.
LARGEST_SIDE = 96
_BASE = 64
_HEALTHY, _LABELLED, _MASKED = "healthy", "labelled", "masked"


@dataclass(frozen=True)
class Method:
    """How a method is trained in a benchmark.

    Args:
        config (`str`): File in `configs/`.
        learns_from (`str`): `"healthy"` slices, `"labelled"` ones, healthy and anomalous, or `"masked"` ones.
        pipeline (`str`, *optional*): Class of what it trains; `None` for a part of another method.
        part (`tuple[str, str]`, *optional*): The method that is trained before, and the key of the block `objective`
            that names it.
        symmetric (`bool`): Whether it needs slices in [-1, 1].
    """

    config: str
    learns_from: str
    pipeline: str | None
    part: tuple[str, str] | None = None
    symmetric: bool = False


# In the order of training; names as of `train.py`.
METHODS = {
    "dae": Method("dae_64.yaml", _HEALTHY, "DAEPipeline"),
    "anoddpm": Method("anoddpm_tcga_lgg.yaml", _HEALTHY, "AnoDDPMPipeline"),
    "andi": Method("andi_tcga_lgg.yaml", _HEALTHY, "ANDiPipeline"),
    "autoddpm": Method("autoddpm_64.yaml", _HEALTHY, "AutoDDPMPipeline", symmetric=True),
    "ddpm_2d": Method("ddpm_2d_64.yaml", _HEALTHY, "CDDPMPipeline"),
    "pddpm": Method("pddpm_64.yaml", _HEALTHY, "PDDPMPipeline"),
    "spark": Method("spark_64.yaml", _HEALTHY, None),
    "cddpm": Method("cddpm_64.yaml", _HEALTHY, "CDDPMPipeline", part=("spark", "encoder_path")),
    "sadm": Method("sadm_64.yaml", _HEALTHY, "SADMPipeline", part=("cddpm", "reconstruction_path")),
    "sadm_labelled": Method("sadm_labelled_64.yaml", _MASKED, "SADMPipeline", part=("cddpm", "reconstruction_path")),
    "anofpdm": Method("anofpdm_tcga_lgg.yaml", _LABELLED, "AnoFPDMPipeline", symmetric=True),
    "ddib": Method("ddib_64.yaml", _LABELLED, "DDIBPipeline", symmetric=True),
    "classifier": Method("classifier_64.yaml", _LABELLED, None, symmetric=True),
    "learned_sigma": Method(
        "classifier_guided_64.yaml",
        _LABELLED,
        "ClassifierGuidedPipeline",
        part=("classifier", "classifier_path"),
        symmetric=True,
    ),
}
# What `--methods` takes; the others are parts, trained where a method needs them.
RANKED = (*(name for name, method in METHODS.items() if method.pipeline), "cimd")
# A row whatever `--methods` says: what a reconstruction in one step without diffusion can do.
ALWAYS = "dae"


@dataclass(frozen=True)
class Counts:
    """Slices of a split by their label, the anomalous and unknown ones without annotation among them, and the largest
    number of annotations of a subject."""

    healthy: int = 0
    anomalous: int = 0
    unknown: int = 0
    unannotated: int = 0
    annotations: int = 0


@dataclass(frozen=True)
class Facts:
    """What of a prepared data set decides which methods can be trained on it: settings of its processor, and counts of
    its splits by their names."""

    processor: dict
    splits: dict[str, Counts]


@dataclass
class Entry:
    """One row of the plan.

    Args:
        name (`str`): Of its files and of the row.
        kind (`str`): `"training"`, `"part"` (a training that is no row), `"shipped"`, `"given"`.
        source (`str`): Configuration of a training, or what `eval.py` loads.
        reason (`str`, *optional*): Why it is not attempted.
    """

    name: str
    kind: str
    source: str
    reason: str | None = None


def make_plan(
    facts: Facts,
    methods: Sequence[str],
    given: dict[str, tuple[str, str, str | None]],
    shipped: dict[str, str | None],
) -> list[Entry]:
    """
    Plans a benchmark.

    Args:
        facts ([`Facts`]): Of the data.
        methods (sequence of `str`): Names of `RANKED`, or `["all"]`: then those are left out that a given model is of.
        given (`dict`): Models of the user: name of the row to what `eval.py` loads, its class, and why it cannot be
            evaluated on the data, or `None`.
        shipped (`dict`): Checkpoints that come with the package, each with the reason why it cannot, or `None`.

    Returns:
        list of [`Entry`]: Trainings in their order, each behind its parts, then shipped and given models.
    """
    everything = list(methods) == ["all"]
    classes = {pipeline: name for name, (_, pipeline, _) in given.items()}
    wanted = [name for name in RANKED if everything or name in methods or name == ALWAYS]
    entries: dict[str, Entry] = {}
    for name in wanted:
        method = METHODS.get(name)
        model = classes.get(method.pipeline) if method and everything else None
        if model is not None:
            entries[name] = Entry(name, "training", method.config, f"the model {model} is of this method")
        else:
            _add_training(name, facts, entries)
    rows = [entries.pop(name) for name in METHODS if name in entries] + list(entries.values())
    rows += [Entry(name, "shipped", name, reason) for name, reason in shipped.items()]
    return rows + [Entry(name, "given", source, reason) for name, (source, _, reason) in given.items()]


def _add_training(name: str, facts: Facts, entries: dict[str, Entry]) -> None:
    """Adds the entry of a method, and those of its parts if it can be trained."""
    reason, method = find_obstacle(name, facts), METHODS.get(name)
    if method is None:
        entries[name] = Entry(name, "training", "", reason)
        return
    part = method.part[0] if method.part else None
    # One that a given model stands for as a row is trained all the same where another method needs it.
    if part and reason is None and (part not in entries or entries[part].reason):
        _add_training(part, facts, entries)
    entries[name] = Entry(name, "training" if method.pipeline else "part", method.config, reason)


def find_obstacle(name: str, facts: Facts) -> str | None:
    """Returns why a method cannot be trained on a data set, or `None`."""
    if name == "cimd":
        several = max(counts.annotations for counts in facts.splits.values()) > 1
        return (
            "it makes several segmentations, which have no anomaly map to rank: train and evaluate it alone"
            if several
            else "it learns from several annotations of every slice, and there are none"
        )
    method, processor = METHODS[name], facts.processor
    if "train" not in facts.splits:
        return "there is no split `train` to learn from"
    if processor["size"] is None:
        return "the slices have no common size: prepare them with `size`"
    counts = facts.splits["train"]
    if method.learns_from == _HEALTHY and not counts.healthy + counts.unknown:
        return "the split `train` holds no healthy slice"
    if method.learns_from in (_LABELLED, _MASKED):
        if counts.unknown:
            return f"{counts.unknown} slices of the split `train` have no known label"
        if not counts.anomalous:
            return "the split `train` holds no anomalous slice: prepare it with `slices.train` all"
        if method.learns_from == _LABELLED and not counts.healthy:
            return "the split `train` holds no healthy slice"
    if method.learns_from == _MASKED and counts.unannotated:
        return f"{counts.unannotated} anomalous slices of the split `train` have no mask"
    if method.symmetric and tuple(processor["value_range"]) != (-1, 1):
        low, high = processor["value_range"]
        return f"it needs slices in [-1, 1], and these are in [{low:g}, {high:g}]"
    if name == "dae" and processor["intensity"] == "mean_std":
        return "it needs a background at the lower end of the values, which `intensity` mean_std does not give"
    factor = side_factor(name, processor["size"])
    if any(side % factor for side in processor["size"]):
        height, width = processor["size"]
        return f"its network needs sides divisible by {factor}, and slices have {height} x {width} pixels"
    obstacle = find_obstacle(method.part[0], facts) if method.part else None
    return f"it needs {method.part[0]}: {obstacle}" if obstacle else None


def extra_levels(size: Sequence[int]) -> int:
    """Returns how many levels more than for 64 px a network has for slices of a size `(H, W)`."""
    levels = 0
    while max(size) > LARGEST_SIDE * 2**levels:
        levels += 1
    return levels


def side_factor(name: str, size: Sequence[int]) -> int:
    """Returns what the sides of slices must be divisible by for a method's network."""
    if name == "spark":
        return 16  # its three stages
    widths = read_yaml(packaged_config(METHODS[name].config))["unet"]["block_out_channels"]
    return 2 ** (len(widths) - 1 + extra_levels(size))


def make_configuration(name: str, facts: Facts, data: str, parts: dict[str, str]) -> dict:
    """
    Makes the configuration of a training: the method's own for 64 px, brought to the size of the data.

    Every length in pixels grows with the longer side, areas with the pixels; networks get a level at full resolution for every
    doubling beyond 96 px. The number of steps is left to whoever knows how long one takes.

    Args:
        name (`str`): Of `METHODS`.
        facts ([`Facts`]): Of the data.
        data (`str`): What `train.py` reads them by.
        parts (`dict[str, str]`): Method to the folder of what it trained.

    Returns:
        `dict`: As a file of `configs/` holds it.
    """
    method, (height, width) = METHODS[name], facts.processor["size"]
    config = read_yaml(packaged_config(method.config))
    config.pop("processor", None)  # that of the data
    config["data"]["path"] = data
    scale = max(height, width) / _BASE
    levels = extra_levels((height, width))
    unet, scheduler, inference = (config.get(block, {}) for block in ("unet", "scheduler", "inference"))
    if levels:
        for key, at_end in (("block_out_channels", False), ("down_block_types", False), ("up_block_types", True)):
            if key in unet:
                values = unet[key]
                unet[key] = values + values[-1:] * levels if at_end else values[:1] * levels + values
        if "attention_levels" in unet:
            unet["attention_levels"] = [level + levels for level in unet["attention_levels"]]
    if "wavelength" in scheduler:
        scheduler["wavelength"] *= scale
    if "noise_resolution" in scheduler:
        scheduler["noise_resolution"] = round(scheduler["noise_resolution"] * scale)
    if "erosion" in inference:
        inference["erosion"] = round(inference["erosion"] * scale)
    if "min_component_size" in inference:
        inference["min_component_size"] = round(inference["min_component_size"] * height * width / _BASE**2)
    if "patch_size" in inference:
        # Half the longer side; where that does not fill the slice, patches overlap.
        side = min(-(-max(height, width) // 2), height, width)
        fills = height % side == 0 and width % side == 0
        inference |= {"patch_size": side, "overlap": "none" if fills else "average"}
    if method.part is not None:
        part, key = method.part
        config["objective"][key] = parts[part]
    return config
