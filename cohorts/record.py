"""The record of a command, `run.json`: what was asked for, with which versions and on what, of which files, and how far
it is. No torch here."""

from __future__ import annotations

import dataclasses
import os
import platform
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import psutil

from .. import __version__
from ..files import read_json, write_json
from ..hub.configuration import plain
from .options import PredictOptions


_LIBRARIES = ("torch", "diffusers", "accelerate", "numpy", "nibabel")


def record_path(options: PredictOptions) -> Path:
    """Returns where the record of a command goes: `run.json`, or `run_2-of-8.json` of a part."""
    number, count = options.part()
    return Path(options.output) / ("run.json" if options.shard is None else f"run_{number}-of-{count}.json")


def check_record(path: Path) -> None:
    """Raises a `FileExistsError` if there is a file at a path that is no record of a command."""
    if os.path.lexists(path) and not _is_record(path):
        raise FileExistsError(
            f"{path} is no record of this command: it is not replaced. Move it away, or choose another folder for the"
            " results."
        )


def begin_record(
    path: Path,
    arguments: list[str],
    options: PredictOptions,
    checkpoint: dict,
    settings: dict,
    hardware: dict,
    counts: dict,
) -> str:
    """
    Writes the record of a command that begins. That of an earlier one, which may still be running, is kept beside it,
    with its time in the name. The caller holds the tables.

    Args:
        path (`Path`): As of [`record_path`].
        arguments (`list[str]`): As the user typed them.
        options ([`PredictOptions`]): What they mean.
        checkpoint (`dict`): Its name and revision.
        settings (`dict`): The inference values.
        hardware (`dict`): The device, and in how many processes.
        counts (`dict`): Of scans, by what becomes of them.

    Returns:
        when it began, by which the other functions know it.
    """
    if path.exists():
        path.rename(_earlier(path, read_json(path)["started"]))
    started = datetime.now(UTC).isoformat()
    options = dataclasses.asdict(options)
    del options["scans"]  # the command names them
    record = {
        "command": ["anodiff", "predict", *arguments],
        "anodiff": __version__,
        "versions": {"python": platform.python_version(), **{name: version(name) for name in _LIBRARIES}},
        **checkpoint,
        "options": options,
        "settings": plain(settings),
        "hardware": {
            **hardware,
            "processor": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        },
        "started": started,
        "ended": None,
        "status": None,
        "scans": counts,
        "inputs": {},
    }
    write_json(path, record)
    return started


def update_record(path: Path, started: str, done: int, failed: int, inputs: dict[str, dict[str, str]]) -> None:
    """Adds scans that are done or have failed to the record, and the SHA-256 of their files, by scan and path. The
    caller holds the tables."""
    path = _find(path, started)
    record = read_json(path)
    record["scans"]["done"] += done
    record["scans"]["failed"] += failed
    record["inputs"] = dict(sorted((record["inputs"] | inputs).items()))
    write_json(path, record)


def end_record(path: Path, started: str, status: int) -> None:
    """Notes the end of a command, and its exit status. The caller holds the tables."""
    path = _find(path, started)
    write_json(path, read_json(path) | {"ended": datetime.now(UTC).isoformat(), "status": status})


def _earlier(path: Path, started: str) -> Path:
    return path.with_name(f"{path.stem}_{started.replace(':', '').removesuffix('+0000')}.json")


def _find(path: Path, started: str) -> Path:
    """Returns where the record of a command is, which another one may have put aside."""
    return path if read_json(path)["started"] == started else _earlier(path, started)


def _is_record(path: Path) -> bool:
    try:
        record = read_json(path)
    except (OSError, ValueError):
        return False
    return isinstance(record, dict) and {"command", "started", "inputs"} <= record.keys()
