"""Validation: the loss of the averaged weights on fixed slices with fixed noise, and a picture."""

from __future__ import annotations

import numpy as np
import torch

from ..files import replacing
from ..schedulers.draws import make_keys
from .keys import PREVIEW, VALIDATION
from .samples import as_tensors, validation_rows
from .state import Run


def validate(run: Run) -> None:
    """Logs the validation loss, whose slices are spread over the processes, and draws `samples/step-*.png`."""
    accelerator, objective, loop = run.accelerator, run.objective, run.options.train
    device, split = accelerator.device, run.validation_split
    chosen = _spread(validation_rows(split, objective), loop.validation_slices)

    def read(rows: np.ndarray) -> dict[str, torch.Tensor]:
        batch = as_tensors(split.read_rows(rows.tolist(), objective.columns))
        return {name: values.to(device) for name, values in batch.items()}

    losses = torch.zeros(len(chosen), device=device)
    with run.averaged_model() as model, torch.no_grad(), accelerator.autocast():
        mine = range(accelerator.process_index, len(chosen), accelerator.num_processes)
        for start in range(0, len(mine), loop.batch_size):
            positions = list(mine[start : start + loop.batch_size])
            keys = make_keys(loop.seed, positions, VALIDATION, device)
            losses[positions] = objective.loss(model, read(chosen[positions]), keys).float()
        if accelerator.is_main_process:
            shown = _spread(chosen, 6)
            rows = objective.preview(model, read(shown), make_keys(loop.seed, shown.tolist(), PREVIEW, device))
            _draw_preview(run, rows)
    value = accelerator.reduce(losses, "sum").mean().item()
    if not np.isfinite(value):
        raise run.not_finite(f"The validation loss is {value}")
    run.log({"validation_loss": value})


def _spread(rows: np.ndarray, count: int) -> np.ndarray:
    """At most `count` of the rows, evenly spaced."""
    return rows[np.linspace(0, len(rows) - 1, min(count, len(rows))).astype(int)]


def _draw_preview(run: Run, rows: dict[str, torch.Tensor]) -> None:
    from matplotlib.figure import Figure  # late: the first step comes without it

    low, high = run.objective.processor.config.value_range
    columns = len(next(iter(rows.values())))
    figure = Figure(figsize=(1.6 * columns, 1.75 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for row, (title, images) in zip(axes, rows.items(), strict=True):
        row[0].set_title(title, loc="left", fontsize=8)
        for axis, image in zip(row, run.objective.processor.middle(images).float().cpu().numpy(), strict=True):
            axis.imshow(image[0], cmap="gray", vmin=low, vmax=high)
            axis.set_axis_off()
    samples = run.folder / "samples"
    samples.mkdir(parents=True, exist_ok=True)
    with replacing(samples / f"step-{run.progress.step:07d}.png") as unfinished:
        figure.savefig(unfinished, dpi=100)
