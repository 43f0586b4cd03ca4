"""`train.py --push_to_hub` over real HTTP, and the pipeline that others then get. Every client is a process of its own."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from anodiff import AnoDDPMPipeline, AnomalyPipeline


PULL = """
import json, sys
import numpy as np
from anodiff import AnomalyPipeline

subject, out, *models = sys.argv[1:]
maps = []
for model in models:
    pipeline = AnomalyPipeline.from_pretrained(model)
    pipeline.set_progress_bar_config(disable=True)
    maps.append(pipeline({name: f"{subject}/{name}.nii.gz" for name in ("flair", "t1", "brain")}).anomaly_map)
np.savez(out, *maps)
print(json.dumps(type(pipeline).__name__))
"""


@pytest.fixture
def train(hub, workplace):
    """`train(run)` trains two steps and pushes them to owner/tiny."""

    def run(output: str, *, check: bool = True) -> subprocess.CompletedProcess:
        return workplace.run(
            "train",
            *["--config", "tiny.yaml", "--data", "prepared", "--train.output_dir", output],
            *["--train.max_steps", 2, "--push_to_hub", "owner/tiny"],
            environment=hub.environment(workplace.folder / "home"),
            check=check,
        )

    return run


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def pushed(hub) -> dict[str, bytes]:
    return {path: content for path, content in hub.files("owner/tiny").items() if path != ".gitattributes"}


def test_what_is_pushed_is_what_others_get(hub, hub_client, workplace, train, tmp_path):
    train("pushed")
    folder = workplace.folder / "pushed" / "pipeline"
    assert pushed(hub) == contents(folder)
    card = (folder / "README.md").read_text()
    assert 'from_pretrained("owner/tiny")' in card and "not a medical device" in card

    # In Python: the Hub's copy, read with an empty cache, and the local folder.
    subject = workplace.folder / "raw" / "test_1"
    assert hub_client(PULL, subject, tmp_path / "maps.npz", "owner/tiny", folder, home="empty") == "AnoDDPMPipeline"
    remote, local = np.load(tmp_path / "maps.npz").values()
    assert remote.shape == nib.load(subject / "flair.nii.gz").shape and remote.max() > 0
    np.testing.assert_array_equal(remote, local)
    assert any((tmp_path / "empty" / "hub").glob("models--owner--tiny/snapshots/*/unet/*.safetensors"))

    # With predict.py, again with an empty cache.
    workplace.run(
        "predict",
        *["--model", "owner/tiny", "raw/test_1", "-o", "remote", "--brain", "brain.nii.gz"],
        environment=hub.environment(tmp_path / "empty too"),
    )
    image = nib.load(workplace.folder / "remote" / "test_1" / "anomaly_map.nii.gz")
    np.testing.assert_array_equal(np.asarray(image.dataobj), local)


def test_a_push_that_fails_loses_nothing(hub, hub_client, workplace, train):
    hub.fail("POST", "/commit/", status=500)
    done = train("unpushed", check=False)
    folder = workplace.folder / "unpushed" / "pipeline"
    assert done.returncode == 1
    # The message, not a stack of HTTP calls.
    assert "error: owner/tiny was not pushed: " in done.stderr and "500" in done.stderr
    assert "Traceback" not in done.stderr
    assert f"All files are safe in {folder.resolve()}" in done.stderr
    assert pushed(hub) == {}

    pipeline = AnomalyPipeline.from_pretrained(folder)
    assert type(pipeline) is AnoDDPMPipeline and pipeline.config.noise_level == 3
    pipeline.set_progress_bar_config(disable=True)
    slices = torch.randn(2, 2, 16, 16, generator=torch.manual_seed(0))
    assert torch.isfinite(pipeline(slices).anomaly_map).all()

    # The command of the message, as it stands, once the Hub is back.
    hub.failures.clear()
    [line] = re.findall(r"^ +(hf upload .*)$", done.stderr, re.MULTILINE)
    hub_client(
        "import subprocess, sys; subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL); print('true')",
        Path(sys.executable).with_name("hf"),
        *shlex.split(line)[1:],
    )
    assert pushed(hub) == contents(folder)
