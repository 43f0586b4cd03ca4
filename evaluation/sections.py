"""The sections of `report.md`: tables of the rows of a report, and its protocol in lines that can be read."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from ..hub.shipped import add_interval, add_samples
from ..pipelines.guarantee import UNITS
from .froc import RATES


# Below the main table. `{}` is the unit of distances.
LESION_COLUMNS = {
    **{f"lesion_recall_{policy}": f"lesion recall, {policy}" for policy in ("validation", "healthy", "yen", "own")},
    **{f"false_positives_{policy}": f"FP per volume, {policy}" for policy in ("validation", "healthy", "yen", "own")},
    "surface_dice_validation": "surface Dice (2 {}), validation",
    "hausdorff_95_validation": "HD95 ({}), validation",
}
COMPARED = {
    "voxel_average_precision": "AP (voxels)",
    "dice_validation": "Dice, validation",
    "dice_healthy": "Dice, healthy only",
    "slice_auroc": "AUROC (slices)",
    "ged": "GED",
    "hm_iou": "HM-IoU",
    "collective_insight": "CI",
    "dice_majority": "Dice of majorities",
}
STRATIFIED = {
    "voxel_average_precision": "AP (voxels)",
    "dice_validation": "Dice, validation",
    "dice_healthy": "Dice, healthy only",
    "lesion_recall_validation": "lesion recall, validation",
    "lesion_recall_healthy": "lesion recall, healthy only",
}


def table(columns: list[str], rows: list[list[str]]) -> list[str]:
    """Returns the lines of a table in Markdown, with an empty one behind it."""
    head = "| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"
    return [*head, *("| " + " | ".join(cells) + " |" for cells in rows), ""]


def metric_table(rows: list[dict], columns: dict[str, str]) -> list[str]:
    """Returns the table of rows, dicts of `name` and `metrics`, under those of the `columns`, metric to title, that a
    row has a value of; no lines if none has."""
    columns = {
        name: title for name, title in columns.items() if any(row["metrics"].get(name) is not None for row in rows)
    }
    cells = [[row["name"], *(metric_cell(row["metrics"], name) for name in columns)] for row in rows]
    return table(["", *columns.values()], cells) if columns else []


def metric_cell(metrics: dict, name: str) -> str:
    """Returns a metric with its interval as the text of a cell, empty where it is undefined."""
    value = metrics.get(name)
    text = "" if value is None else str(value) if isinstance(value, int) else f"{value:.3f}"
    return add_interval(text, metrics.get(f"{name}_low"), metrics.get(f"{name}_high"))


def lesion_section(report: dict) -> list[str]:
    """Returns the tables of lesions, surfaces and the free-response curve of the rows with maps."""
    rows = [row for row in report["results"] if "froc" in row]
    if not any(row["metrics"]["froc_score"] is not None for row in rows):
        return []
    unit = rows[0]["distance_unit"]
    columns = {name: title.format(unit) for name, title in LESION_COLUMNS.items()}
    undefined = [
        f"{row['name']}: {number}"
        for row in rows
        if (number := row["metrics"].get("hausdorff_95_undefined_validation"))
    ]
    lines = ["## Lesions and surfaces", "", *metric_table(rows, columns)]
    if undefined:
        lines += _wrap(
            f"Subjects with an empty mask, whose HD95 is undefined and left out: {', '.join(undefined)}.", ""
        )
        lines += [""]
    rates = {f"froc_recall_{rate:g}": f"{rate:g} FP" for rate in RATES}
    lines += ["Recall of lesions at so many false positives per volume, and the mean of these:", ""]
    return [*lines, *metric_table(rows, rates | {"froc_score": "mean"})]


def choose_best(rows: Sequence[dict]) -> int | None:
    """Returns the number of the row with the best main metric, pipelines before others, `None` without rows."""

    def order(number: int) -> tuple:
        row, metrics = rows[number], rows[number]["metrics"]
        keys = ("voxel_average_precision", "slice_auroc")
        value = next((metrics[key] for key in keys if metrics.get(key) is not None), 0.0)
        return row["kind"] == "pipeline", value, -metrics.get("ged", 0.0), -number

    return max(range(len(rows)), key=order, default=None)


def comparison_section(report: dict) -> list[str]:
    """Returns the table of the model that is best ([`choose_best`]) against every other row, of ensembles those of as
    many samples."""
    comparisons = report.get("comparisons", [])
    if not comparisons:
        return []
    results = report["results"]
    best = choose_best(results)
    comparisons = [one for one in comparisons if best in one["rows"]]
    if not comparisons:
        return []
    columns = {
        name: add_samples(name, title, [results[best]])
        for name, title in COMPARED.items()
        if any(one["metric"] == name for one in comparisons)
    }
    # By the number of the row: several may have one name, such as a checkpoint with two settings.
    cells: dict[int, dict[str, str]] = {}
    for one in comparisons:
        if one["metric"] not in columns:
            continue
        sign, other = (1, one["rows"][1]) if one["rows"][0] == best else (-1, one["rows"][0])
        low, high = sorted((sign * one["low"], sign * one["high"]))
        text = f"{sign * one['difference']:+.3f} ({low:+.3f} to {high:+.3f}), p {one['p_holm']:.2g}"
        cells.setdefault(other, {})[one["metric"]] = text
    note = (
        f"Differences {results[best]['name']} less the other, on the same resamples of the subjects;"
        " p: two-sided, corrected (Holm) for all comparisons of the metric."
    )
    rows = [
        [results[other]["name"], *(of_metric.get(name, "") for name in columns)] for other, of_metric in cells.items()
    ]
    return ["## The best model against the others", "", *_wrap(note, ""), "", *table(["", *columns.values()], rows)]


def strata_section(report: dict) -> list[str]:
    """Returns a table for each division of the subjects, of the models and the baseline with the highest average
    precision."""
    rows = [row for row in report["results"] if "strata" in row]
    values = [row["metrics"]["voxel_average_precision"] or 0.0 for row in rows if row["kind"] == "baseline"]
    rows = [
        row
        for row in rows
        if row["kind"] == "pipeline" or (row["metrics"]["voxel_average_precision"] or 0.0) == max(values)
    ]
    lines = []
    for name in rows[0]["strata"] if rows else ():
        some = [
            (row["name"], one)
            for group in zip(*(row["strata"][name] for row in rows), strict=True)
            for row, one in zip(rows, group, strict=True)
        ]
        columns = {
            key: title
            for key, title in STRATIFIED.items()
            if any(one["metrics"].get(key) is not None for _, one in some)
        }
        cells = [
            [one["stratum"], row, f"{one['subjects']}{' (few)' * one['few']}"]
            + [metric_cell(one["metrics"], key) for key in columns]
            for row, one in some
        ]
        lines += [f"## By {name}", "", *table(["stratum", "method", "subjects", *columns.values()], cells)]
    return lines


def guarantee_section(report: dict) -> list[str]:
    """Returns what the calibrations of the rows promise of healthy scans, and how it was kept, as a table."""
    rows, notes = [], []
    for row in (row for row in report["results"] if "guarantee" in row):
        told = row["guarantee"]
        if not told["holds"]:
            notes.append(f"{row['name']}: no guarantee, {told['reason']}.")
            continue
        for unit in UNITS:
            if unit in told:
                one = told[unit]
                measured = metric_cell(row["metrics"], f"conformal_{unit}_rate") or "no such subject"
                cells = [f"{unit}s", one["population"], f"{one['n']}", f"{one['promised']:g}", measured]
                rows.append([row["name"], *cells, f"{one['tested']}"])
            else:
                notes.append(f"{row['name']}: nothing is promised of {unit}s. {told['left_out'][unit]}")
        if "probability" in told:
            one, names = told["probability"], {"expected_calibration_error": "ECE", "brier_score": "Brier score"}
            measured = [f"{names[name]} {metric_cell(row['metrics'], f'probability_{name}') or '-'}" for name in names]
            notes.append(
                f"{row['name']}, probability of a lesion: {', '.join(measured)}; for the prevalence of the"
                f" {one['subjects']} subjects of the calibration, {one['prevalence']:.3g} of the brain voxels."
            )
    if not rows and not notes:
        return []
    note = (
        "Of new healthy scans like those of the calibration (n subjects) at most the promised share is above the"
        " threshold, on average over calibrations; measured on this split."
    )
    columns = ["", "what", "population", "n", "promised", "measured", "subjects measured"]
    lines = ["## Guarantees", "", *_wrap(note, ""), "", *(table(columns, rows) if rows else [])]
    for text in notes:
        lines += [*_wrap(f"- {text}", "  ")]
    return [*lines, ""]


def protocol_section(report: dict) -> list[str]:
    """Returns the protocol field by field, in lines of at most 110 letters, and the settings in which rows differ as a
    table."""
    lines = ["## Protocol", ""]
    shared, differing = split_settings(report["results"])
    for name, text in report["protocol"].items():
        title = f"- **{name.replace('_', ' ')}**:"
        parts = text.split("; ")
        if name == "postprocessing":
            parts = [f"of every row {join_settings(shared) or 'nothing'}; the rest is in the table below"]
        if len(parts) == 1:
            lines += _wrap(f"{title} {parts[0]}", "  ")
            continue
        lines.append(title)
        for part in parts:
            lines += _wrap(f"  - {part}", "    ")
    keys = list(dict.fromkeys(key for _, own in differing for key in own))
    lines += [""]
    if keys:
        rows = [[name, *(str(own.get(key, "")) for key in keys)] for name, own in differing]
        lines += table(["", *keys], rows)
    return lines


def split_settings(rows: list[dict]) -> tuple[dict, list[tuple[str, dict]]]:
    """Returns the settings that all rows with settings share, and the name of each of these rows with those that it does
    not share."""
    given = [row for row in rows if row["settings"]]
    first = given[0]["settings"] if given else {}
    shared = {
        key: value
        for key, value in first.items()
        if all(key in row["settings"] and row["settings"][key] == value for row in given)
    }
    differing = [
        (row["name"], {key: value for key, value in row["settings"].items() if key not in shared}) for row in given
    ]
    return shared, differing


def join_settings(settings: dict) -> str:
    """Returns settings as text."""
    return ", ".join(f"{key} {value}" for key, value in settings.items())


def _wrap(text: str, indent: str) -> list[str]:
    return textwrap.wrap(text, 110, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
