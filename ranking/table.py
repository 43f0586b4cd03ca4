"""The ranking of a benchmark: its rows in order, with who they were trained on and what they cost."""

from __future__ import annotations

from collections.abc import Sequence

from ..evaluation.sections import metric_cell, table
from .plan import METHODS, Entry, Facts


# The ranking goes by the first of these that any row has.
RANKED_BY = {"voxel_average_precision": "AP (voxels)", "slice_auroc": "AUROC (slices)"}
# Beside it.
ALSO = {"dice_validation": "Dice, validation", "dice_healthy": "Dice, healthy only", "slice_auroc": "AUROC (slices)"}
HERE = "trained here"


def rank(report: dict, names: Sequence[str], entries: Sequence[Entry], states: dict[str, dict]) -> dict:
    """
    Ranks the rows of a report.

    Args:
        report (`dict`): As `report.json` holds it; its first rows are those of the models.
        names (sequence of `str`): Entries of these models, in that order.
        entries (sequence of [`~plan.Entry`]): The plan.
        states (`dict[str, dict]`): States of the trainings, by name.

    Returns:
        `dict`: `metric`, what the order goes by; `rows`, each with its `rank`, `name`, `origin`, `trained_on`,
        `training_seconds`, `steps`, `seconds_per_slice`, and `next`: how it compares with the row below it, where the
        report says that; and `absent`, name and reason of what was not ranked.
    """
    kinds = {entry.name: entry for entry in entries}
    results = report["results"]
    metric = next((key for key in RANKED_BY if any(row["metrics"].get(key) is not None for row in results)), None)
    if metric is None:
        raise ValueError("There is nothing to rank by: no slice of the test split is known to be anomalous.")
    numbers = [number for number, row in enumerate(results) if row["metrics"].get(metric) is not None]
    numbers.sort(key=lambda number: -results[number]["metrics"][metric])
    rows = []
    for place, number in enumerate(numbers):
        row, entry = results[number], kinds.get(names[number]) if number < len(names) else None
        state = states.get(entry.name, {}) if entry is not None and entry.kind == "training" else {}
        origin = {"training": HERE, "shipped": "comes with anodiff", "given": "given"}
        below = numbers[place + 1] if place + 1 < len(numbers) else None
        rows.append(
            {
                "rank": place + 1,
                "name": row["name"],
                "result": number,
                "origin": row["kind"] if entry is None else origin[entry.kind],
                "trained_on": row.get("training_population", ""),
                "training_seconds": state.get("seconds"),
                "steps": state.get("steps"),
                "seconds_per_slice": row.get("seconds_per_slice"),
                "next": None if below is None else _compare(report, metric, number, below),
            }
        )
    failed = {name: state["reason"] for name, state in states.items() if state.get("reason")}
    absent = {entry.name: entry.reason for entry in entries if entry.reason} | failed
    absent |= {
        results[number]["name"]: f"it has no {RANKED_BY[metric]}"
        for number in range(len(results))
        if number not in numbers
    }
    return {"metric": metric, "rows": rows, "absent": absent}


def _compare(report: dict, metric: str, first: int, second: int) -> dict | None:
    """What the report says of the difference of two of its rows, the first less the second."""
    for one in report.get("comparisons") or ():
        if one["metric"] == metric and set(one["rows"]) == {first, second}:
            sign = 1 if one["rows"][0] == first else -1
            ends = sorted((sign * one["low"], sign * one["high"]))
            return {
                **{"difference": sign * one["difference"], "low": ends[0], "high": ends[1]},
                **{"p": one["p"], "p_holm": one["p_holm"], "significant": one["p_holm"] < 0.05},
            }
    return None


def describe_duration(seconds: float) -> str:
    """Returns a time in words, `1 h 20 min` or `42 s`."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def print_plan(entries: Sequence[Entry], budget: float, facts: Facts) -> str:
    """Returns the plan as text: a line for every row, with the reason where it is not attempted."""
    trained = [entry for entry in entries if entry.kind in ("training", "part") and not entry.reason]
    lines = [["row", "what", "how"]]
    kinds = {
        "training": "train and evaluate",
        "part": "train, a part of others",
        "shipped": "evaluate",
        "given": "evaluate",
    }
    for entry in entries:
        part = METHODS[entry.name].part if entry.name in METHODS else None
        behind = f", after {part[0]}" if part and not entry.reason else ""
        where = {"shipped": "comes with anodiff", "given": entry.source}.get(entry.kind, f"{entry.source}{behind}")
        lines.append([entry.name, "-" if entry.reason else kinds[entry.kind], entry.reason or where])
    lines += [
        [f"intensity of {modality}", "evaluate", "as it is, over its median, and inverted"]
        for modality in facts.processor["modalities"]
    ]
    lines.append(["trivial statistics", "evaluate", "brain area, mean intensity, mean absolute Laplacian of slices"])
    widths = [max(len(line[column]) for line in lines) for column in range(2)]
    text = [f"{line[0]:<{widths[0]}}  {line[1]:<{widths[1]}}  {line[2]}".rstrip() for line in lines]
    share = f", {describe_duration(budget / len(trained))} each" if trained else ""
    text.append(f"{len(trained)} trainings share {describe_duration(budget)} of optimizer steps{share}.")
    return "\n".join(text)


def markdown(report: dict, ranking: dict, head: str) -> str:
    """Returns the ranking as Markdown, above the report `head`."""
    metric = ranking["metric"]
    others = {key: title for key, title in ALSO.items() if key != metric}
    titles = ["", "row", RANKED_BY[metric], "less the next", *others.values(), "origin", "training", "s per slice"]
    cells = []
    for row in ranking["rows"]:
        metrics = report["results"][row["result"]]["metrics"]
        seconds = row["seconds_per_slice"]
        cells.append(
            [
                *(str(row["rank"]), row["name"], metric_cell(metrics, metric), describe_next(row["next"])),
                *(metric_cell(metrics, key) for key in others),
                *(row["origin"], describe_training(row), "" if seconds is None else f"{seconds:.3g}"),
            ]
        )
    lines = [f"# Ranking on {report['data']['name']}, {report['data']['split']}", "", *table(titles, cells)]
    lines += [f"Times: {report['device']}. Intervals: {report['intervals']}.", ""]
    populations: dict[str, list[str]] = {}
    for row in ranking["rows"]:
        if row["trained_on"]:
            populations.setdefault(row["trained_on"], []).append(row["name"])
    lines += ["## Trained on", "", *(f"- {', '.join(names)}: {text}" for text, names in populations.items()), ""]
    if ranking["absent"]:
        lines += ["## Not ranked", "", *(f"- {name}: {reason}" for name, reason in ranking["absent"].items()), ""]
    return "\n".join(lines) + "\n" + head


def describe_training(row: dict) -> str:
    """Returns the time and steps of a row's training, empty if it was not trained here."""
    if row["training_seconds"] is None:
        return ""
    return f"{describe_duration(row['training_seconds'])}, {row['steps']} steps"


def describe_next(comparison: dict | None) -> str:
    """Returns a comparison with the row below as the text of a cell."""
    if comparison is None:
        return ""
    text = "{difference:+.3f} ({low:+.3f} to {high:+.3f}), p {p_holm:.3g}".format(**comparison)
    return text if comparison["significant"] else f"{text}, not significant"
