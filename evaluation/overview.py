"""One picture per scan: its most suspicious slices, for a first look."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np

from ..data.geometry import plane_orientation
from ..pipelines.pipeline_output import AnomalyOutput


def draw_overview(output: AnomalyOutput, path: Path, title: str, *, plane: str = "axial", slices: int = 5) -> None:
    """
    Draws the `slices` highest scored slices of a result, in radiological convention: image, pseudo-healthy image, map over
    the image (one colour scale for all slices, from 0), mask.

    Args:
        output ([`AnomalyOutput`]): Result of a volume (not of a tensor).
        path (`Path`): PNG file to write.
        title (`str`): What the scan is called.
        plane (`str`): Plane of the checkpoint's processor.
        slices (`int`): Columns at most.
    """
    from matplotlib.figure import Figure

    source = output.source
    if source is None:
        raise ValueError(
            "A result of a tensor has no picture: its image is not kept. Call the pipeline with a volume."
        )
    image = next(iter(source.arrays.values()))
    to_plane = plane_orientation(source.affine, plane)

    def in_plane(array: np.ndarray) -> np.ndarray:
        # The input's form back to (X, Y, Z), then (N, H, W).
        array = array.T[..., None] if source.is_picture else array.reshape(source.shape)
        return nib.orientations.apply_orientation(array, to_plane).transpose(2, 1, 0)

    image = nib.orientations.apply_orientation(image, to_plane).transpose(2, 1, 0)
    maps = in_plane(output.anomaly_map)
    axis = int(np.argsort(to_plane[:, 0])[2])
    scores = output.pred_score if to_plane[axis, 1] > 0 else output.pred_score[::-1]
    chosen = np.sort(np.argsort(scores)[::-1][: min(slices, len(scores))])
    zooms = np.linalg.norm(source.affine[:3, :3], axis=0)[np.argsort(to_plane[:, 0])]
    rows = {"image": image}
    if output.reconstruction is not None:
        first = output.reconstruction if output.reconstruction.ndim == source.ndim else output.reconstruction[..., 0]
        rows["pseudo-healthy"] = in_plane(first)
    rows["anomaly map"] = maps
    mask = None if output.pred_mask is None else in_plane(output.pred_mask)

    low, high = 0.0 if image.min() >= 0 else float(image.min()), float(np.quantile(image, 0.998))
    top = float(np.quantile(maps[chosen], 0.999)) or 1.0
    figure = Figure(figsize=(2.1 * len(chosen) + 0.9, 2.2 * len(rows) + 0.4), layout="constrained")
    axes = figure.subplots(len(rows), len(chosen), squeeze=False)
    for line, (title, array) in zip(axes, rows.items(), strict=True):
        for axis_, index in zip(line, chosen, strict=True):
            axis_.imshow(image[index] if array is maps else array[index], cmap="gray", vmin=low, vmax=high)
            if array is maps:
                strength = np.clip(maps[index] / top, 0.0, 1.0)
                overlay = axis_.imshow(maps[index], cmap="inferno", vmin=0.0, vmax=top, alpha=0.85 * strength**0.5)
                if mask is not None and mask[index].any():
                    axis_.contour(mask[index], [0.5], colors="tab:cyan", linewidths=0.8)
            axis_.set_aspect(zooms[1] / zooms[0])
            axis_.set_xticks([])
            axis_.set_yticks([])
        line[0].set_ylabel(title, fontsize=8)
    for axis_, index in zip(axes[0], chosen, strict=True):
        axis_.set_title(f"slice {index}, score {scores[index]:.3g}", fontsize=7)
    figure.colorbar(overlay, ax=axes, shrink=0.4, label="score").ax.tick_params(labelsize=6)
    threshold = (output.settings or {}).get("threshold")
    note = (
        ""
        if mask is None
        else "; cyan: the method's mask"
        if threshold is None
        else f"; cyan: score > {threshold:.3g}"
    )
    figure.suptitle(f"{title}: highest scored slices{note}. Research use only.", fontsize=8)
    figure.savefig(path, dpi=120)
