"""What missing modalities cost, with and without `objective.modality_dropout`, on the phantom or prepared data.

    python benchmarks/missing_modalities.py OUT --data phantom-mini --config andi_phantom.yaml

Two networks that differ in the dropout alone are trained, and scored with all modalities and with each of them alone.
The one without dropout is made to accept scans that it cannot do without: this is what it would be worth.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from anodiff import AnomalyPipeline
from anodiff.eval import main as evaluate
from anodiff.evaluation.candidates import store_values
from anodiff.files import read_json
from anodiff.train import main as train


METRICS = ("voxel_average_precision", "voxel_auroc", "dice_oracle")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--data", default="phantom-mini")
    parser.add_argument("--config", default="andi_phantom.yaml")
    parser.add_argument("--dropout", type=float, default=0.3)
    options, flags = parser.parse_known_args()  # others are those of train.py, such as --train.max_steps

    models = []
    for dropout in (0.0, options.dropout):
        folder = options.out / f"dropout-{dropout:g}"
        arguments = ["--config", options.config, "--data", options.data, "--train.output_dir", str(folder)]
        train([*arguments, "--objective.modality_dropout", str(dropout), "--train.report_to", "none", *flags])
        models.append(folder / "pipeline")
    modalities = list(AnomalyPipeline.from_pretrained(models[0]).processor.config.modalities)
    store_values(models[0], {"optional_modalities": modalities})

    named = [word for model in models for word in ("--model", str(model))]
    print("| modalities | dropout |", " | ".join(METRICS), "|")
    for present in (modalities, *([modality] for modality in modalities)):
        folder = options.out / f"eval-{'-'.join(present)}"
        arguments = ["--data", options.data, "--output_dir", str(folder), "--report", "none", "--baselines", "false"]
        arguments += ["--validation_split", "none"]
        evaluate([*named, *arguments, "--inference.present_modalities", str(present)])
        for model, row in zip(models, read_json(folder / "report.json")["results"], strict=True):
            numbers = [row["metrics"][metric] for metric in METRICS]
            told = ["undefined" if number is None else f"{number:.3f}" for number in numbers]
            print("|", ", ".join(present), "|", model.parent.name, "|", " | ".join(told), "|")


if __name__ == "__main__":
    main()
