"""`make demo`, shortened: its own commands, with fewer heads and steps, one after the other in one process."""

import importlib
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import datasets
import pytest

import anodiff
from anodiff.data.phantoms import head_files, head_maps, sets
from anodiff.files import read_json, read_text


ROOT = Path(anodiff.__file__).parent
SHORT = ("DEMO=demo", "DEMO_SUBJECTS=1", "DEMO_TESTED=2", "DEMO_HALF=1", "DEMO_STEPS=2")


def demo_commands(*variables: str) -> list[list[str]]:
    """The words of the commands of `make demo` behind `anodiff`."""
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    command = ["make", "--dry-run", "--directory", str(ROOT), "demo", "BIN=bin", *variables]
    text = subprocess.run(command, check=True, capture_output=True, encoding="utf-8").stdout
    return [shlex.split(line)[1:] for line in text.splitlines() if line.startswith("bin/anodiff ")]


def test_the_demonstration(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(
        sets, "write_head_maps", lambda folder, count, **_: head_maps.write_head_maps(folder, 3, spacing=3.0)
    )
    # Heads of a quarter of the pixels.
    monkeypatch.setattr(head_files, "HEAD_SIZE", (88, 64))
    monkeypatch.setattr(head_files, "HEAD_SPACING", 3.0)
    commands = demo_commands(*SHORT)
    assert [words[0] for words in commands] == [*["preprocess"] * 3, *["predict"] * 3, *["train"] * 2, *["eval"] * 3]
    for words in commands:
        assert importlib.import_module(f"anodiff.{words[0]}").main(words[1:]) == 0, shlex.join(words)
    demo = tmp_path / "demo"
    for contrast in ("flair", "t1", "t2"):
        (folder,) = (path for path in (demo / "maps" / contrast).iterdir() if path.is_dir())
        assert (demo / "maps" / contrast / "report.html").is_file()
        assert {"anomaly_map.nii.gz", "pred_mask.nii.gz", "overview.png"} <= set(os.listdir(folder))
        report = read_json(demo / "eval" / contrast / "report.json")
        assert {row["kind"] for row in report["results"]} >= {"pipeline", "baseline"}
    steps = re.findall(r'"step": (\d+)', read_text(demo / "finetuned" / "log.jsonl"))
    assert sorted(set(steps)) == ["1", "2"]


def test_the_commands_of_the_readme_are_those_of_the_demonstration():
    text = read_text(ROOT / "README.md")
    section = text[text.index("## The demonstration") :].split("\n## ")[0]
    shown = [shlex.split(line)[1:] for line in section.splitlines() if line.startswith("anodiff ")]
    commands = [{word.removeprefix("./") for word in words} for words in demo_commands("DEMO=.")]
    assert len(shown) >= 5
    for words in shown:
        assert any(set(words) <= command for command in commands), shlex.join(words)
