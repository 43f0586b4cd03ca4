"""Runs scripts in processes of their own which do not import everything anew, ten seconds for each: a server has imported
it, and every script is a fork of it.

Scripts that a launcher starts, and those whose start is tested, are ordinary processes.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path


# Those do not ask for variables of the Hub when they are imported.
INDEPENDENT = (
    *("torch", "torch._dynamo", "torch.distributed.fsdp", "torch.export", "torch.utils.data"),
    *("scipy.ndimage", "scipy.optimize", "scipy.stats", "skimage.measure", "pandas", "sympy"),
    *("jsonargparse", "nibabel", "PIL.Image", "psutil", "tqdm", "yaml"),
)
EVERYTHING = (
    *INDEPENDENT,
    *("datasets", "anodiff.eval", "anodiff.predict", "anodiff.preprocess", "anodiff.train", "anodiff.training.loop"),
    *("anodiff.training.objective_noise", "anodiff.evaluation.run"),
)


def run_python(
    command: Sequence[str | Path], folder: str | Path, environment: dict[str, str]
) -> subprocess.CompletedProcess:
    """Runs a command of Python, `[FILE, ...]` or `["-c", CODE, ...]`, in a folder, and returns what `subprocess.run` does
    with `capture_output` and `text`."""
    hub = {name: value for name, value in environment.items() if name.startswith("HF_")}
    # Libraries read these when they are imported; every Hub of a test has another address.
    near = "HF_ENDPOINT" in hub
    server = _server(INDEPENDENT if near else EVERYTHING, frozenset() if near else frozenset(hub.items()))
    with tempfile.TemporaryDirectory() as outputs:
        files = [os.path.join(outputs, name) for name in ("stdout", "stderr")]
        command = [str(word) for word in command]
        asked = {"command": command, "folder": str(folder), "environment": environment, "files": files}
        print(json.dumps(asked), file=server.stdin, flush=True)
        status = int(server.stdout.readline())
        texts = [Path(file).read_text() for file in files]
    return subprocess.CompletedProcess(command, status, *texts)


@cache
def _server(modules: Sequence[str], variables: frozenset[tuple[str, str]]) -> subprocess.Popen:
    """A server, which ends with this process."""
    command = [sys.executable, __file__, *modules]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env={**os.environ, **dict(variables)}, start_new_session=True, **pipes)


def serve() -> None:
    """Answers a line of standard input, one command, with its exit status."""
    gc.freeze()  # a collection of a fork would look at all that was imported, and copy it
    for line in sys.stdin:
        asked = json.loads(line)
        child = os.fork()
        if not child:
            return become(**asked)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def become(command: list[str], folder: str, environment: dict[str, str], files: list[str]) -> None:
    """Makes this process that of a command."""
    os.setsid()
    for number, file in enumerate([os.devnull, *files]):
        os.dup2(os.open(file, os.O_RDWR | os.O_CREAT), number)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    tempfile.tempdir = None  # `TMPDIR` was read
    if command[0] == "-c":
        sys.argv, sys.path[0] = ["-c", *command[2:]], ""
        exec(compile(command[1], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv, sys.path[0] = command, os.path.dirname(command[0])
        runpy.run_path(command[0], run_name="__main__")


if __name__ == "__main__":
    for module in sys.argv[1:]:
        importlib.import_module(module)
    serve()
