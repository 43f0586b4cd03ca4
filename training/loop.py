"""The loop that every objective shares. accelerate does devices, precision, accumulation, trackers and state.

Sample number p of a run (p = 0, 1, ...) decides everything random about it: its slice is entry p of an endless sequence of
permutations of the training set, and augmentation, timestep and noise come from a generator keyed by (seed, p). Optimizer
step s consumes the samples s G ... (s + 1) G - 1 with G = batch size x processes x accumulation. So a run that was
interrupted, or that has another number of processes with the same G, sees the same samples with the same noise.

An objective may ask for u updates on every batch (`updates_per_batch`, CIMD's original has two). Every update is an optimizer step
like any other, for `max_steps`, the learning rate, the average and checkpoints; step s then consumes the samples of batch s // u.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import time
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.utils.data
import yaml
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, set_seed
from tqdm.auto import tqdm

from ..data.prepare import PHANTOMS, describe_population, is_phantom
from ..data.prepared import PreparedSplit, StreamedSplit, load_prepared
from ..hub.model_card import make_card
from ..hub.publishing import BackgroundPush, PublishingError, complete_folder, open_repository, push_folder
from ..pipelines.base import device_name
from ..volumes.processor import VolumeProcessor
from .augmentation import augment, augment_intensity
from .optimization import check_optim, make_ema, make_lr_scheduler, make_optimizer
from .options import LoopOptions, TrainOptions
from .samples import PositionBatches, SampleStream, StreamedSamples, sample_generators


class Progress:
    """Optimizer steps done, the number of samples per step and of updates per batch that they were done with; part of a checkpoint."""

    def __init__(self, samples_per_step: int, updates_per_batch: int):
        self.step = 0
        self.samples_per_step = samples_per_step
        self.updates_per_batch = updates_per_batch

    def state_dict(self) -> dict:
        return dict(vars(self))

    def load_state_dict(self, state: dict) -> None:
        if state["samples_per_step"] != self.samples_per_step:
            raise ValueError(
                f"The checkpoint was trained with {state['samples_per_step']} samples per step, this run has"
                f" {self.samples_per_step} (batch size x processes x accumulation). Make them equal, or start a new run."
            )
        if state.get("updates_per_batch", 1) != self.updates_per_batch:
            raise ValueError(
                f"The checkpoint was trained with {state['updates_per_batch']} updates per batch, this run has"
                f" {self.updates_per_batch} (`objective.updates_per_batch`). Make them equal, or start a new run."
            )
        self.step = state["step"]


def fit(options: TrainOptions, objective_class: type) -> Path:
    """
    Trains one objective and writes `<output_dir>/pipeline`, a folder that `from_pretrained` reads.

    Args:
        options ([`TrainOptions`]): The run.
        objective_class (`type`):
            Gives `from_options(options, processor)`, `columns`, `trains_on`, `validates_on`, `updates_per_batch`, `model`,
            `loss(model, batch, generators) -> (N,)`, `preview(model, batch, generators) -> dict` and `export(model, folder)`; docs/adding_a_method.md says more.

    Returns:
        `Path`: The exported folder.
    """
    loop, optim = options.train, options.optim
    output_dir = Path(loop.output_dir)
    accelerator = Accelerator(
        gradient_accumulation_steps=loop.gradient_accumulation_steps,
        mixed_precision=loop.mixed_precision,
        log_with=None if loop.report_to == "none" else loop.report_to,
        project_dir=output_dir,
        step_scheduler_with_optimizer=False,
        # The first process may be busy for long while the others wait: a phantom is made, a card is written.
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=2))],
    )
    _check_options(options, output_dir)
    if loop.push_to_hub and accelerator.is_main_process:
        _check_hub(loop)

    # 1. Data.
    train_split, validation_split = _load_splits(accelerator, options, objective_class)
    processor = VolumeProcessor.from_dict(train_split.processor_settings)
    VolumeProcessor.from_dict({**processor.settings(), **options.processor})  # unknown keys and values
    processor.check_equal(options.processor, "the block `processor` of the configuration asks for")

    # 2. Objective, optimizer, average.
    set_seed(loop.seed)
    objective = objective_class.from_options(options, processor)
    if objective.updates_per_batch > 1 and isinstance(train_split, StreamedSplit):
        raise ValueError(
            f"`objective.updates_per_batch` is {objective.updates_per_batch}, but `data.streaming` reads every slice once: set one to 1,"
            " or the other to false."
        )
    optimizer = make_optimizer(objective.model.parameters(), optim)
    # Stepped by hand once per optimizer step and not prepared: accelerate would count processes as steps.
    lr_scheduler = make_lr_scheduler(optimizer, optim, loop.max_steps)
    model, optimizer = accelerator.prepare(objective.model, optimizer)
    set_seed(loop.seed, device_specific=True)  # dropout differs between processes
    progress = Progress(
        loop.batch_size * accelerator.num_processes * loop.gradient_accumulation_steps, objective.updates_per_batch
    )
    accelerator.register_for_checkpointing(lr_scheduler, progress)
    ema = None
    if loop.ema.enabled:
        ema = make_ema(accelerator.unwrap_model(model).parameters(), loop.ema)
        ema.to(accelerator.device)
        accelerator.register_for_checkpointing(ema)

    # 3. State.
    if loop.resume:
        checkpoint = _find_checkpoint(loop.resume, output_dir)
        accelerator.load_state(checkpoint)
        # Checkpoints lie between optimizer steps; accelerate would go on counting forward passes where it was, which is
        # wrong under another accumulation. And it loads the average to the CPU.
        accelerator.step = 0
        if ema is not None:
            ema.to(accelerator.device)
        accelerator.print(f"Resumed from {checkpoint} at step {progress.step}.")
    if accelerator.is_main_process:
        output_dir.mkdir(parents=True, exist_ok=True)
        _forget_later_entries(output_dir / "log.jsonl", progress.step)
        (output_dir / "config.yaml").write_text(yaml.safe_dump(_plain(options), sort_keys=False))
    if loop.report_to != "none":
        accelerator.init_trackers("logs")
    batches = PositionBatches(
        progress.step,
        loop.max_steps,
        loop.batch_size,
        loop.gradient_accumulation_steps,
        accelerator.num_processes,
        accelerator.process_index,
        objective.updates_per_batch,
    )
    if isinstance(train_split, StreamedSplit):
        samples = StreamedSamples(
            train_split,
            loop.seed,
            options.data.shuffle_buffer,
            batches,
            objective_class.columns,
            objective_class.trains_on,
        )
        source: dict = {"dataset": samples, "batch_size": None}  # it makes whole batches
    else:
        source = {
            "dataset": SampleStream(train_split, loop.seed, objective_class.columns, objective_class.trains_on),
            "batch_sampler": batches,
        }
    loader = torch.utils.data.DataLoader(
        **source,
        collate_fn=_as_tensors,
        # A generator of its own: starting a loader draws from the global one, which dropout draws from too.
        generator=torch.Generator(),
        num_workers=options.data.num_workers,
        pin_memory=accelerator.device.type == "cuda",
        persistent_workers=options.data.num_workers > 0,
    )

    # 4. Steps.
    folder, upload = output_dir / "pipeline", BackgroundPush()
    hub_arguments = {"private": loop.hub_private}
    start, first_step = time.perf_counter(), progress.step

    def run() -> str:
        seconds = time.perf_counter() - start
        return (
            f"Trained to step {progress.step} with {progress.samples_per_step} slices a step; the steps from {first_step} on took"
            f" {seconds / 60:.3g} minutes on {accelerator.num_processes} x {device_name(accelerator.device)}."
        )

    background = processor.config.value_range[0]
    bar = tqdm(
        total=loop.max_steps, initial=progress.step, desc="training", disable=not accelerator.is_local_main_process
    )
    model.train()
    step_loss = torch.zeros((), device=accelerator.device)
    for batch in loader:
        with accelerator.accumulate(model):
            generators = sample_generators(loop.seed, 0, batch.pop("position"), accelerator.device)
            batch = {name: values.to(accelerator.device, non_blocking=True) for name, values in batch.items()}
            batch = augment(batch, generators, options.data.augmentation, background)
            batch["image"] = augment_intensity(
                batch["image"], generators, options.data.augmentation, processor.config.value_range
            )
            update = progress.step % objective.updates_per_batch
            loss = objective.loss(model, batch, generators, **({"update": update} if update else {})).mean()
            accelerator.backward(loss)
            step_loss += loss.detach() / loop.gradient_accumulation_steps
            if accelerator.sync_gradients and optim.max_grad_norm:
                accelerator.clip_grad_norm_(model.parameters(), optim.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
        if not accelerator.sync_gradients:
            continue
        # A step that mixed precision skipped because of an overflow changes neither average nor learning rate.
        if not accelerator.optimizer_step_was_skipped:
            lr_scheduler.step()
            if ema is not None:
                ema.step(accelerator.unwrap_model(model).parameters())
        progress.step += 1
        bar.update()

        last = progress.step == loop.max_steps
        saves = last or (loop.checkpoint_every and progress.step % loop.checkpoint_every == 0)
        if saves or progress.step % loop.log_every == 0:
            value = accelerator.reduce(step_loss, "mean").item()
            if not np.isfinite(value):
                raise FloatingPointError(
                    f"The loss is {value} at step {progress.step}. Lower `optim.learning_rate`, or use bf16 instead of fp16;"
                    " the last checkpoint is unharmed."
                )
            _log(accelerator, output_dir, progress.step, {"loss": value, "lr": lr_scheduler.get_last_lr()[0]})
            bar.set_postfix(loss=f"{value:.4f}")
        step_loss = torch.zeros_like(step_loss)
        if loop.validate_every and (last or progress.step % loop.validate_every == 0):
            _validate(accelerator, objective, model, ema, validation_split, options, progress.step)
        if saves:
            _save_checkpoint(accelerator, output_dir, progress.step, loop.checkpoint_limit)
            pushes = loop.push_to_hub and loop.hub_strategy == "every_save" and accelerator.is_main_process
            # A push that takes longer than the way to the next checkpoint makes that one wait for the one after it.
            if pushes and not last and not upload.busy:
                unwrapped = accelerator.unwrap_model(model).eval()
                if ema is not None:
                    ema.store(unwrapped.parameters())
                    ema.copy_to(unwrapped.parameters())
                _export(objective, unwrapped, folder, options, train_split, validation_split, run())
                if ema is not None:
                    ema.restore(unwrapped.parameters())
                unwrapped.train()
                upload.start(folder, loop.push_to_hub, commit_message=f"Step {progress.step}", **hub_arguments)
    bar.close()

    # 5. The finished pipeline, with the averaged weights.
    upload.wait()
    accelerator.wait_for_everyone()
    unwrapped = accelerator.unwrap_model(model)
    if ema is not None:
        ema.copy_to(unwrapped.parameters())
    if accelerator.is_main_process:
        _export(objective, unwrapped.eval(), folder, options, train_split, validation_split, run())
    accelerator.wait_for_everyone()
    accelerator.end_training()  # takes the process group down: nothing waits for anybody from here on
    if accelerator.is_main_process:
        print(f"Pipeline written to {folder}")
        if loop.push_to_hub:
            message = f"Step {progress.step}, the end of the training"
            print(f"Pushed to {push_folder(folder, loop.push_to_hub, commit_message=message, **hub_arguments)}")
    return folder


def _load_splits(
    accelerator: Accelerator, options: TrainOptions, objective: type
) -> tuple[PreparedSplit | StreamedSplit, PreparedSplit | None]:
    data = options.data
    if data.streaming:
        if data.path in PHANTOMS and not Path(data.path).is_dir():
            raise ValueError(
                f"`data.streaming` is for a folder or a data set on the Hub, got the phantom {data.path!r}, which is made on this"
                " machine: leave `data.streaming` out, or name other data with `--data`."
            )
        if data.num_workers not in (0, 1):
            raise ValueError(
                f"`data.num_workers` must be 0 or 1 with `data.streaming`, got {data.num_workers}: every worker would read the whole"
                " data set."
            )
        if data.shuffle_buffer < 1:
            raise ValueError(f"`data.shuffle_buffer` must be at least 1, got {data.shuffle_buffer}.")
    # The first process makes a phantom or fills a cache, the others then find it.
    with accelerator.main_process_first():
        train_split = load_prepared(data.path, data.train_split, streaming=data.streaming)
        if not train_split.count_rows(objective.trains_on):
            raise ValueError(
                f"The split `{data.train_split}` of {data.path} holds no {objective.trains_on} slice, which this method learns from:"
                " name another with `--data.train_split`, or prepare other data."
            )
        if not options.train.validate_every:
            return train_split, None
        validation_split = load_prepared(data.path, data.validation_split)
    if not _validation_rows(validation_split, objective).size:
        raise ValueError(
            f"The split `{options.data.validation_split}` holds no {objective.validates_on} slice to validate on: name another with"
            " `--data.validation_split`, or switch validation off with `--train.validate_every 0`."
        )
    return train_split, validation_split


def _check_hub(loop: LoopOptions) -> None:
    """What a push at the end would fail at, found before the training."""
    if loop.hub_picture and not Path(loop.hub_picture).is_file():
        raise FileNotFoundError(f"`train.hub_picture`: there is no file {loop.hub_picture}.")
    try:
        open_repository(loop.push_to_hub, private=loop.hub_private, licence=loop.hub_licence)
    except PublishingError as error:
        raise PublishingError(
            f"{loop.push_to_hub} cannot be pushed to: {error} Nothing was trained; repair it, or leave `--push_to_hub` out and"
            " push later."
        ) from error


def _export(
    objective, model, folder: Path, options: TrainOptions, train_split, validation_split, training: str
) -> None:
    """Writes the pipeline, and what somebody who finds the folder wants to know of its training."""
    pipeline = objective.export(model, folder)
    published = _published(options)
    (folder / "config.yaml").write_text(yaml.safe_dump(published, sort_keys=False))
    recipe = dict(train_split.recipe)
    if objective.trains_on == "healthy" and recipe.get("slices", {}).get("train", "all") == "all":
        recipe["trained_on"] = "not_anomalous"
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    if pipeline is None:
        parts = ", ".join(sorted(path.parent.name for path in folder.glob("*/*.json")))
        card = f"---\nlicense: {options.train.hub_licence}\ntags:\n- anodiff\n---\n\n# Part of a pipeline: {options.method}\n\n"
        card += f"{parts}, made by anodiff. {training} Research use only, not a medical device.\n"
        (folder / "README.md").write_text(card)
        return
    picture = _example(folder, options, train_split, objective.validates_on)
    card = make_card(
        pipeline,
        repo_id=options.train.push_to_hub,
        config=published,
        recipe=recipe,
        population=describe_population(recipe) if recipe else None,
        data_summary={
            name: {
                "subjects": len(split.subjects),
                "slices": split.count_rows(objective.trains_on),
            }
            for name, split in (("train", train_split), ("validation", validation_split))
            if split is not None
        },
        training=training,
        picture=picture,
        licence=options.train.hub_licence,
    )
    complete_folder(folder, str(card))


def _example(folder: Path, options: TrainOptions, split, shown: str) -> tuple[str, str] | None:
    """Copies the picture of the card: the user's, or the last validation of a phantom. Scans of people are nobody's example."""
    given, samples = options.train.hub_picture, sorted(Path(options.train.output_dir, "samples").glob("*.png"))
    if given:
        shutil.copy(given, folder / f"example{Path(given).suffix}")
        return f"example{Path(given).suffix}", "An example"
    if not is_phantom(split.recipe) or not samples:
        return None
    shutil.copy(samples[-1], folder / "example.png")
    slices = "Healthy slices" if shown == "healthy" else "Slices"
    return "example.png", f"{slices} of the phantom that the network has not seen in training"


def _validate(accelerator, objective, model, ema, split: PreparedSplit, options: TrainOptions, step: int) -> None:
    """Loss of the averaged weights on fixed slices with fixed noise, spread over the processes, and a picture."""
    loop, device = options.train, accelerator.device
    allowed = _validation_rows(split, objective)
    chosen = allowed[np.linspace(0, allowed.size - 1, min(loop.validation_slices, allowed.size)).astype(int)]

    def read(rows: list[int]) -> dict[str, torch.Tensor]:
        return {
            name: values.to(device) for name, values in _as_tensors(split.read_rows(rows, objective.columns)).items()
        }

    unwrapped = accelerator.unwrap_model(model)
    if ema is not None:
        ema.store(unwrapped.parameters())
        ema.copy_to(unwrapped.parameters())
    unwrapped.eval()
    losses = torch.zeros(len(chosen), device=device)
    with torch.no_grad(), accelerator.autocast():
        mine = range(accelerator.process_index, len(chosen), accelerator.num_processes)
        for start in range(0, len(mine), loop.batch_size):
            positions = list(mine[start : start + loop.batch_size])
            generators = sample_generators(loop.seed, 1, positions, device)
            losses[positions] = objective.loss(unwrapped, read(chosen[positions].tolist()), generators).float()
        if accelerator.is_main_process:
            shown = chosen[np.linspace(0, len(chosen) - 1, min(6, len(chosen))).astype(int)].tolist()
            rows = objective.preview(unwrapped, read(shown), sample_generators(loop.seed, 2, shown, device))
            low, high = objective.processor.config.value_range
            _draw_preview(rows, (low, high), Path(loop.output_dir) / "samples" / f"step-{step:07d}.png")
    if ema is not None:
        ema.restore(unwrapped.parameters())
    unwrapped.train()
    losses = accelerator.reduce(losses, "sum")
    _log(accelerator, Path(loop.output_dir), step, {"validation_loss": losses.mean().item()})


def _draw_preview(rows: dict[str, torch.Tensor], value_range: tuple[float, float], path: Path) -> None:
    from matplotlib.figure import Figure

    columns = len(next(iter(rows.values())))
    figure = Figure(figsize=(1.6 * columns, 1.75 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for row, (title, images) in zip(axes, rows.items(), strict=True):
        row[0].set_title(title, loc="left", fontsize=8)
        for axis, image in zip(row, images.float().cpu().numpy(), strict=True):
            axis.imshow(image[0], cmap="gray", vmin=value_range[0], vmax=value_range[1])
            axis.set_axis_off()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


def _log(accelerator: Accelerator, output_dir: Path, step: int, values: dict[str, float]) -> None:
    accelerator.log(values, step=step)
    if accelerator.is_main_process:
        with open(output_dir / "log.jsonl", "a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")


def _save_checkpoint(accelerator: Accelerator, output_dir: Path, step: int, limit: int) -> None:
    # Written beside its place and renamed: a checkpoint that has its name is whole.
    target = output_dir / "checkpoints" / f"step-{step:07d}"
    temporary = target.with_name(target.name + ".partial")
    if accelerator.is_main_process:
        shutil.rmtree(temporary, ignore_errors=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(temporary)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        shutil.rmtree(target, ignore_errors=True)
        os.replace(temporary, target)
        for old in _checkpoints(output_dir)[: -max(limit, 1)]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()


def _checkpoints(output_dir: Path) -> list[Path]:
    folders = (output_dir / "checkpoints").glob("step-*")
    return sorted(path for path in folders if path.suffix != ".partial")


def _find_checkpoint(resume: str, output_dir: Path) -> Path:
    if resume != "latest":
        if not Path(resume).is_dir():
            raise FileNotFoundError(f"`train.resume`: there is no checkpoint folder {resume}.")
        return Path(resume)
    checkpoints = _checkpoints(output_dir)
    if not checkpoints:
        raise FileNotFoundError(f"`train.resume` is 'latest', but {output_dir / 'checkpoints'} holds no checkpoint.")
    return checkpoints[-1]


def _check_options(options: TrainOptions, output_dir: Path) -> None:
    loop, optim = options.train, options.optim
    at_least_one = ("max_steps", "batch_size", "gradient_accumulation_steps", "log_every", "checkpoint_limit")
    for names, smallest in (((*at_least_one, "validation_slices"), 1), (("validate_every", "checkpoint_every"), 0)):
        for name in names:
            if getattr(loop, name) < smallest:
                raise ValueError(f"`train.{name}` must be at least {smallest}, got {getattr(loop, name)}.")
    for name in ("gamma", "bias_field", "blur", "ghosting"):
        probability = getattr(options.data.augmentation, name)
        if not 0 <= probability <= 1:
            raise ValueError(f"`data.augmentation.{name}` must be a probability from 0 to 1, got {probability}.")
    if loop.ema.start_step < 0:
        raise ValueError(f"`train.ema.start_step` must not be negative, got {loop.ema.start_step}.")
    check_optim(optim)
    if not loop.resume and _checkpoints(output_dir):
        raise FileExistsError(
            f"{output_dir} holds checkpoints of an earlier run. Go on with `--train.resume latest`, or choose another"
            " `--train.output_dir`."
        )


def _plain(options: TrainOptions) -> dict:
    # Through JSON: tuples become lists, as they are read.
    return json.loads(json.dumps(dataclasses.asdict(options)))


def _published(options: TrainOptions) -> dict:
    """The configuration as it travels with the weights: without folders of this machine."""
    config = _plain(options)
    if Path(options.data.path).exists():
        config["data"]["path"] = Path(options.data.path).name
    # A part that was trained before.
    for name, value in options.objective.items():
        if name.endswith("_path") and Path(value).exists():
            config["objective"][name] = Path(value).name
    config["train"] |= {"output_dir": Path(options.train.output_dir).name, "resume": None}
    return config


def _forget_later_entries(path: Path, step: int) -> None:
    """Drops what a run logged after the checkpoint that it is resumed from: it will be logged again."""
    if path.exists():
        lines = path.read_text().splitlines(keepends=True)
        path.write_text("".join(line for line in lines if json.loads(line)["step"] <= step))


def _as_tensors(batch: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(np.ascontiguousarray(values)) for name, values in batch.items()}


def _validation_rows(split: PreparedSplit, objective: type) -> np.ndarray:
    """The slices that an objective is validated on: those of a population, or those with a known label."""
    if objective.validates_on == "labelled":
        return np.flatnonzero(split.labels >= 0)
    return split.rows_of(objective.validates_on)
