import os
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import nibabel as nib
import numpy as np
import pytest
import yaml

from anodiff.data.phantoms.brains import PHANTOM_SETS
from anodiff.data.prepared import load_prepared
from anodiff.preprocess import main as preprocess
from anodiff.running import run_script


SCRIPT = Path(__file__).parents[2] / "preprocess.py"
RECIPE = {
    "reader": "volume_folders",
    "reader_options": {"modalities": {"flair": "flair.nii.gz"}, "masks": ["lesion.nii.gz"]},
    "processor": {"modalities": ["flair"], "size": [8, 8]},
    "slices": {"train": "healthy_by_mask"},
    "split": {"fractions": {"train": 0.5, "test": 0.5}, "seed": 1},
    "license": "cc0-1.0",
}


def main(arguments: list[str]) -> int:
    """As the script runs it: errors are its last line."""
    return run_script(lambda: preprocess(arguments))


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Arrow copies of test data go away with it."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def raw(tmp_path):
    rng = np.random.default_rng(0)
    for name in ("a", "b", "c", "d"):
        folder = tmp_path / "raw" / name
        folder.mkdir(parents=True)
        nib.save(nib.Nifti1Image(rng.uniform(1, 2, (9, 9, 5)).astype(np.float32), np.eye(4)), folder / "flair.nii.gz")
        lesion = np.zeros((9, 9, 5), np.uint8)
        lesion[2:6, 2:6, 3] = 1
        nib.save(nib.Nifti1Image(lesion, np.eye(4)), folder / "lesion.nii.gz")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    return tmp_path / "raw"


def test_raw_data_to_prepared_data(raw, tmp_path):
    command = [sys.executable, SCRIPT, "--recipe", "recipe.yaml", "--root", "raw", "--out", "prepared/set"]
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, cwd=tmp_path, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "Wrote prepared/set.\n"
    train, test = (load_prepared(tmp_path / "prepared" / "set", name) for name in ("train", "test"))
    assert sorted(train.subjects + test.subjects) == ["a", "b", "c", "d"]
    assert train.slices.tolist() == [0, 1, 2, 4] * 2
    assert test.labels.tolist() == [0, 0, 0, 1, 0] * 2
    assert train.recipe == RECIPE
    assert sorted(path.name for path in (tmp_path / "prepared").iterdir()) == ["set"]


def test_what_cannot_be_read_is_listed(raw, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    file = raw / "b" / "flair.nii.gz"
    file.write_bytes(file.read_bytes()[:300])
    assert main(["--recipe", "recipe.yaml", "--root", "raw", "--out", "set"]) == 1
    said = capsys.readouterr()
    assert said.out == "Wrote set.\n"
    assert "Left out b: raw/b/flair.nii.gz cannot be read" in said.err
    subjects = [load_prepared(tmp_path / "set", name).subjects for name in ("train", "test")]
    assert sorted(sum(subjects, [])) == ["a", "c", "d"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--recipe", "recipe.yaml"], "Give `--recipe` and `--root` of a raw data set, or `--phantom`, or `--heads`."),
        (
            ["--phantom", "phantom-maxi"],
            "`name` must be one of phantom-mini, phantom-std, phantom-raters, got 'phantom-maxi'",
        ),
        (
            ["--phantom", "phantom-mini", "--recipe", "registered.yaml"],
            "`correction.register` needs a template: give `--template FILE`.",
        ),
        (
            ["--recipe", "recipe.yaml", "--root", "raw", "--subjects", "2", "--tested", "1", "--contrast", "t1"],
            "`--contrast`, `--subjects`, `--tested` would change nothing in what `--recipe` makes: leave it out.",
        ),
        (["--recipe", "recipe.yaml", "--root", "raw", "--phantom_anatomy", "geometric"], "`--phantom_anatomy` would"),
        (["--phantom", "phantom-mini", "--skull"], "`--skull` would change nothing in what `--phantom` makes"),
        (["--heads", "builtin", "--template", "a.nii"], "`--template` would change nothing in what `--heads` makes"),
        (["--phantom", "phantom-raters", "--phantom_anatomy", "geometric"], "`anatomy` is of phantoms of brains"),
        (["--recipe", "nothing", "--root", "raw"], "There is no recipe nothing. The package comes with anoddpm_nfbs"),
        (["--recipe", "wrong.yaml", "--root", "raw"], "`recipe` has no key slice; it takes source, license, reader"),
        (["--recipe", "recipe.yaml", "--root", "nowhere"], "`root` must be a folder, and nowhere is none."),
        (["--recipe", "tcga_lgg_flair", "--root", "raw"], "Subject a: the pattern 'brain.nii.gz' must match one file"),
    ],
)
def test_one_clear_line_about_what_is_wrong(raw, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    Path("wrong.yaml").write_text(yaml.safe_dump({**RECIPE, "slice": {}}))
    Path("registered.yaml").write_text(yaml.safe_dump({**RECIPE, "correction": {"register": "rigid"}}))
    assert main([*arguments, "--out", "set"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1
    assert not Path("set").exists()


def test_a_missing_extra_is_one_clear_line(raw, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "SimpleITK", None)
    recipe = {**RECIPE, "processor": {**RECIPE["processor"], "curvature_flow": 3}}
    (tmp_path / "smooth.yaml").write_text(yaml.safe_dump(recipe))
    assert main(["--recipe", "smooth.yaml", "--root", "raw", "--out", "out"]) == 1
    error = capsys.readouterr().err
    assert "error: `curvature_flow` of the processor needs SimpleITK: `pip install anodiff[preprocess]`." in error
    assert not (tmp_path / "out").exists()


def test_an_existing_folder_is_never_written_into(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("set").mkdir()
    assert main(["--phantom", "phantom-mini", "--out", "set"]) == 1
    assert "`out` set exists" in capsys.readouterr().err
    assert list(Path("set").iterdir()) == []


def test_check_finds_what_is_on_both_sides(raw, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["--recipe", "recipe.yaml", "--root", "raw", "--out", "clean", "--num_proc", "2"]) == 0
    capsys.readouterr()
    assert main(["--check", "clean"]) == 0
    assert capsys.readouterr().out == "No leak found. Wrote leaks.csv.\n"
    assert (
        Path("leaks.csv").read_text().startswith("kind,set_a,split_a,subject_a,")
        and Path("leaks.csv").read_text().count("\n") == 1
    )
    # A scan under two names, one of them in each split.
    train, test = (load_prepared("clean", name).subjects for name in ("train", "test"))
    shutil.copy(Path("raw", train[0], "flair.nii.gz"), Path("raw", test[1], "flair.nii.gz"))
    assert main(["--recipe", "recipe.yaml", "--root", "raw", "--out", "leaky"]) == 0
    assert main(["--check", "clean", "leaky", "--out", "found.csv"]) == 1
    out = capsys.readouterr().out
    assert f"of {train[0]} in train of leaky nearly equal slices of {test[1]} in test of leaky" in out
    assert "leaks found. Wrote found.csv." in out and f"group {test[1]}" not in out
    assert main(["--check"]) == 1
    assert "Give the prepared data sets to compare" in capsys.readouterr().err


def test_images_that_may_not_be_given_away(raw, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text(yaml.safe_dump({**RECIPE, "rehosting": "forbidden"}))
    arguments = ["--recipe", "mine.yaml", "--root", "raw", "--out", "set"]
    assert main([*arguments, "--push_to_hub", "owner/set", "--hub_private", "false"]) == 1
    assert "`--hub_private false` is refused: by `rehosting: forbidden` of the recipe" in capsys.readouterr().err
    assert not Path("set").exists()
    assert main(arguments) == 0
    card = Path("set", "README.md").read_text()
    assert "The licence forbids to offer the images for download" in card and "rehosting: forbidden" in card
    Path("mine.yaml").write_text(yaml.safe_dump({**RECIPE, "rehosting": "maybe"}))
    assert main([*arguments[:-1], "other"]) == 1
    assert "`rehosting` must be one of allowed, forbidden, got 'maybe'" in capsys.readouterr().err


def test_phantom(tmp_path, monkeypatch):
    # Two subjects instead of 32.
    monkeypatch.setitem(PHANTOM_SETS, "phantom-mini", {"train": ((None, 1),), "test": (("tumour", 1),)})
    monkeypatch.chdir(tmp_path)
    assert main(["--phantom", "phantom-mini", "--phantom_anatomy", "geometric", "--out", "set", "--root", "raw"]) == 0
    for name, subject in (("train", "healthy_0000"), ("test", "tumour_0001")):
        split = load_prepared("set", name)
        assert split.modalities == ("flair", "t1") and split.subjects == [subject]
        assert split[0]["image"].shape == (2, 64, 64) and 12 <= len(split) <= 22
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "raw", "set"]
    assert sorted(path.name for path in Path("raw").iterdir()) == ["healthy_0000", "splits", "tumour_0001"]


def test_help_does_not_wait_for_torch():
    code = (
        "import runpy, sys; sys.argv = [sys.argv[1], '--help']\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "finally: print(sorted({'torch', 'datasets', 'diffusers', 'nibabel'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code, SCRIPT], text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert "Literal['mni152', 'geometric']" in done.stdout
    assert done.stdout.endswith("[]\n")
