"""SADM as a person would run it: training over a finished cDDPM with synthetic anomalies and with masks, and its evaluation."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from anodiff import (
    AnoDDPMScheduler,
    AnomalyPipeline,
    CDDPMPipeline,
    ConditionedUNet2DModel,
    SADMPipeline,
    VolumeProcessor,
)
from anodiff.convert import main as convert
from anodiff.data.prepared import load_prepared
from anodiff.eval import main as evaluate
from anodiff.evaluation.calibration import calibrate
from anodiff.evaluation.thresholds import otsu_threshold
from anodiff.train import main as train

from .conftest import TINY


@pytest.fixture(scope="module")
def reconstruction(workplace) -> str:
    """A cDDPM without encoder and with weights of no use, relative to the workplace."""
    unet = ConditionedUNet2DModel(
        sample_size=16,
        in_channels=2,
        out_channels=2,
        block_out_channels=(8, 8),
        layers_per_block=1,
        down_block_types=("ResnetDownsampleBlock2D",) * 2,
        up_block_types=("ResnetUpsampleBlock2D",) * 2,
        attention_head_dim=4,
        norm_num_groups=4,
        attn_norm_num_groups=4,
        condition_dim=None,
    )
    processor = VolumeProcessor.from_dict(load_prepared(workplace.folder / "prepared", "train").processor_settings)
    scheduler = AnoDDPMScheduler(beta_schedule="cosine", z=None, wavelength=8.0)
    CDDPMPipeline(unet, scheduler, processor, timesteps=[499]).save_pretrained(workplace.folder / "cddpm-part")
    return "cddpm-part"


def run_training(workplace, reconstruction, name, method, **more):
    config = {
        "method": method,
        "unet": {"block_out_channels": [4, 8], **more.pop("unet", {})},
        "inference": {"timesteps": [249, 749], "median_size": 3, "residual_weight": 0.5},
        "objective": {"reconstruction_path": reconstruction, **more.pop("objective", {})},
        "data": {**TINY["data"], **more},
        "train": TINY["train"] | {"max_steps": 2, "checkpoint_every": 0, "report_to": "none"},
    }
    (workplace.folder / f"{name}.yaml").write_text(yaml.safe_dump(config))
    assert train(["--config", f"{name}.yaml", "--data", "prepared", "--train.output_dir", name]) == 0
    losses = [json.loads(line) for line in (workplace.folder / name / "log.jsonl").read_text().splitlines()]
    assert len(losses) == 3 and all(math.isfinite(value) for line in losses for value in line.values())
    assert list((workplace.folder / name / "samples").glob("*.png"))
    folder = workplace.folder / name / "pipeline"
    pipe = AnomalyPipeline.from_pretrained(folder)
    assert type(pipe) is SADMPipeline and pipe.config.residual_weight == 0.5
    # No folder of this machine travels with the weights.
    assert yaml.safe_load((folder / "config.yaml").read_text())["objective"]["reconstruction_path"] == reconstruction
    return pipe


def test_sadm_is_trained_and_evaluated(workplace, reconstruction, monkeypatch):
    monkeypatch.chdir(workplace.folder)
    more = {"unet": {"deep_supervision": True}, "objective": {"loss": "bce_dice", "shared_noise": True}}
    pipe = run_training(workplace, reconstruction, "sadm", "sadm", **more)
    assert len(pipe.segmentation_network.deepsup_1x1) == 1
    frozen = CDDPMPipeline.from_pretrained(workplace.folder / reconstruction).unet.state_dict()
    assert all(value.equal(frozen[name]) for name, value in pipe.unet.state_dict().items())

    # The validation split has masks.
    run_training(workplace, reconstruction, "sadm-labelled", "sadm_labelled", train_split="validation")

    options = ["--model", "sadm/pipeline", "--data", "prepared", "--output_dir", "sadm-eval", "--protocol", "sadm"]
    assert evaluate([*options, "--keep_maps", "--batch_size", "64"]) == 0
    check_cases(pipe, load_prepared(workplace.folder / "prepared", "test"), workplace.folder / "sadm-eval")
    report = json.loads((workplace.folder / "sadm-eval" / "report.json").read_text())
    sadm, intensity = report["results"][:2]
    assert sadm["settings"]["residual_weight"] == 0.5 and sadm["settings"]["filter_order"] == "erosion_first"
    assert intensity["kind"] == "baseline" and "sadm_l1" not in intensity["metrics"]
    for row in (sadm, intensity):
        assert {"sadm_dice_search", "sadm_dice_exact", "sadm_dice_fpr5", "sadm_healthy_fpr_fpr5"} <= set(
            row["metrics"]
        )
        assert [size["size"] for size in row["lesion_sizes"]] == ["small", "medium", "large"]
        assert sum(size["volumes"] for size in row["lesion_sizes"]) == 2
        # Scores of the intensity have gaps, so that a share below them is all that can be had.
        assert 0 <= row["metrics"]["sadm_healthy_fpr_fpr5"] < 1
    assert 0 < sadm["metrics"]["sadm_l1"] and sadm["metrics"]["sadm_l1_ratio"] > 0
    assert "Dice, search (SADM)" in (workplace.folder / "sadm-eval" / "report.md").read_text()
    counts = [sadm["subjects"][number] for number in range(3)]
    assert all(sum(record[f"sadm_{name}"] for name in ("tp", "fp", "fn", "tn")) % 256 == 0 for record in counts)


def check_cases(pipe, split, folder):
    """What was scored is what the pipeline makes of every subject alone: residual of the whole volume, segmentation added."""
    for subject in split.subjects:
        item = split.read_subject(subject)
        brain = item["brain"].astype(bool)
        assert brain.any((1, 2)).all() and len(brain) < 64
        images = torch.from_numpy(item["image"])
        results = pipe.compute_maps(images, item["slice"].tolist(), seed=0, batch_size=5, **pipe.default_settings())
        assert results.added.any()
        expected = pipe.postprocessing.filter(results.maps.numpy(), brain, results.added.numpy())
        chosen = calibrate(pipe, [item], "otsu", batch_size=64)["values"]["threshold"]
        assert chosen == pytest.approx(otsu_threshold(expected[brain]), rel=1e-4)
        with np.load(folder / "maps" / "00" / "test" / f"{subject}.npz") as case:
            np.testing.assert_allclose(case["maps"], expected, rtol=0, atol=1e-5)
            error = (images - results.reconstruction).abs().mean(1) / 2  # of the range from -1 to 1
            np.testing.assert_allclose(case["error"], error, rtol=0, atol=1e-5)


def test_wrong_options_are_found_before_the_training(workplace, reconstruction, monkeypatch):
    monkeypatch.chdir(workplace.folder)
    where = ["--data", "prepared", "--train.output_dir", "sadm-wrong"]
    path = ["--objective.reconstruction_path", reconstruction]
    for arguments, message in (
        ([], "`objective.reconstruction_path` must be the folder or Hub id"),
        ([*path, "--scheduler.octaves", "2"], "`scheduler` has no key octaves; SADMObjective takes none"),
        ([*path, "--unet._class_name", "UNet2DModel"], "`unet._class_name` must be one of SiameseUNet2DModel"),
        ([*path, "--objective.los", "dice"], "`objective` has no key los"),
        ([*path, "--inference.residual_weight", "2"], "`residual_weight` must be a finite number .*, got 2"),
    ):
        (workplace.folder / "wrong.yaml").write_text("method: sadm")
        with pytest.raises(ValueError, match=message):
            train(["--config", "wrong.yaml", *where, *arguments])
    shutil.copytree(reconstruction, "cddpm-other")
    # As if it had been saved with these settings.
    index = json.loads(Path("cddpm-other/model_index.json").read_text())
    del index["_sha256"]
    Path("cddpm-other/model_index.json").write_text(json.dumps(index))
    settings = json.loads(Path("cddpm-other/processor/processor_config.json").read_text())
    Path("cddpm-other/processor/processor_config.json").write_text(json.dumps({**settings, "quantile": 0.5}))
    with pytest.raises(ValueError, match="(?s)cDDPM cddpm-other was trained with.*quantile"):
        train(["--config", "wrong.yaml", *where, "--objective.reconstruction_path", "cddpm-other"])
    with pytest.raises(ValueError, match="`sweep` needs one of the protocols andi, uad_imag, anofpdm"):
        evaluate(["--data", "prepared", "--output_dir", "no", "--protocol", "sadm", "--sweep", "[0.1,0.2,0.1]"])


def test_convert_sadm(workplace, reconstruction, tmp_path):
    from anodiff import SiameseUNet2DModel

    torch.manual_seed(0)
    original = SiameseUNet2DModel(2, (4, 8, 16), deep_supervision=True).eval()
    state = {f"seg.{name}": tensor for name, tensor in original.state_dict().items()}
    torch.save({"state_dict": {**state, "diffusion.betas": torch.ones(3)}}, tmp_path / "last.ckpt")
    part = str(workplace.folder / reconstruction)
    arguments = ["sadm", str(tmp_path / "last.ckpt"), str(tmp_path / "out"), "--key", "state_dict"]
    assert convert([*arguments, "--cddpm", part]) == 0
    pipe = AnomalyPipeline.from_pretrained(tmp_path / "out")
    assert type(pipe) is SADMPipeline and list(pipe.segmentation_network.config.block_out_channels) == [4, 8, 16]
    images, reconstructions = torch.rand(2, 1, 2, 16, 16)
    with torch.no_grad():
        # The original saw transposed slices.
        expected = original(images.mT, reconstructions.mT).logits.mT
        actual = pipe.segmentation_network(images, reconstructions).logits
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)

    torch.save({"state_dict": {"diffusion.betas": torch.ones(3)}}, tmp_path / "last.ckpt")
    arguments[2] = str(tmp_path / "wrong")
    with pytest.raises(ValueError, match="`--cddpm` is for sadm, which needs it"):
        convert(arguments)
    with pytest.raises(ValueError, match="it has no down_path.0.block.1.weight"):
        convert([*arguments, "--cddpm", part])
