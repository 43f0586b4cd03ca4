"""Guards of a package whose root is the repository."""

import configparser
import subprocess
import sys
from pathlib import Path

import anodiff


ROOT = Path(__file__).parents[1]
OUTSIDE = {"tests", "docs", "benchmarks"}


def setup_cfg() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return parser


def listed(section: str, key: str) -> list[str]:
    return [line.strip() for line in setup_cfg()[section][key].splitlines() if line.strip()]


def test_every_folder_with_code_is_listed_as_a_package():
    tracked = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, text=True, capture_output=True, check=True).stdout
    folders = {Path(name).parent for name in tracked.splitlines()}
    wanted = {".".join(["anodiff", *folder.parts]) for folder in folders if not OUTSIDE & set(folder.parts)}
    assert wanted == set(listed("options", "packages"))


def test_every_public_name_is_there():
    for name in anodiff.__all__:
        assert getattr(anodiff, name).__name__ == name


def test_importing_the_package_imports_nothing_heavy():
    code = "import sys, anodiff; print([name for name in ('torch', 'diffusers', 'numpy') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True, check=True)
    assert done.stdout.strip() == "[]"


def test_tables_of_diffusers_know_our_components():
    """Private tables: if this fails after an update of diffusers, see `hub/registration.py` and its pin in setup.cfg."""
    from diffusers.pipelines import pipeline_loading_utils

    from anodiff import AnoDDPMScheduler, UNet2DHeadsModel, VolumeProcessor

    bases = pipeline_loading_utils.LOADABLE_CLASSES["anodiff"]
    assert set(bases) == {"ModelMixin", "SchedulerMixin", "VolumeProcessor"}
    for component in (AnoDDPMScheduler, UNet2DHeadsModel, VolumeProcessor):
        assert any(issubclass(component, getattr(anodiff, base)) for base in bases)
    assert set(bases) <= set(pipeline_loading_utils.ALL_IMPORTABLE_CLASSES)


def test_required_packages_and_pins():
    required = {line.split()[0] for line in listed("options", "install_requires") if not line.startswith("#")}
    wanted = {
        "torch",
        "diffusers",
        "accelerate",
        "transformers",
        "datasets",
        "safetensors",
        "nibabel",
        "huggingface_hub",
    }
    assert wanted <= required
    constraints = (ROOT / "constraints.txt").read_text()
    pinned = {line.partition("==")[0].lower().replace("_", "-") for line in constraints.splitlines()}
    assert "torch==2.13.0" in constraints
    assert {name.split("[")[0].lower().replace("_", "-") for name in required} <= pinned
    assert "//" not in constraints  # no registry's host


def test_folders_do_not_shadow_libraries():
    import diffusers.pipelines

    folders = {path.name for path in ROOT.iterdir() if path.is_dir() and (path / "__init__.py").exists()}
    assert "datasets" not in folders
    assert not [name for name in folders if hasattr(diffusers.pipelines, name)]
