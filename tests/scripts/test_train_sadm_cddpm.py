"""cDDPM, DDPM_2D and pDDPM as a person would train them, for two steps, in this process."""

import json
import math

import pytest
import yaml

from anodiff import AnomalyPipeline
from anodiff.evaluation.options import EvalOptions
from anodiff.train import main as train

from .conftest import TINY


UNET = {
    "_class_name": "ConditionedUNet2DModel",
    "block_out_channels": [8, 8],
    "layers_per_block": 1,
    "down_block_types": ["ResnetDownsampleBlock2D"] * 2,
    "up_block_types": ["ResnetUpsampleBlock2D"] * 2,
    "attention_head_dim": 4,
    "norm_num_groups": 4,
    "attn_norm_num_groups": 4,
    "condition_dim": None,
}


@pytest.mark.parametrize("method", ["cddpm", "ddpm_2d", "pddpm"])
def test_two_steps(method, workplace, tmp_path, monkeypatch):
    config = json.loads(json.dumps(TINY))
    config |= {
        "method": method,
        "unet": {**UNET, "condition_dim": 6} if method == "cddpm" else UNET,
        "scheduler": {**TINY["scheduler"], "beta_schedule": "cosine", "z": None},
        "inference": {"timesteps": [99, 499], "erosion": 1},
        "objective": {},
    }
    if method == "cddpm":
        config["objective"]["encoder"] = {"embedding_size": 4, "hidden_sizes": [8, 8], "depths": [1, 1]}
        config["inference"]["map_type"] = "ssim"
    elif method == "pddpm":
        config["objective"]["boxes"], config["inference"]["patch_size"] = "random", 8
    config["train"] |= {"max_steps": 2, "checkpoint_every": 0, "report_to": "none", "ema": {"enabled": False}}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    data = str(workplace.folder / "prepared")
    assert train(["--config", "run.yaml", "--data", data, "--train.output_dir", "run"]) == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert lines and all(math.isfinite(value) for line in lines for value in line.values())
    assert list((tmp_path / "run" / "samples").glob("*.png"))
    pipe = AnomalyPipeline.from_pretrained(tmp_path / "run" / "pipeline")
    assert type(pipe).__name__ == ("PDDPMPipeline" if method == "pddpm" else "CDDPMPipeline")
    assert pipe.scheduler.config.z is None and list(pipe.config.timesteps) == [99, 499]
    card = (tmp_path / "run" / "pipeline" / "README.md").read_text()
    assert "Behrendt" in card

    if method == "cddpm":
        from anodiff.evaluation.run import evaluate

        options = EvalOptions(model=[str(tmp_path / "run" / "pipeline")], data=data, output_dir=str(tmp_path / "eval"))
        evaluate(options)
        report = json.loads((tmp_path / "eval" / "report.json").read_text())
        assert math.isfinite(report["results"][0]["metrics"]["voxel_average_precision"])
