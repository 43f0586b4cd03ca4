"""The recipes of containers, and the conditions that programs in them meet."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from .tiny import make_pipeline


ROOT = Path(__file__).parents[1]
DOCKERFILE, APPTAINER = ROOT / "Dockerfile", ROOT / "apptainer.def"


def read_dockerfile_settings() -> dict[str, str]:
    lines = DOCKERFILE.read_text(encoding="utf-8").replace("\\\n", " ")
    return dict(re.findall(r"(\w+)=(\S+)", re.search(r"^ENV (.*)$", lines, re.MULTILINE).group(1)))


def read_sections() -> dict[str, str]:
    parts = re.split(r"^%(\w+)\n", APPTAINER.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def test_the_dockerfile_has_no_faults():
    hadolint = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([hadolint, str(DOCKERFILE)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_both_recipes_make_the_same():
    sections, text = read_sections(), DOCKERFILE.read_text(encoding="utf-8")
    assert set(sections) == {"arguments", "files", "post", "environment", "runscript", "test"}
    exported = dict(re.findall(r"^\s*export (\w+)=(\S+)$", sections["environment"], re.MULTILINE))
    assert exported == read_dockerfile_settings()
    assert dict(re.findall(r"^\s*(\w+)=(.*)$", sections["arguments"], re.MULTILINE)) == {
        name: value.strip('"') for name, value in re.findall(r"^ARG (\w+)=(.*)$", text, re.MULTILINE)
    }
    for command in (
        "pip install --no-cache-dir --constraint /src/constraints.txt",
        '"/src[dicom]"',
        "apt-get install --yes --no-install-recommends gcc libc6-dev",
    ):
        assert command in text and command in sections["post"]


def test_what_is_copied_is_the_whole_package():
    """Nothing that `.dockerignore` leaves out is part of what `pip` installs."""
    ignored = {
        line.rstrip("/")
        for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
        if not line.startswith(("#", ".", "*"))
    }
    assert ignored <= {"benchmarks", "build", "dist", "docs", "outputs", "space", "tests"}
    listed = re.search(
        r"^packages =\n((?:    \S+\n)+)", (ROOT / "setup.cfg").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert not ignored & {name.strip().split(".")[-1] for name in listed.group(1).split()}


def test_predict_needs_no_network_no_home_and_no_variables(tmp_path):
    if shutil.which("unshare") is None or subprocess.run(["unshare", "-rn", "true"], capture_output=True).returncode:
        pytest.skip("this system makes no name spaces without a network")
    make_pipeline("AnoDDPMPipeline").save_pretrained(tmp_path / "model")
    scan = np.random.default_rng(0).random((20, 18, 3)).astype(np.float32)
    nib.save(nib.Nifti1Image(scan, np.eye(4)), tmp_path / "scan.nii.gz")
    settings = {
        name: value.replace("/tmp", str(tmp_path / "tmp")) for name, value in read_dockerfile_settings().items()
    }
    settings["PATH"] = os.defpath
    (tmp_path / "tmp").mkdir()
    command = [shutil.which("unshare"), "-rn", sys.executable, "-m", "anodiff", "predict", "--model", "/in/model"]
    command = [part.replace("/in", str(tmp_path)) for part in [*command, "/in/scan.nii.gz", "-o", "/in/out"]]
    # A home and a working folder that nobody can write to, not even the superuser.
    settings |= {"HOME": "/proc/self/none", "TMPDIR": str(tmp_path / "tmp")}
    if "PYTHONPATH" in os.environ:
        settings["PYTHONPATH"] = os.environ["PYTHONPATH"]
    done = subprocess.run(command, env=settings, cwd="/proc", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out/scan/anomaly_map.nii.gz").is_file() and (tmp_path / "out/report.html").is_file()
    assert "none" not in done.stderr  # no complaint about the home
