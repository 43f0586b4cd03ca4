"""How a script runs: it ends with one line and a status, whatever stops it. No torch here."""

from __future__ import annotations

import dis
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable


# Names of programs and modules that start the processes of a run.
_LAUNCHERS = {
    *("accelerate", "accelerate-launch", "accelerate.commands.launch"),
    *("torchrun", "torch.distributed.run", "torch.distributed.launch"),
}
# Seconds that a process without its launcher has for its own end; it may be waiting for another that is gone.
_PATIENCE = 30


class Stopped(KeyboardInterrupt):
    """Reports that a signal stops this process, as Ctrl-C does."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.number = number


def run_script(main: Callable[[], int], go_on: str = "") -> int:
    """
    Runs the main function of a script, and returns its exit status: its own; 1 for an error, whose message is the last
    line; 128 and the signal's number where SIGINT or SIGTERM stopped it, after one line. A second signal ends the
    process at once.

    A process of `accelerate launch` ends with its launcher, which may be killed without telling it.

    Args:
        main (callable): Without arguments.
        go_on (`str`): What a user does after a stop, for that line.
    """
    _follow_launcher()
    before = {number: signal.signal(number, _stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        return main()
    except Stopped as stop:
        _say(f"stopped by {stop}: what is finished is kept, nothing is half-written. {go_on}".rstrip())
        return 128 + stop.number
    except Exception as error:  # noqa: BLE001 (the last line is the message, of any error)
        text = str(error) or type(error).__name__
        if not _is_message(error):
            traceback.print_exc()
            text = f"{type(error).__name__}: {text}"
        _say(f"error: {text}")
        return 1
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _stop(number: int, _frame) -> None:
    for other in (signal.SIGINT, signal.SIGTERM):
        signal.signal(other, signal.SIG_DFL)
    raise Stopped(number)


def _is_message(error: Exception) -> bool:
    """Tells whether an error is a message to the user: raised by a statement of our code, or by the system (a disk is
    full, a file may not be read). Of any other one, where it happened may be of use."""
    if isinstance(error, OSError) and error.errno is not None:
        return True
    last = error.__traceback__
    while last.tb_next is not None:
        last = last.tb_next
    code, module = last.tb_frame.f_code.co_code, last.tb_frame.f_globals["__name__"]
    return module.split(".")[0] in ("anodiff", "__main__") and dis.opname[code[last.tb_lasti]] == "RAISE_VARARGS"


def _say(line: str) -> None:
    if "tqdm" in sys.modules:
        # A bar that is still open would share the line.
        for bar in list(getattr(sys.modules["tqdm"].tqdm, "_instances", ())):
            bar.close()
    sys.stdout.flush()
    print(line, file=sys.stderr, flush=True)


def _follow_launcher() -> None:
    import psutil

    launcher = os.getppid()
    try:
        names = {os.path.basename(word) for word in psutil.Process(launcher).cmdline()}
    except psutil.Error:
        return
    if names & _LAUNCHERS:
        threading.Thread(target=_leave_with, args=(launcher,), daemon=True).start()


def _leave_with(launcher: int) -> None:
    while os.getppid() == launcher:
        time.sleep(1)
    print("The launcher of this process is gone: it ends, too.", file=sys.stderr, flush=True)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_PATIENCE)
    os._exit(128 + signal.SIGTERM)
