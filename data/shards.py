"""Writes the rows of prepared data sets: a piece per finished subject, by the workers of a Dask cluster where that is
wanted, then Parquet shards of all pieces.

A piece is an Arrow file with the rows of one subject; its row of `subjects.parquet` travels in the header. Its name is
made of all that it depends on, so a second run finds what a first one finished, and nothing that has changed since.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import multiprocessing.spawn
import os
import shutil
import signal
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from multiprocessing import resource_tracker
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from datasets.features.features import numpy_to_pyarrow_listarray

from ..files import replacing, write_text
from .readers.subjects import Subject


# The modules that produce prepared data, phantoms included, from the package's root. A test finds one that is missing.
PRODUCERS = (
    *("volumes/dicom.py", "volumes/geometry.py", "volumes/processor.py", "volumes/results.py", "volumes/scans.py"),
    "volumes/volume.py",
    *("data/correction.py", "data/layout.py", "data/prepare.py", "data/raters.py", "data/rules.py", "data/shards.py"),
    *("data/participants.py", "data/slicing.py", "data/smooth_fields.py"),
    *("data/readers/arrays.py", "data/readers/files.py", "data/readers/listing.py", "data/readers/subjects.py"),
    *("data/phantoms/brains.py", "data/phantoms/head_draws.py", "data/phantoms/head_files.py"),
    *("data/phantoms/head_maps.py", "data/phantoms/head_painting.py", "data/phantoms/head_splines.py"),
    *("data/phantoms/heads.py", "data/phantoms/label_maps.py", "data/phantoms/nodules.py", "data/phantoms/sets.py"),
    *("schedulers/devices.py", "schedulers/draws.py", "schedulers/draws_triton.py"),
)

_ROW_GROUP = 128  # rows that streaming reads at a time
_HEADER = b"anodiff"
_MARKER = "UNFINISHED.txt"
_MARKER_TEXT = "A data set that is being prepared. If the run was interrupted, the same command goes on from here.\n"
# Of a library whose processes Dask does not limit to one thread by itself, as it does for OpenMP, OpenBLAS and MKL.
_ONE_THREAD = {"ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS": "1"}


def check_partial(folder: Path) -> None:
    """Raises a `FileExistsError` if there is a folder of this name that is no interrupted run."""
    ours = not folder.exists() or (folder / _MARKER).is_file()
    if not ours and not (folder.is_dir() and all(path.name.startswith(".run.") for path in folder.iterdir())):
        raise FileExistsError(f"{folder} exists, and is no interrupted run: its place is needed, move it away.")


def open_partial(folder: Path) -> None:
    """Takes up the folder of the pieces, which this run holds; what another run was writing of a result is removed."""
    write_text(folder / _MARKER, _MARKER_TEXT)
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)


def code_digest() -> str:
    """Returns the SHA-256 of the modules that produce prepared data; it is part of every cache key."""
    root = Path(__file__).parent.parent
    return hashlib.sha256(b"".join((root / module).read_bytes() for module in PRODUCERS)).hexdigest()


def piece_name(settings: list, subject: Subject, training: bool) -> str:
    """Returns the name of a subject's piece: a hash of the settings, of what the reader says of the subject, and of
    the size and time of its files."""
    # A folder of DICOM stands for the files in it.
    files = [one for file in subject.files for one in (sorted(file.rglob("*")) if file.is_dir() else [file])]
    states = [[file.stat().st_size, file.stat().st_mtime_ns] if file.is_file() else [] for file in files]
    key = json.dumps([settings, repr(subject), training, states], sort_keys=True)
    return hashlib.sha256(key.encode()).hexdigest()[:32]


def source_files(subject: Subject, root: Path) -> dict:
    """Returns the columns of `subjects.parquet` that name files, relative to `root`."""
    volumes, masks = subject.volume_files, subject.mask_files
    names = [Path(os.path.relpath(file, root)).as_posix() for file in subject.files]
    return {
        "volume_files": names[: len(volumes)],
        "mask_files": names[len(volumes) : len(volumes) + len(masks)],
        "brain_file": (names[len(volumes) + len(masks) :] or [None])[0],
    }


def make_table(arrays: dict, subject: str, dtype: str) -> pa.Table:
    """Returns the rows of a subject as a table of arrays `image (N, C, H, W)`, which becomes `dtype`,
    `mask (N, A, H, W)`, `brain (N, H, W)`, `label (N,)` and `slice (N,)`."""
    image, mask, brain = arrays["image"].astype(dtype), arrays["mask"], arrays["brain"]
    features = datasets.Features(
        {
            "image": datasets.Array3D(image.shape[1:], dtype),
            "mask": datasets.Array3D(mask.shape[1:], "uint8"),
            "brain": datasets.Array2D(brain.shape[1:], "uint8"),
            "label": datasets.Value("int8"),
            "subject": datasets.Value("string"),
            "slice": datasets.Value("int32"),
        }
    )
    pixels = [
        pa.ExtensionArray.from_storage(features[name](), numpy_to_pyarrow_listarray(array))
        for name, array in (("image", image), ("mask", mask), ("brain", brain))
    ]
    names = pa.array([subject] * len(image), pa.string())
    columns = [*pixels, pa.array(arrays["label"]), names, pa.array(arrays["slice"])]
    return pa.Table.from_arrays(columns, schema=features.arrow_schema)


def write_piece(path: Path, table: pa.Table, row: dict) -> None:
    """Writes a piece that is there as a whole or not at all. `row` must survive JSON."""
    table = table.replace_schema_metadata({**table.schema.metadata, _HEADER: json.dumps(row)})
    options = pa.ipc.IpcWriteOptions(compression="lz4")
    with replacing(path) as unfinished, pa.ipc.new_file(str(unfinished), table.schema, options=options) as writer:
        writer.write_table(table)


def read_piece_row(path: Path) -> dict:
    """Reads the row of `subjects.parquet` that a piece carries."""
    with pa.memory_map(str(path)) as file:
        return json.loads(pa.ipc.open_file(file).schema.metadata[_HEADER])


def read_piece(path: Path) -> pa.Table:
    """Reads the rows of a piece."""
    with pa.OSFile(str(path)) as file:
        table = pa.ipc.open_file(file).read_all()
    metadata = {key: value for key, value in table.schema.metadata.items() if key != _HEADER}
    return table.replace_schema_metadata(metadata)


def write_shards(tables: Iterable[pa.Table], folder: Path, split: str, shard_rows: int) -> None:
    """Writes `split-00000-of-0000N.parquet` files of `shard_rows` rows, which are renamed when N is known."""
    pending: list[pa.Table] = []
    shards: list[Path] = []
    rows = 0
    for table in itertools.chain(tables, [None]):
        if table is not None:
            pending.append(table)
            rows += table.num_rows
        while rows >= shard_rows or (table is None and rows):
            together = pa.concat_tables(pending)
            shards.append(folder / f"{split}-{len(shards):05d}")
            # Pixels have no dictionary; looking for one takes time and gains nothing.
            pq.write_table(
                together.slice(0, shard_rows), shards[-1], row_group_size=_ROW_GROUP, use_dictionary=["subject"]
            )
            pending = [together.slice(shard_rows)]
            rows = pending[0].num_rows
    for shard in shards:
        shard.rename(folder / f"{shard.name}-of-{len(shards):05d}.parquet")


def run_tasks(function: Callable, tasks: Sequence[tuple], num_proc: int = 1, scheduler: str | None = None) -> Iterator:
    """
    Yields `function(*task)` of every task in order: one after the other here, or by the workers of a Dask cluster, each
    of which takes the next task when it is free, and one at a time.

    Args:
        num_proc: Processes of a cluster on this computer that lives as long as this call; 1 for none.
        scheduler: Address of a cluster that is there, `tcp://HOST:PORT`.

    Raises:
        ChildProcessError: Workers died, or could not start.
        ConnectionError: The cluster does not answer.
        ValueError: A worker of the cluster has several threads, or another version of this code.
    """
    if num_proc == 1 and scheduler is None:
        for task in tasks:
            yield function(*task)
        return
    from distributed import KilledWorker
    from distributed.client import FutureCancelledError
    from distributed.comm import CommClosedError

    with _open_local(num_proc) if scheduler is None else _open_remote(scheduler) as client:
        run = partial(_run_task, function, code_digest())
        try:
            for future in client.map(run, tasks, pure=False, key="prepare"):
                yield future.result()
        except KilledWorker as error:
            raise ChildProcessError(
                "A worker process was stopped from outside, perhaps for want of memory: every worker holds one subject."
                " What is done is kept; run the same command again, with a smaller `num_proc`, or with workers that have"
                " more memory."
            ) from error
        except (FutureCancelledError, CommClosedError) as error:
            raise ConnectionError(
                f"The connection to the cluster {scheduler or ''} is lost. What is done is kept; run the same command again."
            ) from error


def _run_task(function: Callable, digest: str, task: tuple):
    """Runs a task on a worker."""
    from distributed import get_worker

    threads = get_worker().state.nthreads
    if threads != 1:
        raise ValueError(
            f"Workers must have one thread each, as every thread would hold a subject, got one with {threads}: start"
            " them with `--nthreads 1`."
        )
    if code_digest() != digest:
        raise ValueError(
            "Workers must have the same version of anodiff as this process, got one with another version."
        )
    return function(*task)


@contextmanager
def _open_local(num_proc: int):
    """Opens a client of a cluster of `num_proc` processes on this computer, which ends with it."""
    from distributed import Client, LocalCluster

    outside = dict(os.environ)  # into which Dask puts what workers are to inherit
    masked = sys.platform != "win32"
    try:
        # Workers inherit this, also those that take the place of one that died: Ctrl-C, which their terminal sends to
        # them as well, is for the main process.
        resource_tracker.ensure_running()  # which would end the mask of the thread that starts it
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT}) if masked else None
        try:
            cluster = LocalCluster(
                n_workers=num_proc,
                threads_per_worker=1,
                # What a subject takes is not ours to limit.
                memory_limit=0,
                dashboard_address="127.0.0.1:0",
                silence_logs=logging.CRITICAL,
                scheduler_kwargs={"allowed_failures": 0},
                env=_ONE_THREAD,
            )
        except RuntimeError as error:
            raise ChildProcessError(
                "The worker processes could not start. Each of them reads the script again that called this: with"
                ' `num_proc` above 1 the call must stand below `if __name__ == "__main__":`.'
            ) from error
        finally:
            if masked:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
        with cluster, Client(cluster) as client:
            yield client
    finally:
        os.environ.clear()
        os.environ.update(outside)


@contextmanager
def _open_remote(scheduler: str):
    """Opens a client of the cluster at this address."""
    from distributed import Client

    try:
        client = Client(scheduler)
    except (OSError, ValueError) as error:
        raise ConnectionError(
            f"`scheduler` must be the address of a Dask scheduler, got {scheduler}: {error}"
        ) from error
    with client:
        if not client.nthreads():
            warnings.warn(f"{scheduler} has no workers yet: subjects wait for them.", stacklevel=2)
        yield client


def leave_if_worker() -> None:
    """Ends this process without a word if it is a worker that is still starting, and reads the script of its parent
    for that: what it is to do comes from [`run_tasks`], and the parent says what is wrong with the script."""
    try:
        multiprocessing.spawn.get_preparation_data("worker")  # what starting a process begins with
    except RuntimeError:
        raise SystemExit(1) from None
