"""The loop that every objective shares. accelerate does devices, precision, accumulation, trackers and state.

Sample number p of a run (p = 0, 1, ...) decides everything random about it: its slice is entry p of an endless
sequence of permutations of the training set, and augmentation, timestep and noise are functions of a key of (seed, p).
Optimizer step s consumes the samples s G ... (s + 1) G - 1 with G = batch size x processes x accumulation. So a run
that was interrupted, or that has another number of processes with the same G, sees the same samples with the same
noise.

An objective may ask for u updates on every batch (`updates_per_batch`, CIMD's original has two). Every update is an
optimizer step like any other, for `max_steps`, the learning rate, the average and checkpoints; step s then consumes
the samples of batch s // u.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list, parse_flag_from_env
from tqdm.auto import tqdm

from ..files import lock_folder
from ..hub.publishing import BackgroundPush, push_folder
from .augmentation import augment, augment_intensity
from .checkpoints import find_checkpoint
from .export import check_hub, check_picture, choose_card, export, restore_pipeline
from .objective import Objective
from .optimization import check_optim
from .options import LoopOptions, TrainOptions, check_options
from .samples import make_loader, move_batches, read_batches
from .start import take_start
from .state import Run, make_run
from .validation import validate


def fit(options: TrainOptions, objective_class: type[Objective]) -> Path:
    """Trains one objective; writes and returns `<output_dir>/pipeline`, a folder that `from_pretrained` reads."""
    # What can be wrong is found before any data is made or read.
    loop = options.train
    check_options(options)
    check_optim(options.optim, loop.max_steps)
    objective_class.check_options(options)
    start = None
    if loop.init_from is not None:
        options, start = take_start(options, objective_class)
        objective_class.check_options(options)
    check_picture(loop)
    accelerator = _make_accelerator(loop)
    with _held_folder(accelerator, loop) as checkpoint:
        if accelerator.is_main_process:
            restore_pipeline(Path(loop.output_dir))
        run = make_run(options, objective_class, accelerator, start)
        run.begin(checkpoint)
        upload = BackgroundPush()
        _take_steps(run, upload)
        upload.wait()
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            export(run)
        accelerator.wait_for_everyone()
        accelerator.end_training()  # takes the process group down: nothing waits for anybody from here on
        folder = run.folder / "pipeline"
        if accelerator.is_main_process:
            print(f"Pipeline written to {folder}")
            if loop.push_to_hub:
                arguments = {"private": loop.hub_private, "make_card": choose_card(folder)}
                message = f"Step {run.progress.step}, the end of the training"
                url = push_folder(folder, loop.push_to_hub, commit_message=message, **arguments)
                print(f"Pushed to {url}")
    return folder


def _make_accelerator(loop: LoopOptions) -> Accelerator:
    # The first process may be busy for long while the others wait: a phantom is made, a card is written.
    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"), timeout=timedelta(hours=2))
    precision = loop.mixed_precision
    if precision == "bf16" and state.device.type == "cpu" and not _has_bf16():
        precision = "no"
        state.print(
            "This CPU has no instructions for `train.mixed_precision` bf16, which would be slower: float32 it is."
        )
    return Accelerator(
        gradient_accumulation_steps=loop.gradient_accumulation_steps,
        mixed_precision=precision,
        log_with=None if loop.report_to == "none" else loop.report_to,
        project_dir=loop.output_dir,
        step_scheduler_with_optimizer=False,
        dynamo_backend="no",  # `make_run` does that
    )


def _has_bf16() -> bool:
    """Whether oneDNN multiplies bf16 on this CPU; without it, training takes ten times as long as in float32."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


@contextmanager
def _held_folder(accelerator: Accelerator, loop: LoopOptions) -> Iterator[Path | None]:
    """Holds `train.output_dir` for this run and gives the checkpoint to go on from. The first process does it; where
    it fails, all of them end with its message."""
    with ExitStack() as held:
        checkpoint, failure = None, None
        if accelerator.is_main_process:
            try:
                find_checkpoint(loop)  # before anything is made that a mistake would leave behind
                if loop.push_to_hub:
                    check_hub(loop)
                held.enter_context(lock_folder(loop.output_dir))
                checkpoint = find_checkpoint(loop)
            except Exception as error:  # noqa: BLE001 (raised again below)
                failure = error
        checkpoint, text = broadcast_object_list([checkpoint, None if failure is None else str(failure)])
        if failure is not None:
            raise failure
        if text is not None:
            raise RuntimeError(text)
        yield checkpoint


def _take_steps(run: Run, upload: BackgroundPush) -> None:
    accelerator, objective, progress = run.accelerator, run.objective, run.progress
    loop, augmentation = run.options.train, run.options.data.augmentation
    device, value_range = accelerator.device, objective.processor.config.value_range
    hidden = not accelerator.is_local_main_process
    bar = tqdm(total=loop.max_steps, initial=progress.step, desc="training", disable=hidden)
    run.model.train()
    # As a list: walking through a network takes longer than launching a pass over its weights.
    weights = list(objective.model.parameters())
    step_loss = 0.0
    loader = make_loader(run.train_split, objective, run.options, accelerator, progress.step)
    since = time.perf_counter()
    # In this loop nothing waits for the GPU but for a line of the log or a checkpoint: the next step is prepared while
    # it works.
    for batch, keys in move_batches(read_batches(loader), loop.seed, device):
        with accelerator.accumulate(run.model):
            if not objective.draws_volumes:
                batch = augment(batch, keys, augmentation, value_range[0])
                batch["image"] = augment_intensity(batch["image"], keys, augmentation, value_range)
            update = progress.step % objective.updates_per_batch
            loss = objective.loss(run.model, batch, keys, **({"update": update} if update else {})).mean()
            accelerator.backward(loss)
            step_loss += loss.detach() / loop.gradient_accumulation_steps
            if accelerator.sync_gradients and run.options.optim.max_grad_norm:
                accelerator.clip_grad_norm_(weights, run.options.optim.max_grad_norm)
            run.optimizer.step()
            run.optimizer.zero_grad()
        if not accelerator.sync_gradients:
            continue
        # A step that mixed precision skipped because of an overflow changes neither average nor learning rate.
        if not accelerator.optimizer_step_was_skipped:
            run.lr_scheduler.step()
            if run.ema is not None:
                run.ema.step(weights)
        progress.step += 1
        bar.update()

        last = progress.step == loop.max_steps
        saves = last or (loop.checkpoint_every and progress.step % loop.checkpoint_every == 0)
        validates = loop.validate_every and (last or progress.step % loop.validate_every == 0)
        if saves or progress.step % loop.log_every == 0:
            value = accelerator.reduce(step_loss, "mean").item()
            if not np.isfinite(value):
                raise run.not_finite(f"The loss is {value}")
            run.log({"loss": value, "lr": run.lr_scheduler.get_last_lr()[0]})
            bar.set_postfix(loss=f"{value:.4f}")
        step_loss = 0.0
        if saves or validates:
            run.check_finite()  # waits for the GPU
            progress.seconds += time.perf_counter() - since
        if validates:
            validate(run)
        if saves:
            run.save_checkpoint()
            pushes = loop.push_to_hub and loop.hub_strategy == "every_save" and accelerator.is_main_process
            # A push that takes longer than the way to the next checkpoint makes that one wait for the one after it.
            if pushes and not last and not upload.busy:
                folder = export(run)
                arguments = {"private": loop.hub_private, "make_card": choose_card(folder)}
                upload.start(folder, loop.push_to_hub, commit_message=f"Step {progress.step}", **arguments)
        if saves or validates:
            since = time.perf_counter()
    bar.close()
