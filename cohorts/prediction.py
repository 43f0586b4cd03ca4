"""Predicts scans one after the other: while the network works on one, the next is read and the last is written."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path

import huggingface_hub
import numpy as np
import torch

from .. import AnomalyPipeline
from ..checks import check_keys
from ..evaluation import overview
from ..files import lock_folder, read_json, sha256
from ..hub import shipped
from ..hub.model_index import SUMS
from ..pipelines.dispersion import check_dispersion, disperse
from ..pipelines.guarantee import describe_claims
from ..pipelines.output import AnomalyOutput
from ..volumes.results import (
    CALIBRATED_ARRAYS,
    DICOM_STEMS,
    DISPERSION_ARRAYS,
    ENSEMBLE_ARRAYS,
    MAP_ARRAYS,
    PICTURES,
    check_place,
    is_whole,
    remove_results,
)
from ..volumes.scans import Scan, name_modality
from .inputs import Inputs, find_input_modality, hash_files
from .measures import measure_result, read_atlas
from .options import PredictOptions


# How a scan's brain mask came about (`pipelines/brain.py`).
_ORIGINS = {
    "given": "brain mask as given",
    "extracted": "brain extracted, its mask is brain_mask.nii.gz",
    "stripped": "left as it is: its skull is off already",
    "nonzero": "brain taken as what is above the background",
    "none": "whole slices, no brain mask",
}
# The warnings of the scan that a thread is at.
_WARNED: ContextVar[list[str] | None] = ContextVar("warned", default=None)
# Said with `--skip_existing`, which leaves out scans whose results are whole when it begins.
NOT_REPLACED = (
    "{} is of another command, which has written it meanwhile, maybe for another scan of this name: nothing is replaced."
    " Give the command again, or choose another folder for the results."
)
# Of changes to come in a library, not of a scan.
_OF_CODE = (DeprecationWarning, PendingDeprecationWarning, FutureWarning)


@dataclass
class Prediction:
    """
    Says what became of a scan.

    Args:
        scan ([`~volumes.scans.Scan`]): Which one.
        reason (`str`, *optional*): Why it failed.
        told (`str`): What [`write_scan`] says of it.
        row (`dict`): Values of `cohort.tsv`, but for those that all scans of a run share.
        regions (`list[dict]`): Rows of `regions.tsv`.
        inputs (`dict[str, str]`): SHA-256 of the files that were read, by their paths.
        warnings (`list[str]`): What was warned of.
        seconds (`float`): For reading, computing and writing it, without the time that it waited for others.
    """

    scan: Scan
    reason: str | None = None
    told: str = ""
    row: dict = field(default_factory=dict)
    regions: list[dict] = field(default_factory=list)
    inputs: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @contextmanager
    def working(self) -> Iterator[None]:
        """Adds the time of the block, and what is warned of in this thread meanwhile."""
        token, start = _WARNED.set(self.warnings), time.perf_counter()
        try:
            yield
        finally:
            self.seconds += time.perf_counter() - start
            _WARNED.reset(token)


def choose_model(options: PredictOptions, inputs: Inputs) -> tuple[str, str | None, dict]:
    """Chooses the shipped checkpoint for the scans; returns its folder, the modality of the scans, if it is known, and
    what the results record of the choice."""
    if options.modality:
        modality = name_modality(options.modality)
        reason = f"`--modality` says {modality}"
    else:
        modality = find_input_modality(inputs, options)
        reason = "no name of a scan says a modality" if modality is None else f"the name of the scan says {modality}"
    name, fits = shipped.choose_shipped(modality)
    reason = f"{reason}: {fits}"
    return str(shipped.SHIPPED / name), modality, {"model": name, "model_chosen": reason}


def find_device(name: str | None):
    """Returns the device of this name, or a GPU where there is one, else the CPU; raises a `ValueError` that lists
    those there are, if it cannot be used."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.zeros(1, device=device).item()
    except Exception as error:  # each kind of device has its own
        known = ["cpu", *(f"cuda:{number}" for number in range(torch.cuda.device_count()))]
        raise ValueError(
            f"`--device` must be one that this computer has, {', '.join(known)}, got {name!r}."
        ) from error
    return device


def load_pipeline(model: str, device, options: PredictOptions):
    """Loads the pipeline of a checkpoint, and checks that it knows the options; whatever its files or the Hub raise
    becomes one `ValueError`."""
    try:
        pipeline = AnomalyPipeline.from_pretrained(model)
    except Exception as error:
        text = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{model} cannot be loaded: {text}") from error
    pipeline.to(device)
    if options.fast:
        pipeline.enable_fast_inference(mixed_precision=options.mixed_precision)
    elif options.mixed_precision is not None:
        pipeline.enable_fast_inference(mixed_precision=options.mixed_precision, channels_last=False, compile=False)
    if options.dispersion:
        check_dispersion(pipeline, options.dispersion)
    check_keys("inference", options.inference, pipeline.default_settings(), type(pipeline).__name__)
    return pipeline


def find_revision(model: str) -> str | None:
    """Returns which files a checkpoint was loaded from: the commit of a Hub repository, or the SHA-256 of
    `model_index.json`, which names those of all other files, as `sha256:...`; `None` where it names none."""
    folder = Path(shipped.locate(model))
    if folder.is_dir():
        index = folder / "model_index.json"
        return f"sha256:{sha256(index)}" if read_json(index).get(SUMS) else None
    # What the download has just noted as the newest commit; the Hub may have a newer one by now.
    cached = huggingface_hub.try_to_load_from_cache(model, "model_index.json")
    return Path(cached).parent.name if isinstance(cached, str) else None


def predict_scans(
    pipeline: AnomalyPipeline,
    scans: list[Scan],
    options: PredictOptions,
    record: dict,
    check: Callable[[AnomalyPipeline, Scan, PredictOptions], None],
    write: Callable[..., str],
    region_names: dict[int, str] | None = None,
) -> Iterator[Prediction]:
    """
    Predicts scans. While the network works on one of them, a thread reads the next one, and another thread writes the
    result of the last one; memory holds no more than these three.

    Args:
        record (`dict`): What goes into the settings of the results.
        check, write (callable): Like [`check_free`] and [`write_scan`].
        region_names (`dict[int, str]`, *optional*): Names of the labels of an atlas.

    Yields:
        what became of each scan, when it is done.
    """
    with _noting_warnings(), ThreadPoolExecutor(1, "reader") as reader, ThreadPoolExecutor(1, "writer") as writer:

        def read(scan: Scan | None) -> tuple[Prediction, Future] | None:
            if scan is None:
                return None
            prediction = Prediction(scan)
            return prediction, reader.submit(read_scan, pipeline, prediction, options, check)

        def finish(prediction: Prediction, result, spread, labels: np.ndarray | None) -> None:
            with prediction.working():
                prediction.told = write(pipeline, prediction.scan, options, result, spread)
                prediction.row, prediction.regions = measure_result(result, labels, region_names)
            if isinstance(result, AnomalyOutput):
                prediction.warnings.extend(result.warnings or [])
            if labels is not None and not prediction.regions:
                prediction.warnings.append("nothing is measured by region, as there is no mask: give `--threshold`")

        def ended(prediction: Prediction, writing: Future) -> Prediction:
            error = writing.exception()
            prediction.reason = None if error is None else describe_error(error)
            return prediction

        ahead, behind = read(next(iter(scans), None)), None
        for following in [*scans[1:], None] if scans else []:
            prediction, reading = ahead
            wait([reading])
            ahead = read(following)
            try:
                volume, labels = reading.result()
                with prediction.working():
                    result, spread = compute_scan(pipeline, volume, options)
                result.settings |= record
                result.settings["inputs"] = [prediction.inputs[str(image)] for image in prediction.scan.images()]
            except Exception as error:  # noqa: BLE001 (whatever is wrong with one scan, the others are still wanted)
                prediction.reason = describe_error(error)
                yield prediction
                continue
            if behind is not None:
                yield ended(*behind)
            behind = prediction, writer.submit(finish, prediction, result, spread, labels)
        if behind is not None:
            yield ended(*behind)


def describe_error(error: BaseException) -> str:
    """Returns the kind and the message of an error, as it is said of a scan."""
    return f"{type(error).__name__}: {error}"


@contextmanager
def _noting_warnings() -> Iterator[None]:
    """Notes warnings with the scan that their thread is at, each time, and shows them as ever."""
    with warnings.catch_warnings():
        warnings.filterwarnings("always", module="anodiff")
        show = warnings.showwarning

        def note(message, category, filename, lineno, file=None, line=None):
            noted = _WARNED.get()
            if noted is not None and not issubclass(category, _OF_CODE):
                noted.append(str(message))
            show(message, category, filename, lineno, file, line)

        warnings.showwarning = note
        yield


def wanted_records(options: PredictOptions) -> tuple[str, ...]:
    """Returns the records of a whole result."""
    return ("result", "dispersion") if options.dispersion else ("result",)


def check_free(pipeline: AnomalyPipeline, scan: Scan, options: PredictOptions) -> None:
    """Raises a `FileExistsError` if the result of a scan may not be written: also one that another command has written
    since the scans were listed."""
    folder, records = Path(options.output) / scan.name, wanted_records(options)
    arrays = ENSEMBLE_ARRAYS if pipeline.task == "segmentation" else MAP_ARRAYS
    stems = {*arrays, *(DISPERSION_ARRAYS if options.dispersion else ()), *(PICTURES[record] for record in records)}
    if pipeline.brain_extractor is None:
        stems.discard("brain_mask")
    if pipeline.task != "segmentation" and pipeline.config.calibration is None:
        stems -= {*CALIBRATED_ARRAYS}
    check_place(folder, stems | DICOM_STEMS, records)
    if options.overwrite:
        return
    if (folder / "result.json").exists() and not options.skip_existing:
        raise FileExistsError(
            f"{folder} already holds a result; `--overwrite` replaces it, `--skip_existing` leaves it as it is."
        )
    if is_whole(folder, records):
        raise FileExistsError(NOT_REPLACED.format(folder / "result.json"))


def read_scan(
    pipeline: AnomalyPipeline, prediction: Prediction, options: PredictOptions, check: Callable
) -> tuple[object, np.ndarray | None]:
    """Returns a scan for the pipeline, if its result may be written: its slices, or its volume if the pipeline has to
    find the brain; and its labels `(X, Y, Z)`, if there is an atlas. Notes the SHA-256 of its files."""
    scan = prediction.scan
    with prediction.working():
        check(pipeline, scan, options)
        volume = scan.volume
        if isinstance(volume, dict) and len(pipeline.processor.config.modalities) == 1:
            # A network for any contrast has another name for it.
            volume = dict(zip(pipeline.processor.config.modalities, volume.values(), strict=True))
        if pipeline.brain_extractor is not None and scan.brain is None:
            # Two networks at once might not fit into the memory of a GPU: this one waits for its turn.
            prepared = source = pipeline.processor.read(volume, pipeline.may_lack)
        else:
            prepared = pipeline.prepare_volume(volume, scan.brain)
            source = prepared.processed.source
        labels = None if scan.atlas is None else read_atlas(scan.atlas, source)
        prediction.inputs = hash_files(
            image for image in (*scan.images(), scan.brain, scan.atlas) if image is not None
        )
    return prepared, labels


def compute_scan(pipeline, volume, options: PredictOptions) -> tuple:
    """Returns the result of a scan as [`read_scan`] gives it, and with `--dispersion` that of all its draws, else
    `None`."""
    arguments = dict(
        generator=options.seed,
        batch_size=options.batch_size,
        threshold=options.threshold,
        **options.inference,
    )
    if not options.dispersion:
        return pipeline(volume, **arguments), None
    spread = disperse(pipeline, volume, options.dispersion, **arguments)
    return spread.first, spread


def write_scan(pipeline: AnomalyPipeline, scan: Scan, options: PredictOptions, result, spread) -> str:
    """Writes the result of a scan, and its pictures, into a folder of its own. Returns how its brain mask came about,
    what a calibrated checkpoint says of it, and the warnings of the result, in words."""
    folder, plane = Path(options.output) / scan.name, pipeline.processor.config.plane
    draw = overview.draw_overview if isinstance(result, AnomalyOutput) else overview.draw_members
    # The record of the result, which marks the scan as done, comes last.
    with lock_folder(folder):
        check_free(pipeline, scan, options)  # again: computing took its time
        if spread is not None or (folder / "dispersion.json").exists():
            remove_results(folder)  # of a call with other options, which wrote other files
        if spread is not None:
            spread.save(folder, lambda path: overview.draw_members(spread, path, scan.name, plane=plane))
        result.save(folder, lambda path: draw(result, path, scan.name, plane=plane), dicom=options.dicom_output)
    told = _ORIGINS[result.settings["brain"]]
    if isinstance(result, AnomalyOutput) and result.guarantee is not None:
        told = f"{told}; {describe_claims(result.guarantee)}"
    if isinstance(result, AnomalyOutput) and result.warnings is not None:
        told = f"{told}. {' '.join(result.warnings)}"
    return told
