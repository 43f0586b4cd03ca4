"""The loop that every objective shares. accelerate does devices, precision, accumulation, trackers and state.

Sample number p of a run (p = 0, 1, ...) decides everything random about it: its slice is entry p of an endless sequence of
permutations of the training set, and augmentation, timestep and noise come from a generator keyed by (seed, p). Optimizer
step s consumes the samples s G ... (s + 1) G - 1 with G = batch size x processes x accumulation. So a run that was
interrupted, or that has another number of processes with the same G, sees the same samples with the same noise.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.utils.data
import yaml
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, set_seed
from diffusers.optimization import SchedulerType, get_scheduler
from diffusers.training_utils import EMAModel
from tqdm.auto import tqdm

from ..data.prepared import PreparedSplit, load_prepared
from ..data.processor import VolumeProcessor
from ..hub.model_card import make_card
from ..hub.publishing import complete_folder, push_folder
from .augmentation import augment
from .options import TrainOptions


class SampleStream(torch.utils.data.Dataset):
    """Samples by number: the slices of an endless sequence of permutations of a split."""

    def __init__(self, split: PreparedSplit, seed: int):
        self.split = split
        self.seed = seed
        self._epoch, self._order = -1, None

    def __getitems__(self, positions: list[int]) -> dict:
        rows = [self._row(position) for position in positions]
        return {"image": self.split.__getitems__(rows)["image"], "position": np.array(positions)}

    def _row(self, position: int) -> int:
        epoch, index = divmod(position, len(self.split))
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = np.random.default_rng([self.seed, epoch]).permutation(len(self.split))
        return int(self._order[index])


class PositionBatches:
    """Sample numbers of each forward pass of one process, from optimizer step `first_step` on."""

    def __init__(
        self, first_step: int, last_step: int, batch_size: int, accumulation: int, processes: int, process: int
    ):
        self.steps = range(first_step, last_step)
        self.batch_size = batch_size
        self.accumulation = accumulation
        self.processes = processes
        self.process = process

    def __len__(self) -> int:
        return len(self.steps) * self.accumulation

    def __iter__(self):
        for step in self.steps:
            for micro in range(self.accumulation):
                start = ((step * self.accumulation + micro) * self.processes + self.process) * self.batch_size
                yield list(range(start, start + self.batch_size))


class Progress:
    """Optimizer steps done, and the number of samples per step that they were done with; part of a checkpoint."""

    def __init__(self, samples_per_step: int):
        self.step = 0
        self.samples_per_step = samples_per_step

    def state_dict(self) -> dict:
        return {"step": self.step, "samples_per_step": self.samples_per_step}

    def load_state_dict(self, state: dict) -> None:
        if state["samples_per_step"] != self.samples_per_step:
            raise ValueError(
                f"The checkpoint was trained with {state['samples_per_step']} samples per step, this run has"
                f" {self.samples_per_step} (batch size x processes x accumulation). Make them equal, or start a new run."
            )
        self.step = state["step"]


def sample_generators(seed: int, stream: int, positions, device: torch.device) -> list[torch.Generator]:
    """One generator per sample; `stream` 0 is training, 1 validation."""
    keys = [np.random.SeedSequence([seed, stream, int(p)]).generate_state(1, np.uint64)[0] for p in positions]
    return [torch.Generator(device).manual_seed(int(key)) for key in keys]


def fit(options: TrainOptions, objective_class: type) -> Path:
    """
    Trains one objective and writes `<output_dir>/pipeline`, a folder that `from_pretrained` reads.

    Args:
        options ([`TrainOptions`]): The run.
        objective_class (`type`):
            Gives `from_options(options, processor)`, `model`, `loss(model, images, generators) -> (N,)`,
            `preview(model, images, generators) -> dict` and `export(model, folder)`.

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

    # 1. Data.
    train_split, validation_split = _load_splits(accelerator, options)
    processor = VolumeProcessor.from_dict(train_split.processor_settings)
    VolumeProcessor.from_dict({**processor.settings(), **options.processor})  # unknown keys and values
    processor.check_equal(options.processor, "the block `processor` of the configuration asks for")

    # 2. Objective, optimizer, average.
    set_seed(loop.seed)
    objective = objective_class.from_options(options, processor)
    optimizer = torch.optim.AdamW(
        objective.model.parameters(),
        lr=optim.learning_rate,
        betas=tuple(optim.betas),
        weight_decay=optim.weight_decay,
    )
    # Stepped by hand once per optimizer step and not prepared: accelerate would count processes as steps.
    lr_scheduler = get_scheduler(
        optim.lr_scheduler,
        optimizer,
        num_warmup_steps=optim.warmup_steps,
        num_training_steps=optim.lr_total_steps or loop.max_steps,
    )
    model, optimizer = accelerator.prepare(objective.model, optimizer)
    set_seed(loop.seed, device_specific=True)  # dropout differs between processes
    progress = Progress(loop.batch_size * accelerator.num_processes * loop.gradient_accumulation_steps)
    accelerator.register_for_checkpointing(lr_scheduler, progress)
    ema = None
    if loop.ema.enabled:
        # diffusers' average has its own warm-up, (1 + step) / (10 + step); a fixed decay needs both arguments below.
        fixed = {} if loop.ema.warmup else {"min_decay": loop.ema.decay, "update_after_step": -1}
        ema = EMAModel(accelerator.unwrap_model(model).parameters(), decay=loop.ema.decay, **fixed)
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
    loader = torch.utils.data.DataLoader(
        SampleStream(train_split, loop.seed),
        batch_sampler=PositionBatches(
            progress.step,
            loop.max_steps,
            loop.batch_size,
            loop.gradient_accumulation_steps,
            accelerator.num_processes,
            accelerator.process_index,
        ),
        collate_fn=_as_tensors,
        # A generator of its own: starting a loader draws from the global one, which dropout draws from too.
        generator=torch.Generator(),
        num_workers=options.data.num_workers,
        pin_memory=accelerator.device.type == "cuda",
        persistent_workers=options.data.num_workers > 0,
    )

    # 4. Steps.
    background = processor.config.value_range[0]
    bar = tqdm(
        total=loop.max_steps, initial=progress.step, desc="training", disable=not accelerator.is_local_main_process
    )
    model.train()
    step_loss = torch.zeros((), device=accelerator.device)
    for batch in loader:
        with accelerator.accumulate(model):
            images = batch["image"].to(accelerator.device, non_blocking=True)
            generators = sample_generators(loop.seed, 0, batch["position"], accelerator.device)
            images = augment(images, generators, options.data.augmentation, background)
            loss = objective.loss(model, images, generators).mean()
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
    bar.close()

    # 5. The finished pipeline, with the averaged weights.
    accelerator.wait_for_everyone()
    folder = output_dir / "pipeline"
    unwrapped = accelerator.unwrap_model(model)
    if ema is not None:
        ema.copy_to(unwrapped.parameters())
    if accelerator.is_main_process:
        _export(objective, unwrapped.eval(), folder, options, train_split, validation_split)
    accelerator.wait_for_everyone()
    accelerator.end_training()  # takes the process group down: nothing waits for anybody from here on
    if accelerator.is_main_process:
        print(f"Pipeline written to {folder}")
        if loop.push_to_hub:
            print(f"Pushed to {push_folder(folder, loop.push_to_hub)}")
    return folder


def _load_splits(accelerator: Accelerator, options: TrainOptions) -> tuple[PreparedSplit, PreparedSplit | None]:
    # The first process makes a phantom or fills a cache, the others then find it.
    with accelerator.main_process_first():
        train_split = load_prepared(options.data.path, options.data.train_split)
        if not options.train.validate_every:
            return train_split, None
        validation_split = load_prepared(options.data.path, options.data.validation_split)
    if not (validation_split.labels != 1).any():
        raise ValueError(
            f"The split `{options.data.validation_split}` holds no healthy slice to validate on: name another with"
            " `--data.validation_split`, or switch validation off with `--train.validate_every 0`."
        )
    return train_split, validation_split


def _export(objective, model, folder: Path, options: TrainOptions, train_split, validation_split) -> None:
    """Writes the pipeline, and what somebody who finds the folder wants to know of its training."""
    pipeline = objective.export(model, folder)
    published = _published(options)
    (folder / "config.yaml").write_text(yaml.safe_dump(published, sort_keys=False))
    (folder / "recipe.yaml").write_text(yaml.safe_dump(train_split.recipe, sort_keys=False))
    card = make_card(
        pipeline,
        repo_id=options.train.push_to_hub,
        config=published,
        recipe=train_split.recipe,
        data_summary={
            name: {"subjects": len(split.subjects), "slices": len(split)}
            for name, split in (("train", train_split), ("validation", validation_split))
            if split is not None
        },
    )
    complete_folder(folder, str(card))


def _validate(accelerator, objective, model, ema, split: PreparedSplit, options: TrainOptions, step: int) -> None:
    """Loss of the averaged weights on fixed healthy slices with fixed noise, spread over the processes, and a picture."""
    loop, device = options.train, accelerator.device
    healthy = np.flatnonzero(split.labels != 1)
    chosen = healthy[np.linspace(0, healthy.size - 1, min(loop.validation_slices, healthy.size)).astype(int)]
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
            images = torch.from_numpy(split.__getitems__(chosen[positions].tolist())["image"]).float().to(device)
            generators = sample_generators(loop.seed, 1, positions, device)
            losses[positions] = objective.loss(unwrapped, images, generators).float()
        if accelerator.is_main_process:
            shown = chosen[np.linspace(0, len(chosen) - 1, min(6, len(chosen))).astype(int)].tolist()
            images = torch.from_numpy(split.__getitems__(shown)["image"]).float().to(device)
            rows = objective.preview(unwrapped, images, sample_generators(loop.seed, 2, shown, device))
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
    schedules = [schedule.value for schedule in SchedulerType]
    if optim.lr_scheduler not in schedules:
        raise ValueError(f"`optim.lr_scheduler` must be one of {', '.join(schedules)}, got {optim.lr_scheduler!r}.")
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
    config["train"] |= {"output_dir": Path(options.train.output_dir).name, "resume": None}
    return config


def _forget_later_entries(path: Path, step: int) -> None:
    """Drops what a run logged after the checkpoint that it is resumed from: it will be logged again."""
    if path.exists():
        lines = path.read_text().splitlines(keepends=True)
        path.write_text("".join(line for line in lines if json.loads(line)["step"] <= step))


def _as_tensors(batch: dict) -> dict:
    return {"image": torch.from_numpy(np.ascontiguousarray(batch["image"])).float(), "position": batch["position"]}
