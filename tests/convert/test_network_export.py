"""Networks as files: what they give, for batches of any size, and what is refused."""

import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from anodiff.convert.network_export import export_networks, list_networks, make_inputs
from anodiff.files import read_json, read_text
from tests.tiny import SIZE, make_pipeline, make_raw_scan


onnxruntime = pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")
GUIDE = Path(__file__).parents[2] / "docs/export.md"


def run_file(path: Path, inputs: dict[str, torch.Tensor]) -> np.ndarray:
    if path.suffix == ".pt2":
        return torch.export.load(path).module()(*inputs.values()).numpy()
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return session.run(None, {name: value.numpy() for name, value in inputs.items()})[0]


# One of each kind of network: plain, conditioned on labels, on a vector that an encoder makes, with a classifier, without
# timesteps, of two images.
@pytest.mark.parametrize(
    ("name", "networks", "file_format"),
    [
        ("AnoDDPMPipeline", ["unet"], "torch_export"),
        ("AnoFPDMPipeline", ["unet"], "onnx"),
        ("ClassifierGuidedPipeline", ["classifier", "unet"], "onnx"),
        ("DAEPipeline", ["unet"], "onnx"),
        ("SADMPipeline", ["encoder", "segmentation_network", "unet"], "onnx"),
    ],
)
@torch.no_grad()
def test_files_give_what_the_networks_give_for_any_batch(name, networks, file_format, tmp_path):
    pipeline, out = make_pipeline(name), tmp_path / "out"
    record = export_networks(pipeline, out, file_format)
    assert sorted(record["networks"]) == networks and record == read_json(out / "export.json")
    for component, network in list_networks(pipeline).items():
        described = record["networks"][component]
        # Networks of diffusers branch at 64 items, and programs of torch.export hold one branch.
        for items in (1, 70 if file_format == "onnx" else 63):
            inputs = make_inputs(network, (SIZE, SIZE), items, 1000)
            shapes = {key: ["B", *value.shape[1:]] for key, value in inputs.items()}
            assert shapes == {key: value["shape"] for key, value in described["inputs"].items()}
            given, wanted = run_file(out / described["file"], inputs), network(**inputs, return_dict=False)[0]
            assert given.shape == (items, *described["output"][1:])
            np.testing.assert_allclose(given, wanted, rtol=1e-4, atol=1e-4)
    assert described["bytes"] == (out / described["file"]).stat().st_size


@torch.no_grad()
def test_the_deviation_of_float16_is_that_of_the_last_timesteps(tmp_path):
    pipeline = make_pipeline("PDDPMPipeline")
    steps = pipeline.scheduler.config.num_train_timesteps
    inputs = make_inputs(pipeline.unet, (SIZE, SIZE), 3, steps)
    assert inputs["timestep"].max() == steps - 1 and inputs["timestep"].min() >= 0
    # Late timesteps, most of which float16 rounds: it holds integers up to 2048.
    pipeline.scheduler.register_to_config(num_train_timesteps=4096)
    record = export_networks(pipeline, tmp_path / "out", precision="float16")
    inputs["timestep"][:] = 4095
    wanted = pipeline.unet(**inputs, return_dict=False)[0].numpy()
    deviation = np.abs(run_file(tmp_path / "out" / "unet.onnx", inputs) - wanted).max() / max(wanted.std(), 1e-3)
    assert record["networks"]["unet"]["deviation"] > deviation / 3


def test_the_program_of_the_guide_makes_the_map_of_the_pipeline_without_torch(tmp_path):
    settings = {"num_draws": 2, "erosion": 2, "median_size": 3, "median_dimensions": 2, "weighting": "intensity"}
    processor = {"crop": "brain", "intensity": "brain_median", "brain_mask": "nonzero", "size": (32, 24)}
    pipeline = make_pipeline(
        "AnoDDPMPipeline", mode="one_shot", noise_level=200, sign="brighter", processor_settings=processor, **settings
    )
    record = export_networks(pipeline, tmp_path / "exported", precision="float16", noise_slices=40)
    assert record["noise"]["shape"] == [2, 40, 1, 32, 24] and record["networks"]["unet"]["deviation"] < 1e-2
    image, brain, affine = make_raw_scan(spacing=(5.0, 5.0, 6.0), skull=False)
    # Smooth, as the program interpolates a little differently.
    image *= 1 + 8 * gaussian_filter(np.random.default_rng(1).random(image.shape, dtype=np.float32) - 0.5, 2)
    scan = nib.Nifti1Image(image, affine)
    nib.save(scan, tmp_path / "scan.nii.gz")
    (code,) = read_text(GUIDE).split("```python\n")[1:]
    # What the library needs is not there.
    program = (
        "import sys\nsys.modules.update(dict.fromkeys(['torch', 'anodiff', 'diffusers']))\n" + code.split("```")[0]
    )
    (tmp_path / "map.py").write_text(program)
    command = [sys.executable, "map.py", "exported", "scan.nii.gz", "map.nii.gz"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    made = nib.load(tmp_path / "map.nii.gz").get_fdata()
    wanted = pipeline(scan).anomaly_map
    assert made.shape == wanted.shape and made.max() > 0
    assert np.corrcoef(made[brain], wanted[brain])[0, 1] > 0.95


def test_a_network_that_sees_neighbours_is_exported_with_their_channels(tmp_path):
    pipeline = make_pipeline("AnoDDPMPipeline", mode="one_shot", num_draws=2, processor_settings={"context": 1})
    record = export_networks(pipeline, tmp_path / "out", "torch_export", noise_slices=4)
    assert record["processor"]["context"] == 1 and record["noise"]["shape"] == [2, 4, 3, SIZE, SIZE]
    described = record["networks"]["unet"]
    assert described["inputs"]["sample"]["shape"] == described["output"] == ["B", 3, SIZE, SIZE]


def test_what_cannot_be_exported_is_refused(tmp_path):
    pipeline = make_pipeline("ANDiPipeline")
    with pytest.raises(ValueError, match="`format` must be"):
        export_networks(pipeline, tmp_path / "out", "tflite")
    with pytest.raises(ValueError, match="float16 is there for the format onnx alone"):
        export_networks(pipeline, tmp_path / "out", "torch_export", "float16")
    with pytest.raises(ValueError, match="`noise_slices` .* this is a ANDiPipeline"):
        export_networks(pipeline, tmp_path / "out", noise_slices=3)
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "export.json").write_text("{}")
    with pytest.raises(FileExistsError, match="holds an export already"):
        export_networks(pipeline, tmp_path / "out")


def test_a_file_that_deviates_is_refused(tmp_path, monkeypatch):
    pipeline = make_pipeline("AnoDDPMPipeline")
    monkeypatch.setattr("anodiff.convert.network_export.TOLERANCES", {"float32": -1.0})
    with pytest.raises(ValueError, match="unet.pt2 deviates from unet in PyTorch by"):
        export_networks(pipeline, tmp_path / "out", "torch_export")
    assert list((tmp_path / "out").iterdir()) == []
