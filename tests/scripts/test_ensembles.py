"""CIMD through the scripts: training with two updates on a batch, evaluation by two processes and onto the Hub, prediction."""

import io
import json
import shutil

import datasets
import nibabel as nib
import numpy as np
import PIL.Image
import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from safetensors.torch import load_file

from anodiff import AnomalyPipeline, CIMDPipeline
from anodiff.data.phantoms.nodules import RATER_SETS, make_case
from anodiff.data.phantoms.sets import prepare_phantom
from anodiff.eval import main as evaluate
from anodiff.predict import main as predict
from anodiff.train import main as train


RECIPE = {
    "reader": "annotated_folders",
    "reader_options": {
        "modalities": {"image": "image.png"},
        "annotations": ["label*.png"],
        "groups": "patients.csv",
        "group_column": "patient",
    },
    "processor": {
        "modalities": ["image"],
        "size": [16, 16],
        "intensity": "given",
        "value_range": [0, 1],
        "brain_mask": "none",
    },
    "split": {"fractions": {"train": 0.5, "test": 0.5}},
}
CONFIG = {
    "method": "cimd",
    "unet": {
        "block_out_channels": [4, 8],
        "layers_per_block": 1,
        "down_block_types": ["DownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "UpBlock2D"],
        "norm_num_groups": 4,
    },
    "inference": {"num_ensemble": 3, "num_inference_steps": 4, "threshold": 0.45},
    "objective": {"updates_per_batch": 2},
    "optim": {"learning_rate": 1e-3},
    "train": {
        "max_steps": 4,
        "batch_size": 2,
        "log_every": 1,
        "validate_every": 0,
        "checkpoint_every": 1,
        "checkpoint_limit": 9,
        "report_to": "none",
        "ema": {"decay": 0.9},
    },
}


@pytest.fixture(scope="module")
def ensembles(workplace):
    """Folder with prepared `raters` and a run `cimd` of four steps, two on each batch."""
    folder = workplace.folder / "ensembles"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
        patch.setitem(RATER_SETS, "phantom-raters", (6, 2))
        assert prepare_phantom("phantom-raters", folder / "raters", recipe=RECIPE, progress=False) == {}
        (folder / "cimd.yaml").write_text(yaml.safe_dump(CONFIG))
        assert fit(folder, "cimd") == 0
        yield folder


def fit(folder, run, *arguments) -> int:
    options = ["--config", folder / "cimd.yaml", "--data", folder / "raters", "--train.output_dir", folder / run]
    return train([*map(str, options), *map(str, arguments)])


def losses(folder, run) -> dict[int, float]:
    entries = map(json.loads, (folder / run / "log.jsonl").read_text().splitlines())
    return {entry["step"]: entry["loss"] for entry in entries if "loss" in entry}


def test_two_updates_on_every_batch_are_resumed_exactly(ensembles):
    assert sorted(losses(ensembles, "cimd")) == [1, 2, 3, 4]
    # The run dies between the two updates on its second batch.
    assert fit(ensembles, "part", "--train.max_steps", 3) == 0
    assert fit(ensembles, "part", "--train.resume", "latest") == 0
    assert losses(ensembles, "part") == losses(ensembles, "cimd")
    weights = "pipeline/unet/diffusion_pytorch_model.safetensors"
    expected = load_file(ensembles / "cimd" / weights)
    for name, tensor in load_file(ensembles / "part" / weights).items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=0)
    # Without learning, the first update on a batch is that of a run of one, the second draws anew from the same samples.
    still = ["--optim.learning_rate", 0, "--train.ema.enabled", "false", "--train.checkpoint_every", 0]
    assert fit(ensembles, "still", *still) == 0
    assert fit(ensembles, "single", *still, "--objective.updates_per_batch", 1) == 0
    two, one = losses(ensembles, "still"), losses(ensembles, "single")
    assert (two[1], two[3]) == (one[1], one[2]) and len({*two.values(), one[3]}) == 5


def test_what_several_updates_do_not_go_with(ensembles):
    with pytest.raises(ValueError, match="`objective.updates_per_batch` was 2, is 1"):
        fit(ensembles, "cimd", "--train.resume", "latest", "--objective.updates_per_batch", 1)
    with pytest.raises(ValueError, match="`objective.updates_per_batch` is 2, but `data.streaming` reads every slice"):
        fit(ensembles, "streamed", "--data.streaming", "true")


def test_the_card_speaks_of_segmentations(ensembles):
    card = (ensembles / "cimd" / "pipeline" / "README.md").read_text()
    assert "plausible segmentations" in card and "anomaly map" not in card and "Research use only" in card


def test_two_processes_equal_one(workplace, ensembles):
    common = [
        "--model",
        str(ensembles / "cimd" / "pipeline"),
        "--data",
        str(ensembles / "raters"),
        "--batch_size",
        "4",
    ]
    workplace.run("eval", *common, "--output_dir", ensembles / "together", processes=2)
    assert evaluate([*common, "--output_dir", str(ensembles / "alone")]) == 0
    together, alone = (json.loads((ensembles / run / "report.json").read_text()) for run in ("together", "alone"))
    assert together["processes"] == 2 and alone["processes"] == 1
    assert together["data"] == alone["data"] and together["protocol"] == alone["protocol"]
    for ours, theirs in zip(together["results"], alone["results"], strict=True):
        assert ours["metrics"] == pytest.approx(theirs["metrics"], abs=1e-6)
        for one, other in zip(ours["subjects"], theirs["subjects"], strict=True):
            assert one == pytest.approx(other, abs=1e-6)
    assert (ensembles / "together" / "cases.png").exists() and not (ensembles / "together" / "maps").exists()


def test_a_report_goes_into_the_card(hub, workplace, ensembles):
    folder = ensembles / "published"
    shutil.copytree(ensembles / "cimd" / "pipeline", folder)
    options = ["--model", folder, "--data", ensembles / "raters", "--output_dir", ensembles / "pushed"]
    workplace.run(
        "eval",
        *[*options, "--push_to_hub", "owner/cimd"],
        environment=hub.environment(workplace.folder / "home"),
    )
    files = hub.files("owner/cimd")
    report = json.loads((ensembles / "pushed" / "report.json").read_text())
    card = ModelCard(files["README.md"].decode())
    values = {result.metric_type: result for result in card.data.eval_results}
    assert values["ged"].metric_value == report["results"][0]["metrics"]["ged"]
    assert {result.task_name for result in card.data.eval_results} == {"Ambiguous segmentation"}
    assert "### raters, split `test`" in card.text and "random training annotation (baseline)" in card.text
    # A phantom's cases are everybody's.
    (picture,) = [path for path in files if path.endswith(".png")]
    pushed, drawn = PIL.Image.open(io.BytesIO(files[picture])), PIL.Image.open(ensembles / "pushed" / "cases.png")
    assert np.array_equal(pushed, drawn) and f"]({picture})" in card.text
    assert "unet/diffusion_pytorch_model.safetensors" in files


def test_predict_writes_masks_and_a_picture(ensembles):
    case = make_case(1, 0)
    PIL.Image.fromarray(case.image).save(ensembles / "nodule.png")
    command = ["--model", str(ensembles / "cimd" / "pipeline"), str(ensembles / "nodule.png")]
    assert predict([*command, "-o", str(ensembles / "out"), "--inference.num_ensemble", "2"]) == 0
    out = ensembles / "out" / "nodule"
    names = {path.name for path in out.iterdir()}
    assert {"overview.png", "result.json", "member_masks_01.png", "probability_map.png", "std_map.png"} <= names
    pipe = CIMDPipeline.from_pretrained(ensembles / "cimd" / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    expected = pipe(ensembles / "nodule.png", num_ensemble=2)
    with PIL.Image.open(out / "mean_map.png") as picture:
        np.testing.assert_allclose(np.asarray(picture) / 65535, expected.mean_map, rtol=0, atol=1e-3)
    with PIL.Image.open(out / "overview.png") as picture:
        assert picture.width > 700
    with pytest.raises(ValueError, match="CIMDPipeline makes an ensemble by itself"):
        predict([*command, "--dispersion", "4"])
    with pytest.raises(ValueError, match="`--dispersion` must be 0, for none, or at least 2, got 1"):
        predict([*command, "--dispersion", "1"])


def test_predict_writes_the_dispersion_of_maps(workplace, trained):
    out, raw = workplace.folder / "spread" / "test_1", workplace.folder / "raw" / "test_1"
    model = str(workplace.folder / trained / "pipeline")
    options = ["--model", model, str(raw), "-o", str(out.parent), "--brain", "brain.nii.gz"]
    assert predict([*options, "--dispersion", "3", "--seed", "1"]) == 0
    pipe = AnomalyPipeline.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    volume = {name: raw / f"{name}.nii.gz" for name in ("flair", "t1", "brain")}
    maps = np.stack([pipe(volume, generator=seed).anomaly_map for seed in (1, 2, 3)])
    for name, expected in (
        ("anomaly_map", maps[0]),
        ("mean_map", maps.mean(0)),
        ("dispersion", maps.std(0)),
        ("member_maps", np.moveaxis(maps, 0, -1)),
    ):
        image = nib.load(out / f"{name}.nii.gz")
        np.testing.assert_allclose(image.affine, nib.load(raw / "flair.nii.gz").affine)
        np.testing.assert_allclose(image.get_fdata(), expected, rtol=0, atol=2e-5 * maps.max())
    assert (
        (out / "dispersion.png").exists() and (out / "overview.png").exists() and (out / "pred_mask.nii.gz").exists()
    )
