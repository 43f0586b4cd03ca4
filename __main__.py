"""The console command `anodiff`: the scripts' own mains."""

from __future__ import annotations

import importlib
import sys
from functools import partial
from types import ModuleType

from anodiff.configs.completion import write_completion
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
    "completion": "what a shell completes these commands with",
}


def main(argv: list[str] | None = None) -> int:
    """Runs a sub-command; returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] == "completion":
        return run_script(lambda: print_completion(argv[1:]))
    if argv and argv[0] in COMMANDS:
        script = find_script(argv[0])
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


def find_script(command: str) -> ModuleType:
    """Imports the script of a sub-command."""
    # `anodiff.models` is the package of networks.
    return importlib.import_module(f"anodiff.{'list_models' if command == 'models' else command}")


def print_completion(argv: list[str]) -> int:
    """Prints the script of a shell; returns 0."""
    import jsonargparse

    parser = jsonargparse.ArgumentParser(
        prog="anodiff completion",
        description="Prints the script by which a shell completes commands, options and files. For the bash that is"
        " running: source <(anodiff completion bash)",
    )
    parser.add_argument("shell", choices=("bash", "zsh", "fish", "tcsh"))
    shell = parser.parse_args(argv).shell
    mains = {name: print_completion if name == "completion" else find_script(name).main for name in COMMANDS}
    commands = {name: (COMMANDS[name], partial(main, [])) for name, main in mains.items()}
    print(write_completion(shell, "anodiff", commands))
    return 0


if __name__ == "__main__":
    sys.exit(main())
