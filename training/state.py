"""The state of a training: what it consists of, its checkpoints and its log file."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers.training_utils import EMAModel

from ..data.prepared import PreparedSplit, StreamedSplit
from ..schedulers.draws import DRAWS_VERSION
from ..volumes.processor import VolumeProcessor
from .objective import Objective
from .optimization import make_ema, make_lr_scheduler, make_optimizer
from .options import LoopOptions, TrainOptions
from .samples import load_splits


class Progress:
    """Counts optimizer steps, and remembers what they were done with; part of a checkpoint."""

    def __init__(self, samples_per_step: int, updates_per_batch: int):
        self.step = 0
        self.samples_per_step = samples_per_step
        self.updates_per_batch = updates_per_batch
        self.draws_version = DRAWS_VERSION

    def state_dict(self) -> dict:
        return dict(vars(self))

    def load_state_dict(self, state: dict) -> None:
        """Takes the number of steps from a checkpoint that this run can go on from as if nothing had happened."""
        for name, text in (
            ("samples_per_step", "{} samples per step, this run has {} (batch size x processes x accumulation)"),
            ("updates_per_batch", "{} updates per batch, this run has {} (`objective.updates_per_batch`)"),
            ("draws_version", "version {} of the random numbers, this run has {} (`schedulers/draws.py`)"),
        ):
            own, saved = vars(self)[name], state.get(name, "none")
            if saved != own:
                difference = text.format(saved, own)
                raise ValueError(f"The checkpoint was trained with {difference}. Make them equal, or start a new run.")
        self.step = state["step"]


@dataclass
class Run:
    """A training that is under way."""

    options: TrainOptions
    accelerator: Accelerator
    objective: Objective
    model: torch.nn.Module  # as accelerate wraps it
    optimizer: torch.optim.Optimizer
    lr_scheduler: torch.optim.lr_scheduler.LRScheduler
    ema: EMAModel | None
    progress: Progress
    train_split: PreparedSplit | StreamedSplit
    validation_split: PreparedSplit | None
    first_step: int = 0
    started: float = field(default_factory=time.perf_counter)

    @property
    def folder(self) -> Path:
        """Folder of checkpoints, logs, pictures and the finished pipeline."""
        return Path(self.options.train.output_dir)

    @contextmanager
    def averaged_model(self) -> Iterator[torch.nn.Module]:
        """Gives the bare network in evaluation mode with the averaged weights, if there are any, for a while."""
        model = self.accelerator.unwrap_model(self.model)
        if self.ema is not None:
            self.ema.store(model.parameters())
            self.ema.copy_to(model.parameters())
        model.eval()
        try:
            yield model
        finally:
            if self.ema is not None:
                self.ema.restore(model.parameters())
            model.train()

    def log(self, values: dict[str, float]) -> None:
        """Writes values of this step to the tracker and to `log.jsonl`."""
        self.accelerator.log(values, step=self.progress.step)
        if self.accelerator.is_main_process:
            with open(self.folder / "log.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps({"step": self.progress.step, **values}) + "\n")

    def begin(self, checkpoint: Path | None) -> None:
        """Loads the checkpoint to go on from, if there is one, and writes the configuration."""
        accelerator = self.accelerator
        if checkpoint is not None:
            accelerator.load_state(checkpoint)
            # Checkpoints lie between optimizer steps; accelerate would go on counting forward passes where it was,
            # which is wrong under another accumulation. And it loads the average to the CPU.
            accelerator.step = 0
            if self.ema is not None:
                self.ema.to(accelerator.device)
            self.first_step = self.progress.step
            accelerator.print(f"Resumed from {checkpoint} at step {self.progress.step}.")
        if accelerator.is_main_process:
            self.folder.mkdir(parents=True, exist_ok=True)
            log = self.folder / "log.jsonl"
            if log.exists():
                # What was logged after the checkpoint will be logged again.
                lines = log.read_text(encoding="utf-8").splitlines(keepends=True)
                kept = [line for line in lines if json.loads(line)["step"] <= self.progress.step]
                log.write_text("".join(kept), encoding="utf-8")
            text = yaml.safe_dump(plain(self.options), sort_keys=False)
            (self.folder / "config.yaml").write_text(text, encoding="utf-8")
        if self.options.train.report_to != "none":
            accelerator.init_trackers("logs")

    def save_checkpoint(self) -> None:
        """Saves the state, and removes checkpoints beyond `train.checkpoint_limit`."""
        # Written beside its place and renamed: a checkpoint that has its name is whole.
        accelerator = self.accelerator
        target = self.folder / "checkpoints" / f"step-{self.progress.step:07d}"
        temporary = target.with_name(target.name + ".partial")
        if accelerator.is_main_process:
            shutil.rmtree(temporary, ignore_errors=True)
        accelerator.wait_for_everyone()
        accelerator.save_state(temporary)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            shutil.rmtree(target, ignore_errors=True)
            os.replace(temporary, target)
            for old in _list_checkpoints(self.folder)[: -self.options.train.checkpoint_limit]:
                shutil.rmtree(old)
        accelerator.wait_for_everyone()


def make_run(options: TrainOptions, objective_class: type[Objective], accelerator: Accelerator) -> Run:
    """Opens the data, builds the objective, and prepares everything that is trained, with new weights."""
    loop = options.train
    train_split, validation_split = load_splits(accelerator, options.data, loop.validate_every > 0, objective_class)
    processor = VolumeProcessor.from_dict(train_split.processor_settings)
    VolumeProcessor.from_dict({**processor.settings(), **options.processor})  # checks the values
    processor.check_equal(options.processor, "the block `processor` of the configuration asks for")

    set_seed(loop.seed)
    objective = objective_class.from_options(options, processor)
    if objective.updates_per_batch > 1 and options.data.streaming:
        raise ValueError(
            f"`objective.updates_per_batch` is {objective.updates_per_batch}, but `data.streaming` reads every slice"
            " once: set one to 1, or the other to false."
        )
    optimizer = make_optimizer(objective.model.parameters(), options.optim)
    # Stepped by hand once per optimizer step and not prepared: accelerate would count processes as steps.
    lr_scheduler = make_lr_scheduler(optimizer, options.optim, loop.max_steps)
    model, optimizer = accelerator.prepare(objective.model, optimizer)
    set_seed(loop.seed, device_specific=True)  # dropout differs between processes
    samples_per_step = loop.batch_size * accelerator.num_processes * loop.gradient_accumulation_steps
    progress = Progress(samples_per_step, objective.updates_per_batch)
    accelerator.register_for_checkpointing(lr_scheduler, progress)
    ema = None
    if loop.ema.enabled:
        ema = make_ema(accelerator.unwrap_model(model).parameters(), loop.ema)
        ema.to(accelerator.device)
        accelerator.register_for_checkpointing(ema)
    splits = train_split, validation_split
    return Run(options, accelerator, objective, model, optimizer, lr_scheduler, ema, progress, *splits)


def find_checkpoint(loop: LoopOptions) -> Path | None:
    """Finds the checkpoint that `train.resume` names, a folder or `latest`; `None` for a new run, which must not mix
    with an earlier one."""
    checkpoints = _list_checkpoints(Path(loop.output_dir))
    if not loop.resume:
        if checkpoints:
            raise FileExistsError(
                f"{loop.output_dir} holds checkpoints of an earlier run. Go on with `--train.resume latest`, or"
                " choose another `--train.output_dir`."
            )
        return None
    if loop.resume == "latest":
        if not checkpoints:
            raise FileNotFoundError(
                f"`train.resume` is latest, but {loop.output_dir}/checkpoints holds no checkpoint."
            )
        return checkpoints[-1]
    if not Path(loop.resume).is_dir():
        raise FileNotFoundError(f"`train.resume`: there is no checkpoint folder {loop.resume}.")
    return Path(loop.resume)


def _list_checkpoints(folder: Path) -> list[Path]:
    return sorted(path for path in (folder / "checkpoints").glob("step-*") if path.suffix != ".partial")


def plain(options: TrainOptions) -> dict:
    """Returns options as JSON values: tuples become lists, as they are read."""
    return json.loads(json.dumps(dataclasses.asdict(options)))
