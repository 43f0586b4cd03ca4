"""What the options of maps are worth: `sign`, `weighting`, Mahalanobis maps and `normalization`, beside the plain and the
inverted intensity, and the intensity rule `brain_median` beside the 0.99 quantile.

    ANODIFF_TEST_DATA=DATA python benchmarks/map_options.py outputs/anoddpm_heads/pipeline outputs/andi_heads/pipeline
    ANODIFF_TEST_DATA=DATA python benchmarks/map_options.py --rules

DATA holds `mri/tcga_lgg_flair` (glioma, FLAIR), `mri/ms_lesjak_mni` (multiple sclerosis: FLAIR, T1, T2) and `label_maps`,
which synthetic heads with tumours, plaques and strokes are made of, one set of each contrast. Every checkpoint is
measured on what its modality names, `image` on everything. Voxels of the brain are pooled over a set.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from anodiff import AnoDDPMPipeline, AnomalyPipeline, VolumeProcessor
from anodiff.data.phantoms.head_files import write_heads
from anodiff.data.phantoms.heads import LESIONS, make_slices
from anodiff.data.phantoms.label_maps import read_label_maps
from anodiff.evaluation.healthy import measure_healthy_maps
from anodiff.evaluation.metrics import PooledScores, auroc
from anodiff.pipelines.mahalanobis import MAHALANOBIS
from anodiff.schedulers.draws import make_keys
from anodiff.volumes.volume import read_volume


CONTRASTS = ("flair", "t1", "t2")
HEADS = 12  # with lesions but for every fourth, and as many again that healthy maps are measured on
COLUMNS = ("set", "map", "AP", "Dice, oracle", "AUROC (slices)")


@dataclass
class Scan:
    """One scan, ready: slices `(N, C, H, W)` on the pipeline's device, brain and lesion `(N, H, W)`, bool, of the slices
    with brain."""

    slices: torch.Tensor
    brain: torch.Tensor
    lesion: np.ndarray
    numbers: list[int]

    @property
    def labels(self) -> np.ndarray:
        return self.lesion.any((1, 2)).astype(np.int64)


def find_sets(data: Path, heads: Path, modality: str) -> dict[str, tuple[str, list[Path]]]:
    """The sets that a modality can be measured on: name to the contrast and the folders of the subjects."""
    contrasts = CONTRASTS if modality == "image" else (modality,)
    sets = {}
    for contrast in contrasts:
        if contrast == "flair":
            folders = sorted(path for path in (data / "mri" / "tcga_lgg_flair").iterdir() if path.is_dir())
            sets["glioma, flair"] = contrast, folders
        sets[f"MS, {contrast}"] = contrast, sorted((data / "mri" / "ms_lesjak_mni").glob("patient*"))
        names = (heads / "splits" / "test.csv").read_text(encoding="utf-8").split()[1:]
        sets[f"synthetic, {contrast}"] = contrast, [heads / name for name in names]
    return sets


def read_scan(folder: Path, contrast: str, processor: VolumeProcessor, device: str) -> Scan:
    """Slices of 2 % of brain or more; of thin ones every fourth."""
    files = {name: folder / f"{name}.nii.gz" for name in (contrast, "brain", "lesion")}
    processed = processor.preprocess(files[contrast], files["brain"])
    lesion = processor.preprocess_mask(files["lesion"], processed.geometry) > 0
    rows = np.flatnonzero(processed.brain.float().mean((1, 2)).numpy() >= 0.02)
    if np.linalg.norm(processed.source.affine[:3, 2]) < 2:
        rows = rows[::4]
    return Scan(processed.slices[rows].to(device), processed.brain[rows], lesion[rows], rows.tolist())


def variants(pipe: AnomalyPipeline) -> Iterator[tuple[str, dict, dict]]:
    """Name, settings of the method, and settings of the post-processing, of every map that is measured."""
    plain = {"sign": "both", "weighting": "none", "normalization": "none"}
    for weighting in ("none", "intensity"):
        for sign in ("both", "brighter", "darker"):
            for normalization in ("none", "healthy_maps"):
                chosen = {"sign": sign, "weighting": weighting, "normalization": normalization}
                named = [value for value in chosen.values() if value not in ("none", "both")]
                yield ", ".join(["map", *named]), {}, chosen
    if isinstance(pipe, AnoDDPMPipeline):
        draws = max(4, pipe.config.num_draws)
        levels = {"noise_level": [50, 100, 150, 200], "num_draws": 1}
        yield "mean of 4 levels", levels, plain
        for map_type in MAHALANOBIS:
            settings = {"map_type": map_type, "num_draws": draws}
            yield f"{map_type}, {draws} draws", settings, plain
            yield f"{map_type}, 4 levels", levels | {"map_type": map_type}, plain


def score(pipe: AnomalyPipeline, scans: list[Scan], maps: list[np.ndarray]) -> list[str]:
    """Average precision, best Dice and AUROC of the slices, as text."""
    pooled = PooledScores()
    for scan, own in zip(scans, maps, strict=True):
        pooled.update(own[scan.brain.numpy()], scan.lesion[scan.brain.numpy()])
    slices = [pipe.postprocessing.score_slices(own, s.brain.numpy()) for s, own in zip(scans, maps, strict=True)]
    of_slices = auroc(np.concatenate(slices), np.concatenate([scan.labels for scan in scans]))
    return [f"{value:.3f}" for value in (pooled.average_precision(), pooled.best_dice()[0], of_slices)]


def measure(pipe: AnomalyPipeline, scans: list[Scan], healthy: list[Scan], batch_size: int) -> Iterator[list[str]]:
    """Yields the rows of a set: name of the map and its scores."""
    off = {"sign": "both", "weighting": "none", "normalization": "none"}
    pipe.register_to_config(**off)
    image = [pipe.processor.to_unit(scan.slices)[:, 0].cpu().numpy() for scan in scans]
    for name, maps in (("intensity", image), ("inverted intensity", [1 - one for one in image])):
        filtered = [pipe.postprocessing.filter(own, scan.brain.numpy()) for scan, own in zip(scans, maps, strict=True)]
        yield [name, *score(pipe, scans, filtered)]
    raw = {}
    for name, settings, chosen in variants(pipe):
        key = str(settings)
        if key not in raw:
            raw[key] = [
                pipe.compute_maps(
                    scan.slices, scan.numbers, batch_size=batch_size, **pipe.default_settings() | settings
                ).maps
                for scan in scans
            ]
        if chosen["normalization"] != "none":
            pipe.register_to_config(**chosen | {"normalization": "none"})
            items = (
                {
                    "image": s.slices.cpu().numpy(),
                    "brain": s.brain.numpy(),
                    "label": s.labels,
                    "slice": np.array(s.numbers),
                }
                for s in healthy
            )
            measure_healthy_maps(pipe, items, batch_size=batch_size)
        pipe.register_to_config(**chosen)
        maps = []
        for scan, own in zip(scans, raw[key], strict=True):
            weights = pipe.weigh(scan.slices, scan.brain, scan.numbers, [len(own)])
            own = own if weights is None else own * weights
            maps.append(pipe.filter_maps(own.float().cpu(), scan.brain, None, [len(own)]).numpy())
        yield [name, *score(pipe, scans, maps)]


def compare_rules(data: Path) -> Iterator[list[str]]:
    """Yields rows: set, rule, how far the lesions move the scale of a scan (median and largest ratio of the scale with
    and without), and the AP of the plain intensity. Without lesion is the same synthetic head; of patients, the brain
    without its lesion's voxels."""
    rules = ("percentile", "brain_median")
    processors = {rule: VolumeProcessor(["image"], size=None, intensity=rule, brain_mask="given") for rule in rules}

    def moved(scans: list[tuple]) -> Iterator[list[str]]:
        for rule, processor in processors.items():
            ratios, pooled = [], PooledScores()
            for sick, healthy, brain, left, lesion in scans:
                processed = processor.preprocess(sick, brain)
                ratios.append(processed.units_scale[0, 0] / processor.preprocess(healthy, left).units_scale[0, 0])
                values = processor.postprocess(processor.to_unit(processed.slices[:, 0]), processed)
                pooled.update(values[brain > 0], lesion[brain > 0] > 0)
            shown = (np.median(ratios), max(ratios, key=lambda ratio: abs(ratio - 1)), pooled.average_precision())
            yield [rule, *(f"{value:.3f}" for value in shown)]

    folders = sorted(path for path in (data / "mri" / "tcga_lgg_flair").iterdir() if path.is_dir())
    scans = []
    for folder in folders:
        image, brain, lesion = (
            next(iter(read_volume(folder / f"{name}.nii.gz").arrays.values())) for name in ("flair", "brain", "lesion")
        )
        left = brain * (lesion == 0)
        scans.append((image, np.where(left, image, 0), brain, left, lesion))
    for row in moved(scans):
        yield ["glioma, flair", *row]
    maps = read_label_maps(data / "label_maps")
    for contrast in CONTRASTS:
        scans = []
        for number in range(HEADS):
            keys, chosen = make_keys(1, number, 0), torch.tensor([number % len(maps)])
            positions = torch.arange(-60.0, 75.0, 5.0)[None]
            sick, healthy = (
                make_slices(maps, chosen, keys, positions, contrasts=(contrast,), lesions=lesions)
                for lesions in ([LESIONS[number % len(LESIONS)]], None)
            )
            brain = sick.brain[0].permute(2, 1, 0).numpy().astype(np.uint8)
            images = [heads.images[0, 0].permute(2, 1, 0).numpy() * brain for heads in (sick, healthy)]
            scans.append((*images, brain, brain, sick.lesion[0].permute(2, 1, 0).numpy()))
        for row in moved(scans):
            yield [f"synthetic, {contrast}", *row]


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="*", help="checkpoints of one modality: flair, t1, t2 or image")
    parser.add_argument("--rules", action="store_true", help="compare the intensity rules")
    parser.add_argument("--heads", help="folder of synthetic heads of the three contrasts; made by default")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    data = Path(os.environ["ANODIFF_TEST_DATA"])
    if options.rules:
        print("| set | rule | scale, median | scale, extreme | AP of the intensity |\n|---|---|---|---|---|")
        for row in compare_rules(data):
            print(f"| {' | '.join(row)} |", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        heads = Path(options.heads or Path(folder) / "heads")
        if options.model and not heads.exists():
            write_heads(heads, data / "label_maps", subjects=1, contrasts=CONTRASTS, tested=HEADS)
        for model in options.model:
            pipe = AnomalyPipeline.from_pretrained(model).to(options.device)
            pipe.set_progress_bar_config(disable=True)
            print(f"\n{model}\n\n| {' | '.join(COLUMNS)} |\n" + "|---" * len(COLUMNS) + "|", flush=True)
            for name, (contrast, folders) in find_sets(data, heads, *pipe.processor.config.modalities).items():
                scans = [read_scan(path, contrast, pipe.processor, options.device) for path in folders]
                names = (heads / "splits" / "validation.csv").read_text(encoding="utf-8").split()[1:]
                healthy = [read_scan(heads / one, contrast, pipe.processor, options.device) for one in names]
                for row in measure(pipe, scans, healthy, options.batch_size):
                    print(f"| {' | '.join([name, *row])} |", flush=True)


if __name__ == "__main__":
    main()
