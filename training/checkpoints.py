"""Folders of checkpoints: which of them are a run's own and whole, and what is set aside when one is gone on from."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
from pathlib import Path

from ..files import read_json, replacing, sync_folder
from .options import LoopOptions


RECORD = "training.json"
_NAME = re.compile(r"step-([0-9]{7,})")
# What accelerate writes into every checkpoint; earlier versions of this library wrote no record beside it.
_STATE = ("optimizer.bin", "custom_checkpoint_0.pkl", "custom_checkpoint_1.pkl", "random_states_0.pkl")


def checkpoint_folder(output_dir: Path, step: int) -> Path:
    """Returns the folder of the checkpoint of a step."""
    return output_dir / "checkpoints" / f"step-{step:07d}"


def list_checkpoints(output_dir: Path) -> list[Path]:
    """Returns the checkpoints that runs wrote into a folder and that are whole, by rising step. A copy, or whatever
    else has another name than a run gives, is the user's and not among them."""
    return [path for path in _named(output_dir) if find_damage(path) is None]


def list_damaged(output_dir: Path) -> list[str]:
    """Returns, as text, what is called like a checkpoint of a run but is none that can be gone on from, and why."""
    damage = {path: find_damage(path) for path in _named(output_dir)}
    return [f"{path} ({reason})" for path, reason in damage.items() if reason is not None]


def find_damage(checkpoint: Path) -> str | None:
    """Finds what a checkpoint lacks, by the record that was written into it last: its files and their sizes. `None` if
    it is whole."""
    if not checkpoint.is_dir():
        return "it is no folder"
    files = dict.fromkeys(_STATE)
    record = checkpoint / RECORD
    if record.exists():
        try:
            values = read_json(record)
            files, step = dict(values["files"]), int(values["step"])
        except (ValueError, KeyError, TypeError):
            return f"{RECORD} is damaged"
        if step != _step_of(checkpoint.name, step):
            return f"it is of step {step}"
    for name, size in files.items():
        if not (checkpoint / name).is_file():
            return f"{name} is missing"
        if size is not None and (checkpoint / name).stat().st_size != size:
            return f"{name} has {(checkpoint / name).stat().st_size} bytes instead of {size}"
    return None


def find_checkpoint(loop: LoopOptions) -> Path | None:
    """Finds the checkpoint that `train.resume` names, a folder, `latest` or `auto`; `None` for a new run, which must
    not mix with an earlier one."""
    output_dir = Path(loop.output_dir)
    checkpoints = list_checkpoints(output_dir)
    if not loop.resume:
        if checkpoints:
            raise FileExistsError(
                f"{loop.output_dir} holds checkpoints of an earlier run. Go on with `--train.resume latest`, or"
                " choose another `--train.output_dir`."
            )
        return None
    if loop.resume in ("latest", "auto"):
        damaged = "" if checkpoints else ", ".join(list_damaged(output_dir))
        if not checkpoints and (damaged or loop.resume == "latest"):
            raise FileNotFoundError(
                f"`train.resume` is {loop.resume}, but {loop.output_dir}/checkpoints holds no checkpoint"
                f"{f' that is whole: {damaged}' if damaged else ''}."
            )
        return checkpoints[-1] if checkpoints else None
    checkpoint = Path(loop.resume)
    if not checkpoint.is_dir():
        raise FileNotFoundError(f"`train.resume`: there is no checkpoint folder {loop.resume}.")
    damage = find_damage(checkpoint)
    if damage is not None:
        raise ValueError(f"`train.resume`: {loop.resume} is no whole checkpoint: {damage}.")
    if checkpoints and not lies_in(checkpoint, output_dir):
        raise FileExistsError(
            f"`train.resume`: {loop.resume} does not lie in {loop.output_dir}/checkpoints, which holds others. Choose"
            " another `--train.output_dir`, or copy it there under a name of your own."
        )
    return checkpoint


def lies_in(checkpoint: Path, output_dir: Path) -> bool:
    """Tells whether a checkpoint lies among those of a run, under whatever name."""
    return checkpoint.absolute().parent.resolve() == (output_dir / "checkpoints").resolve()


def finish_checkpoint(unfinished: Path, target: Path, record: dict) -> None:
    """Gives a checkpoint that is written its record and, once all of it is on the disk, its name. What has that name
    is set aside."""
    files = {path.name: path.stat().st_size for path in sorted(unfinished.iterdir())}
    (unfinished / RECORD).write_bytes(json.dumps({**record, "files": files}, indent=2).encode())
    for path in unfinished.iterdir():
        with open(path, "rb+") as file:
            os.fsync(file.fileno())
    sync_folder(unfinished)
    if os.path.lexists(target):
        place = make_place(target.parents[1], f"instead-of-{target.name}")
        shutil.move(target, place)
        print(f"{target} is no checkpoint of this run: it was moved to {place}.")
    os.replace(unfinished, target)
    sync_folder(target.parent)


def remove_checkpoint(checkpoint: Path) -> None:
    """Removes a checkpoint, whose name is gone before its files are."""
    going = unfinished_name(checkpoint)
    shutil.rmtree(going, ignore_errors=True)
    checkpoint.rename(going)
    shutil.rmtree(going)


def unfinished_name(path: Path) -> Path:
    """Returns the hidden name beside `path` of a folder that is being made, or removed."""
    return path.with_name(f".partial.{path.name}")


def remove_leftovers(output_dir: Path) -> None:
    """Removes unfinished checkpoints of killed runs. For whoever holds the folder."""
    for path in (output_dir / "checkpoints").glob(".partial.step-*"):
        if _NAME.fullmatch(path.name.removeprefix(".partial.")):
            shutil.rmtree(path)


def make_place(output_dir: Path, name: str) -> Path:
    """Makes a new folder for what is set aside, which nothing here ever removes, and returns it."""
    for number in itertools.count(1):
        place = output_dir / "set-aside" / (name if number == 1 else f"{name}-{number}")
        if not os.path.lexists(place):
            place.mkdir(parents=True)
            return place


def set_aside(output_dir: Path, step: int) -> Path | None:
    """
    Moves what a run wrote behind a step, where it is about to go another way, into a folder of its own: checkpoints,
    pictures, and lines of `log.jsonl`, a torn one included. Returns the folder, `None` if nothing lay there.
    """
    log = output_dir / "log.jsonl"
    lines = log.read_bytes().splitlines() if log.exists() else []
    kept = [line for line in lines if _step_of_line(line) <= step]
    behind = [line for line in lines if _step_of_line(line) > step]
    moved = [path for path in _named(output_dir) if _step_of(path.name) > step]
    moved += [path for path in (output_dir / "samples").glob("step-*.png") if _step_of(path.stem, step) > step]
    place = make_place(output_dir, f"after-step-{step:07d}") if behind or moved else None
    for path in reversed(moved):
        (place / path.parent.name).mkdir(exist_ok=True)
        shutil.move(path, place / path.parent.name)
    if behind:
        (place / log.name).write_bytes(b"".join(line + b"\n" for line in behind))
    text = b"".join(line + b"\n" for line in kept)
    # The end of a last line may be missing, too.
    if log.exists() and log.read_bytes() != text:
        with replacing(log) as unfinished:
            unfinished.write_bytes(text)
    return place


def _named(output_dir: Path) -> list[Path]:
    """Whatever has exactly a name that a run gives, by rising step."""
    paths = (output_dir / "checkpoints").glob("step-*")
    return sorted((path for path in paths if _step_of(path.name, -1) >= 0), key=lambda path: _step_of(path.name))


def _step_of(name: str, default: int = 0) -> int:
    match = _NAME.fullmatch(name)
    return int(match[1]) if match and name == f"step-{int(match[1]):07d}" else default


def _step_of_line(line: bytes) -> float:
    """The step of a line of `log.jsonl`; infinity for one that is torn."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")
