"""The state of a training: what it consists of, its checkpoints and its log file."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import DynamoBackend, TorchDynamoPlugin, set_seed
from diffusers.training_utils import EMAModel

from ..data.prepared import PreparedSplit, StreamedSplit
from ..files import read_json, remove_unfinished, write_text
from ..pipelines.base import AnomalyPipeline
from ..schedulers.draws import DRAWS_VERSION
from ..volumes.processor import VolumeProcessor
from .checkpoints import (
    RECORD,
    checkpoint_folder,
    finish_checkpoint,
    lies_in,
    list_checkpoints,
    list_damaged,
    remove_checkpoint,
    remove_leftovers,
    set_aside,
    unfinished_name,
)
from .finite import are_finite
from .objective import Objective
from .optimization import make_ema, make_lr_scheduler, make_optimizer
from .options import TrainOptions, check_resumed
from .samples import load_splits
from .start import load_start


class Progress:
    """Counts optimizer steps, and remembers what they were done with; part of a checkpoint."""

    def __init__(self, samples_per_step: int, updates_per_batch: int):
        self.step = 0
        self.seconds = 0.0  # of the steps alone, on this process, by the last checkpoint or validation
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
        self.seconds = state.get("seconds", 0.0)  # earlier versions did not measure


@dataclass
class Run:
    """A training that is under way."""

    options: TrainOptions
    accelerator: Accelerator
    objective: Objective
    model: torch.nn.Module  # as accelerate wraps it, perhaps compiled
    optimizer: torch.optim.Optimizer
    lr_scheduler: torch.optim.lr_scheduler.LRScheduler
    ema: EMAModel | None
    progress: Progress
    train_split: PreparedSplit | StreamedSplit
    validation_split: PreparedSplit | None
    first_step: int = 0
    last_checkpoint: Path | None = None
    started: float = field(default_factory=time.perf_counter)

    @property
    def folder(self) -> Path:
        """Folder of checkpoints, logs, pictures and the finished pipeline."""
        return Path(self.options.train.output_dir)

    @contextmanager
    def averaged_model(self) -> Iterator[torch.nn.Module]:
        """Gives the bare network in evaluation mode with the averaged weights, if there are any, for a while. It is not
        compiled: these batches have other sizes."""
        model = self.objective.model
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
        """Loads the checkpoint to go on from, if there is one, sets aside what lies behind it, and writes the
        configuration."""
        accelerator = self.accelerator
        if checkpoint is not None:
            self._load(checkpoint)
            accelerator.print(f"Resumed from {checkpoint} at step {self.progress.step}.")
        if accelerator.is_main_process:
            # Another run's checkpoint has none of its log and pictures here.
            goes_on = checkpoint is not None and lies_in(checkpoint, self.folder)
            place = set_aside(self.folder, self.progress.step if goes_on else 0)
            if place is not None:
                print(f"What an earlier run wrote behind the step that this one begins at was moved to {place}.")
            remove_leftovers(self.folder)
            remove_unfinished(self.folder / "samples")
            for damaged in list_damaged(self.folder):
                print(f"No whole checkpoint, and left as it is: {damaged}.", file=sys.stderr)
            write_text(
                self.folder / "config.yaml",
                yaml.safe_dump(plain(self.options), sort_keys=False, allow_unicode=True),
            )
        if self.options.train.report_to != "none":
            accelerator.init_trackers("logs")

    def _load(self, checkpoint: Path) -> None:
        accelerator, last_step = self.accelerator, self.options.train.max_steps
        if (checkpoint / RECORD).exists():
            record = read_json(checkpoint / RECORD)
            check_resumed(str(checkpoint), record["options"], plain(self.options))
            if record["data"] != describe_data(self.train_split):
                raise ValueError(
                    f"{checkpoint} was trained on other data than `data.path` {self.options.data.path} holds now: its"
                    " recipe, processor or subjects differ. Name that data, or start a new run with another"
                    " `--train.output_dir`."
                )
        else:
            accelerator.print(
                f"{checkpoint} does not say what it was trained with, an earlier version wrote it: make sure yourself"
                " that the options are the same."
            )
        if accelerator.scaler is not None and not (checkpoint / "scaler.pt").exists():
            raise ValueError(
                f"`train.mixed_precision` is fp16, but {checkpoint} was trained without it and has no scale of the"
                " loss: go on with no or bf16."
            )
        try:
            accelerator.load_state(checkpoint)
        except Exception as error:  # noqa: BLE001 (what a damaged file leads to can be anything)
            raise ValueError(f"{checkpoint} cannot be gone on from. {' '.join(str(error).split())[:500]}") from error
        # Checkpoints lie between optimizer steps; accelerate would go on counting forward passes where it was,
        # which is wrong under another accumulation. And it loads the average to the CPU.
        accelerator.step = 0
        if self.ema is not None:
            self.ema.to(accelerator.device)
        if self.progress.step > last_step:
            raise ValueError(
                f"`train.max_steps` is {last_step}, but {checkpoint} is of step {self.progress.step}: raise it, or"
                " resume from an earlier checkpoint."
            )
        part = self._find_not_finite()
        if part is not None:
            raise ValueError(
                f"{checkpoint} holds NaN or infinite values in {part}: it diverged or is damaged. Resume from an"
                " earlier checkpoint."
            )
        self.first_step, self.last_checkpoint = self.progress.step, checkpoint

    def check_finite(self) -> None:
        """Raises a `FloatingPointError` on all processes if what is about to be saved holds NaN or infinite values."""
        part = self._find_not_finite()
        if part is not None:
            raise self.not_finite(f"There are NaN or infinite values in {part}")

    def not_finite(self, what: str) -> FloatingPointError:
        """Makes the error of a training that went wrong at this step."""
        saved, kept = self.last_checkpoint, "Nothing was saved yet"
        if saved is not None:
            kept = f"{saved} was saved before and is finite"
        return FloatingPointError(
            f"{what} at step {self.progress.step}. {kept}. Start a new run with a lower `optim.learning_rate`, or use"
            " bf16 instead of fp16."
        )

    def _find_not_finite(self) -> str | None:
        """What of the state holds NaN or infinite values on any process."""
        optimizer = [value for state in self.optimizer.state.values() for value in state.values()]
        parts = {
            "the weights": self.objective.model.state_dict().values(),
            "their moving average": [] if self.ema is None else self.ema.shadow_params,
            "the optimizer's state": [value for value in optimizer if torch.is_tensor(value)],
        }
        finite = torch.tensor([are_finite(tensors) for tensors in parts.values()], device=self.accelerator.device)
        fails = self.accelerator.reduce((~finite).float(), "sum").tolist()
        return next((part for part, failed in zip(parts, fails, strict=True) if failed), None)

    def save_checkpoint(self) -> None:
        """Saves the state, which [`check_finite`] has found finite, and removes checkpoints beyond
        `train.checkpoint_limit`."""
        # Written beside its place and renamed: a checkpoint that has its name is whole.
        accelerator = self.accelerator
        target = checkpoint_folder(self.folder, self.progress.step)
        unfinished = unfinished_name(target)
        if accelerator.is_main_process:
            shutil.rmtree(unfinished, ignore_errors=True)
        accelerator.wait_for_everyone()
        accelerator.save_state(unfinished)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            data = describe_data(self.train_split)
            done = {"step": self.progress.step, "seconds": round(self.progress.seconds, 3)}
            record = {**done, "options": plain(self.options), "data": data}
            finish_checkpoint(unfinished, target, record)
            for old in list_checkpoints(self.folder)[: -self.options.train.checkpoint_limit]:
                if not old.is_symlink():
                    remove_checkpoint(old)
        accelerator.wait_for_everyone()
        self.last_checkpoint = target


def make_run(
    options: TrainOptions,
    objective_class: type[Objective],
    accelerator: Accelerator,
    start: AnomalyPipeline | None = None,
) -> Run:
    """Opens the data, builds the objective, and prepares everything that is trained, with new weights, or those of the
    pipeline `start`."""
    loop = options.train
    train_split, validation_split = load_splits(accelerator, options, objective_class)
    context = options.processor.get("context", 0)
    processor = VolumeProcessor.from_dict({**train_split.processor_settings, "context": context})
    VolumeProcessor.from_dict({**processor.settings(), **options.processor})  # checks the values
    processor.check_equal(options.processor, "the block `processor` of the configuration asks for")

    set_seed(loop.seed)
    objective = objective_class.from_options(options, processor)
    if start is not None:
        load_start(objective, start, loop.init_from)
    if objective.updates_per_batch > 1 and options.data.streaming:
        raise ValueError(
            f"`objective.updates_per_batch` is {objective.updates_per_batch}, but `data.streaming` reads every slice"
            " once: set one to 1, or the other to false."
        )
    # On a GPU every parameter's own launch takes longer than its work. Not with fp16: accelerate would not see that an
    # optimizer that skips a step by itself has skipped it.
    on_gpu = accelerator.device.type == "cuda"
    fused = on_gpu and accelerator.scaler is None
    optimizer = make_optimizer(objective.model.parameters(), options.optim, fused)
    # Stepped by hand once per optimizer step and not prepared: accelerate would count processes as steps.
    lr_scheduler = make_lr_scheduler(optimizer, options.optim, loop.max_steps)
    model, optimizer = accelerator.prepare(objective.model, optimizer)
    dynamo = TorchDynamoPlugin(backend="inductor") if loop.compile else TorchDynamoPlugin()
    if dynamo.use_regional_compilation:
        raise ValueError("`accelerate launch` was told to compile regions: here the whole network is compiled.")
    if dynamo.backend != DynamoBackend.NO:
        # Not by accelerate, whose checkpoints would then hold other names of the weights.
        model = torch.compile(model, **dynamo.to_kwargs())
    set_seed(loop.seed, device_specific=True)  # dropout differs between processes
    samples_per_step = loop.batch_size * accelerator.num_processes * loop.gradient_accumulation_steps
    progress = Progress(samples_per_step, objective.updates_per_batch)
    accelerator.register_for_checkpointing(lr_scheduler, progress)
    ema = None
    if loop.ema.enabled:
        ema = make_ema(objective.model.parameters(), loop.ema, fused=on_gpu)
        ema.to(accelerator.device)
        accelerator.register_for_checkpointing(ema)
    splits = train_split, validation_split
    return Run(options, accelerator, objective, model, optimizer, lr_scheduler, ema, progress, *splits)


def describe_data(split: PreparedSplit | StreamedSplit) -> str:
    """Returns the SHA-256 of what makes the slices of a split what they are, wherever the data lie: recipe, processor,
    and the subjects with their numbers of slices."""
    recipe = {key: value for key, value in split.recipe.items() if key not in ("license", "rehosting", "source")}
    counts = ("rows", "anomalous_rows", "annotations")
    subjects = {name: [row[count] for count in counts] for name, row in split.subject_info.items()}
    text = json.dumps([recipe, split.processor_settings, subjects], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def plain(options: TrainOptions) -> dict:
    """Returns options as JSON values: tuples become lists, as they are read."""
    return json.loads(json.dumps(dataclasses.asdict(options)))
