"""`predict.py` and `convert.py` in processes of their own."""

import json

import nibabel as nib
import numpy as np
import torch
import yaml
from diffusers import UNet2DModel

from anodiff import AnomalyPipeline


def test_maps_of_several_scans_one_of_them_broken(workplace, trained):
    raw = workplace.folder / "raw"
    broken = workplace.folder / "broken"
    for name in ("flair", "t1", "brain"):
        content = (raw / "test_0" / f"{name}.nii.gz").read_bytes()
        broken.mkdir(exist_ok=True)
        (broken / f"{name}.nii.gz").write_bytes(content[: len(content) // 2] if name == "flair" else content)
    done = workplace.run(
        "predict",
        *[
            "--model",
            f"{trained}/pipeline",
            "raw/test_1",
            "broken",
            "raw/test_2",
            "-o",
            "maps",
            "--brain",
            "brain.nii.gz",
        ],
        check=False,
    )
    assert done.returncode == 1
    assert "2 scan(s) done" in done.stdout
    assert "FAILED broken" in done.stderr and "flair.nii.gz cannot be read" in done.stderr
    assert sorted(path.name for path in (workplace.folder / "maps").iterdir()) == ["test_1", "test_2"]

    out = workplace.folder / "maps" / "test_1"
    source = nib.load(raw / "test_1" / "flair.nii.gz")
    anomaly_map, mask = nib.load(out / "anomaly_map.nii.gz"), nib.load(out / "pred_mask.nii.gz")
    assert anomaly_map.get_data_dtype() == np.float32 and mask.get_data_dtype() == np.uint8
    for image in (anomaly_map, mask):
        assert image.shape == source.shape
        np.testing.assert_allclose(image.affine, source.affine)
    assert nib.load(out / "reconstruction.nii.gz").shape == (*source.shape, 2)
    assert (out / "overview.png").stat().st_size > 10_000
    record = json.loads((out / "result.json").read_text())
    assert record["settings"]["noise_level"] == 3 and len(record["pred_score"]) == source.shape[2]

    # The same call in Python gives the same map.
    pipe = AnomalyPipeline.from_pretrained(workplace.folder / trained / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    volume = {name: raw / "test_1" / f"{name}.nii.gz" for name in ("flair", "t1", "brain")}
    expected = pipe(volume).anomaly_map
    np.testing.assert_allclose(anomaly_map.get_fdata(), expected, rtol=0, atol=1e-5 * expected.max())

    again = workplace.run(
        "predict",
        *["--model", f"{trained}/pipeline", "raw/test_1", "-o", "maps", "--brain", "brain.nii.gz"],
        check=False,
    )
    assert again.returncode == 1 and "`--overwrite` replaces it" in again.stderr


def test_a_folder_of_subjects(workplace, trained):
    done = workplace.run(
        "predict",
        *["--model", f"{trained}/pipeline", "raw", "-o", "all", "--brain", "brain.nii.gz"],
        *["--inference.noise_level", 1, "--inference.mode", "one_shot", "--threshold", 0.5],
    )
    assert "8 scan(s) done" in done.stdout
    record = json.loads((workplace.folder / "all" / "train_0" / "result.json").read_text())
    assert record["settings"]["mode"] == "one_shot" and record["settings"]["threshold"] == 0.5


def test_nothing_to_predict(workplace, trained):
    assert "no scan given" in workplace.run("predict", "--model", f"{trained}/pipeline", check=False).stderr
    done = workplace.run("predict", "--model", f"{trained}/pipeline", "nowhere.nii.gz", check=False)
    assert done.returncode == 1 and "There is no file nowhere.nii.gz" in done.stderr


def test_convert_brain_damage(workplace):
    # The notebook saves the state dict of its UNet2DModel; a few channels stand in for 92 million parameters.
    config = yaml.safe_load((workplace.folder / "tiny.yaml").read_text())["unet"]
    from anodiff.configs import config_path

    original = yaml.safe_load(config_path("brain_damage.yaml").read_text())["unet"]
    torch.manual_seed(0)
    torch.save(
        {"model": UNet2DModel(**original | {"in_channels": 1, "out_channels": 1}).state_dict()},
        workplace.folder / "bd.pth",
    )
    done = workplace.run("convert", "brain_damage", "bd.pth", "converted", "--key", "model")
    assert "Pipeline folder written" in done.stdout
    pipe = AnomalyPipeline.from_pretrained(workplace.folder / "converted")
    assert pipe.config.mode == "one_shot" and pipe.scheduler.config.beta_schedule == "cosine_clipped"
    state = torch.load(workplace.folder / "bd.pth", weights_only=True)["model"]
    for name, tensor in pipe.unet.state_dict().items():
        torch.testing.assert_close(tensor, state[name], rtol=0, atol=0)

    torch.save(
        UNet2DModel(sample_size=16, in_channels=1, out_channels=1, **config).state_dict(),
        workplace.folder / "other.pth",
    )
    wrong = workplace.run("convert", "brain_damage", "other.pth", "wrong", check=False)
    assert wrong.returncode == 1 and "does not fit the network of brain_damage" in wrong.stderr
    assert not (workplace.folder / "wrong").exists()
