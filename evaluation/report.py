"""What people look at: the Markdown table and the picture of the best, the median and the worst case."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ..data.prepared import PreparedSplit
from .scoring import Case


COLUMNS = {
    "voxel_average_precision": "AP (voxels)",
    "voxel_auroc": "AUROC (voxels)",
    "dice_oracle": "Dice, oracle",
    "dice_validation": "Dice, validation",
    "dice_healthy": "Dice, healthy only",
    "dice_yen": "Dice, label-free",
    "volume_dice_validation": "Dice per volume, validation",
    "slice_auroc": "AUROC (slices)",
    "subject_auroc": "AUROC (subjects)",
}

# Of some methods and other protocols, shown where a row has them.
PROTOCOL_COLUMNS = {
    "dice_own": "Dice, own masks",
    "andi_average_precision": "AP (ANDi)",
    "andi_dice_oracle": "Dice, oracle (ANDi)",
    "andi_dice_yen": "Dice, Yen (ANDi)",
    "uad_imag_average_precision": "AP (UAD-IMAG)",
    "uad_imag_dice_oracle": "Dice, oracle (UAD-IMAG)",
    "uad_imag_dice_validation": "Dice, validation (UAD-IMAG)",
    "uad_imag_fpr_validation": "FPR, validation (UAD-IMAG)",
    "uad_imag_dice_healthy": "Dice, healthy only (UAD-IMAG)",
    "uad_imag_fpr_healthy": "FPR, healthy only (UAD-IMAG)",
    **{
        f"anofpdm_{name}": f"{title} (AnoFPDM)"
        for name, title in {
            "dice_mixed_own": "Dice, own masks, mixed",
            "dice_unhealthy_own": "Dice, own masks, unhealthy",
            "dice_mixed_validation": "Dice, validation, mixed",
            "dice_unhealthy_validation": "Dice, validation, unhealthy",
            "dice_mixed_healthy": "Dice, healthy only, mixed",
            "dice_unhealthy_healthy": "Dice, healthy only, unhealthy",
            "auprc_mixed": "AP, mixed",
            "auprc_unhealthy": "AP, unhealthy",
            "image_accuracy_own": "image accuracy, own",
            "image_accuracy_validation": "image accuracy, validation",
        }.items()
    },
    **{
        f"sadm_{name}": f"{title} (SADM)"
        for name, title in {
            "dice_search": "Dice, search",
            "dice_exact": "Dice, exact threshold",
            "best_dice": "Dice, best per volume",
            "auprc": "AP",
            "auroc": "AUROC",
            "hausdorff_search": "Hausdorff, search",
            "dice_small": "Dice, small lesions",
            "dice_medium": "Dice, medium lesions",
            "dice_large": "Dice, large lesions",
            "healthy_fpr_search": "FPR of healthy slices, search",
            "dice_fpr5": "Dice at 5 % FPR",
            "healthy_fpr_fpr5": "FPR of healthy slices, 5 % FPR",
            "l1": "l1",
            "l1_ratio": "l1 ratio",
        }.items()
    },
}


def markdown_table(report: dict, columns: dict[str, str] = COLUMNS) -> str:
    """The report as Markdown: a table of every row, with titles for the metrics that are shown, and the nine protocol fields below it."""
    data = report["data"]
    shown = {name for row in report["results"] for name in row["metrics"]}
    columns = columns | {name: title for name, title in PROTOCOL_COLUMNS.items() if name in shown}
    lines = [
        f"# {data['name']}, {data['split']}",
        "",
        f"{data['subjects']} subjects, {data['slices']} slices, {data['anomalous_slices']} of them anomalous.",
        "Research use, not a medical device.",
        "",
        "| | " + " | ".join([*columns.values(), "s per slice"]) + " |",
        "|---" * (len(columns) + 2) + "|",
    ]
    for row in report["results"]:
        values = [row["metrics"].get(name) for name in columns]
        seconds = row.get("seconds_per_slice")
        cells = ["" if value is None else str(value) if isinstance(value, int) else f"{value:.3f}" for value in values]
        lines.append(f"| {row['name']} | " + " | ".join([*cells, "" if seconds is None else f"{seconds:.3g}"]) + " |")
    lines += ["", "## Protocol", ""]
    lines += [f"- **{name.replace('_', ' ')}**: {text}" for name, text in report["protocol"].items()]
    versions = ", ".join(f"{name} {number}" for name, number in report["versions"].items())
    lines += [
        "",
        f"anodiff {report['anodiff']}, {versions}, {report['device']}, {report['processes']} process(es), seed {report['seed']}.",
        "",
    ]
    return "\n".join(lines)


def draw_cases(report: dict, rows: list[dict], split: PreparedSplit, path: Path) -> None:
    """
    Draws the best, the median and the worst test subject of the first row, one slice each, with every row's map.

    With masks the order is that of Dice at the validation threshold (oracle without one), and the slice the one with most lesion, outlined.
    Without masks it is the order of the scores among the anomalous subjects.
    """
    from matplotlib.figure import Figure

    shown = [row for row in rows if row.get("subjects") and not row["name"].endswith("over its median")]
    if not shown:
        return
    key, ranked = _rank(shown[0]["subjects"])
    if not ranked:
        return
    chosen = [(title, ranked[index]) for title, index in (("best", -1), ("median", len(ranked) // 2), ("worst", 0))]
    columns = 2 + len(shown)
    figure = Figure(figsize=(2.3 * columns, 2.55 * len(chosen)), layout="constrained")
    axes = figure.subplots(len(chosen), columns, squeeze=False)
    # One colour scale per method: cases stay comparable.
    cases = {
        (number, record["subject"]): Case.load(row["maps"] / "test" / f"{record['subject']}.npz")
        for number, row in enumerate(shown)
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
        for number, (axis, row) in enumerate(zip(line[2:], shown, strict=True)):
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
    data = report["data"]
    figure.suptitle(
        f"{data['name']}, {data['split']}: maps from 0, one scale per method; cyan reference, green prediction",
        fontsize=8,
    )
    figure.savefig(path, dpi=130)


def _rank(records: list[dict]) -> tuple[str, list[dict]]:
    for key in ("dice_validation", "dice_oracle"):
        ranked = sorted((record for record in records if key in record), key=lambda record: record[key])
        if ranked:
            return key, ranked
    return "score", sorted((record for record in records if record["label"] == 1), key=lambda record: record["score"])
