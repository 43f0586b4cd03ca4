"""Writes the networks of a checkpoint for programs without this library, as ONNX or as programs of torch.export.

python export.py anoddpm-flair -o exported
python export.py outputs/train/pipeline -o exported --format torch_export
python export.py anoddpm-flair -o exported --precision float16 --noise_slices 160    # noise for programs without torch

Every file takes batches of many sizes, and is compared with the network in PyTorch when it is written. What a program
needs beside them is in export.json; docs/export.md has one of 30 lines.
Research use, not a medical device.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path

from anodiff.configs import parse_options
from anodiff.running import run_script


# What a user does after a stop.
GO_ON = "Remove the folder, or name another one, and export again."


@dataclass
class ExportOptions:
    """Which checkpoint, where to."""

    checkpoint: list[str] = field(default_factory=list)
    output: str = "outputs/export"
    """Folder for the files (also -o); must not hold an export already."""
    format: str = "onnx"
    """onnx (needs the extra `onnx`), or torch_export."""
    precision: str = "float32"
    """float32, or float16 for half the size (onnx)."""
    noise_slices: int = 0
    """Also write the noise that the pipeline draws for so many slices, for programs without torch; of AnoDDPM in one
    step."""


def main(argv: list[str] | None = None) -> int:
    """Exports one checkpoint; returns 0."""
    shorthands = {"-o": "--output"}
    options = parse_options(
        ExportOptions, argv, prog="export.py", description=__doc__, positional="checkpoint", shorthands=shorthands
    )
    if len(options.checkpoint) != 1:
        raise ValueError(
            "give one checkpoint: a pipeline folder, a Hub id, or a name of `anodiff models`; got"
            f" {', '.join(options.checkpoint) or 'none'}."
        )

    from anodiff import AnomalyPipeline
    from anodiff.convert.network_export import export_networks

    (model,) = options.checkpoint
    try:
        pipeline = AnomalyPipeline.from_pretrained(model)
    except Exception as error:
        text = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{model} cannot be loaded: {text}") from error
    folder = Path(options.output)
    record = export_networks(
        pipeline, folder, options.format, options.precision, options.noise_slices, model=Path(model).name
    )
    for name, network in record["networks"].items():
        size = f"{network['bytes'] / 1e6:.2f} MB"
        print(f"{name}: {folder / network['file']}, {size}, deviates from PyTorch by {network['deviation']:.1e}")
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main, GO_ON))
