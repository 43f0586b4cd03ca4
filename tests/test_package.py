"""Guards of a package whose root is the repository."""

import ast
import configparser
import graphlib
import re
import subprocess
import sys
from pathlib import Path

import anodiff


ROOT = Path(__file__).parents[1]
OUTSIDE = {"checkpoints", "tests", "docs", "benchmarks", "space"}

# A room may import from those in lines above its own and from itself; what shares a line shares nothing else.
ROOMS = (
    ("checks", "files", "running"),
    ("hub", "configs"),
    ("volumes", "schedulers", "models"),
    ("pipelines", "data"),
    ("reports",),
    ("training", "evaluation"),
    ("apps", "cohorts", "convert", "ranking"),
    (
        "train",
        "eval",
        "predict",
        "bids",
        "preprocess",
        "strip",
        "list_models",
        "ship",
        "publish",
        "benchmark",
        "__main__",
        "app",
        "explore",
        "export",
    ),
)


def setup_cfg() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return parser


def listed(section: str, key: str) -> list[str]:
    return [line.strip() for line in setup_cfg()[section][key].splitlines() if line.strip()]


def product_files() -> list[Path]:
    """The tracked modules of the package, relative to the root."""
    tracked = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, text=True, capture_output=True, check=True).stdout
    return [Path(name) for name in tracked.splitlines() if not OUTSIDE & set(Path(name).parts)]


def test_every_folder_with_code_is_listed_as_a_package():
    wanted = {".".join(["anodiff", *path.parent.parts]) for path in product_files()}
    assert wanted == set(listed("options", "packages"))


def test_every_public_name_is_there():
    for name in anodiff.__all__:
        assert getattr(anodiff, name).__name__ == name


def test_what_is_heavy_is_imported_late():
    """The package alone imports nothing, a prediction and the first step of a training only what they need."""
    code = """
import sys

def report(*names):
    print([name for name in names if name in sys.modules])

import anodiff
report("torch", "diffusers", "numpy")
import anodiff.predict, anodiff.pipelines.dispersion, anodiff.pipelines.pipeline_anoddpm
import anodiff.evaluation.overview, anodiff.volumes.results, anodiff.volumes.scans
report("datasets", "matplotlib", "tensorboard", "pandas", "pyarrow", "sklearn", "SimpleITK", "dask")
import anodiff.training.loop, anodiff.training.objective_noise
report("matplotlib", "tensorboard", "sklearn", "dask")
"""
    done = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True, check=True)
    assert done.stdout.split("\n") == ["[]", "[]", "[]", ""]


def test_preparing_data_imports_no_networks():
    code = "import sys, anodiff.data.prepare; print(sorted({'transformers', 'accelerate'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], text=True, capture_output=True, check=True).stdout == "[]\n"


def test_tables_of_diffusers_know_our_components():
    """If this fails after an update of diffusers: its tables are private, see `hub/registration.py`."""
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


def test_imports_run_downwards_and_in_no_circle():
    # Scripts write `from anodiff import ...`: what they import is the module of that name.
    lazy = {name: getattr(anodiff, name).__module__ for name in anodiff.__all__}
    paths = {}
    for name in product_files():
        parts = name.with_suffix("").parts
        # `convert.py` is the script beside the package of that name.
        if name != Path("convert.py"):
            paths[".".join(["anodiff", *(part for part in parts if part != "__init__")])] = ROOT / name
    imported = {module: imports_of(module, path, paths, lazy) for module, path in paths.items() if module != "anodiff"}
    level = {room: number for number, rooms in enumerate(ROOMS) for room in rooms}
    upwards = [
        f"{module} -> {other}"
        for module, others in imported.items()
        for other in others - {"anodiff"}
        if (room := other.split(".")[1]) != module.split(".")[1] and level[room] >= level[module.split(".")[1]]
    ]
    assert not upwards
    # Raises a CycleError that names the circle.
    assert set(graphlib.TopologicalSorter(imported).static_order()) >= set(imported)


def imports_of(module: str, path: Path, modules, lazy: dict[str, str]) -> set[str]:
    """Modules of the package that a module imports, within functions as well."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names if name.name.split(".")[0] == "anodiff"}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            for name in node.names if base.split(".")[0] == "anodiff" else ():
                inner = f"{base}.{name.name}"
                found.add(inner if inner in modules else lazy.get(name.name, base) if base == "anodiff" else base)
    return found


def test_public_docstrings_begin_with_a_verb():
    """What a function or method does comes first: Returns ..., Draws ... Properties say what they are."""
    wrong = []
    for name in product_files():
        for node in ast.walk(ast.parse((ROOT / name).read_text(encoding="utf-8"))):
            for function in node.body if isinstance(node, (ast.Module, ast.ClassDef)) else []:
                if not isinstance(function, ast.FunctionDef) or function.name.startswith("_"):
                    continue
                is_property = any(getattr(decorator, "id", "") == "property" for decorator in function.decorator_list)
                text = ast.get_docstring(function)
                if text and not is_property and not re.match(r"[A-Z][a-z]+s\b", text):
                    wrong.append(f"{name}: {function.name}")
    assert not wrong
