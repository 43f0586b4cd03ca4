"""The documents name what there is, and all of it."""

import importlib
import inspect
import math
import re
from pathlib import Path

import pytest
import yaml

import anodiff
from anodiff.evaluation.protocols import PROTOCOLS
from anodiff.train import OBJECTIVES
from anodiff.training.objective import COMPONENTS


ROOT = Path(anodiff.__file__).parent
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "benchmarks/README.md",
]
CODE = [
    path
    for folder in (
        ".",
        *"apps cohorts convert data evaluation hub models pipelines ranking reports schedulers training volumes tests benchmarks configs".split(),
    )
    for path in (ROOT / folder).glob("*.py" if folder == "." else "**/*.py")
]
DEFINED = {name for path in CODE for name in re.findall(r"(?:def|class) (\w+)", path.read_text(encoding="utf-8"))}
# Of other libraries.
FOREIGN = {
    "load_dataset",
    "from_pretrained",
    "register_to_config",
    "linspace",
    "register_modules",
    "fromarray",
    "vectorize",
    "locals",
    "push_to_hub",
    "roc_curve",
}


# What stands for several words in the names of metrics.
PLACES = {
    "POLICY": "(oracle|validation|healthy|yen|own)",
    "RATE": r"[\d.]+",
    "SETTING": "(mixed|unhealthy)",
    "RULE": "(search|exact|fpr1|fpr5|fpr10)",
}


def find_undefined(metrics, *pages: str) -> list[str]:
    """The names of metrics of a report that no table of these pages of the documentation defines in its first
    column."""
    defined = []
    for page in pages:
        rows = re.findall(r"^\| (`.+?`) \|", (ROOT / "docs" / page).read_text(encoding="utf-8"), flags=re.MULTILINE)
        defined += [name for row in rows for name in re.findall(r"`([^`]+)`", row)]
    patterns = set()
    for name in defined:
        for place, words in PLACES.items():
            name = name.replace(place, words)
        patterns.add(name)
    known = re.compile(f"({'|'.join(patterns)})(_low|_high)?")
    return [name for name in metrics if not known.fullmatch(name)]


def objective(method: str) -> type:
    module, name = OBJECTIVES[method]
    return getattr(importlib.import_module(module), name)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_functions_and_classes_exist(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    called = set(re.findall(r"`(?:\w+\.)*(\w+)\(", text))
    classes = set(re.findall(r"`([A-Z]\w*(?:Pipeline|Scheduler|Model|Objective|Output|Processor))\b", text)) - {
        "YourScheduler"
    }
    missing = sorted(
        name for name in (called | classes) - DEFINED - FOREIGN if not hasattr(__import__("diffusers"), name)
    )
    assert not missing, f"{page.name} names {', '.join(missing)}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_and_links_exist(page):
    text = page.read_text(encoding="utf-8")
    for name in re.findall(r"`((?:\w+/)+\w+\.(?:py|yaml|md))`", text):
        assert "NAME" in name or name.startswith("outputs/") or (ROOT / name).exists(), f"{page.name} names {name}"
    for target, anchor in re.findall(r"\]\((?!http)([^)#\s]*)(?:#([^)]+))?\)", text):
        file = (page.parent / target).resolve() if target else page
        assert file.exists(), f"{page.name} links to {target}"
        if anchor:
            titles = re.findall(r"^#+ (.+)$", file.read_text(encoding="utf-8"), flags=re.MULTILINE)
            anchors = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
            assert anchor in anchors, f"{page.name} links to {target}#{anchor}"


def test_the_table_of_methods_is_that_of_the_objectives():
    text = (ROOT / "docs" / "training_and_evaluation.md").read_text(encoding="utf-8")
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")
    ]
    described = {re.sub(r"[^a-z0-9_ ].*|`|\[| .*", "", row[0].lstrip("[`")): row for row in rows if len(row) == 5}
    described = {
        method: row for method, row in described.items() if method in OBJECTIVES or method.islower() and "_" in method
    }
    assert set(described) >= set(OBJECTIVES), f"missing: {set(OBJECTIVES) - set(described)}"
    for method in OBJECTIVES:
        kind, (_, trains_on, validates_on, columns, exports) = objective(method), described[method]
        assert (trains_on, validates_on) == (kind.trains_on, kind.validates_on), method
        assert set(re.findall(r"`(\w+)`", columns)) == set(kind.columns) - {"image"}, method
        exported = kind.pipeline_class
        assert exports.startswith("a part" if exported is None else f"`{exported.__name__}`"), method


def arguments_of(kind: type) -> set[str]:
    """The settings of a class, without its components."""
    return set(inspect.signature(kind.__init__).parameters) - {"self", "processor", "scheduler", "unet", *COMPONENTS}


@pytest.mark.parametrize("method", OBJECTIVES)
def test_every_setting_is_in_the_table_of_options(method):
    text = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    table = text[text.index("## Where each option is") :].split("\n\n")[1]
    block, keys, before = "", {}, set()
    for row in ([cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]):
        block = row[0].strip("`") or block
        named = set(re.findall(r"`(\w+)`", row[2]))
        if row[2].startswith("the same"):
            named |= before
        for other in re.findall(r"as `(\w+)`", row[2]):
            named |= keys[block, other]
        for name in (
            set(re.findall(r"`(\w+)`", row[1])) & set(OBJECTIVES) if not row[1].startswith("all") else OBJECTIVES
        ):
            keys[block, name] = keys.get((block, name), set()) | named
        before = named
    kind = objective(method)
    expected = {"objective": set(kind.objective_keys)}
    if kind.scheduler_class is not None:
        expected["scheduler"] = arguments_of(kind.scheduler_class)
    if kind.pipeline_class is not None:
        expected["inference"] = arguments_of(kind.pipeline_class)
    for block, names in expected.items():
        missing = names - keys.get((block, method), set())
        assert not missing, f"the row of {method} in the block {block} lacks {', '.join(sorted(missing))}"


@pytest.mark.parametrize(("page", "at_least"), [("reliability.md", 50), ("metrics.md", 20)])
def test_promises_name_tests_that_there_are(page, at_least):
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    named = re.findall(r"`([\w/]+\.py)(?:::(\w+))?`", text)
    assert len(named) > at_least
    for file, test in named:
        defined = re.findall(r"def (test_\w+)", (ROOT / file).read_text(encoding="utf-8"))
        assert test in defined if test else defined, f"{file}::{test}"
    if page == "metrics.md":
        return
    promises = [line for line in text.splitlines() if line.startswith("| ") and "`" in line and "status" not in line]
    assert all(re.search(r"`[\w/]+\.py", line) for line in promises if not re.match(r"\| [\d, ]+ \|", line))


def test_the_paper_index_names_what_there_is_and_all_of_it():
    text = (ROOT / "docs" / "papers.md").read_text(encoding="utf-8")
    head, *sections = text.split("\n## ")
    rows = [line for line in head.splitlines() if line.startswith("| [")]
    entries = {row.split("]")[0][3:]: row for row in rows}
    assert [section.split("\n")[0] for section in sections] == list(entries)
    pipelines = {name for name in anodiff.__all__ if name.endswith("Pipeline")} - {"AnomalyPipeline"}
    assert pipelines == {name for row in rows for name in re.findall(r"`(\w+Pipeline)`", row)}
    methods = set()
    for section in sections:
        title = section.split("\n")[0]
        assert all(f"**{part}**" in section for part in ("Published", "Parity", "Measured here")), title
        block = "".join(re.findall(r"```bash\n(.*?)```", section, flags=re.DOTALL))
        configs = {name: read_config(name) for name in re.findall(r"configs/(\w+)\.yaml", section)}
        methods |= {config["method"] for config in configs.values()}
        outputs = {config["train"]["output_dir"] for config in configs.values()}
        evaluated = re.findall(r"--model (\S+)/pipeline", block)
        assert set(evaluated) <= outputs and (evaluated or title == "ANDi in UAD-IMAG"), title
        assert set(re.findall(r"--protocol (\w+)", block)) <= set(PROTOCOLS), title
        assert set(re.findall(r"(\w+)\.yaml", entries[title])) <= set(configs), title
        tests = re.findall(r"`(tests/parity/\w+\.py)`", section)
        assert tests or "**Parity**: as of [cDDPM](#cddpm)" in section, title
    assert methods == set(OBJECTIVES) - {"brain_extractor"}


def read_config(name: str) -> dict:
    return yaml.safe_load((ROOT / "configs" / f"{name}.yaml").read_text(encoding="utf-8"))


def told_by(notebook) -> list[str]:
    """What the cells of a notebook print and give, each as one text."""
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    printed = [
        output.text if output.output_type == "stream" else output.data["text/plain"] + "\n"
        for output in outputs
        if output.get("name") != "stderr"
    ]
    # Of a line that is written again and again the last state.
    return re.split(r"\n+", re.sub(r"[^\n]*\r", "", "".join(printed)).strip())


def test_the_notebook_runs_and_shows_what_it_gives(tmp_path):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    path = ROOT / "docs/quickstart.ipynb"
    stored = nbformat.read(path, 4)
    assert path.stat().st_size < 300_000
    assert not re.search(r"/(home|root|tmp|work|usr)/", path.read_text(encoding="utf-8"))
    run = nbformat.read(path, 4)
    nbclient.NotebookClient(run, timeout=500, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert (tmp_path / "quickstart/report.html").stat().st_size > 1_000_000
    shown, given = told_by(stored), told_by(run)
    number = r"\d+\.?\d*"
    assert [re.sub(number, "#", line) for line in given] == [re.sub(number, "#", line) for line in shown]
    for line, expected in zip(given, shown, strict=True):
        for one, other in zip(re.findall(number, line), re.findall(number, expected), strict=True):
            assert math.isclose(float(one), float(other), rel_tol=0.05, abs_tol=0.02), (line, expected)
