"""A script ends with one line and a status, whatever stops it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest


# What the main function of a script does, and how the script ends: status, and all of stderr or its last line.
ENDINGS = {
    "return 0": (0, ""),
    "return 3": (3, ""),
    "raise ValueError('`size` must be 1, got 2.')": (1, "error: `size` must be 1, got 2.\n"),
    "open('missing')": (1, "error: [Errno 2] No such file or directory: 'missing'\n"),
    "raise SystemExit(2)": (2, ""),
}
FAULTS = {
    "[][1]": "error: IndexError: list index out of range",
    "int('x')": "error: ValueError: invalid literal for int() with base 10: 'x'",
    "json.loads('{')": "error: JSONDecodeError: ",
}


def run(statement: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run(**command(statement), capture_output=True, **options)


def command(statement: str) -> dict:
    script = (
        "import json, os, signal, sys, time\n"
        "from anodiff.running import run_script\n"
        f"def main():\n    {statement}\n"
        "sys.exit(run_script(main, 'Go on so.'))"
    )
    return {"args": [sys.executable, "-c", script], "text": True}


@pytest.mark.parametrize("statement", ENDINGS)
def test_messages_are_one_line(statement):
    done = run(statement)
    assert (done.returncode, done.stderr) == ENDINGS[statement]


@pytest.mark.parametrize("statement", FAULTS)
def test_faults_say_where_they_were_and_end_with_the_message(statement):
    done = run(statement)
    assert done.returncode == 1 and done.stderr.startswith("Traceback")
    assert done.stderr.splitlines()[-1].startswith(FAULTS[statement])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_end_a_script_with_one_line(number):
    with subprocess.Popen(**command("print(1, flush=True); time.sleep(60)"), stdout=-1, stderr=-1) as child:
        child.stdout.readline()
        child.send_signal(number)
        _, said = child.communicate()
    assert child.returncode == 128 + number
    assert said == f"stopped by {number.name}: what is finished is kept, nothing is half-written. Go on so.\n"


def test_a_second_signal_ends_at_once():
    stubborn = "\n    ".join(
        ["try:", "  print(1, flush=True); time.sleep(60)", "finally:", "  print(2, flush=True); time.sleep(60)"]
    )
    with subprocess.Popen(**command(stubborn), stdout=-1, stderr=-1) as child:
        for _ in range(2):
            child.stdout.readline()
            child.send_signal(signal.SIGTERM)
        assert child.wait() == -signal.SIGTERM


def test_a_process_ends_with_its_launcher(tmp_path):
    """accelerate starts the processes of a run; if it is killed, nobody tells them."""
    Path(tmp_path / "child.py").write_text(command("print(os.getpid(), flush=True); time.sleep(60)")["args"][2])
    launcher = tmp_path / "accelerate"
    launcher.write_text("import subprocess, sys; subprocess.run([sys.executable, 'child.py'])")
    with subprocess.Popen([sys.executable, launcher], cwd=tmp_path, text=True, stdout=-1, stderr=-1) as parent:
        child = int(parent.stdout.readline())
        parent.kill()
        _, said = parent.communicate()  # until the child closes its end
    assert said.startswith("The launcher of this process is gone: it ends, too.\nstopped by SIGTERM: ")
    for _ in range(100):
        try:
            os.kill(child, 0)
        except ProcessLookupError:
            break
        time.sleep(0.1)
    else:
        raise AssertionError("The child is still there.")


def test_a_process_outlives_a_shell(tmp_path):
    """`nohup python train.py &` in a script, whatever it is called, goes on when the script ends."""
    (tmp_path / "child.py").write_text(command("time.sleep(3)\n    open('done', 'w').close()")["args"][2])
    (tmp_path / "run_accelerate.sh").write_text(f"{sys.executable} child.py &\n")
    subprocess.run(["sh", "run_accelerate.sh"], cwd=tmp_path, check=True)
    for _ in range(200):
        if (tmp_path / "done").exists():
            return
        time.sleep(0.1)
    raise AssertionError("The child has ended.")
