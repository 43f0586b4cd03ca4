"""Methods that learn from labels of slices, as a person would run them: training, calibration, evaluation, guidance by a classifier."""

import json
import math

import numpy as np
import pytest
import yaml

from anodiff import AnoFPDMPipeline, AnomalyPipeline, ClassifierGuidedPipeline
from anodiff.data.prepared import load_prepared

from .conftest import RECIPE, SPLITS, TINY


@pytest.fixture(scope="module")
def labelled(workplace) -> str:
    """A prepared set whose training split holds healthy and anomalous slices."""
    names = [f"{split}_{number}" for split, lesions in SPLITS.items() for number in range(len(lesions))]
    folder = workplace.folder / "raw" / "mixed"
    folder.mkdir()
    for split in SPLITS:
        chosen = names if split == "train" else [name for name in names if name.startswith(split)]
        chosen = [name for name in chosen if split != "train" or not name.startswith("validation")]
        chosen = [name for name in chosen if split != "train" or name != "test_2"]
        chosen = [name for name in chosen if split != "test" or name == "test_2"]
        (folder / f"{split}.csv").write_text("\n".join(["subject", *chosen]))
    recipe = json.loads(json.dumps(RECIPE))
    recipe["reader_options"]["splits"] = "mixed"
    recipe["slices"]["train"] = "all"
    (workplace.folder / "mixed.yaml").write_text(yaml.safe_dump(recipe))
    workplace.run("preprocess", "--recipe", "mixed.yaml", "--root", "raw", "--out", "mixed")
    labels = load_prepared(workplace.folder / "mixed", "train").labels
    assert (labels == 0).any() and (labels == 1).any()
    return "mixed"


def configuration(**blocks) -> dict:
    """The tiny configuration with other blocks."""
    config = json.loads(json.dumps(TINY))
    config["train"] |= {"max_steps": 2, "validate_every": 2, "checkpoint_every": 0}
    config["scheduler"], config["objective"] = {}, {}
    return {**config, **blocks}


def train(workplace, labelled, name, **blocks):
    (workplace.folder / f"{name}.yaml").write_text(yaml.safe_dump(configuration(**blocks)))
    workplace.run("train", "--config", f"{name}.yaml", "--data", labelled, "--train.output_dir", name)
    losses = [json.loads(line) for line in (workplace.folder / name / "log.jsonl").read_text().splitlines()]
    assert all(math.isfinite(value) for line in losses for value in line.values())
    assert list((workplace.folder / name / "samples").glob("*.png"))
    return workplace.folder / name / "pipeline"


def test_anofpdm_is_trained_calibrated_and_evaluated_without_masks(workplace, labelled):
    inference = {"forward_steps": 6, "median_size": 3, "min_component_size": 0}
    folder = train(workplace, labelled, "fpdm", method="anofpdm", inference=inference)
    pipe = AnomalyPipeline.from_pretrained(folder)
    assert type(pipe) is AnoFPDMPipeline and pipe.unet.config.num_class_embeds == 3
    assert pipe.config.similarity_threshold is None
    options = ["--calibrate", "labels", "--protocol", "anofpdm", "--baselines", "false"]
    workplace.run("eval", "--model", folder, "--data", labelled, "--output_dir", "fpdm-eval", *options)
    report = json.loads((workplace.folder / "fpdm-eval" / "report.json").read_text())
    [row] = report["results"]
    values = row["calibration"]["values"]
    calibrated = AnomalyPipeline.from_pretrained(folder)
    assert calibrated.config.similarity_threshold == pytest.approx(values["similarity_threshold"])
    assert list(calibrated.config.gap_scale) == pytest.approx(values["gap_scale"])
    assert "dice_own" in row["metrics"] and "anofpdm_image_accuracy_own" in row["metrics"]

    # The checkpoint then gives masks and labels of slices by itself.
    workplace.run("predict", "--model", folder, "raw/test_2", "-o", "fpdm-maps", "--brain", "brain.nii.gz")
    record = json.loads((workplace.folder / "fpdm-maps" / "test_2" / "result.json").read_text())
    assert set(record["label"]) <= {-1, 0, 1} and len(record["label"]) == len(record["pred_score"])
    assert (workplace.folder / "fpdm-maps" / "test_2" / "pred_mask.nii.gz").exists()


def test_a_classifier_is_trained_and_guides(workplace, labelled):
    unet = {
        "_class_name": "NoisyClassifierModel",
        "block_out_channels": [32, 32],
        "layers_per_block": 1,
        "attention_levels": [1],
        "attention_head_dim": 16,
    }
    folder = train(workplace, labelled, "classifier", method="classifier", unet=unet, inference={})
    assert {path.name for path in folder.iterdir()} == {
        "README.md", "classifier", "config.yaml", "processor", "recipe.yaml", "scheduler", "validation.jsonl",
    }  # fmt: skip
    assert "Part of a pipeline: classifier" in (folder / "README.md").read_text()

    blocks = {"inference": {"noise_level": 3, "min_component_size": 0}, "objective": {"classifier_path": str(folder)}}
    guided = train(workplace, labelled, "guided", method="learned_sigma", **blocks)
    pipe = AnomalyPipeline.from_pretrained(guided)
    assert type(pipe) is ClassifierGuidedPipeline and pipe.unet.config.out_channels == 4
    # No folder of this machine travels with the weights.
    published = yaml.safe_load((guided / "config.yaml").read_text())
    assert published["objective"] == {"classifier_path": "pipeline"}
    pipe.set_progress_bar_config(disable=True)
    subject = workplace.folder / "raw" / "test_2"
    result = pipe({name: str(subject / f"{name}.nii.gz") for name in ("flair", "t1", "brain")})
    assert np.isfinite(result.anomaly_map).all() and result.anomaly_map.max() > 0


def test_what_learns_from_healthy_slices_leaves_the_others_out(workplace, labelled):
    train(workplace, labelled, "healthy", inference={"noise_level": 3})
    prepared = load_prepared(workplace.folder / labelled, "train")
    card = (workplace.folder / "healthy" / "pipeline" / "README.md").read_text()
    recipe = yaml.safe_load((workplace.folder / "healthy" / "pipeline" / "recipe.yaml").read_text())
    assert recipe["trained_on"] == "not_anomalous"
    assert f"| train | {len(prepared.subjects)} | {(prepared.labels == 0).sum()} |" in card
