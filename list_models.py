"""Lists the checkpoints that come with the package, or prints the card of one.

anodiff models
anodiff models anoddpm-flair
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field

from anodiff.configs import parse_options
from anodiff.running import run_script


# What a user does after a stop.
GO_ON = ""


@dataclass
class ModelsOptions:
    """[NAME]."""

    names: list[str] = field(default_factory=list)


def main(argv: list[str] | None = None) -> int:
    """Prints the table, or the cards of those that are named; returns 0."""
    options = parse_options(ModelsOptions, argv, prog="models", description=__doc__, positional="names")

    from anodiff.checks import check_choice
    from anodiff.files import read_text
    from anodiff.hub import shipped

    records = shipped.list_shipped()
    for name in options.names:
        check_choice("NAME", name, records)
    for name in options.names:
        print(read_text(shipped.SHIPPED / name / "README.md"))
    if options.names:
        return 0
    if not records:
        raise FileNotFoundError(f"This installation has no checkpoints: there are none in {shipped.SHIPPED}.")
    for name, record in records.items():
        size = sum(path.stat().st_size for path in (shipped.SHIPPED / name).rglob("*") if path.is_file())
        shared = [f"{component} of {owner}" for component, owner in record["shares"].items()]
        modality = "any contrast" if record["modality"] in shipped.ANY else record["modality"] or "component"
        facts = [record["method"], modality, f"{size / 1e6:.2f} MB" + (f" and {', '.join(shared)}" if shared else "")]
        print(f"{name}: {record['purpose']}")
        print(f"    {'; '.join(facts)}{'; default' if record['default'] else ''}")
        for figure in record["figures"]:
            print(f"    {describe(figure)}")
    print("\nResearch use, not a medical device. `anodiff models NAME` prints the card; `--model NAME` takes one.")
    return 0


def describe(figure: dict) -> str:
    """Returns figures in one line: the data, and the metrics of each row."""
    from anodiff.hub.shipped import THIS, describe_metrics

    rows = []
    for name, metrics in figure["rows"].items():
        texts = ", ".join(f"{metric} {text}" for metric, text in describe_metrics(metrics).items())
        rows.append(texts if name == THIS else f"{name}: {texts}")
    return f"{figure['data']}: {'; '.join(rows)}"


if __name__ == "__main__":
    sys.exit(run_script(main, GO_ON))
