"""What a type checker says of the public names."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import anodiff


PROGRAM = """
from collections.abc import Iterator

import anodiff
from anodiff import AnomalyOutput, AnomalyPipeline, ANDiPipeline, AnoDDPMScheduler, VolumeProcessor, disperse

pipe = AnomalyPipeline.from_pretrained("anoddpm-flair", device_map="cpu").to("cpu")
pipe.set_progress_bar_config(disable=True)
pipe.enable_fast_inference(mixed_precision="bf16")
result: AnomalyOutput = pipe("scan.nii.gz", threshold=0.5, callback=lambda done, total: print(done / total))
result.save("out")
score: float = result.volume_score

andi = ANDiPipeline.from_pretrained("owner/andi")
andi("scan.nii.gz", start=75, stop=79, noise=lambda draws, indices, shape: 0).save("out")
results: Iterator[AnomalyOutput] = andi(iter(["one.nii.gz", "two.nii.gz"]))
for one in results:
    one.save("out")
disperse(pipe, "scan.nii.gz", num_members=4).save("out")

slices = VolumeProcessor(modalities=("flair",), size=(64, 64)).preprocess("scan.nii.gz").slices
AnoDDPMScheduler().save_pretrained("out")
andi("scan.nii.gz", start="early")
"""


@pytest.mark.skipif(shutil.which("node") is None, reason="no Node.js is installed, which pyright runs in")
def test_public_names_have_types(tmp_path):
    (tmp_path / "anodiff").symlink_to(Path(anodiff.__path__[0]).resolve())
    asked = [f"reveal_type(anodiff.{name})" for name in anodiff.__all__]
    (tmp_path / "use.py").write_text("\n".join([PROGRAM, *asked]), encoding="utf-8")
    settings = {"typeCheckingMode": "standard", "extraPaths": [str(tmp_path)]}
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(settings), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "pyright", "--pythonpath", sys.executable, "--outputjson", "use.py"],
        cwd=tmp_path,
        env={**os.environ, "PYRIGHT_PYTHON_IGNORE_WARNINGS": "1"},
        text=True,
        capture_output=True,
    )
    said = json.loads(done.stdout)["generalDiagnostics"]
    wrong = [one["message"].partition("\n")[0] for one in said if one["severity"] != "information"]
    assert wrong == [
        'Argument of type "Literal[\'early\']" cannot be assigned to parameter "start" of type "int | None" in function "__call__"'
    ]
    told = dict(
        zip(anodiff.__all__, [one["message"] for one in said if one["severity"] == "information"], strict=True)
    )
    functions = {name for name in anodiff.__all__ if not isinstance(getattr(anodiff, name), type)}
    wanted = {name: f'Type of "anodiff.{name}" is "type[{name}]"' for name in told if name not in functions}
    assert {name: told[name] for name in wanted} == wanted
    assert not [name for name in functions if "Unknown" in told[name]]


def test_the_installation_says_that_it_has_types():
    """Without the marker type checkers do not look at an installed package."""
    folder = Path(anodiff.__path__[0])
    assert (folder / "py.typed").is_file() and (folder / "__init__.pyi").is_file()
