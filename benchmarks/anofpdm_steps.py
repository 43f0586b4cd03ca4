"""What larger steps and the aligned indices of AnoFPDM cost in quality, on real slices with masks.

    python benchmarks/anofpdm_steps.py --model outputs/anofpdm_tcga_lgg/pipeline --data prepared/tcga_lgg_labelled

The reference is the authors' way: their indices, every timestep. Each setting is run once on the same test slices. Its
labels and masks are calibrated from labels of slices: those of every second subject for the other subjects, and the
other way round. Maps are compared in the brain, after the pipeline's own filter. Prints a Markdown table, a row as
soon as it is there.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import torch

from anodiff import AnoFPDMPipeline
from anodiff.data.prepared import PreparedSplit, load_prepared
from anodiff.evaluation.calibration import LabelledSlices
from anodiff.evaluation.metrics import PooledScores, auroc, dice
from anodiff.pipelines.running_maps import similarity_threshold


COLUMNS = (
    "indices",
    "stride",
    "evaluations",
    "seconds per slice",
    "correlation of the map",
    "AP",
    "Dice, oracle",
    "Dice, own masks",
    "slice AUROC of the similarity",
    "labels as the reference",
    "image accuracy",
)


def read_slices(split: PreparedSplit, count: int) -> tuple[dict, np.ndarray]:
    """Columns of `count` labelled slices, evenly spread, and which of two halves of the subjects each belongs to,
    bool."""
    rows = LabelledSlices(split, count).rows
    item = split.read_rows(rows, ("image", "brain", "label", "slice", "mask", "subject"))
    item["mask"] = item["mask"].astype(bool).any(1)
    item["image"] = torch.as_tensor(item["image"])
    half = np.unique(item["subject"], return_inverse=True)[1] % 2 == 1
    for part in (half, ~half):
        if set(item["label"][part].tolist()) != {0, 1}:
            raise SystemExit(
                "error: each half of the subjects must have healthy and unhealthy slices; raise `--slices`."
            )
    return item, half


def measure(pipe: AnoFPDMPipeline, item: dict, half: np.ndarray, batch: int) -> dict[str, np.ndarray]:
    """Filtered maps, own masks, labels and similarities of the slices."""
    images, labels = item["image"], torch.as_tensor(item["label"])
    settings = pipe.default_settings() | {"similarity_threshold": None, "gap_scale": None}
    results = pipe.compute_maps(images, item["slice"].tolist(), seed=0, batch_size=batch, **settings)
    similarity, gap = results.details["similarity"], results.details["gap"]
    found = torch.zeros(len(images), dtype=torch.bool)
    masks = torch.zeros(results.maps.shape, dtype=torch.bool)
    for part in (half, ~half):
        part = torch.from_numpy(part)
        threshold, _ = similarity_threshold(similarity[~part], labels[~part])
        found[part] = similarity[part] <= threshold
        masks[part] = pipe.segment(
            results.maps[part][:, None],
            gap[part],
            images[part],
            gap_scale=gap[~part][labels[~part] == 1].amax(0).tolist(),
            quantile_range=settings["quantile_range"],
            quantile_region=settings["quantile_region"],
        )[0]
    return {
        "maps": pipe.postprocessing.filter(results.maps.numpy(), item["brain"]),
        "masks": (masks & found[:, None, None]).numpy() & item["brain"],
        "labels": found.numpy(),
        "similarity": similarity.numpy(),
    }


def mean_correlation(maps: np.ndarray, others: np.ndarray, brain: np.ndarray) -> float:
    """Mean over slices of Pearson's correlation of two maps in the brain."""
    pairs = zip(maps, others, brain, strict=True)
    return float(np.mean([np.corrcoef(a[inside], b[inside])[0, 1] for a, b, inside in pairs]))


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--slices", type=int, default=40, help="test slices, evenly spread")
    parser.add_argument("--strides", type=int, nargs="+", default=[1, 5, 10, 20])
    parser.add_argument("--guidance_scale", type=float, help="the checkpoint's own by default")
    parser.add_argument("--batch", type=int, default=20)
    options = parser.parse_args()
    pipe = AnoFPDMPipeline.from_pretrained(options.model)
    if len(pipe.processor.config.modalities) > 1:
        raise SystemExit("error: `--model` must be a checkpoint of one modality.")
    pipe.set_progress_bar_config(disable=True)
    if options.guidance_scale is not None:
        pipe.register_to_config(guidance_scale=options.guidance_scale)
    item, half = read_slices(load_prepared(options.data, "test"), options.slices)
    print(f"{len(half)} test slices, {int((item['label'] == 1).sum())} with lesion\n\n| {' | '.join(COLUMNS)} |")
    print("|---" * len(COLUMNS) + "|", flush=True)
    reference = None
    for stride in options.strides:
        for mode in ("original", "aligned"):
            pipe.register_to_config(index_mode=mode, stride=stride)
            start = time.perf_counter()
            result = measure(pipe, item, half, options.batch)
            seconds = (time.perf_counter() - start) / len(half)
            reference = reference or result
            pooled = PooledScores()
            pooled.update(result["maps"][item["brain"]], item["mask"][item["brain"]])
            steps = len(range(0, pipe.config.forward_steps, stride))
            row = (
                mode,
                stride,
                2 * steps if mode == "aligned" else 3 * steps - 1,
                f"{seconds:.2f}",
                *(
                    f"{value:.3f}"
                    for value in (
                        mean_correlation(result["maps"], reference["maps"], item["brain"]),
                        pooled.average_precision(),
                        pooled.best_dice()[0],
                        dice(result["masks"], item["mask"]),
                        auroc(-result["similarity"], item["label"]),
                        np.mean(result["labels"] == reference["labels"]),
                        np.mean(result["labels"] == item["label"]),
                    )
                ),
            )
            print("| " + " | ".join(map(str, row)) + " |", flush=True)


if __name__ == "__main__":
    main()
