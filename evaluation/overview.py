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

    threshold = (output.settings or {}).get("threshold")
    contour = "the method's mask" if threshold is None else f"score > {threshold:.3g}"
    note = "" if mask is None else f"; cyan: {contour}"
    heading = f"{title}: highest scored slices{note}. Research use only."

    # Every picture is a tile of one image in one system of axes: with one for each of them, drawing takes three times
    # as long, and there may be a thousand scans. The last line has the map over the image.
    tiles = np.stack([(image if array is maps else array)[chosen] for array in rows.values()]).astype(np.float32)
    colours, strength, marks = np.zeros_like(tiles), np.zeros_like(tiles), np.zeros_like(tiles)
    top = float(np.quantile(maps[chosen], 0.999)) or 1.0
    colours[-1], strength[-1] = maps[chosen], 0.85 * np.clip(maps[chosen] / top, 0.0, 1.0) ** 0.5
    scale, gaps = _measure_tiles(tiles.shape[2:], zooms)
    axes, bar = _make_axes(_tile(colours, gaps).shape * scale, tiles.shape[2:] * scale, heading)
    axes.imshow(_tile(tiles, gaps, np.nan), cmap="gray", vmin=low, vmax=high, aspect="auto")
    strength = _tile(strength, gaps)
    overlay = axes.imshow(_tile(colours, gaps), cmap="inferno", vmin=0.0, vmax=top, alpha=strength, aspect="auto")
    if mask is not None and mask[chosen].any():
        marks[-1] = mask[chosen]
        axes.contour(_tile(marks, gaps), [0.5], colors="tab:cyan", linewidths=0.8)
    (height, width), around = tiles.shape[2:], {"textcoords": "offset points", "va": "center", "ha": "right"}
    for line, label in enumerate(rows):
        axes.annotate(label, (-0.5, line * (height + gaps[0]) + height / 2), (-4, 0), rotation=90, size=8, **around)
    around |= {"va": "bottom", "ha": "center"}
    for column, index in enumerate(chosen):
        text = f"slice {index}, score {scores[index]:.3g}"
        axes.annotate(text, (column * (width + gaps[1]) + width / 2, -0.5), (0, 4), size=7, **around)
    _label_bar(axes.figure.colorbar(overlay, cax=bar), "score")
    axes.figure.savefig(path, dpi=120)


# In inches: of a tile, height and width at most; of what stands beside and above one; left, right, above and below all
# tiles; of a line of the heading.
_TILE, _TEXTS = (2.2, 2.1), (0.95, 1.6)
_LEFT, _RIGHT, _ABOVE, _BELOW, _LINE = 0.25, 0.85, 0.25, 0.08, 0.16


def _measure_tiles(shape: tuple[int, int], zooms: np.ndarray) -> tuple[np.ndarray, tuple[int, int]]:
    """Returns the inches of a pixel of tiles `(H, W)` down and across, and the pixels between two tiles."""
    size = np.array([shape[0] * zooms[1], shape[1] * zooms[0]])  # mm
    scale = (_TILE / size).min() * np.array([zooms[1], zooms[0]])
    gaps = np.maximum(np.maximum(np.round(0.05 / scale), 1), np.ceil(_TEXTS / scale - shape))
    return scale, (int(gaps[0]), int(gaps[1]))


def _tile(pictures: np.ndarray, gaps: tuple[int, int], between: float = 0.0) -> np.ndarray:
    """Lays pictures `(R, N, H, W)` out in R lines of N, as one image."""
    wide = np.pad(pictures, ((0, 0), (0, 0), (0, gaps[0]), (0, gaps[1])), constant_values=between)
    return wide.transpose(0, 2, 1, 3).reshape(len(wide) * wide.shape[2], -1)[: -gaps[0], : -gaps[1]]


def _make_axes(size: np.ndarray, tile: np.ndarray, heading: str) -> tuple:
    """Makes axes for an image of tiles, and those of a bar beside them, both below a heading. Height and width of the
    image and of a tile are in inches."""
    from matplotlib.figure import Figure

    along, across = size
    # What stands beside a low tile, or above a narrow one, is longer than it.
    below, left = np.maximum((_BELOW, _LEFT), (_TEXTS - tile) / 2)
    full_width = max(left + across, _TILE[1]) + _RIGHT
    lines = _wrap(heading, full_width)
    full_height = along + _ABOVE + below + _LINE * len(lines) + 0.1
    figure = Figure(figsize=(full_width, full_height))
    figure.suptitle("\n".join(lines), y=1 - 0.06 / full_height, va="top", fontsize=8, parse_math=False)
    unit = np.array([full_width, full_height] * 2)
    left = max(left, full_width - _RIGHT - across)
    axes = figure.add_axes(np.array([left, below, across, along]) / unit)
    axes.set_axis_off()
    return axes, figure.add_axes(np.array([left + across + 0.08, below + 0.3 * along, 0.1, 0.4 * along]) / unit)


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
    # A $ in the name of a scan is no formula.
    figure.suptitle("\n".join(_wrap(text, figure.get_figwidth())), fontsize=8, parse_math=False)


def _wrap(text: str, inches: float) -> list[str]:
    """Cuts a heading into lines: about 16 letters an inch."""
    return textwrap.wrap(text, int(16 * inches), break_on_hyphens=False)


def _finish_axes(axes: np.ndarray, zooms: np.ndarray) -> None:
    for axis in axes.flat:
        axis.set_aspect(zooms[1] / zooms[0])
        axis.set_xticks([])
        axis.set_yticks([])


def add_bar(figure, drawn, axes: np.ndarray, label: str, shrink: float, **place: float) -> None:
    """Adds the bar of the colours of `drawn` beside `axes`, small."""
    _label_bar(figure.colorbar(drawn, ax=axes, shrink=shrink, **place), label)


def _label_bar(bar, label: str) -> None:
    bar.set_label(label, fontsize=7)
    bar.ax.tick_params(labelsize=6)
    bar.ax.yaxis.get_offset_text().set_fontsize(6)
