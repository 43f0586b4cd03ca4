"""The documents name what there is, and all of it."""

import importlib
import re
from pathlib import Path

import pytest

import anodiff
from anodiff.train import OBJECTIVES


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
        *"convert data evaluation hub models pipelines schedulers training volumes tests benchmarks configs".split(),
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
    "locals",
    "push_to_hub",
    "roc_curve",
}


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
        assert "NAME" in name or (ROOT / name).exists(), f"{page.name} names {name}"
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


def test_every_setting_is_in_the_table_of_options():
    text = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    table = text[text.index("## Where each option is") :].split("\n\n")[1]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]
    block, keys = "", {}
    for row in rows:
        block = row[0].strip("`") or block
        for method in re.findall(r"`(\w+)`", row[1]) if row[1] != "all" else OBJECTIVES:
            keys.setdefault((block, method), set()).update(re.findall(r"`(\w+)`", row[2]))
    for method in OBJECTIVES:
        named = keys.get(("objective", method), set())
        assert set(objective(method).objective_keys) <= named or any(
            f"as `{other}`" in row[2] for row in rows for other in OBJECTIVES
        ), f"objective of {method}: {set(objective(method).objective_keys) - named}"
