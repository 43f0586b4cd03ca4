"""How files are read and written: text is UTF-8, what replaces a file replaces it whole or not at all, a name is no
path, and a folder belongs to one run at a time. No torch here."""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import filelock


_LOCK, _HOLDER = ".run.lock", ".run.json"
# Bytes that file systems allow for a name, less what suffixes and the names of unfinished files add.
_LONGEST_NAME = 200


def read_text(path: str | os.PathLike) -> str:
    """Reads a text file, whatever the locale; raises a `ValueError` that names the line if it is not UTF-8."""
    content = Path(path).read_bytes()
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{path}, line {line}: byte 0x{content[error.start]:02x} is not UTF-8. Text files must be UTF-8: save the"
            f" file in that encoding, or convert it: iconv -f latin1 -t utf-8 {Path(path).name}."
        ) from None


def read_json(path: str | os.PathLike):
    """Reads a JSON file; raises a `ValueError` that names the file and line if it is none."""
    try:
        return json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path}, line {error.lineno}: the file is no JSON, it may be truncated or damaged: {error.msg}."
        ) from None


def write_text(path: str | os.PathLike, text: str) -> None:
    """Writes a text file in UTF-8, whole or not at all ([`replacing`])."""
    with replacing(path) as unfinished:
        unfinished.write_bytes(text.encode("utf-8"))


def write_json(path: str | os.PathLike, values) -> None:
    """Writes values as a JSON file, whole or not at all; NaN and infinity, which JSON has not, are a `ValueError`."""
    write_text(path, json.dumps(values, indent=2, allow_nan=False) + "\n")


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """
    Gives the path of an unfinished file beside `path`, hidden and with the same suffix, to be written in the block.

    At the end of the block it is on the disk and takes the place of `path` in one step: whoever reads `path`, at any
    time and after any interruption, finds the old content or the new one. If the block raises, `path` stays as it is.
    """
    path = Path(path)
    unfinished = path.with_name(f".{secrets.token_hex(4)}.partial.{path.name}")
    try:
        yield unfinished
        with open(unfinished, "rb+") as file:
            os.fsync(file.fileno())
        with suppress(OSError):  # there is none, or the file system has no modes
            shutil.copymode(path, unfinished)
        os.replace(unfinished, path)
        sync_folder(path.parent)
    finally:
        with suppress(FileNotFoundError):
            unfinished.unlink()


@contextmanager
def making_folder(folder: str | os.PathLike) -> Iterator[Path]:
    """
    Gives a folder to be filled in the block, which becomes `folder` at its end, as a whole. It is in `.NAME.partial`
    beside `folder`, which one run at a time may hold; what is left there by a run that was killed is removed.
    """
    folder = Path(folder)
    partial = folder.with_name(f".{folder.name}.partial")
    with lock_folder(partial):
        unfinished = partial / folder.name
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir()
        try:
            yield unfinished
            rename_folder(unfinished, folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def rename_folder(unfinished: Path, folder: Path) -> None:
    """Gives a finished folder its name, on the same disk, in one step, when all that it holds is on the disk."""
    for path in (*unfinished.rglob("*"), unfinished):
        sync_folder(path)  # files as well
    unfinished.rename(folder)
    sync_folder(folder.parent)


def sha256(path: str | os.PathLike) -> str:
    """Returns the SHA-256 of a file's content, in hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def sync_folder(folder: str | os.PathLike) -> None:
    """Makes sure that the names in a folder are on the disk, where the system can."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def remove_unfinished(folder: str | os.PathLike) -> None:
    """Removes the unfinished files that killed runs left in a folder ([`replacing`]). For whoever holds the folder."""
    for path in Path(folder).glob(".*.partial.*"):
        if re.fullmatch(r"\.[0-9a-f]{8}\.partial\..+", path.name) and path.is_file():
            path.unlink(missing_ok=True)


def check_name(what: str, name: str) -> None:
    """
    Raises a `ValueError` unless `name` may become the name of a file or folder below another one. It may have several
    parts, `group/one`; it may not be absolute, lead upwards, or hold what file systems do not take.

    Args:
        what (`str`): What it is the name of, for the message: `"a subject in FILE"`.
        name (`str`): The name.
    """
    parts = name.split("/") if isinstance(name, str) else [""]
    if any(part in ("", ".", "..") for part in parts):
        reason = "it is empty, absolute, or leads out of its folder"
    elif re.search(r"[\x00-\x1f\x7f\\\ud800-\udfff]", name):
        reason = "it holds a backslash, a control character, or bytes that are not UTF-8"
    elif max(len(part.encode("utf-8", "replace")) for part in parts) > _LONGEST_NAME:
        reason = f"a part of it is longer than {_LONGEST_NAME} bytes"
    else:
        return
    raise ValueError(f"The name of {what} must be one that a file can have, got {str(name)[:300]!r}: {reason}.")


@contextmanager
def lock_folder(folder: str | os.PathLike) -> Iterator[None]:
    """
    Holds a folder, which is made if it is missing, for one run, and removes unfinished files that earlier ones left.

    The lock is the system's, on the file `.run.lock`, and ends with the process, however it ends; `.run.json` says who
    holds it. So the record of a run that was killed never keeps anybody out.

    Raises:
        BlockingIOError: Another run holds the folder; the message says which, since when, and on which computer.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    lock, holder = filelock.FileLock(folder / _LOCK), folder / _HOLDER
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        who = "another run"
        with suppress(OSError, ValueError, KeyError):
            record = read_json(holder)
            who = "process {process} on {host}, since {since} (UTC)".format(**record)
        raise BlockingIOError(
            f"{folder} is in use by {who}. Wait until that run ends, stop it, or choose another folder."
        ) from None
    try:
        remove_unfinished(folder)
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime())
        write_json(holder, {"process": os.getpid(), "host": socket.gethostname(), "since": since})
        yield
    finally:
        holder.unlink(missing_ok=True)
        lock.release()
