"""Keeps the tables and the record of a command up to date while it predicts a cohort."""

from __future__ import annotations

from pathlib import Path

import torch

from ..pipelines.base import AnomalyPipeline, device_name
from ..volumes.scans import Scan
from .measures import measure_folder, read_atlas, read_mask
from .options import PredictOptions
from .prediction import Prediction, describe_error, find_revision
from .record import begin_record, end_record, record_path, update_record
from .tables import DONE, FAILED, SKIPPED, cell, hold_tables, read_rows, write_rows


class CohortRun:
    """
    Writes what a command does into the output folder, which other commands and processes may share: `cohort.tsv`,
    `regions.tsv`, and the record of the command.

    Args:
        options ([`~cohorts.options.PredictOptions`]): Of the command.
        pipeline ([`AnomalyPipeline`]): The checkpoint, on its device.
        model (`str`): Where it was loaded from.
        name (`str`): What the tables call it.
        region_names (`dict[int, str]`, *optional*): Names of the labels of the atlas.
    """

    def __init__(
        self,
        options: PredictOptions,
        pipeline: AnomalyPipeline,
        model: str,
        name: str,
        region_names: dict[int, str] | None,
    ):
        self.options, self.pipeline, self.region_names = options, pipeline, region_names
        self.folder, self.record = Path(options.output), record_path(options)
        self.checkpoint, self.started = {"checkpoint": name, "revision": find_revision(model)}, ""

    def begin(
        self,
        arguments: list[str],
        scans: list[Scan],
        failed: list[tuple[str, str]],
        finished: list[Scan],
        processes: int,
    ) -> list[tuple[str, str]]:
        """Writes the record of a command that begins, and the rows of what it does not predict; returns finished scans
        that cannot be measured, with the reason. Of several processes one does it, and tells the others `started`. Other
        arguments as of [`~cohorts.inputs.list_scans`]."""
        rows = [({"source": source, "status": FAILED, "reason": reason}, None) for source, reason in failed]
        skipped, unread = self.describe_finished(finished)
        device = self.pipeline.device
        hardware = {"device": device_name(device), "processes": processes, "threads": torch.get_num_threads()}
        if device.type == "cuda":
            hardware["device_memory_gb"] = round(torch.cuda.get_device_properties(device).total_memory / 1e9, 1)
        settings = self.pipeline.default_settings() | self.options.inference
        counts = {
            "named": len(scans) + len(failed) + len(finished),
            "done": 0,
            "skipped": len(finished) - len(unread),
            "failed": len(failed) + len(unread),
        }
        with hold_tables(self.folder):
            self.started = begin_record(
                self.record, arguments, self.options, self.checkpoint, settings, hardware, counts
            )
            write_rows(self.folder, [*rows, *skipped])
        return unread

    def describe_finished(self, scans: list[Scan]) -> tuple[list[tuple[dict, list | None]], list[tuple[str, str]]]:
        """Returns rows of scans that have results, which are measured if the table has no values of them, and those
        that cannot be measured."""
        earlier, rows, unread = read_rows(self.folder), [], []
        for scan in scans:
            row = {"scan": scan.name, "source": str(scan.source), "status": SKIPPED, "reason": None}
            regions, there = None, earlier.get(cell(scan.name))
            atlas = None if scan.atlas is None else cell(scan.atlas)
            if there is None or there["checkpoint"] is None or atlas not in (None, there["atlas"]):
                try:
                    mask = read_mask(self.folder / scan.name)
                    labels = None if mask is None or scan.atlas is None else read_atlas(scan.atlas, mask)
                    values, regions = measure_folder(self.folder / scan.name, labels, self.region_names)
                    row |= (there or {}) | values | {"atlas": atlas} | row
                except (OSError, ValueError) as error:
                    unread.append((str(scan.source), f"its result cannot be measured: {describe_error(error)}"))
                    row |= {"status": FAILED, "reason": unread[-1][1]}
            rows.append((row, regions))
        return rows, unread

    def add(self, prediction: Prediction) -> None:
        """Writes the rows of a scan that is done or has failed."""
        scan, has_failed = prediction.scan, prediction.reason is not None
        row = {"scan": scan.name, "source": str(scan.source), "status": FAILED if has_failed else DONE}
        row |= {"reason": prediction.reason}
        if not has_failed:
            row |= self.checkpoint | prediction.row
        row |= {"seconds": prediction.seconds, "warnings": " | ".join(prediction.warnings)}
        row |= {"atlas": None if scan.atlas is None else str(scan.atlas)}
        with hold_tables(self.folder):
            write_rows(self.folder, [(row, None if has_failed else prediction.regions)])
            update_record(
                self.record, self.started, int(not has_failed), int(has_failed), {scan.name: prediction.inputs}
            )

    def end(self, status: int) -> None:
        """Notes the end of the command and its exit status."""
        with hold_tables(self.folder):
            end_record(self.record, self.started, status)
