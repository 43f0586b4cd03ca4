"""Scores models and baselines on a prepared data set under one protocol.

python eval.py --model outputs/train/pipeline
accelerate launch eval.py --model owner/one --model owner/two --data prepared/brats21 --split test
"""

from __future__ import annotations

import sys

from anodiff.configs import parse_options
from anodiff.evaluation.options import EvalOptions


def main(argv: list[str] | None = None) -> int:
    """Runs one evaluation; returns the exit status."""
    options = parse_options(EvalOptions, argv, prog="eval.py", description=__doc__, shorthands={"--model": "--model+"})
    from anodiff.evaluation.run import evaluate

    evaluate(options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
