"""One evaluation: maps of every subject, spread over the processes, then the report of the first one."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
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
from ..pipelines.base import NOT_FINITE, device_name
from ..pipelines.postprocessing import PostProcessing
from ..volumes.processor import VolumeProcessor
from .baselines import equalised_map, intensity_map, slice_statistics
from .calibration import LabelledSlices
from .checkpoints import (
    calibrate_checkpoint,
    check_calibrate,
    check_set_threshold,
    describe_model,
    load_pipeline,
    postprocessing_changes,
    set_threshold,
)
from .options import EvalOptions
from .protocols.andi import (
    ANDI_SWEEP,
    EQUALISED_SWEEP,
    PROTOCOL_TEXT,
    check_protocol,
    score_andi,
    score_uad_imag,
    sweep_thresholds,
)
from .protocols.anofpdm import ANOFPDM_SWEEP, foreground_of, score_anofpdm
from .protocols.sadm import score_sadm
from .publishing import check_hub, push_report
from .report import draw_cases, markdown_table
from .scoring import Case, score_cases, score_statistic


EQUALISED = "equalised flair"


def evaluate(options: EvalOptions) -> dict:
    """
    Evaluates and writes `report.json`, `report.md` and `cases.png` into `options.output_dir`.

    Subjects are dealt to the processes in turn. A slice's random numbers depend on the seed and on its index in its volume, as in
    a call of the pipeline, so that the maps do not depend on the number of processes. Maps go through files of the output
    folder, which all processes must see.

    Returns:
        `dict`: The report, on every process.
    """
    # The first process scores while the others wait; NCCL would give up after ten minutes.
    accelerator = Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=12))])
    output_dir = Path(options.output_dir)
    if (output_dir / "report.json").exists():
        raise FileExistsError(f"{output_dir} already holds a report. Choose another `--output_dir`, or move it away.")
    check_set_threshold(options)
    check_calibrate(options)
    check_protocol(options.protocol, options.sweep)
    if options.push_to_hub:
        check_hub(options, accelerator.is_main_process)
    accelerator.wait_for_everyone()
    with accelerator.main_process_first():
        splits = {"test": load_prepared(options.data, options.split)}
        if options.validation_split != "none":
            splits["validation"] = load_prepared(options.data, options.validation_split)
    maps_dir = output_dir / "maps"
    rows = []
    calibrations = {}
    if options.calibrate and accelerator.is_main_process:
        # Once: the other processes wait, and then load what was stored.
        slices = LabelledSlices(splits["validation"], options.calibration_slices)
        for model in options.model:
            calibrations[model] = calibrate_checkpoint(
                model, slices, splits["validation"], options, accelerator.device
            )
    accelerator.wait_for_everyone()

    # 1. Pipelines.
    postprocessing = None
    for number, model in enumerate(options.model):
        pipeline = load_pipeline(model, options, accelerator.device)
        pipeline.processor.check_equal(splits["test"].processor_settings, f"{model} was trained with")
        postprocessing = postprocessing or pipeline.postprocessing
        # Two models of one name must not share a folder.
        folder = maps_dir / f"{number:02d}"
        settings = {**asdict(pipeline.postprocessing), **pipeline.default_settings()}
        seconds = _pipeline_cases(pipeline, splits, folder, options, accelerator, Path(model).name)
        rows.append(
            {
                **describe_model(model, pipeline, options),
                "settings": settings,
                "seconds_per_slice": seconds,
                "maps": folder,
                **({"calibration": calibrations[model]} if model in calibrations else {}),
            }
        )
        del pipeline

    # 2. Baselines with the post-processing of the first model.
    processor = VolumeProcessor.from_dict(splits["test"].processor_settings)
    if options.baselines:
        postprocessing = postprocessing or PostProcessing(**postprocessing_changes(options))
        for channel, modality in enumerate(processor.config.modalities):
            for over_median in (False, True):
                folder = maps_dir / f"intensity-{channel}{'-over-median' * over_median}"
                low_high = processor.config.value_range
                for item, target in _own_subjects(splits, folder, accelerator):
                    maps = intensity_map(item["image"], item["brain"], channel, low_high, over_median)
                    _case(item, maps, postprocessing).save(target)
                rows.append(
                    {
                        "name": f"intensity of {modality}{' over its median' * over_median}",
                        "kind": "baseline",
                        "settings": asdict(postprocessing),
                        "maps": folder,
                    }
                )
        if options.protocol == "andi" and "flair" in processor.config.modalities:
            folder = maps_dir / "equalised-flair"
            channel = processor.config.modalities.index("flair")
            for item, target in _own_subjects(splits, folder, accelerator):
                maps = equalised_map(item["image"], item["brain"], channel, processor.config.value_range)
                _case(item, maps, postprocessing).save(target)
            rows.append(
                {"name": EQUALISED, "kind": "baseline", "settings": asdict(postprocessing), "maps": folder},
            )
    accelerator.wait_for_everyone()

    # 3. Scores and report.
    if accelerator.is_main_process:
        for row in tqdm(rows, desc="scoring"):
            files = {
                split: [row["maps"] / split / f"{name}.npz" for name in splits[split].subjects] for split in splits
            }
            row["metrics"], row["subjects"] = score_cases(
                files["test"],
                files.get("validation", []),
                min_component_size=row["settings"]["min_component_size"],
                healthy_fpr=options.healthy_fpr,
            )
            _score_protocol(row, files, splits["test"], options)
        if options.baselines:
            rows += _statistic_rows(splits)
        report = _report(options, splits, processor, rows, accelerator)
        draw_cases(report, rows, splits["test"], output_dir / "cases.png")
        for row in rows:
            row.pop("maps", None)
        (output_dir / "report.md").write_text(markdown_table(report))
        (output_dir / "report.json").write_text(json.dumps(report, indent=2, allow_nan=False))
        if options.set_threshold:
            for row in rows:
                if row["kind"] == "pipeline":
                    set_threshold(Path(row["model"]), row["metrics"][f"threshold_{options.set_threshold}"])
        if not options.keep_maps:
            shutil.rmtree(maps_dir, ignore_errors=True)
    accelerator.wait_for_everyone()
    report = json.loads((output_dir / "report.json").read_text())
    accelerator.end_training()  # takes the process group down: nothing waits for anybody from here on
    if accelerator.is_main_process and options.push_to_hub:
        print(f"Pushed to {push_report(options, report, splits['test'].recipe, output_dir)}")
    return report


def _score_protocol(row: dict, files: dict[str, list[Path]], split: PreparedSplit, options: EvalOptions) -> None:
    """Adds the columns of another protocol to a scored row, and the Dice of its sweep."""
    if options.protocol == "andi":
        # The authors do not scale the equalised FLAIR, whose lesions lie near 1.
        equalised = row["name"] == EQUALISED
        thresholds = sweep_thresholds(options.sweep or (EQUALISED_SWEEP if equalised else ANDI_SWEEP))
        metrics, row["sweep"], records = score_andi(files["test"], thresholds, scale=not equalised)
        for subject, record in zip(row["subjects"], records, strict=True):
            subject.update(record)
        row["metrics"] |= metrics
    elif options.protocol == "uad_imag":
        thresholds = None if options.sweep is None else sweep_thresholds(options.sweep)
        metrics, row["sweep"] = score_uad_imag(
            files["test"], files.get("validation", []), thresholds, healthy_fpr=options.healthy_fpr
        )
        row["metrics"] |= metrics
    elif options.protocol == "anofpdm":

        def foreground(subject: str) -> np.ndarray:
            return foreground_of(split.read_subject(subject)["image"], split.processor_settings["value_range"])

        row["metrics"] |= score_anofpdm(
            files["test"],
            files.get("validation", []),
            foreground,
            sweep_thresholds(options.sweep or ANOFPDM_SWEEP),
            healthy_fpr=options.healthy_fpr,
        )
    elif options.protocol == "sadm":
        metrics, records, row["lesion_sizes"] = score_sadm(
            files["test"], files.get("validation", []), min_component_size=row["settings"]["min_component_size"]
        )
        for subject, record in zip(row["subjects"], records, strict=True):
            subject.update(record)
        row["metrics"] |= metrics


@torch.no_grad()
def _pipeline_cases(
    pipeline, splits: dict[str, PreparedSplit], folder: Path, options, accelerator, name: str
) -> float:
    """Writes the cases of this process; returns seconds per slice, of all processes together."""
    seconds, count = 0.0, 0
    for split_name, split in splits.items():
        mine = split.subjects[accelerator.process_index :: accelerator.num_processes]
        progress = tqdm(
            total=len(mine),
            desc=f"{name}, {split_name}",
            disable=not accelerator.is_local_main_process,
            unit="subject",
        )
        # Subjects of few slices (pictures) are put together, so that batches are full.
        waiting: list[dict] = []
        for position, subject in enumerate(mine):
            waiting.append({"subject": subject, **split.read_subject(subject)})
            is_full = pipeline.whole_volumes or sum(len(item["image"]) for item in waiting) >= options.batch_size
            if not is_full and position + 1 < len(mine):
                continue
            start = time.perf_counter()
            images = torch.from_numpy(np.concatenate([item["image"] for item in waiting])).to(accelerator.device)
            brain = np.concatenate([item["brain"] for item in waiting])
            numbers = np.concatenate([item["slice"] for item in waiting])
            active = np.flatnonzero(brain.any((1, 2)))
            settings = pipeline.default_settings()
            if "gate_by_label" in settings:
                # Cases keep masks and image labels apart: one setting of the protocol needs the masks alone.
                settings["gate_by_label"] = False
            results = pipeline.compute_maps(
                images[active], numbers[active].tolist(), seed=options.seed, batch_size=options.batch_size, **settings
            )
            maps = _with_empty_slices(results.maps, active, brain.shape)
            own_mask = own_labels = added = error = None
            if results.added is not None:
                added = _with_empty_slices(results.added, active, brain.shape)
            if options.protocol == "sadm" and results.reconstruction is not None:
                low, high = pipeline.processor.config.value_range
                difference = (images[active] - results.reconstruction).abs().mean(1) / (high - low)
                error = _with_empty_slices(difference, active, brain.shape)
            if results.masks is not None:
                own_mask, own_labels = np.zeros(brain.shape, bool), np.zeros(len(brain), np.int64)
                own_mask[active] = results.masks.cpu().numpy()
                own_labels[active] = results.details.get("label", results.masks.any(2).any(1)).cpu().numpy()
            if not np.isfinite(maps).all() or (added is not None and not np.isfinite(added).all()):
                names = ", ".join(item["subject"] for item in waiting)
                raise ValueError(f"{name}, {split_name}, subject(s) {names}: {NOT_FINITE}")
            offset = 0
            for item in waiting:
                rows = slice(offset, offset + len(item["image"]))
                offset = rows.stop
                case = _case(item, maps[rows], pipeline.postprocessing, None if added is None else added[rows])
                if error is not None:
                    case = replace(case, error=error[rows])
                if own_mask is not None:
                    # The original's masks know no brain; a predicted voxel outside is none.
                    case = replace(case, own_mask=own_mask[rows] & item["brain"], own_labels=own_labels[rows])
                case.save(folder / split_name)
            seconds += time.perf_counter() - start
            count += len(images)
            progress.update(len(waiting))
            waiting = []
        progress.close()
    totals = accelerator.reduce(torch.tensor([seconds, count], device=accelerator.device, dtype=torch.float32), "sum")
    return (totals[0] / totals[1].clamp(min=1)).item()


def _own_subjects(splits: dict[str, PreparedSplit], folder: Path, accelerator) -> Iterator[tuple[dict, Path]]:
    """The subjects of this process, read, each with the folder that its case goes to."""
    for split_name, split in splits.items():
        for subject in split.subjects[accelerator.process_index :: accelerator.num_processes]:
            yield {"subject": subject, **split.read_subject(subject)}, folder / split_name


def _with_empty_slices(values: torch.Tensor, active: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Maps of the slices with brain among those of all, 0 elsewhere, float32."""
    everything = np.zeros(shape, np.float32)
    everything[active] = values.float().cpu().numpy()
    return everything


def _case(item: dict, maps: np.ndarray, postprocessing: PostProcessing, added: np.ndarray | None = None) -> Case:
    brain = item["brain"]
    filtered = postprocessing.filter(maps, brain, added)
    # Several annotators: a voxel counts as lesion where at least half of them say so.
    mask = item["mask"].mean(1) >= 0.5 if item["mask"].shape[1] and (item["label"] >= 0).all() else None
    return Case(
        subject=item["subject"],
        maps=filtered,
        brain=brain,
        mask=mask,
        labels=item["label"],
        slice_scores=postprocessing.score_slices(filtered, brain),
        volume_score=postprocessing.score(filtered, brain),
    )


def _statistic_rows(splits: dict[str, PreparedSplit]) -> list[dict]:
    values: dict[str, dict[str, list]] = {}
    for split_name, split in splits.items():
        for subject in split.subjects:
            item = split.read_subject(subject)
            known = item["label"] >= 0
            for name, statistic in slice_statistics(item["image"], item["brain"]).items():
                values.setdefault(name, {}).setdefault(split_name, []).append((statistic[known], item["label"][known]))
    rows = []
    for name, by_split in values.items():
        pooled = {
            key: tuple(np.concatenate(part) for part in zip(*pairs, strict=True)) for key, pairs in by_split.items()
        }
        metrics = score_statistic(pooled["test"], pooled.get("validation"))
        rows.append({"name": name, "kind": "statistic", "settings": {}, "metrics": metrics, "subjects": []})
    return rows


def _report(options: EvalOptions, splits, processor: VolumeProcessor, rows: list[dict], accelerator) -> dict:
    split = splits["test"]
    labels = split.labels
    settings = processor.settings()
    recipe = split.recipe
    return {
        "anodiff": anodiff.__version__,
        "data": {
            # A Hub id stays whole: results belong to that data set.
            "name": Path(options.data).name if Path(options.data).exists() else options.data,
            "split": options.split,
            "subjects": len(split.subjects),
            "slices": len(split),
            "anomalous_slices": int((labels == 1).sum()),
        },
        "protocol": {
            "training_population": "; ".join(
                f"{row['name']}: {row['training_population']}" for row in rows if row["kind"] == "pipeline"
            )
            or "no model was evaluated",
            "modality": ", ".join(settings["modalities"]),
            "unit_of_averaging": "pooled brain voxels; volume_dice: mean over subjects with lesion; slices and subjects for AUROC"
            + PROTOCOL_TEXT[options.protocol].get("unit_of_averaging", ""),
            "threshold_policy": "oracle: best pooled Dice on the test split; validation: best pooled Dice on the validation split;"
            f" healthy: {options.healthy_fpr:g} of the voxels of healthy validation slices; yen: label-free, per subject; all"
            " chosen before small components are removed; own: the method's own masks of the slices that it calls anomalous"
            + PROTOCOL_TEXT[options.protocol].get("threshold_policy", ""),
            "geometry": f"network grid {settings['size']}, plane {settings['plane']}, slices {recipe.get('slices', {})}",
            "preprocessing": ", ".join(
                f"{key} {settings[key]}" for key in ("intensity", "value_range", "clip", "resize", "brain_mask")
            ),
            "postprocessing": "; ".join(
                f"{row['name']}: " + (", ".join(f"{key} {value}" for key, value in row["settings"].items()) or "none")
                for row in rows
            ),
            "label_definition": _label_definition(split),
            "samples": f"{len(split.subjects)} subjects, {len(split)} slices, {int((labels == 1).sum())} of them anomalous",
        },
        "results": [{key: value for key, value in row.items() if key != "maps"} for row in rows],
        "seed": options.seed,
        "device": device_name(accelerator.device),
        "processes": accelerator.num_processes,
        "versions": {name: version(name) for name in ("torch", "diffusers", "accelerate", "numpy")},
    }


def _label_definition(split: PreparedSplit) -> str:
    annotations = max(split.subject_info[subject]["annotations"] for subject in split.subjects)
    if annotations == 0:
        return "given per subject, no masks"
    voxel = "mask > 0" if annotations == 1 else f"at least half of {annotations} annotations"
    return f"voxel: {voxel}; a slice is anomalous with one annotated pixel, a subject with one such slice"
