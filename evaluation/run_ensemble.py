"""One evaluation of ensembles of segmentations (CIMD): several masks of an image against several annotations of it."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from tqdm.auto import tqdm

import anodiff

from ..data.prepared import PreparedSplit, load_prepared
from ..hub.model_index import read_model_index
from ..pipelines.base import device_name
from .checkpoints import describe_model, load_pipeline
from .ensemble_metrics import FrequencyCalibration, score_ensemble
from .metrics import bootstrap_interval
from .options import EvalOptions
from .publishing import check_hub, push_report
from .report import markdown_table


# N slices, E members, A annotations, C modalities, H x W pixels.

PROTOCOL = "ensemble"
PIPELINE = "CIMDPipeline"
MEMBERS = 16  # of the baselines where no model says how many

COLUMNS = {
    "num_samples": "samples",
    "ged": "GED",
    "hm_iou": "HM-IoU",
    "collective_insight": "CI",
    "combined_sensitivity": "Sc",
    "maximum_dice": "Dmax",
    "diversity_agreement": "Da",
    "collective_insight_variances": "CI (Da: variances)",
    "collective_insight_pairs_with_self": "CI (Da: pairs with self)",
    "sample_diversity": "diversity of samples",
    "annotation_diversity": "diversity of raters",
    "dice_majority": "Dice of majorities",
    "expected_calibration_error": "ECE",
    "expected_calibration_error_marked": "ECE (marked)",
}
# Those that a table of a paper shows get an interval.
INTERVALS = ("ged", "hm_iou", "collective_insight")


def is_of_ensembles(options: EvalOptions) -> bool:
    """Whether the models to evaluate are ensembles of segmentations, or the options say so.

    Raises:
        ValueError: Some models are and others are not, or the protocol is one of anomaly maps.
    """
    kinds = {model: read_model_index(model).get("_class_name") for model in options.model}
    others = [f"{model} ({kind})" for model, kind in kinds.items() if kind != PIPELINE]
    if options.protocol != PROTOCOL and len(others) == len(kinds):
        return False
    if others:
        raise ValueError(
            f"Ensembles of segmentations ({PIPELINE}) are evaluated among themselves, got {', '.join(others)} beside them or under"
            f" `protocol` {PROTOCOL}."
        )
    if options.protocol not in ("pooled", PROTOCOL):
        raise ValueError(f"`protocol` {options.protocol} is one of anomaly maps; {PIPELINE} has `{PROTOCOL}`.")
    return True


def evaluate_ensembles(options: EvalOptions) -> dict:
    """
    Evaluates and writes `report.json`, `report.md`, `cases.png` and `reliability.png` into `options.output_dir`.

    An image is a slice with annotations; every metric is the mean over images. Subjects are dealt to the processes in turn; members do not
    depend on their number. The members go through files of the output folder, which all processes must see.

    Returns:
        `dict`: The report, on every process.
    """
    accelerator = Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=12))])
    output_dir = Path(options.output_dir)
    if (output_dir / "report.json").exists():
        raise FileExistsError(f"{output_dir} already holds a report. Choose another `--output_dir`, or move it away.")
    _check_options(options)
    if options.push_to_hub:
        check_hub(options, accelerator.is_main_process)
    accelerator.wait_for_everyone()
    with accelerator.main_process_first():
        split = load_prepared(options.data, options.split)
        training = load_prepared(options.data, "train") if options.baselines else None
    if not split.annotations.any():
        raise ValueError(f"The split `{options.split}` of {options.data} has no annotations to compare with.")
    members_dir = output_dir / "maps"
    rows = []

    # 1. Pipelines.
    for number, model in enumerate(options.model):
        pipeline = load_pipeline(model, options, accelerator.device)
        pipeline.processor.check_equal(split.processor_settings, f"{model} was trained with")
        folder = members_dir / f"{number:02d}"
        seconds = _sample_members(pipeline, split, folder, options, accelerator, Path(model).name)
        rows.append(
            {
                **describe_model(model, pipeline, options),
                "settings": {**pipeline.default_settings(), "threshold": pipeline.config.threshold},
                "seconds_per_slice": seconds,
                "maps": folder,
            }
        )
        del pipeline

    # 2. Baselines that see no image, with as many members as the first model.
    if training is not None:
        count = rows[0]["settings"]["num_ensemble"] if rows else MEMBERS
        for name, members_of in _baselines(training, count, options.seed).items():
            folder = members_dir / name.replace(" ", "-")
            for subject in _own_subjects(split, accelerator):
                masks = members_of(split.subject_rows(subject))
                _save_members(folder, subject, masks, masks.mean(1), masks.std(1))
            rows.append({"name": name, "kind": "baseline", "settings": {"num_ensemble": count}, "maps": folder})
    accelerator.wait_for_everyone()

    # 3. Scores and report.
    if accelerator.is_main_process:
        for row in tqdm(rows, desc="scoring"):
            _score(row, split)
        report = _report(options, split, rows, accelerator)
        _draw_cases(report, rows[0], split, output_dir / "cases.png")
        _draw_reliability(rows, output_dir / "reliability.png")
        for row in rows:
            row.pop("maps")
        (output_dir / "report.md").write_text(markdown_table(report, COLUMNS) + _reliability_table(rows))
        (output_dir / "report.json").write_text(json.dumps(report, indent=2, allow_nan=False))
        if not options.keep_maps:
            shutil.rmtree(members_dir, ignore_errors=True)
    accelerator.wait_for_everyone()
    report = json.loads((output_dir / "report.json").read_text())
    accelerator.end_training()
    if accelerator.is_main_process and options.push_to_hub:
        print(f"Pushed to {push_report(options, report, split.recipe, output_dir)}")
    return report


def _check_options(options: EvalOptions) -> None:
    if not options.model and not options.baselines:
        raise ValueError("There is nothing to evaluate: give `--model`, or leave `baselines` on.")
    # Settings of anomaly maps that would change nothing.
    given = {
        "calibrate": options.calibrate,
        "calibration_slices": options.calibration_slices,
        "guidance_scales": options.guidance_scales,
        "set_threshold": options.set_threshold,
        "sweep": options.sweep,
        "median_dimensions": options.median_dimensions,
        "erosion": options.erosion,
        "min_component_size": options.min_component_size,
        "slice_score": options.slice_score,
    }
    wrong = [name for name, value in given.items() if value not in (None, [])]
    if wrong:
        raise ValueError(
            f"Ensembles of segmentations have no {', '.join(f'`{name}`' for name in wrong)}: leave it out."
        )


def _own_subjects(split: PreparedSplit, accelerator: Accelerator) -> list[str]:
    """The subjects with annotations that this process has to do."""
    annotated = [subject for subject in split.subjects if split.subject_info[subject]["annotations"]]
    return annotated[accelerator.process_index :: accelerator.num_processes]


def _sample_members(
    pipeline, split: PreparedSplit, folder: Path, options: EvalOptions, accelerator: Accelerator, name: str
) -> float:
    """Writes the members of this process's subjects; returns seconds per slice, of all processes together."""
    seconds, count = 0.0, 0
    settings, threshold = pipeline.default_settings(), pipeline.config.threshold
    mine = _own_subjects(split, accelerator)
    bar = tqdm(total=len(mine), desc=name, disable=not accelerator.is_local_main_process, unit="subject")
    # Subjects of few slices (pictures) are put together, so that batches are full.
    waiting: list[tuple[str, dict]] = []
    for position, subject in enumerate(mine):
        waiting.append((subject, split.read_subject(subject)))
        slices = sum(len(item["image"]) for _, item in waiting)
        if slices * settings["num_ensemble"] < options.batch_size and position + 1 < len(mine):
            continue
        start = time.perf_counter()
        images, brain = (np.concatenate([item[key] for _, item in waiting]) for key in ("image", "brain"))
        # Numbers of the split's rows, not of a volume's slices: in pictures, all of number 0, a member would have the same noise
        # everywhere, and what it draws by chance would count in every one of them.
        numbers = [row for subject, _ in waiting for row in split.subject_rows(subject)]
        members = pipeline.compute_members(
            torch.from_numpy(images).to(accelerator.device),
            numbers,
            seed=options.seed,
            batch_size=options.batch_size,
            **settings,
        )
        members = members.float().cpu().numpy() * brain[:, None]  # as in the pipeline's call
        seconds += time.perf_counter() - start
        count += slices
        first = 0
        for subject, item in waiting:
            own = members[first : first + len(item["image"])]
            first += len(own)
            _save_members(folder, subject, own > threshold, own.mean(1), own.std(1))
        bar.update(len(waiting))
        waiting = []
    bar.close()
    totals = accelerator.reduce(torch.tensor([seconds, count], device=accelerator.device, dtype=torch.float32), "sum")
    return (totals[0] / totals[1].clamp(min=1)).item()


def _baselines(training: PreparedSplit, count: int, seed: int) -> dict[str, Callable[[range], np.ndarray]]:
    """Name to a function from rows of the evaluated split to masks `(N, count, H, W)` bool."""
    annotated = np.flatnonzero(training.annotations)
    if not annotated.size:
        raise ValueError("The training split has no annotations to make baselines of: `--baselines false`.")
    rate = 0.0
    for first in range(0, annotated.size, 256):
        rows = annotated[first : first + 256]
        # What is not there is zeros.
        marked = training.read_rows(rows, ("mask",))["mask"].sum(1) / training.annotations[rows, None, None]
        rate = rate + marked.sum(0) / annotated.size
    levels = rate > (np.arange(count)[:, None, None] + 0.5) / count

    def mean_rate(rows: range) -> np.ndarray:
        return np.broadcast_to(levels, (len(rows), *levels.shape))

    def random_annotation(rows: range) -> np.ndarray:
        drawn = []
        for row in rows:
            rng = np.random.default_rng([seed, row])
            chosen = rng.choice(annotated, count)
            masks = training.read_rows(chosen, ("mask",))["mask"]
            drawn.append(masks[np.arange(count), rng.integers(training.annotations[chosen])])
        return np.stack(drawn) > 0

    return {"mean annotation rate": mean_rate, "random training annotation": random_annotation}


def _save_members(folder: Path, subject: str, masks: np.ndarray, mean: np.ndarray, deviation: np.ndarray) -> None:
    path = folder / f"{subject}.npz"  # a picture's name holds the folders it came from
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path, masks=masks, mean=mean.astype(np.float32), deviation=deviation.astype(np.float32))


def _load_members(folder: Path, subject: str) -> dict[str, np.ndarray]:
    with np.load(folder / f"{subject}.npz", allow_pickle=False) as arrays:
        return dict(arrays)


def _score(row: dict, split: PreparedSplit) -> None:
    """Adds `metrics`, `reliability` and `subjects` (a record per image) to a row."""
    calibrations = {"all": FrequencyCalibration(), "marked": FrequencyCalibration()}
    records = []
    for subject in split.subjects:
        if not split.subject_info[subject]["annotations"]:
            continue
        item, masks = split.read_subject(subject), _load_members(row["maps"], subject)["masks"]
        for number, pred, gt in zip(item["slice"], masks, item["mask"], strict=True):
            group = split.subject_info[subject]["group"]
            records.append({"subject": subject, "slice": int(number), "group": group, **score_ensemble(pred, gt)})
            predicted, observed = pred.mean(0), gt.mean(0)
            # Not where an annotation marks: pixels that are chosen by the outcome are never calibrated.
            marked = predicted > 0
            calibrations["all"].update(predicted, observed)
            calibrations["marked"].update(predicted[marked], observed[marked])
    metrics: dict[str, float | None] = {"num_samples": row["settings"]["num_ensemble"]}
    groups = np.unique([record["group"] for record in records], return_inverse=True)[1]
    for name in records[0]:
        if name not in ("subject", "slice", "group"):
            values = np.array([record[name] for record in records])
            metrics[name] = float(values.mean())
            if name in INTERVALS:
                metrics[f"{name}_low"], metrics[f"{name}_high"] = bootstrap_interval(values, groups)
    for region, ending in (("all", ""), ("marked", "_marked")):
        error = calibrations[region].expected_error()
        metrics[f"expected_calibration_error{ending}"] = None if np.isnan(error) else error
    row["metrics"], row["subjects"] = metrics, records
    row["reliability"] = {
        region: {name: values.tolist() for name, values in calibration.curve().items()}
        for region, calibration in calibrations.items()
    }


def _report(options: EvalOptions, split: PreparedSplit, rows: list[dict], accelerator: Accelerator) -> dict:
    settings, recipe, images = split.processor_settings, split.recipe, rows[0]["subjects"]
    annotations = sorted({split.subject_info[image["subject"]]["annotations"] for image in images})
    raters = " to ".join(map(str, sorted({annotations[0], annotations[-1]})))
    groups = len({image["group"] for image in images})
    samples = ", ".join(f"{row['name']}: {row['metrics']['num_samples']}" for row in rows)
    return {
        "anodiff": anodiff.__version__,
        "task": "Ambiguous segmentation",
        "data": {
            "name": Path(options.data).name if Path(options.data).exists() else options.data,
            "split": options.split,
            "subjects": len({image["subject"] for image in images}),
            "slices": len(images),
            "anomalous_slices": int((split.labels[split.annotations > 0] == 1).sum()),
        },
        "protocol": {
            "training_population": "; ".join(
                f"{row['name']}: {row['training_population']}" for row in rows if row["kind"] == "pipeline"
            )
            or "no model was evaluated",
            "modality": ", ".join(settings["modalities"]),
            "unit_of_averaging": "mean over images (slices with annotations); intervals: 95 %, bootstrap over groups of subjects"
            " (patients); calibration: pixels of all images together, `marked`: those that a sample marks",
            "threshold_policy": "samples are masks at the checkpoint's own threshold; nothing is tuned on these data. mean annotation"
            " rate: level sets of the training set's rate, without the image; random training annotation: one per sample",
            "geometry": f"network grid {settings['size']}, plane {settings['plane']}, slices {recipe.get('slices', {})}",
            "preprocessing": ", ".join(
                f"{key} {settings[key]}" for key in ("intensity", "value_range", "clip", "resize", "brain_mask")
            ),
            "postprocessing": "; ".join(
                f"{row['name']}: median of the members {row['settings']['median_size']}"
                for row in rows
                if row["kind"] == "pipeline"
            )
            or "none",
            "label_definition": f"{raters} annotations as they are, empty ones included; two empty masks agree (IoU 1); GED over all"
            " ordered pairs with themselves (V-statistic)",
            "samples": f"{groups} groups, {len(images)} images; samples per image: {samples}",
        },
        "results": [{key: value for key, value in row.items() if key != "maps"} for row in rows],
        "seed": options.seed,
        "device": device_name(accelerator.device),
        "processes": accelerator.num_processes,
        "versions": {name: version(name) for name in ("torch", "diffusers", "accelerate", "numpy")},
    }


def _reliability_table(rows: list[dict]) -> str:
    """Of the first row: how many raters mark the pixels that so many samples mark?"""
    curve = rows[0]["reliability"]["all"]
    lines = [
        f"## Reliability of {rows[0]['name']}",
        "",
        "Pixels by the share of the samples that mark them.",
        "",
        "| share of the samples | share of the annotations | pixels |",
        "|---|---|---|",
    ]
    for predicted, observed, pixels in zip(curve["predicted"], curve["observed"], curve["pixels"], strict=True):
        lines.append(f"| {predicted:.3f} | {observed:.3f} | {pixels} |")
    return "\n".join(["", *lines, ""])


def _draw_reliability(rows: list[dict], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.2), layout="constrained")
    titles = {"all": "all pixels", "marked": "pixels that a sample marks"}
    for axis, (region, title) in zip(figure.subplots(1, 2), titles.items(), strict=True):
        axis.plot([0, 1], [0, 1], color="0.7", linewidth=1)
        for row in rows:
            curve = row["reliability"][region]
            ending = "" if region == "all" else "_marked"
            error = row["metrics"][f"expected_calibration_error{ending}"]
            label = row["name"] if error is None else f"{row['name']}, ECE {error:.3f}"
            axis.plot(curve["predicted"], curve["observed"], marker="o", markersize=3, linewidth=1, label=label)
        axis.set(xlabel="share of the samples", ylabel="share of the annotations", xlim=(0, 1), ylim=(0, 1))
        axis.set_title(title, fontsize=8)
        axis.legend(fontsize=7)
    figure.savefig(path, dpi=130)


def _draw_cases(report: dict, row: dict, split: PreparedSplit, path: Path) -> None:
    """Draws five images of a row, from its best to its worst GED: image, up to four annotations and members, their means, and the
    members' deviation."""
    from matplotlib.figure import Figure

    ranked = sorted(row["subjects"], key=lambda record: record["ged"])
    # Where all masks are empty there is nothing to see.
    ranked = [record for record in ranked if record["annotation_diversity"] or record["ged"]] or ranked
    chosen = [ranked[place] for place in sorted({round(q * (len(ranked) - 1)) for q in (0, 0.25, 0.5, 0.75, 1)})]
    cases = []
    for record in chosen:
        item, members = split.read_subject(record["subject"]), _load_members(row["maps"], record["subject"])
        place = item["slice"].tolist().index(record["slice"])
        cases.append((item["image"][place, 0], item["mask"][place], {k: v[place] for k, v in members.items()}))
    raters = min(4, max(len(masks) for _, masks, _ in cases))
    shown = min(4, row["metrics"]["num_samples"])
    columns = 4 + raters + shown
    figure = Figure(figsize=(1.45 * columns + 1.1, 1.75 * len(cases)), layout="constrained")
    axes = figure.subplots(len(cases), columns, squeeze=False)
    low, high = split.processor_settings["value_range"]
    for line, record, (image, masks, members) in zip(axes, chosen, cases, strict=True):
        for axis in line:
            axis.set_axis_off()
        pictures = [
            (f"{record['subject']}\nslice {record['slice']}, GED {record['ged']:.2f}", image, "gray", low, high)
        ]
        pictures += [(f"rater {k + 1}", mask, "gray", 0, 1) for k, mask in enumerate(masks[:raters])]
        pictures += [("", None, "", 0, 1)] * (raters - len(masks))
        pictures += [("mean of raters", masks.mean(0), "viridis", 0, 1)]
        pictures += [(f"member {k + 1}", mask, "gray", 0, 1) for k, mask in enumerate(members["masks"][:shown])]
        pictures += [
            ("mean of members", members["mean"], "viridis", 0, 1),
            ("deviation", members["deviation"], "magma", 0, 0.5),
        ]
        for axis, (title, picture, colours, bottom, top) in zip(line, pictures, strict=True):
            if picture is not None:
                axis.imshow(picture, cmap=colours, vmin=bottom, vmax=top, interpolation="nearest")
                axis.set_title(title, fontsize=7)
    for axis, label in ((line[-1], "deviation"), (line[-2], "mean")):
        bar = figure.colorbar(
            axis.images[0], ax=axes, shrink=0.9 if len(cases) == 1 else 0.4, fraction=0.02, pad=0.005
        )
        bar.set_label(label, fontsize=7)
        bar.ax.tick_params(labelsize=6)
    data = report["data"]
    figure.suptitle(
        f"{row['name']} on {data['name']}, {data['split']}: best to worst GED, {row['metrics']['num_samples']} members."
        " Deviation is dispersion, not confidence. Research use only.",
        fontsize=8,
    )
    figure.savefig(path, dpi=110)
