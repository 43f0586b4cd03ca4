"""The console command `anodiff`: the scripts' own mains."""

from __future__ import annotations

import importlib
import sys

from anodiff.running import run_script


COMMANDS = {
    "preprocess": "raw data set -> prepared data set",
    "train": "fit one method",
    "eval": "score methods under one protocol",
    "benchmark": "rank methods on a prepared data set",
    "predict": "maps for new scans",
    "bids": "maps of a BIDS data set, as derivatives",
    "models": "checkpoints that come with the package",
    "strip": "scans without their skull",
    "app": "maps of uploaded scans, in a browser",
    "explore": "noise of diffusion models, in a browser",
    "export": "networks of a checkpoint as ONNX, for other programs",
    "convert": "checkpoint of an original program -> pipeline folder",
}


def main(argv: list[str] | None = None) -> int:
    """Runs a sub-command; returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] in COMMANDS:
        # `anodiff.models` is the package of networks.
        name = "list_models" if argv[0] == "models" else argv[0]
        script = importlib.import_module(f"anodiff.{name}")
        return run_script(lambda: script.main(argv[1:]), script.GO_ON)
    usage = "\n".join(
        [
            "usage: anodiff COMMAND [...]",
            "",
            "HuggingFace-style pipelines that find anomalies in medical images with diffusion models.",
            "Research use, not a medical device.",
            "",
            "commands (anodiff COMMAND --help):",
            *(f"  {name:<12}{purpose}" for name, purpose in COMMANDS.items()),
        ]
    )
    if argv in (["--help"], ["-h"]):
        print(usage)
        return 0
    wrong = f"unknown command {argv[0]!r}" if argv else "a command is missing"
    print(f"{usage}\n\nerror: {wrong}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
