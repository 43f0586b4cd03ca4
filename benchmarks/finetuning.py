"""What fine-tuning on slices of one's own scanner gains: a checkpoint before and after `train.init_from`.

    python benchmarks/finetuning.py TCGA_LGG_FLAIR OUT    # folders of patients with flair, lesion and brain .nii.gz

Patients are split as in the recipe `tcga_lgg_flair`. The network learns from the healthy slices of the training
patients, prepared as the checkpoint asks for, and is scored on the test patients, beside the checkpoint itself and the
plain intensity: OUT/eval/report.md.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from anodiff import AnomalyPipeline
from anodiff.data.prepare import prepare, read_recipe
from anodiff.data.readers.subjects import read_volume_folders
from anodiff.data.rules import SliceRule, SplitRule
from anodiff.eval import main as evaluate
from anodiff.train import main as train


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tcga_lgg", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", default="anoddpm-flair")
    parser.add_argument("--patients", type=int, default=20, help="training patients that are used")
    parser.add_argument("--steps", type=int, nargs="+", default=[100, 300])
    options, flags = parser.parse_known_args()  # others are those of train.py, such as --optim.learning_rate

    processor = AnomalyPipeline.from_pretrained(options.model).processor
    modality = processor.config.modalities[0]
    recipe = read_recipe("tcga_lgg_flair")
    subjects = read_volume_folders(options.tcga_lgg, {modality: "flair.nii.gz"}, ["lesion.nii.gz"], "brain.nii.gz")
    split_of = SplitRule(**recipe["split"]).assign(subjects)
    subjects = [dataclasses.replace(subject, split=split_of[subject.name]) for subject in subjects]
    used = [subject for subject in subjects if subject.split == "train"][: options.patients]
    used += [subject for subject in subjects if subject.split != "train"]
    slices = SliceRule(**recipe["slices"])
    failures = prepare(used, processor, options.out / "data", recipe=recipe, slices=slices, root=options.tcga_lgg)
    if failures:
        raise RuntimeError(f"Subjects that cannot be read: {failures}")
    models = [options.model]
    for steps in options.steps:
        folder = options.out / f"steps-{steps}"
        arguments = ["--config", "finetune_heads.yaml", "--train.init_from", options.model, "--data"]
        arguments += [str(options.out / "data"), "--train.output_dir", str(folder), "--train.max_steps", str(steps)]
        train([*arguments, "--train.report_to", "none", *flags])
        models.append(str(folder / "pipeline"))
    named = [word for model in models for word in ("--model", model)]
    evaluate([*named, "--data", str(options.out / "data"), "--output_dir", str(options.out / "eval")])


if __name__ == "__main__":
    main()
