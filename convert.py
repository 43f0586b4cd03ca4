"""Turns a checkpoint of an original program into a pipeline folder.

    python convert.py brain_damage model.pth out/
    python convert.py andi ema_ckpt.pt out/

`brain_damage`: the state dict of its `UNet2DModel`, with the notebook's schedule, noise and preprocessing. `andi`: the state dict of
ANDi's `UNet` for FLAIR, T1, T1ce and T2, with the preprocessing of the recipe `brats21_andi`.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path

from anodiff.configs import parse_options


METHODS = ("brain_damage", "andi")


@dataclass
class ConvertOptions:
    """METHOD CHECKPOINT OUT."""

    arguments: list[str] = field(default_factory=list)
    key: str | None = None
    """Key of the weights in the checkpoint, where it holds more than them."""


def main(argv: list[str] | None = None) -> int:
    """Converts; returns the exit status."""
    options = parse_options(
        ConvertOptions, argv, prog="convert.py METHOD CHECKPOINT OUT", description=__doc__, positional="arguments"
    )
    if len(options.arguments) != 3 or options.arguments[0] not in METHODS:
        raise SystemExit(
            f"error: three arguments are needed, METHOD ({', '.join(METHODS)}) CHECKPOINT OUT, got {options.arguments}."
        )
    method, checkpoint, out = options.arguments
    if Path(out).exists():
        raise SystemExit(f"error: {out} exists already; choose another folder.")

    import torch

    from anodiff.hub.model_card import make_card
    from anodiff.hub.publishing import complete_folder

    pipeline, config = _brain_damage() if method == "brain_damage" else _andi()
    # Only tensors are read: a pickle from elsewhere could run code.
    if not Path(checkpoint).is_file():
        raise SystemExit(f"error: there is no file {checkpoint}.")
    state = torch.load(checkpoint, map_location="cpu", weights_only=True)
    if options.key is not None and options.key not in state:
        raise SystemExit(
            f"error: {checkpoint} has no key {options.key!r}; it has {', '.join(map(str, list(state)[:8]))}."
        )
    state = state if options.key is None else state[options.key]
    state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    if method == "andi":
        state = transpose_kernels(pipeline.unet.convert_original_state_dict(state))
    try:
        pipeline.unet.load_state_dict(state)
    except (RuntimeError, AttributeError) as error:
        raise SystemExit(
            f"error: {checkpoint} does not fit the network of {method}: {error}\nIf the weights lie under a key of the"
            f" checkpoint, name it with `--key`; keys there: {', '.join(map(str, list(state)[:8]))}, ..."
        ) from error
    pipeline.unet.eval()
    pipeline.save_pretrained(out)
    complete_folder(out, str(make_card(pipeline, config=config)))
    print(f"Pipeline folder written to {out}")
    return 0


def transpose_kernels(state: dict) -> dict:
    """
    Weights of a network that sees transposed images.

    The originals cut volumes as `array[:, :, k]`, so that H is the axis from right to left; our slices have it along W. Nothing
    but the kernels of a convolutional network knows which axis is which.
    """
    return {name: tensor.mT.contiguous() if tensor.ndim == 4 else tensor for name, tensor in state.items()}


def _brain_damage():
    """Pipeline with untrained weights, and its configuration."""
    import yaml

    from anodiff import AnoDDPMPipeline, VolumeProcessor
    from anodiff.configs import config_path
    from anodiff.training.objective_noise import NoiseObjective
    from anodiff.training.options import TrainOptions

    config = yaml.safe_load(config_path("brain_damage.yaml").read_text())
    blocks = {name: config[name] for name in ("unet", "scheduler", "inference", "objective") if name in config}
    processor = VolumeProcessor.from_dict(config["processor"])
    objective = NoiseObjective.from_options(TrainOptions(**blocks), processor)
    return AnoDDPMPipeline(objective.model, objective.scheduler, processor, **objective.inference), config


def _andi():
    """Pipeline with untrained weights; its configuration is that of the classes."""
    from anodiff import ANDiPipeline, ANDiScheduler, ANDiUNet2DModel, VolumeProcessor
    from anodiff.data.preparation import read_recipe

    processor = VolumeProcessor.from_dict(read_recipe("brats21_andi")["processor"])
    return ANDiPipeline(ANDiUNet2DModel(), ANDiScheduler(), processor), None


if __name__ == "__main__":
    sys.exit(main())
