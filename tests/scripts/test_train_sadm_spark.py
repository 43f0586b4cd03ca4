"""Masked pretraining, as a person would run it."""

import json
import math

import yaml
from transformers import ResNetForImageClassification

from anodiff.train import main as train

from .conftest import TINY


def test_spark_writes_an_encoder(workplace, monkeypatch):
    encoder = {"hidden_sizes": [8, 16], "depths": [1, 1], "embedding_size": 4}
    config = {
        "method": "spark",
        "objective": {"encoder": encoder, "decoder_width": 16, "mask_ratio": 0.5},
        "data": {"augmentation": {"rotation": 5.0, "gamma": 0.5, "bias_field": 0.5, "blur": 0.5, "ghosting": 0.5}},
        "train": TINY["train"] | {"max_steps": 2, "checkpoint_every": 0, "ema": {"enabled": False}},
    }
    (workplace.folder / "spark.yaml").write_text(yaml.safe_dump(config))
    monkeypatch.chdir(workplace.folder)
    assert train(["--config", "spark.yaml", "--data", "prepared", "--train.output_dir", "spark"]) == 0
    run = workplace.folder / "spark"
    losses = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert len(losses) == 3 and all(math.isfinite(value) for line in losses for value in line.values())
    assert list((run / "samples").glob("*.png"))
    loaded = ResNetForImageClassification.from_pretrained(str(run / "pipeline"), subfolder="encoder", num_labels=7)
    assert loaded.config.num_channels == 2 and loaded.classifier[1].out_features == 7
    assert "encoder" in (run / "pipeline" / "README.md").read_text()
