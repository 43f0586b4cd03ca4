"""What larger steps and the aligned indices of AnoFPDM cost in quality, on real slices with masks.

    python benchmarks/anofpdm_steps.py --model outputs/anofpdm_tcga_lgg/pipeline --data prepared/tcga_lgg_labelled

The reference is the authors' way: their indices, every timestep. Each setting is calibrated on labels of validation slices as it will be
used, then run on the same test slices. Maps are compared in the brain, after the pipeline's own filter. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import statistics
import time

import numpy as np
import torch

from anodiff import AnoFPDMPipeline
from anodiff.data.prepared import PreparedSplit, load_prepared
from anodiff.evaluation.calibration import LabelledSlices, calibrate
from anodiff.evaluation.metrics import PooledScores, auroc, dice


def measure(pipe: AnoFPDMPipeline, split: PreparedSplit, rows: np.ndarray, batch: int) -> dict:
    """Filtered maps, own masks and labels of the slices `rows`, in the order of subjects."""
    found = {name: [] for name in ("maps", "masks", "labels", "similarity", "truth", "brain", "lesion")}
    seconds = 0.0
    for subject in split.subjects:
        own = split.subject_rows(subject)
        chosen = rows[(rows >= own.start) & (rows < own.stop)]
        if not len(chosen):
            continue
        item = split.read_rows(chosen, ("image", "brain", "label", "slice", "mask"))
        images, brain = torch.as_tensor(item["image"]), np.asarray(item["brain"], bool)
        numbers = [int(number) for number in item["slice"]]
        start = time.perf_counter()
        results = pipe.compute_maps(images, numbers, seed=0, batch_size=batch, **pipe.default_settings())
        seconds += time.perf_counter() - start
        found["maps"].append(pipe.postprocessing.filter(results.maps.numpy(), brain))
        found["masks"].append(results.masks.numpy() & brain)
        found["labels"].append(results.details["label"].numpy())
        found["similarity"].append(results.details["similarity"].numpy())
        found["truth"].append(np.asarray(item["label"]))
        found["brain"].append(brain)
        found["lesion"].append(np.asarray(item["mask"], bool))
    return {name: np.concatenate(parts) for name, parts in found.items()} | {"seconds": seconds / len(rows)}


def mean_correlation(one: dict, other: dict) -> float:
    """Mean over slices of Pearson's correlation of two maps in the brain."""
    pairs = zip(one["maps"], other["maps"], one["brain"], strict=True)
    return statistics.mean(
        float(np.corrcoef(a[inside], b[inside])[0, 1]) for a, b, inside in pairs if inside.sum() > 1
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--slices", type=int, default=40, help="test slices, evenly spread")
    parser.add_argument("--strides", type=int, nargs="+", default=[1, 5, 10, 20])
    parser.add_argument("--guidance_scale", type=float, help="the checkpoint's own by default")
    parser.add_argument("--batch", type=int, default=16)
    options = parser.parse_args()
    pipe = AnoFPDMPipeline.from_pretrained(options.model)
    pipe.set_progress_bar_config(disable=True)
    if options.guidance_scale is not None:
        pipe.register_to_config(guidance_scale=options.guidance_scale)
    test, validation = (load_prepared(options.data, split) for split in ("test", "validation"))
    rows = LabelledSlices(test, options.slices).rows
    print(f"{len(rows)} test slices, calibration on {len(LabelledSlices(validation).rows)} validation slices\n")
    print(
        "| indices | stride | evaluations | seconds per slice | correlation of the map | AP | Dice, oracle | Dice, own masks | slice AUROC"
        " of the similarity | labels as the reference | image accuracy, test | validation |"
    )
    print("|---" * 12 + "|")
    reference = None
    for mode in ("original", "aligned"):
        for stride in options.strides:
            pipe.register_to_config(index_mode=mode, stride=stride)
            record = calibrate(pipe, LabelledSlices(validation), batch_size=options.batch)
            result = measure(pipe, test, rows, options.batch)
            reference = reference or result
            pooled = PooledScores()
            pooled.update(result["maps"][result["brain"]], result["lesion"][result["brain"]])
            steps = len(range(0, pipe.config.forward_steps, stride))
            evaluations = 2 * steps if mode == "aligned" else 3 * steps - 1
            print(
                f"| {mode} | {stride} | {evaluations} | {result['seconds']:.2f} | {mean_correlation(reference, result):.3f}"
                f" | {pooled.average_precision():.3f} | {pooled.best_dice()[0]:.3f}"
                f" | {dice(result['masks'], result['lesion']):.3f} | {auroc(-result['similarity'], result['truth']):.3f}"
                f" | {np.mean(result['labels'] == reference['labels']):.3f} | {np.mean(result['labels'] == result['truth']):.3f}"
                f" | {record['image_accuracy']:.3f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
