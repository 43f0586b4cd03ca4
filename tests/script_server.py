"""Runs scripts in processes of their own which do not import everything anew, ten seconds for each: a server has
imported it, and every script is a fork of it.

As programs, `script_server.py serve FOLDER MODULE...` is the server at the socket of a folder, and `script_server.py
ask FOLDER [-u] FILE ...` runs a script with its own folder, variables, outputs and signals: a launcher takes it for
Python. Scripts whose start or end is tested are ordinary processes; on systems other than Linux all are.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import runpy
import select
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
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
    """Runs a command of Python, `[FILE, ...]` or `["-c", CODE, ...]`, in a folder, and returns what `subprocess.run`
    does with `capture_output` and `text`."""
    command = [str(word) for word in command]
    if sys.platform != "linux":
        options = {"cwd": folder, "env": environment, "text": True, "capture_output": True}
        return subprocess.run([sys.executable, *command], **options)
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as error:
        status = ask(_find_server(environment), command, folder, environment, [out.fileno(), error.fileno()])
        texts = [file.seek(0) or file.read() for file in (out, error)]
    return subprocess.CompletedProcess(command, status, *texts)


def find_python(environment: dict[str, str]) -> str:
    """Returns the program that a launcher is to start with these variables instead of Python."""
    return str(_find_server(environment) / "python") if sys.platform == "linux" else sys.executable


def _find_server(environment: dict[str, str]) -> Path:
    """Returns the folder of a server for scripts with these variables; it holds `socket` and the program `python`."""
    hub = {name: value for name, value in environment.items() if name.startswith("HF_")}
    # Libraries read these when they are imported; every Hub of a test has another address.
    near = "HF_ENDPOINT" in hub
    return _start(INDEPENDENT if near else EVERYTHING, frozenset() if near else frozenset(hub.items()))


@cache
def _start(modules: Sequence[str], variables: frozenset[tuple[str, str]]) -> Path:
    """Starts a server, which ends with this process."""
    folder = tempfile.TemporaryDirectory(prefix="anodiff-server-")
    atexit.register(folder.cleanup)
    program = Path(folder.name, "python")
    asks = shlex.join([sys.executable, "-S", __file__, "ask", folder.name])
    program.write_text(f'#!/bin/sh\nexec {asks} "$@"\n')
    program.chmod(0o700)
    command = [sys.executable, __file__, "serve", folder.name, *modules]
    # It ends when its standard input does, so with this process, however that ends.
    environment = {**os.environ, **dict(variables)}
    server = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, start_new_session=True)
    atexit.register(server.stdin.close)
    while not program.with_name("socket").exists():
        assert server.poll() is None, "the server of scripts could not start: see above"
        time.sleep(0.02)
    return program.parent


def ask(server: Path, command: list[str], folder: str | Path, environment: dict[str, str], outputs: list[int]) -> int:
    """Has a server run a command with two outputs; returns its exit status. SIGINT and SIGTERM
    of the program `ask` are passed on to it."""
    asked = {"command": command, "folder": str(folder), "environment": environment}
    with socket.socket(socket.AF_UNIX) as connection, connection.makefile("r") as answers:
        connection.connect(str(server / "socket"))
        socket.send_fds(connection, [b"?"], outputs)
        connection.sendall(json.dumps(asked).encode() + b"\n")
        script = int(answers.readline())
        if __name__ == "__main__":
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, lambda number, _: os.kill(script, number))
        return int(answers.readline())


def serve(folder: Path) -> None:
    """Answers connections, each in a fork: the number of the process of the script, then its exit status."""
    gc.freeze()  # a collection of a fork would look at all that was imported, and copy it
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(folder / "socket.new"))
        listener.listen()
        os.rename(folder / "socket.new", folder / "socket")
        while sys.stdin not in select.select([listener, sys.stdin], [], [])[0]:
            connection = listener.accept()[0]
            if not os.fork():
                listener.close()
                return keep(connection)
            connection.close()
            while _ended():
                pass


def _ended() -> bool:
    try:
        return os.waitpid(-1, os.WNOHANG)[0] > 0
    except ChildProcessError:
        return False


def keep(connection: socket.socket) -> None:
    """Runs the script of a connection in a fork, and kills it if whoever asked is gone."""
    _, outputs, _, _ = socket.recv_fds(connection, 1, 2)
    with connection.makefile("r") as lines:
        asked = json.loads(lines.readline())
    script = os.fork()
    if not script:
        connection.close()
        return become(**asked, outputs=outputs)
    connection.sendall(b"%d\n" % script)
    ended = 0
    while not ended:
        ended, status = os.waitpid(script, os.WNOHANG)
        if select.select([connection], [], [], 0.02)[0]:
            os.kill(script, signal.SIGKILL)
            os._exit(1)
    connection.sendall(b"%d\n" % os.waitstatus_to_exitcode(status))
    os._exit(0)


def become(command: list[str], folder: str, environment: dict[str, str], outputs: list[int]) -> None:
    """Makes this process that of a script."""
    os.setsid()
    for number, output in enumerate([os.open(os.devnull, os.O_RDONLY), *outputs]):
        os.dup2(output, number)
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
    role, place, *words = sys.argv[1:]
    if role == "ask":
        words = words[words[0] == "-u" :]
        sys.exit(ask(Path(place), words, os.getcwd(), dict(os.environ), [1, 2]))
    for module in words:
        importlib.import_module(module)
    serve(Path(place))
