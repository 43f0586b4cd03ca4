"""The pictures of a report: the best, the median and the worst case, and how far an ensemble can be relied on."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ..data.prepared import PreparedSplit
from ..files import replacing
from .cases import Case, EnsembleCase
from .overview import DISPERSION_NOTE, add_bar


def draw_cases(report: dict, rows: list[tuple[dict, Path]], split: PreparedSplit, path: Path) -> None:
    """Draws the best, the median and the worst test subject of the first row, one slice each, with the map of every
    row, which stands beside the folder of its cases. The order is that of Dice at the validation threshold (oracle
    without one), and the slice the one with most lesion, outlined; without masks the scores among the anomalous
    subjects."""
    from matplotlib.figure import Figure

    shown = [(row, folder) for row, folder in rows if not row["name"].endswith("over its median")]
    if not shown:
        return
    key, ranked = rank_records(shown[0][0]["subjects"])
    if not ranked:
        return
    chosen = [(title, ranked[index]) for title, index in (("best", -1), ("median", len(ranked) // 2), ("worst", 0))]
    columns = 2 + len(shown)
    figure = Figure(figsize=(2.3 * columns, 2.55 * len(chosen)), layout="constrained")
    axes = figure.subplots(len(chosen), columns, squeeze=False)
    # One colour scale per method: cases stay comparable.
    cases = {
        (number, record["subject"]): Case.load(folder / "test" / f"{record['subject']}.npz")
        for number, (_, folder) in enumerate(shown)
        for _, record in chosen
    }
    for line, (title, record) in zip(axes, chosen, strict=True):
        item = split.read_subject(record["subject"])
        first = cases[0, record["subject"]]
        mask = first.mask
        index = int(mask.sum((1, 2)).argmax()) if mask is not None and mask.any() else int(first.slice_scores.argmax())
        line[0].imshow(item["image"][index, 0], cmap="gray")
        line[0].set_title(f"{title}: {record['subject']}\nslice {item['slice'][index]}", fontsize=7)
        line[1].imshow(item["image"][index, 0], cmap="gray")
        line[1].set_title("reference" if mask is not None else "no reference mask", fontsize=7)
        for number, (axis, (row, _)) in enumerate(zip(line[2:], shown, strict=True)):
            case = cases[number, record["subject"]]
            top = max(np.quantile(cases[number, other["subject"]].maps, 0.999) for _, other in chosen) or 1.0
            axis.imshow(case.maps[index], cmap="inferno", vmin=0, vmax=top)
            own = next(entry for entry in row["subjects"] if entry["subject"] == record["subject"])
            value = own.get(key)
            axis.set_title(f"{row['name']}\n{key} {value:.2f}" if value is not None else row["name"], fontsize=7)
            threshold = row["metrics"].get(key.replace("dice_", "threshold_"))
            if threshold is not None and key.startswith("dice") and (case.maps[index] > threshold).any():
                axis.contour(case.maps[index] > threshold, [0.5], colors="tab:green", linewidths=0.9)
        if mask is not None and mask[index].any():
            for axis in line[1:]:
                axis.contour(mask[index], [0.5], colors="tab:cyan", linewidths=0.8)
    for axis in axes.flat:
        axis.set_axis_off()
    data = f"{report['data']['name']}, {report['data']['split']}"
    note = "maps from 0, one scale per method; cyan reference, green prediction"
    figure.suptitle(f"{data}: {note}", fontsize=8)
    with replacing(path) as unfinished:
        figure.savefig(unfinished, dpi=130)


def rank_records(records: list[dict]) -> tuple[str, list[dict]]:
    """Returns the records of a row from the worst to the best, and by what: Dice at the validation threshold (oracle
    without one); without masks the scores of the anomalous subjects; of ensembles GED."""
    if records and "ged" in records[0]:
        return "ged", sorted(records, key=lambda record: -record["ged"])
    for key in ("dice_validation", "dice_oracle"):
        ranked = sorted((record for record in records if key in record), key=lambda record: record[key])
        if ranked:
            return key, ranked
    return "score", sorted((record for record in records if record["label"] == 1), key=lambda record: record["score"])


def draw_ensemble_cases(report: dict, row: dict, folder: Path, split: PreparedSplit, path: Path) -> None:
    """Draws five images of a row, whose cases are in `folder`, from its best to its worst GED: image, up to four
    annotations and members, their means, and the members' deviation."""
    from matplotlib.figure import Figure

    ranked = sorted(row["subjects"], key=lambda record: record["ged"])
    # Where all masks are empty there is nothing to see.
    ranked = [record for record in ranked if record["annotation_diversity"] or record["ged"]] or ranked
    chosen = [ranked[place] for place in sorted({round(q * (len(ranked) - 1)) for q in (0, 0.25, 0.5, 0.75, 1)})]
    cases = []
    for record in chosen:
        case = EnsembleCase.load(folder / "test" / f"{record['subject']}.npz")
        place = case.slices.tolist().index(record["slice"])
        image = split.read_rows([split.subject_rows(case.subject)[place]], ("image",))["image"][0, 0]
        cases.append((image, *(array[place] for array in (case.annotations, case.masks, case.mean, case.deviation))))
    raters = min(4, max(len(case[1]) for case in cases))
    shown = min(4, row["metrics"]["num_samples"])
    columns = 4 + raters + shown
    figure = Figure(figsize=(1.45 * columns + 1.1, 1.75 * len(cases)), layout="constrained")
    axes = figure.subplots(len(cases), columns, squeeze=False)
    low, high = split.processor_settings["value_range"]
    for line, record, (image, raters_masks, masks, mean, deviation) in zip(axes, chosen, cases, strict=True):
        for axis in line:
            axis.set_axis_off()
        title = f"{record['subject']}\nslice {record['slice']}, GED {record['ged']:.2f}"
        pictures = [(title, image, "gray", low, high)]
        pictures += [(f"rater {k + 1}", mask, "gray", 0, 1) for k, mask in enumerate(raters_masks[:raters])]
        pictures += [("", None, "", 0, 1)] * (raters - len(raters_masks))
        pictures += [("mean of raters", raters_masks.mean(0), "viridis", 0, 1)]
        pictures += [(f"member {k + 1}", mask, "gray", 0, 1) for k, mask in enumerate(masks[:shown])]
        pictures += [("mean of members", mean, "viridis", 0, 1), ("deviation", deviation, "magma", 0, 0.5)]
        for axis, (title, picture, colours, bottom, top) in zip(line, pictures, strict=True):
            if picture is not None:
                axis.imshow(picture, cmap=colours, vmin=bottom, vmax=top, interpolation="nearest")
                axis.set_title(title, fontsize=7)
    shrink = 0.9 if len(cases) == 1 else 0.4
    for axis, label in ((line[-1], "deviation"), (line[-2], "mean")):
        add_bar(figure, axis.images[0], axes, label, shrink, fraction=0.02, pad=0.005)
    data, count = report["data"], row["metrics"]["num_samples"]
    title = f"{row['name']} on {data['name']}, {data['split']}: best to worst GED, {count} members. {DISPERSION_NOTE}"
    figure.suptitle(title, fontsize=8)
    with replacing(path) as unfinished:
        figure.savefig(unfinished, dpi=110)


def draw_reliability(rows: list[dict], path: Path) -> None:
    """Draws the curves of the reliability of every row: of all pixels, and of those that a sample marks."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.2), layout="constrained")
    titles = {"all": "all pixels", "marked": "pixels that a sample marks"}
    for axis, (region, title) in zip(figure.subplots(1, 2), titles.items(), strict=True):
        axis.plot([0, 1], [0, 1], color="0.7", linewidth=1)
        for row in rows:
            curve = row["reliability"][region]
            error = row["metrics"]["expected_calibration_error" + ("" if region == "all" else "_marked")]
            label = f"{row['name']}, {row['metrics']['num_samples']} samples"
            label += "" if error is None else f", ECE {error:.3f}"
            axis.plot(curve["predicted"], curve["observed"], marker="o", markersize=3, linewidth=1, label=label)
        axis.set(xlabel="share of the samples", ylabel="share of the annotations", xlim=(0, 1), ylim=(0, 1))
        axis.set_title(title, fontsize=8)
        axis.legend(fontsize=7)
    with replacing(path) as unfinished:
        figure.savefig(unfinished, dpi=130)
