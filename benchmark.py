"""Ranks methods on a prepared data set under one protocol; what has no checkpoint is trained first, within a budget.

python benchmark.py --data prepared/mine --dry_run                  # the plan, and nothing else
python benchmark.py --data prepared/mine --budget 2h
python benchmark.py --data prepared/mine --methods "[anoddpm,andi]" --model owner/one --budget 30m

The same command goes on after an interruption: what is finished is not done again.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass, field

from anodiff.configs import parse_options
from anodiff.running import run_script


# What a user does after a stop.
GO_ON = "The same command goes on."


@dataclass
class BenchmarkOptions:
    """One benchmark."""

    data: str = "phantom-mini"
    """Folder or Hub id of a prepared data set, or the name of a phantom."""
    methods: str = "all"
    """Methods that are trained on the data, separated by commas, or all that the data allow; names as of train.py."""
    budget: str = "2h"
    """Time of optimizer steps that all trainings share: 2h, 90m, 1h30m, 45s. The rest comes on top."""
    model: list[str] = field(default_factory=list)
    """Pipeline folder or Hub id to compare with; give the flag once per model. With `methods` all, its method is not
    trained."""
    split: str = "test"
    """Split that is scored."""
    output_dir: str = "outputs/benchmark"
    """Folder of everything; a benchmark in it goes on."""
    fast: bool = False
    """Evaluate with what is fastest on this device, as of eval.py."""
    launch: str = ""
    """Arguments of `accelerate launch`, such as "--multi_gpu --num_processes 4"; one process by default."""
    push_to_hub: str | None = None
    """User or organisation on the Hub: every pipeline that was trained here is pushed to OWNER/METHOD-DATA with its
    results in its card."""
    dry_run: bool = False
    """Print the plan and end."""


def main(argv: list[str] | None = None) -> int:
    """Runs a benchmark; returns 0, or 1 if a method failed or a model cannot be evaluated on the data."""
    options = parse_options(
        BenchmarkOptions, argv, prog="benchmark.py", description=__doc__, shorthands={"--model": "--model+"}
    )
    budget = read_duration(options.budget)

    from anodiff.checks import check_choice
    from anodiff.ranking.plan import RANKED

    methods = [name.strip() for name in options.methods.strip("[] ").split(",")]
    for name in methods:
        check_choice("methods", name, ("all", *RANKED))

    from anodiff.ranking.facts import describe_given, find_shipped, read_facts
    from anodiff.ranking.plan import make_plan
    from anodiff.ranking.table import print_plan

    facts = read_facts(options.data)
    check_choice("split", options.split, facts.splits)
    entries = make_plan(facts, methods, describe_given(options.model, facts), find_shipped(facts))
    print(print_plan(entries, budget, facts), flush=True)
    if options.dry_run:
        return 0

    from anodiff.ranking.run import run_benchmark

    return run_benchmark(options, budget, facts, entries)


def read_duration(text: str) -> float:
    """Returns the seconds of a duration such as 2h, 90m, 1h30m or 45s."""
    match = re.fullmatch(r"(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m)?(?:(\d+(?:\.\d+)?)s)?", text.strip())
    seconds = (
        sum(float(part or 0) * unit for part, unit in zip(match.groups(), (3600, 60, 1), strict=True)) if match else 0
    )
    if not seconds:
        raise ValueError(f"`budget` must be a time above 0 such as 2h, 90m, 1h30m or 45s, got {text!r}.")
    return seconds


if __name__ == "__main__":
    sys.exit(run_script(main, GO_ON))
