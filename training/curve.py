"""How the losses of a training went, of its log."""

from __future__ import annotations

import json
from pathlib import Path

from ..files import read_text, replacing


def read_losses(log: Path, name: str) -> list[dict]:
    """Returns the lines of `log.jsonl` that hold the loss `name` (`loss` or `validation_loss`), each `{"step": 100, name:
    0.5}`, in their order."""
    lines = [json.loads(line) for line in read_text(log).splitlines()] if log.exists() else []
    return [{"step": line["step"], name: line[name]} for line in lines if name in line]


def draw_curve(log: Path, path: Path) -> None:
    """Draws the losses of `log.jsonl` by step into a PNG file."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3), layout="constrained")
    axis = figure.subplots()
    for name, style in (
        ("loss", {"linewidth": 0.6, "color": "0.6"}),
        ("validation_loss", {"marker": ".", "color": "k"}),
    ):
        losses = read_losses(log, name)
        axis.plot(
            [line["step"] for line in losses], [line[name] for line in losses], label=name.replace("_", " "), **style
        )
    axis.set_xlabel("step")
    axis.set_yscale("log")
    axis.legend(frameon=False)
    with replacing(path) as unfinished:
        figure.savefig(unfinished, dpi=120)
