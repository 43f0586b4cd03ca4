"""Turns a checkpoint of an original program into a pipeline folder.

    python convert.py brain_damage model.pth out/

`brain_damage`: the state dict of its `UNet2DModel`, with the notebook's schedule, noise and preprocessing.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path

from anodiff.configs import parse_options


# Method -> configuration of the package whose blocks describe network, scheduler and inference of the original.
CONFIGS = {"brain_damage": "brain_damage.yaml"}


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
    if len(options.arguments) != 3 or options.arguments[0] not in CONFIGS:
        raise SystemExit(
            f"error: three arguments are needed, METHOD ({', '.join(CONFIGS)}) CHECKPOINT OUT, got {options.arguments}."
        )
    method, checkpoint, out = options.arguments
    if Path(out).exists():
        raise SystemExit(f"error: {out} exists already; choose another folder.")

    import torch
    import yaml

    from anodiff import VolumeProcessor
    from anodiff.configs import config_path
    from anodiff.hub.model_card import make_card
    from anodiff.hub.publishing import complete_folder
    from anodiff.training.objective_noise import NoiseObjective
    from anodiff.training.options import TrainOptions

    config = yaml.safe_load(config_path(CONFIGS[method]).read_text())
    blocks = {name: config[name] for name in ("unet", "scheduler", "inference", "objective") if name in config}
    processor = VolumeProcessor.from_dict(config["processor"])
    objective = NoiseObjective.from_options(TrainOptions(**blocks), processor)
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
    try:
        objective.model.load_state_dict(state)
    except (RuntimeError, AttributeError) as error:
        raise SystemExit(
            f"error: {checkpoint} does not fit the network of {method}: {error}\nIf the weights lie under a key of the"
            f" checkpoint, name it with `--key`; keys there: {', '.join(map(str, list(state)[:8]))}, ..."
        ) from error
    pipeline = objective.export(objective.model.eval(), out)
    complete_folder(out, str(make_card(pipeline, config=config)))
    print(f"Pipeline folder written to {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
