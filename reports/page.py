"""The page of a report: what it may hold, and how it is written."""

from __future__ import annotations

import base64
import gzip
import json
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import chain
from numbers import Real
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from ..checks import check_choice
from ..files import read_text, write_text
from .layers import (
    KINDS,
    MAP,
    MASK,
    PROBABILITY,
    SCAN,
    STEPS,
    EncodedLayer,
    draw_slice,
    encode_layers,
    plane_axes,
    read_layer,
)


# Bytes that a page may have: what most mail servers take.
LIMIT = 10_000_000
# Scans on one page; more get a page each.
MOST_SCANS = 30
MARK = '<meta name="generator" content="anodiff report">'
_ASSETS = Path(__file__).parent / "assets"


@dataclass(frozen=True)
class Layer:
    """
    An image of a scan, over the others or beside them.

    Args:
        name (`str`): What the page calls it.
        kind (`str`):
            `"scan"`, `"map"` (scores >= 0), `"mask"`, `"reference"` (mask of an expert), `"reconstruction"`,
            `"probability"` (in [0, 1]) or `"members"` (masks or maps of an ensemble along the fourth axis).
        image (`nibabel` image, `str` or `os.PathLike`): The image or a NIfTI file, of 2 or 3 dimensions, 4 of members.
    """

    name: str
    kind: str
    image: Any


@dataclass(frozen=True)
class ScanView:
    """
    One scan in the viewer.

    Args:
        name (`str`): Of the scan, any text.
        layers (sequence of [`Layer`]): One of them is the scan. Layers of one shape share its grid.
        score (`float`, *optional*): Of the scan: the higher, the more suspicious; the list of scans is sorted by it.
        threshold (`float`, *optional*): Of the first map or probability, where its slider begins.
        slice_scores (sequence of `float`, *optional*): One for each slice of the scan along the axis of `plane`.
        facts (mapping): Lines of text below the viewer, name to value.
        plane (`str`, defaults to `"axial"`): What `slice_scores` count: `"axial"`, `"coronal"` or `"sagittal"` slices.
        is_picture (`bool`): The scan is a 2-D picture, without sides and millimetres.
    """

    name: str
    layers: Sequence[Layer]
    score: float | None = None
    threshold: float | None = None
    slice_scores: Sequence[float] | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    plane: str = "axial"
    is_picture: bool = False


@dataclass(frozen=True)
class Column:
    """
    A column of a table.

    Args:
        key (`str`): Of the rows' values.
        title (`str`): Its heading.
        help (`str`): What the heading means, shown on demand.
        better (`str`, *optional*): `"higher"` or `"lower"`: the best number is bold.
    """

    key: str
    title: str
    help: str = ""
    better: str | None = None


@dataclass(frozen=True)
class Table:
    """
    A table that a click on a heading sorts.

    Args:
        title (`str`): Its heading.
        columns (sequence of [`Column`]): From left to right.
        rows (sequence of `dict`): Key of a column to a number, a text, `None`, or a number with its interval, `(value,
            low, high)`.
        caption (`str`): A sentence below the heading.
    """

    title: str
    columns: Sequence[Column]
    rows: Sequence[Mapping[str, Any]]
    caption: str = ""


@dataclass(frozen=True)
class Figure:
    """A figure: title, the text of an SVG file of ours, as matplotlib writes it, and a caption."""

    title: str
    svg: str
    caption: str = ""


@dataclass(frozen=True)
class Section:
    """
    A part of the page with a heading.

    Args:
        title (`str`): Its heading.
        blocks (sequence): Tables, figures, and texts, which become paragraphs.
        folded (`bool`, defaults to `False`): Only the heading shows until it is clicked.
        above (`bool`, defaults to `False`): It stands above the scans, not below them.
    """

    title: str
    blocks: Sequence[Table | Figure | str]
    folded: bool = False
    above: bool = False


@dataclass
class _Encoded:
    """A scan as the page has it; `facts` is what the viewer reads."""

    view: ScanView
    layers: dict[int, EncodedLayer]
    facts: dict
    picture: str
    thumbnail: str
    note: str
    marked: float | None  # ml, or pixels
    size: int
    page: str = ""


def write_report(
    path: str | os.PathLike,
    title: str,
    *,
    scans: Iterable[ScanView] = (),
    sections: Sequence[Section] = (),
    summary: str = "",
) -> list[Path]:
    """
    Writes a report as one page that needs no other file and no network.

    Scans that do not fit into 10 MB, or are more than 30, get a page each, in a folder beside `path` with its name,
    and `path` is their index. A scan that alone does not fit is stored in fewer grey levels or at a lower resolution,
    and its page says so. An earlier report is replaced.

    Args:
        path (`str` or `os.PathLike`): The page, `report.html`.
        title (`str`): Its heading.
        scans (iterable of [`ScanView`]): In the order of their pages; they are read one after the other. The list of
            scans is sorted by score.
        sections (sequence of [`Section`]): Tables, figures and texts, below the scans unless they are `above`.
        summary (`str`): A sentence or two below the heading.

    Returns:
        `list[Path]`: The pages that were written, `path` first.

    Raises:
        FileExistsError: There is a file with the name of one of the pages that is no report of this library.
        ValueError: A scan has no layer of the kind `"scan"`, or an image has another shape or values not finite.
    """
    path = Path(path)
    folder = path.with_name(f"{path.stem}_scans")
    check_replaceable(path)
    shared = {"title": title, "summary": summary, "index": path.name, "folder": folder.name}
    viewer = len(_niivue())
    base = viewer + len(_render(shared, scans=[], sections=sections, with_viewer=False).encode())
    budget = LIMIT - viewer - len(_render(shared, scans=[], sections=[], with_viewer=False).encode()) - 40_000
    # All on one page, as long as they fit.
    kept, rest = [], (_encode(view, budget) for view in scans)
    for scan in rest:
        kept.append(scan)
        if len(kept) > MOST_SCANS or base + sum(scan.size for scan in kept) > LIMIT:
            break
    else:
        kept.sort(key=lambda scan: _order(scan.view.score))
        write_text(path, _render(shared, scans=kept, sections=sections, with_viewer=bool(kept)))
        _remove_pages(folder, set())
        return [path]
    pages, listed, before = [], [], None
    folder.mkdir(exist_ok=True)
    for number, scan in enumerate(chain(kept, rest), 1):
        scan.page = f"{number:04d}_{re.sub(r'[^A-Za-z0-9._-]+', '_', scan.view.name)[:80]}.html"
        if before is not None:
            pages.append(_write_page(folder, shared, before, next=scan.page))
        scan.facts["previous"] = before.page if before is not None else ""
        listed.append(scan)
        before = scan
    pages.append(_write_page(folder, shared, before, next=""))
    listed.sort(key=lambda scan: _order(scan.view.score))
    write_text(path, _render(shared, scans=listed, sections=sections, with_viewer=False))
    _remove_pages(folder, {page.name for page in pages})
    return [path, *pages]


def check_replaceable(path: str | os.PathLike) -> None:
    """Raises a `FileExistsError` if there is a file at a path that is no report of this library, which alone may be
    replaced."""
    path = Path(path)
    if os.path.lexists(path) and not _is_report(path):
        raise FileExistsError(
            f"{path} is no report of this library: it is not replaced. Move it away, or choose another folder."
        )


def _is_report(path: Path) -> bool:
    if not path.is_file() or path.is_symlink():
        return False
    with open(path, "rb") as file:
        return MARK.encode() in file.read(1000)


def _remove_pages(folder: Path, wanted: set[str]) -> None:
    """Removes the pages of an earlier report from its folder, and the folder if it is empty then."""
    if not folder.is_dir():
        return
    for page in folder.glob("*.html"):
        if page.name not in wanted and _is_report(page):
            page.unlink()
    if not any(folder.iterdir()):
        folder.rmdir()


def _write_page(folder: Path, shared: dict, scan: _Encoded, next: str) -> Path:
    scan.facts["next"] = next
    path = folder / scan.page
    check_replaceable(path)
    own = {**shared, "title": scan.view.name, "index": f"../{shared['index']}", "of": shared["title"], "summary": ""}
    write_text(path, _render(own, scans=[scan], sections=[], with_viewer=True))
    # The index needs no images.
    scan.layers, scan.picture, scan.view = {}, "", replace(scan.view, layers=())
    return path


def _order(score: float | None) -> float:
    return math.inf if score is None else -score


def _encode(view: ScanView, budget: int) -> _Encoded:
    """Encodes a scan into at most `budget` bytes."""
    kinds = [layer.kind for layer in view.layers]
    for kind in kinds:
        check_choice("kind", kind, KINDS)
    if SCAN not in kinds:
        raise ValueError(
            f"{view.name}: one of the layers must be of the kind 'scan', got {', '.join(kinds) or 'none'}."
        )
    arrays = {number: (layer.kind, *read_layer(layer.name, layer.image)) for number, layer in enumerate(view.layers)}
    _, scan, affine = arrays[kinds.index(SCAN)]
    marked = next((number for number, kind in enumerate(kinds) if kind in (MAP, PROBABILITY)), None)
    overlay = None if marked is None or arrays[marked][1].shape != scan.shape else arrays[marked][1]
    axes = plane_axes(affine)
    axis = axes[view.plane][0]
    if view.slice_scores is not None and len(view.slice_scores) != scan.shape[axis]:
        raise ValueError(
            f"{view.name}: `slice_scores` must hold a number for each of the {scan.shape[axis]} {view.plane} slices,"
            f" got {len(view.slice_scores)}."
        )
    start = _find_start(view, scan, overlay, axis)
    for step in range(len(STEPS)):
        layers = encode_layers(arrays, view.threshold, step)
        size = sum(len(layer.file) for layer in layers.values())
        if size <= budget:
            break
    else:
        raise ValueError(f"{view.name}: too large for a page of {LIMIT / 1e6:.0f} MB.")
    facts = {
        "name": view.name,
        "score": None if view.score is None else float(view.score),
        "threshold": None if view.threshold is None else float(view.threshold),
        "plane": view.plane,
        "axes": axes,
        "start": start,
        "is_picture": view.is_picture,
        "affine": affine.tolist(),
        "shape": list(scan.shape),
        "slice_scores": None
        if view.slice_scores is None
        else [float(one) if math.isfinite(one) else None for one in view.slice_scores],
        "layers": [
            {"name": layer.name, "kind": layer.kind, **layers[number].facts}
            for number, layer in enumerate(view.layers)
        ],
    }
    mask, grid = next(((array, grid) for kind, array, grid in arrays.values() if kind == MASK), (None, affine))
    if mask is None and overlay is not None and view.threshold is not None:
        mask = overlay > view.threshold
    unit = 1.0 if view.is_picture else abs(float(np.linalg.det(grid[:3, :3]))) / 1000
    volume = None if mask is None else np.count_nonzero(mask) * unit
    picture, thumbnail = (draw_slice(scan, overlay, affine, view.plane, start, width) for width in (420, 88))
    return _Encoded(
        view,
        layers,
        facts,
        picture,
        thumbnail,
        STEPS[step][-1],
        volume,
        size + len(picture) + len(thumbnail) + 4000,
    )


def _find_start(view: ScanView, scan: np.ndarray, overlay: np.ndarray | None, axis: int) -> list[int]:
    """The voxel where the cursor begins: the highest one of the map, in the slice with the highest score."""
    if overlay is None or not overlay.any():
        return [size // 2 for size in scan.shape[:3]]
    place = [slice(None)] * 3
    if view.slice_scores is not None:
        scores = np.nan_to_num(np.asarray(view.slice_scores, dtype=np.float64), nan=-np.inf)
        place[axis] = slice(int(np.argmax(scores)), int(np.argmax(scores)) + 1)
    part = overlay[tuple(place)]
    start = np.unravel_index(np.argmax(part), part.shape)
    return [int(one) + (which.start or 0) for one, which in zip(start, place, strict=True)]


@cache
def _asset(name: str) -> str:
    return read_text(_ASSETS / name)


@cache
def _niivue() -> str:
    """The viewer, compressed, in base64."""
    return base64.b64encode(gzip.compress((_ASSETS / "niivue.umd.js").read_bytes(), 9, mtime=0)).decode("ascii")


@cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_asset), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "number": _number,
        "sort_value": _sort_value,
        "curve": _curve,
        "svg": _svg,
        "best": _best,
        "data": _data,
    }
    environment.tests |= {"table": lambda one: isinstance(one, Table), "figure": lambda one: isinstance(one, Figure)}
    return environment.get_template("page.html")


def _render(shared: dict, *, scans: Sequence[_Encoded], sections: Sequence[Section], with_viewer: bool) -> str:
    # A table without rows has nothing to say.
    full = [
        (section, [block for block in section.blocks if not isinstance(block, Table) or block.rows])
        for section in sections
    ]
    page = _template().render(
        **shared,
        scans=scans,
        sections=[(section, blocks) for section, blocks in full if blocks],
        with_viewer=with_viewer,
        mark=MARK,
        css=_asset("page.css"),
        script=_asset("members.js") + _asset("page.js"),
        niivue=_niivue() if with_viewer else "",
    )
    # Paths may hold bytes that are no UTF-8.
    return page.encode("utf-8", "backslashreplace").decode("utf-8")


def _number(value) -> str:
    """A number as it is shown: whole ones as they are, others with three digits that count."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    value = value.item() if isinstance(value, np.generic) else value
    if not isinstance(value, float):
        return str(value)
    if not math.isfinite(value):
        return "∞" if value > 0 else "−∞"
    if value == 0 or 0.01 <= abs(value) < 1000:
        text = f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"
    else:
        text = f"{value:.0f}" if 1000 <= abs(value) < 1e6 else f"{value:.3g}"
    return text.replace("-", "−", 1) if text.startswith("-") else text


def _sort_value(value) -> str:
    """What a value is sorted by in the page: a number as JavaScript reads it, or nothing."""
    if value is None or (isinstance(value, Real) and math.isnan(value)):
        return ""
    return str(value).replace("inf", "Infinity") if isinstance(value, Real) else str(value)


def _best(table: Table, column: Column) -> float | None:
    """The best number of a column, if there is something to choose."""
    numbers = [
        value[0] if isinstance(value, (tuple, list)) else value
        for value in (row.get(column.key) for row in table.rows)
    ]
    numbers = [one for one in numbers if isinstance(one, Real) and not math.isnan(one)]
    if column.better is None or len(set(numbers)) < 2:
        return None
    check_choice("better", column.better, ("higher", "lower"))
    return max(numbers) if column.better == "higher" else min(numbers)


def _curve(scores: Sequence[float | None]) -> str:
    """The points of a curve in a box of 1000 x 100, without those that are `None`."""
    top = max([score for score in scores if score is not None], default=0) or 1.0
    last = max(len(scores) - 1, 1)
    return " ".join(
        f"{1000 * number / last:.1f},{100 - 96 * max(score, 0) / top:.1f}"
        for number, score in enumerate(scores)
        if score is not None
    )


def _svg(text: str) -> str:
    """The drawing of an SVG file, without its prologue and metadata."""
    text = text[max(text.find("<svg"), 0) :]
    return re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)


def _data(values) -> str:
    """JSON that no text in it can leave."""
    return json.dumps(values, allow_nan=False).replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
