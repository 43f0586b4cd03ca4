"""The page of an evaluation: its tables, curves and protocol, and some cases of the test split in a viewer."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import nibabel as nib
import numpy as np

from ..data.prepared import PreparedSplit
from ..hub.shipped import add_samples
from ..reports import Column, Figure, Layer, ScanView, Section, Table, write_report
from .cases import Case, EnsembleCase
from .pictures import rank_records
from .sections import LESION_COLUMNS, STRATIFIED, choose_best, join_settings, split_settings


# Cases of the test split in the viewer.
MOST_CASES = 6
# Not a measurement, or the worse the higher.
_LOWER = ("ged", "error", "hausdorff", "brier", "fpr", "false_positive", "seconds")
_ENDS = ("_low", "_high")
# Of the record of a case, what the viewer shows anyway.
_KNOWN = ("label", "score")
HELP = {
    "voxel_average_precision": "Area under precision over recall of all brain voxels, pooled; it depends on how many are lesion.",
    "voxel_auroc": "Probability that a lesion voxel has a higher score than another voxel of a brain.",
    "dice_oracle": "Dice at the best threshold of the test split itself: an upper bound.",
    "dice_validation": "Dice at the best threshold of the validation split.",
    "dice_healthy": "Dice at a threshold that few voxels of healthy validation slices exceed; it needs no lesion.",
    "dice_yen": "Dice at Yen's threshold of each subject alone.",
    "slice_auroc": "Probability that a slice with a lesion has a higher score than one without.",
    "subject_auroc": "Probability that a subject with a lesion has a higher score than one without.",
    "ged": "Generalised energy distance: how far samples are from annotations, less how far each are from one another; 0"
    " is best. It falls with the number of samples.",
    "hm_iou": "Mean IoU of the best assignment of samples to annotations, one to one; 1 is best.",
    "collective_insight": "CIMD's index of Sc, Dmax and Da; 1 is best.",
    "combined_sensitivity": "Share of what any rater marks that any sample marks.",
    "maximum_dice": "Mean over raters of the Dice of the sample that fits best.",
    "diversity_agreement": "Whether samples differ from one another as much as raters do.",
    "sample_diversity": "Mean of 1 - IoU among the samples: what is wanted is that of the raters.",
    "annotation_diversity": "Mean of 1 - IoU among the raters.",
    "dice_majority": "Dice of what most samples and most raters mark.",
    "seconds_per_slice": "From slices to filtered maps, without reading and writing.",
}


def write_page(
    report: dict,
    columns: dict[str, str],
    split: PreparedSplit,
    folders: Sequence[Path],
    path: Path,
    *,
    title: str | None = None,
    sections: Sequence[Section] = (),
) -> None:
    """
    Writes the page of a report.

    Args:
        report (`dict`): As `report.json` holds it.
        columns (`dict[str, str]`): Metric to title, of the main table.
        split ([`PreparedSplit`]): What was scored.
        folders (sequence of [`~pathlib.Path`]): Of the cases of the first rows, those with maps.
        path ([`~pathlib.Path`]): The page.
        title (`str`, *optional*): Its heading; data and split by default.
        sections (sequence of [`Section`]): Before those of the report.
    """
    data, rows = report["data"], report["results"]
    with_cases = list(zip(rows, folders, strict=False))
    best = choose_best([row for row, _ in with_cases])
    scans = [] if best is None else _view_cases(*with_cases[best], split)
    counts = f"{data['subjects']} subjects, {data['slices']} slices, {data['anomalous_slices']} of them anomalous."
    shown = f" Cases below are those of {with_cases[best][0]['name']}." if scans else ""
    write_report(
        path,
        title or f"{data['name']}, {data['split']}",
        scans=scans,
        sections=[*sections, *make_sections(report, columns)],
        summary=f"{counts}{shown} Research use, not a medical device.",
    )


def make_sections(report: dict, columns: dict[str, str]) -> list[Section]:
    """Returns the parts of the page of a report below its cases."""
    rows = report["results"]
    measured = dict.fromkeys(
        key for row in rows for key, value in row["metrics"].items() if value is not None and not key.endswith(_ENDS)
    )
    main = {key: heading for key, heading in columns.items() if key in measured}
    # Metrics of ensembles depend on the number of samples: no row is better than one of another number.
    compare = len({row["metrics"].get("num_samples") for row in rows}) == 1
    results = Table(
        "Results",
        [
            Column("name", "Row"),
            *(
                Column(key, heading, HELP.get(key, ""), _better(key) if compare else None)
                for key, heading in main.items()
            ),
            Column("seconds", "s per slice", HELP["seconds_per_slice"], "lower"),
        ],
        [
            {
                "name": row["name"],
                "seconds": row.get("seconds_per_slice"),
                **{key: with_interval(row, key) for key in main},
            }
            for row in rows
        ],
        f"Small print: {report['intervals']}.",
    )
    sections = [Section("Results", [results])]
    figures = [figure for figure in (_draw_intervals(rows, main), *_draw_curves(rows)) if figure is not None]
    if figures:
        sections.append(Section("Figures", figures))
    lesions = {key: heading.format(rows[0].get("distance_unit")) for key, heading in LESION_COLUMNS.items()}
    lesions = {key: heading for key, heading in lesions.items() if key in measured and key not in main}
    if lesions:
        sections.append(Section("Lesions", [_tabulate("Lesions", rows, lesions)]))
    compared = _compare(report)
    if compared:
        sections.append(Section("Comparisons", compared[:1]))
    strata = _stratify(report)
    if strata:
        sections.append(Section("Strata", strata))
    if compared[1:]:
        sections.append(Section("Comparisons by other metrics", compared[1:], folded=True))
    others = [key for key in measured if key not in main and key not in lesions]
    if others:
        names = [Column(str(number), row["name"]) for number, row in enumerate(rows)]
        lines = [
            {
                "metric": key.replace("_", " "),
                **{str(number): with_interval(row, key) for number, row in enumerate(rows)},
            }
            for key in others
        ]
        table = Table("All other metrics", [Column("metric", "Metric"), *names], lines)
        sections.append(Section("Other metrics", [table], folded=True))
    return [*sections, Section("Protocol and settings", _describe(report), folded=True)]


def _tabulate(title: str, rows: Sequence[dict], columns: dict[str, str], caption: str = "") -> Table:
    """A table of rows under some metrics, those that have one of them, with their time."""
    shown = [row for row in rows if any(row["metrics"].get(key) is not None for key in columns)]
    heads = [Column(key, heading, HELP.get(key, ""), _better(key)) for key, heading in columns.items()]
    return Table(
        title,
        [Column("name", "Row"), *heads, Column("seconds", "s per slice", HELP["seconds_per_slice"], "lower")],
        [
            {
                "name": row["name"],
                **{key: with_interval(row, key) for key in columns},
                "seconds": row.get("seconds_per_slice"),
            }
            for row in shown
        ],
        caption,
    )


def _better(key: str) -> str | None:
    if key.startswith("threshold") or key in ("num_samples", "sample_diversity", "annotation_diversity"):
        return None
    return "lower" if any(word in key for word in _LOWER) else "higher"


def with_interval(row: dict, key: str):
    """Returns a metric of a row as the cell of a table: the value, with its interval where there is one."""
    value, low, high = (row["metrics"].get(f"{key}{end}") for end in ("", *_ENDS))
    return value if low is None or high is None or value is None else (value, low, high)


def _compare(report: dict) -> list[Table]:
    """A table of every metric's comparisons."""
    tables = []
    for metric in dict.fromkeys(one["metric"] for one in report.get("comparisons", ())):
        rows = [
            {
                "pair": f"{one['first']} - {one['second']}",
                "difference": (one["difference"], one["low"], one["high"]),
                "p": one["p"],
                "p_holm": one["p_holm"],
            }
            for one in report["comparisons"]
            if one["metric"] == metric
        ]
        columns = [
            Column("pair", "Pair"),
            Column("difference", "Difference", "Of the first less the second, on the same subjects"),
            Column("p", "p", "Two-sided, of this pair alone"),
            Column("p_holm", "p, corrected", "By Holm, for all pairs of this metric"),
        ]
        tables.append(Table(metric.replace("_", " "), columns, rows))
    return tables


def _stratify(report: dict) -> list[Table]:
    """A table of the strata of every column, those of few subjects marked."""
    tables = []
    for name in dict.fromkeys(name for row in report["results"] for name in row.get("strata", ())):
        scored = [(row["name"], one) for row in report["results"] for one in row.get("strata", {}).get(name, ())]
        measured = {key for _, one in scored for key, value in one["metrics"].items() if value is not None}
        metrics = {key: heading for key, heading in STRATIFIED.items() if key in measured}
        columns = [Column("stratum", name), Column("name", "Row"), Column("subjects", "Subjects")]
        columns += [Column(key, heading, HELP.get(key, "")) for key, heading in metrics.items()]
        rows = [
            {
                "stratum": one["stratum"] + (" (few)" if one["few"] else ""),
                "name": row,
                "subjects": one["subjects"],
                **{key: with_interval(one, key) for key in metrics},
            }
            for row, one in scored
        ]
        tables.append(Table(f"By {name}", columns, rows))
    return tables


def _describe(report: dict) -> list:
    """Protocol, settings of the rows, and versions; of settings once what rows share."""
    fields = [
        {"field": key.replace("_", " "), "text": text}
        for key, text in report["protocol"].items()
        if key != "postprocessing"  # below, without what rows share
    ]
    blocks: list = [Table("Protocol", [Column("field", "Field"), Column("text", "Here")], fields)]
    shared, differing = split_settings(report["results"])
    if shared:
        blocks.append(f"Settings of all rows: {join_settings(shared)}.")
    keys = list(dict.fromkeys(key for _, settings in differing for key in settings))
    if keys:
        lines = [
            {"name": name, **{key: None if key not in settings else _text(settings[key]) for key in keys}}
            for name, settings in differing
        ]
        columns = [Column("name", "Row"), *(Column(key, key.replace("_", " ")) for key in keys)]
        blocks.append(Table("Settings that differ", columns, lines))
    versions = ", ".join(f"{name} {number}" for name, number in report["versions"].items())
    return [
        *blocks,
        f"anodiff {report['anodiff']}, {versions}, {report['device']}, {report['processes']} process(es), seed"
        f" {report['seed']}, draws {report['draws']}.",
    ]


def _text(value):
    return value if type(value) in (int, float, str) else str(value)


def _save_svg(figure) -> str:
    import matplotlib

    file = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "anodiff"}):
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
    text = file.getvalue()
    return text[text.index("<svg") :]


def _draw_intervals(rows: list[dict], main: dict[str, str]) -> Figure | None:
    """The first metric of every row with its interval."""
    key = next((key for key in main if key != "num_samples"), None)
    shown = [row for row in rows if key and row["metrics"].get(key) is not None]
    if not shown:
        return None
    from matplotlib.figure import Figure as Canvas

    shown.sort(key=lambda row: row["metrics"][key])
    figure = Canvas(figsize=(7, 0.9 + 0.3 * len(shown)), layout="constrained")
    axis = figure.subplots()
    for place, row in enumerate(shown):
        value, low, high = (row["metrics"].get(f"{key}{end}") for end in ("", *_ENDS))
        colour = "tab:blue" if row["kind"] == "pipeline" else "0.5"
        if low is not None and high is not None:
            axis.plot([low, high], [place, place], color=colour, linewidth=2)
        axis.plot(value, place, "o", color=colour)
    axis.set_yticks(range(len(shown)), [row["name"] for row in shown], fontsize=8)
    axis.set_xlabel(main[key])
    axis.grid(axis="x", color="0.85", linewidth=0.6)
    return Figure(main[key], _save_svg(figure), "With 95 % intervals where there are any; grey: baselines.")


def _draw_curves(rows: list[dict]) -> list[Figure | None]:
    """Free-response curves, sweeps of thresholds and reliability, of the rows that have them."""

    def read(row: dict, key: str, x: str, y: str) -> tuple | None:
        curve = row.get(key) or {}
        pairs = [pair for pair in zip(curve.get(x) or (), curve.get(y) or (), strict=True) if None not in pair]
        return tuple(zip(*pairs, strict=True)) if pairs else None

    figures = []
    for key, x, y, heading, labels, scale in (
        (
            "froc",
            "false_positives",
            "recall",
            "Free response",
            ("false positives per volume", "lesions found"),
            "symlog",
        ),
        ("sweep", "thresholds", "dice", "Dice over thresholds", ("threshold", "Dice"), "linear"),
    ):
        curves = [(row["name"], curve) for row in rows if (curve := read(row, key, x, y)) is not None]
        figures.append(_draw_lines(curves, heading, labels, scale))
    curves = [
        (row["name"], (row["reliability"]["all"]["predicted"], row["reliability"]["all"]["observed"]))
        for row in rows
        if row.get("reliability")
    ]
    labels = ("share of the samples", "share of the annotations")
    return [*figures, _draw_lines(curves, "Reliability, all pixels", labels, "linear", diagonal=True)]


def _draw_lines(
    curves: list[tuple[str, tuple]], heading: str, labels: tuple[str, str], scale: str, diagonal: bool = False
) -> Figure | None:
    """A figure of curves, several of which may have one name, such as those of a checkpoint with two settings."""
    if not curves:
        return None
    from matplotlib.figure import Figure as Canvas

    figure = Canvas(figsize=(7, 4), layout="constrained")
    axis = figure.subplots()
    if diagonal:
        axis.plot([0, 1], [0, 1], color="0.7", linewidth=1)
    for name, (x, y) in curves:
        axis.plot(x, y, marker=".", markersize=4, linewidth=1.2, label=name)
    axis.set_xscale(scale)
    axis.set(xlabel=labels[0], ylabel=labels[1])
    axis.grid(color="0.85", linewidth=0.6)
    axis.legend(fontsize=7, frameon=False)
    return Figure(heading, _save_svg(figure))


def _view_cases(row: dict, folder: Path, split: PreparedSplit) -> list[ScanView]:
    """Cases of a row from its worst to its best, evenly spread over the order of the picture."""
    key, ranked = rank_records(row["subjects"])
    places = sorted({round(share * (len(ranked) - 1)) for share in np.linspace(0, 1, MOST_CASES)}) if ranked else []
    views = {}
    for place in places:
        record = ranked[place]
        if record["subject"] not in views:
            title = {places[0]: "worst", places[-1]: "best"}.get(place, "between")
            views[record["subject"]] = _view_case(row, record, folder, split, f"{title} by {key.replace('_', ' ')}")
    return list(views.values())


def _view_case(row: dict, record: dict, folder: Path, split: PreparedSplit, title: str) -> ScanView:
    subject = record["subject"]
    item, path = split.read_subject(subject), folder / "test" / f"{subject}.npz"
    affine, rows = _make_affine(split, subject, item["slice"]), slice(None)
    if "ged" in record:
        ensemble = EnsembleCase.load(path)
        rows = np.flatnonzero(np.isin(item["slice"], ensemble.slices))
        share = ensemble.masks.mean(1)
        layers = [
            ("share of the members", "probability", share),
            ("majority of the members", "mask", share > 0.5),
            ("members", "members", ensemble.masks.transpose(0, 2, 3, 1)),
            ("annotations", "reference", ensemble.annotations.transpose(0, 2, 3, 1)),
        ]
        score, threshold, scores = record["ged"], 0.5, share.mean((1, 2))
    else:
        case = Case.load(path)
        layers = [("anomaly map", "map", case.maps)]
        if case.mask is not None:
            layers.append(("reference mask", "reference", case.mask))
        score, scores = case.volume_score, case.slice_scores
        threshold = row["metrics"].get("threshold_validation") or row["metrics"].get("threshold_healthy")
    images = [(name, "scan", item["image"][rows, channel]) for channel, name in enumerate(split.modalities)]
    own = {key: value for key, value in record.items() if isinstance(value, (int, float)) and key not in _KNOWN}
    facts: dict = {
        add_samples(key, key.replace("_", " "), [row] if key in row["metrics"] else []): value
        for key, value in own.items()
    }
    facts["case"] = f"{title}, {row['name']}"
    facts["grid"] = "the slices that the network sees" + ("" if affine is not None else ", without a voxel size: 1 mm")
    affine = np.diag([-1.0, -1.0, 1.0, 1.0]) if affine is None else affine
    return ScanView(
        subject,
        [
            # (N, H, W) -> (W, H, N)
            Layer(name, kind, nib.Nifti1Image(_as_volume(array), affine))
            for name, kind, array in [*images, *layers]
        ],
        score=float(score),
        threshold=threshold,
        slice_scores=[float(value) for value in scores],
        facts=facts,
        plane=split.processor_settings["plane"],
        is_picture=len(item["slice"]) == 1,
    )


def _as_volume(array: np.ndarray) -> np.ndarray:
    return np.asarray(array, np.float32).swapaxes(0, 2)


def _make_affine(split: PreparedSplit, subject: str, slices: np.ndarray) -> np.ndarray | None:
    """From the voxels of the slices of a subject to millimetres; `None` where nothing says it."""
    values = split.subject_info[subject]["network_affine"]
    if not values or len(values) != 16:
        return None
    affine = np.reshape(values, (4, 4)).astype(np.float64)
    steps = np.diff(slices)
    # Slices that were left out between others make those seem nearer than they are.
    step = int(steps.min(initial=1)) if len(steps) else 1
    affine[:3, 3] += affine[:3, 2] * int(slices[0])
    affine[:3, 2] *= step
    return affine
