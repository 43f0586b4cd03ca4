"""One picture per scan: its most suspicious slices, for a first look."""

from __future__ import annotations

import textwrap
from pathlib import Path

import nibabel as nib
import numpy as np

from ..pipelines.output import AnomalyOutput, CIMDOutput, DispersionOutput
from ..volumes.geometry import plane_orientation
from ..volumes.volume import InputVolume


DISPERSION_NOTE = "Deviation is dispersion, not confidence. Research use only."


def draw_overview(output: AnomalyOutput, path: Path, title: str, *, plane: str = "axial", slices: int = 5) -> None:
    """Draws the `slices` highest scored slices of the result of a volume (not of a tensor) into a PNG file, in
    radiological convention: image, pseudo-healthy image, map over the image (one colour scale for all slices, from 0),
    mask. `plane` is that of the checkpoint's processor."""
    from matplotlib.figure import Figure

    source = output.source
    in_plane, to_plane, zooms, image, (low, high) = _read_image(source, plane)
    maps = in_plane(output.anomaly_map)
    axis = int(np.argsort(to_plane[:, 0])[2])
    scores = output.pred_score if to_plane[axis, 1] > 0 else output.pred_score[::-1]
    chosen = np.sort(np.argsort(scores)[::-1][: min(slices, len(scores))])
    rows = {"image": image}
    if output.reconstruction is not None:
        first = output.reconstruction if output.reconstruction.ndim == source.ndim else output.reconstruction[..., 0]
        rows["pseudo-healthy"] = in_plane(first)
    rows["anomaly map"] = maps
    mask = None if output.pred_mask is None else in_plane(output.pred_mask)

    top = float(np.quantile(maps[chosen], 0.999)) or 1.0
    figure = Figure(figsize=(2.1 * len(chosen) + 0.9, 2.2 * len(rows) + 0.4), layout="constrained")
    axes = figure.subplots(len(rows), len(chosen), squeeze=False)
    for line, (label, array) in zip(axes, rows.items(), strict=True):
        for axis_, index in zip(line, chosen, strict=True):
            axis_.imshow(image[index] if array is maps else array[index], cmap="gray", vmin=low, vmax=high)
            if array is maps:
                strength = np.clip(maps[index] / top, 0.0, 1.0)
                overlay = axis_.imshow(maps[index], cmap="inferno", vmin=0.0, vmax=top, alpha=0.85 * strength**0.5)
                if mask is not None and mask[index].any():
                    axis_.contour(mask[index], [0.5], colors="tab:cyan", linewidths=0.8)
        line[0].set_ylabel(label, fontsize=8)
    for axis_, index in zip(axes[0], chosen, strict=True):
        axis_.set_title(f"slice {index}, score {scores[index]:.3g}", fontsize=7)
    _finish_axes(axes, zooms)
    add_bar(figure, overlay, axes, "score", 0.4)
    threshold = (output.settings or {}).get("threshold")
    contour = "the method's mask" if threshold is None else f"score > {threshold:.3g}"
    note = "" if mask is None else f"; cyan: {contour}"
    _add_heading(figure, f"{title}: highest scored slices{note}. Research use only.")
    figure.savefig(path, dpi=120)


def draw_members(
    output: CIMDOutput | DispersionOutput,
    path: Path,
    title: str,
    *,
    plane: str = "axial",
    slices: int = 5,
    members: int = 4,
) -> None:
    """Draws the ensemble of a volume in radiological convention, arguments as of [`draw_overview`], a line for each of
    the `slices` where its mean is highest: image, the first `members`, mean and deviation. Masks of CIMD are filled
    over the image, maps of an anomaly pipeline share one colour scale."""
    from matplotlib.figure import Figure

    of_masks = isinstance(output, CIMDOutput)
    source = output.source if of_masks else output.first.source
    in_plane, _, zooms, image, (low, high) = _read_image(source, plane)
    shown = [in_plane(one) for one in (output.member_masks if of_masks else output.member_maps)[:members]]
    mean = in_plane(output.mean_map)
    deviation = in_plane(output.std_map if of_masks else output.dispersion)
    chosen = np.sort(np.argsort(mean.sum((1, 2)), kind="stable")[::-1][:slices])

    top, widest, colours = 1.0, 0.5, "viridis" if of_masks else "inferno"
    if not of_masks:
        top = max(float(np.quantile(one[chosen], 0.999)) for one in (mean, *shown)) or 1.0
        widest = float(np.quantile(deviation[chosen], 0.999)) or 1.0
    names = ["image", *(f"member {number + 1}" for number in range(len(shown))), "mean", "deviation"]
    figure = Figure(figsize=(1.7 * len(names) + 1.3, 1.75 * len(chosen) + 0.5), layout="constrained")
    axes = figure.subplots(len(chosen), len(names), squeeze=False)
    for line, index in zip(axes, chosen, strict=True):
        line[0].imshow(image[index], cmap="gray", vmin=low, vmax=high)
        if not source.is_picture:
            line[0].set_ylabel(f"slice {index}", fontsize=7)
        for axis, one in zip(line[1:-2], shown, strict=True):
            if not of_masks:
                axis.imshow(one[index], cmap=colours, vmin=0.0, vmax=top)
                continue
            axis.imshow(image[index], cmap="gray", vmin=low, vmax=high)
            marked = np.ma.masked_equal(one[index], 0)
            axis.imshow(marked, cmap="autumn", vmin=1, vmax=2, alpha=0.3, interpolation="nearest")
            if marked.count():
                axis.contour(one[index], [0.5], colors="red", linewidths=0.8)
        of_mean = line[-2].imshow(mean[index], cmap=colours, vmin=0.0, vmax=top)
        of_deviation = line[-1].imshow(deviation[index], cmap="magma", vmin=0.0, vmax=widest)
    _finish_axes(axes, zooms)
    for axis, name in zip(axes[0], names, strict=True):
        axis.set_title(name, fontsize=8)
    for drawn, label in ((of_deviation, "deviation"), (of_mean, "mean" if of_masks else "score")):
        add_bar(figure, drawn, axes, label, 0.9 if len(chosen) == 1 else 0.4, fraction=0.03, pad=0.01)
    note = f"{len(output.member_maps)} members. {DISPERSION_NOTE}"
    _add_heading(figure, f"{title}: {note}")
    figure.savefig(path, dpi=120)


def _read_image(source: InputVolume | None, plane: str) -> tuple:
    """What brings an array of the input's form to `(N, H, W)`; the orientation that it goes by; the sizes of a voxel
    along W, H, N in mm; the first modality, `(N, H, W)`, and the range of grey values to show."""
    if source is None:
        raise ValueError(
            "A result of a tensor has no picture: its image is not kept. Call the pipeline with a volume."
        )
    to_plane = plane_orientation(source.affine, plane)

    def in_plane(array: np.ndarray) -> np.ndarray:
        # The input's form back to (X, Y, Z), then (N, H, W).
        array = array.T[..., None] if source.is_picture else array.reshape(source.shape)
        return nib.orientations.apply_orientation(array, to_plane).transpose(2, 1, 0)

    zooms = np.linalg.norm(source.affine[:3, :3], axis=0)[np.argsort(to_plane[:, 0])]
    image = in_plane(source.as_given(next(iter(source.arrays.values()))))
    low, high = 0.0 if image.min() >= 0 else float(image.min()), float(np.quantile(image, 0.998))
    return in_plane, to_plane, zooms, image, (low, high)


def _add_heading(figure, text: str) -> None:
    # About 16 letters an inch; a $ in the name of a scan is no formula.
    lines = textwrap.wrap(text, int(16 * figure.get_figwidth()), break_on_hyphens=False)
    figure.suptitle("\n".join(lines), fontsize=8, parse_math=False)


def _finish_axes(axes: np.ndarray, zooms: np.ndarray) -> None:
    for axis in axes.flat:
        axis.set_aspect(zooms[1] / zooms[0])
        axis.set_xticks([])
        axis.set_yticks([])


def add_bar(figure, drawn, axes: np.ndarray, label: str, shrink: float, **place: float) -> None:
    """Adds the bar of the colours of `drawn` beside `axes`, small."""
    bar = figure.colorbar(drawn, ax=axes, shrink=shrink, **place)
    bar.set_label(label, fontsize=7)
    bar.ax.tick_params(labelsize=6)
