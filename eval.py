"""Scores models and baselines on a prepared data set under one protocol.

python eval.py --model outputs/train/pipeline
accelerate launch eval.py --model owner/one --model owner/two --data prepared/brats21 --split test
python eval.py --model owner/one --data prepared/brats21 --push_to_hub owner/one    # results into its card
python eval.py --model outputs/train/pipeline --data prepared/brats21 --calibrate labels    # thresholds, stored
python eval.py --model outputs/cimd/pipeline --data phantom-raters --inference.num_ensemble 8    # masks of raters
"""

from __future__ import annotations

import sys

from anodiff.configs import parse_options
from anodiff.evaluation.options import EvalOptions
from anodiff.running import run_script


# What a user does after a stop.
GO_ON = "The same command begins anew."


def main(argv: list[str] | None = None) -> int:
    """Runs one evaluation; returns the exit status."""
    several = {"--model": "--model+", "--merge": "--merge+"}
    options = parse_options(EvalOptions, argv, prog="eval.py", description=__doc__, shorthands=several)
    from anodiff.evaluation.run import evaluate

    evaluate(options)
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main, GO_ON))
