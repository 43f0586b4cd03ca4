"""Anomaly maps of a BIDS data set, as a BIDS App: derivatives in a data set of their own.

anodiff bids data out participant                               # scans of the one modality that the data set has
anodiff bids data out participant --modality flair              # with the checkpoint of this package for FLAIR
anodiff bids data out participant --participant_label 01 02 --model owner/two-modalities
anodiff bids data out participant --brain data/derivatives/masks --skip_existing
anodiff bids data out group                                     # cohort.tsv and report.html of what was made

Several of these may run at once on different participants or sessions with one folder of results. What is not predicted
is named with the reason, and the status is then 1.
Research use, not a medical device.
"""

from __future__ import annotations

import sys
from pathlib import Path

from anodiff.checks import check_choice
from anodiff.cohorts.options import BidsOptions
from anodiff.configs import parse_options
from anodiff.running import run_script


# What a user does after a stop.
GO_ON = "Scans that are done keep their results; the same command with `--skip_existing` goes on with the others."


def main(argv: list[str] | None = None) -> int:
    """Makes the maps of participants, or the table of a group; returns 0, or 1 if a scan has none."""
    options = parse_options(
        BidsOptions,
        argv,
        prog="bids.py",
        description=__doc__,
        positional="places",
        lists=("participant_label", "session_label", "run_label", "acquisition_label"),
    )
    if len(options.places) != 3:
        given = " ".join(options.places) or "nothing"
        raise ValueError(f"BIDS_DIR, OUT, and participant or group are needed, in this order and first, got {given}.")
    root, out, level = options.places
    check_choice("level", level, ("participant", "group"))
    options.check(level)
    from anodiff.cohorts.bids import run_group, run_participants

    failed = (run_participants if level == "participant" else run_group)(Path(root), Path(out), options)
    for name, reason in failed:
        print(f"FAILED {name}: {reason}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(run_script(main, GO_ON))
