"""What a training run can be told. No torch here: `--help` must be fast."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from ..checks import check_integer, check_number


# What may differ from a checkpoint that a training goes on from, because it holds from there on, or is compared
# elsewhere. Everything else has shaped the checkpoint, and lies in it or cannot be told from it.
MAY_CHANGE = (
    "processor",  # compared with the data
    "inference",  # stored in the pipeline at the end
    "data.path",  # the data are compared by what they are, not by where they lie
    "data.validation_split",
    "data.num_workers",
    "train.max_steps",  # the length of the schedule is compared, `optim.lr_total_steps`
    "train.batch_size",  # the slices of a step are compared (`training/state.py`)
    "train.gradient_accumulation_steps",
    *("train.mixed_precision", "train.compile", "train.gradient_checkpointing"),
    *("train.output_dir", "train.resume", "train.report_to"),
    *("train.log_every", "train.validate_every", "train.validation_slices"),
    *("train.checkpoint_every", "train.checkpoint_limit"),
    *("train.push_to_hub", "train.hub_strategy", "train.hub_private", "train.hub_licence", "train.hub_picture"),
)
# Of them those that have shaped it nevertheless: pDDPM draws the patches of its training with the first two, and what a
# network sees is no matter of the data.
_TRAINED = ("inference.patch_size", "inference.overlap", "processor.context")
# Blocks whose keys are not always all there.
_OPEN_BLOCKS = ("unet", "scheduler", "processor", "inference", "objective")
ENDLESS = ("constant", "constant_with_warmup")


@dataclass
class AugmentationOptions:
    """Random changes of a training slice, the same for all its channels."""

    rotation: float = 0.0
    """Largest rotation in degrees, in both directions."""
    translation: tuple[float, float] = (0.0, 0.0)
    """Largest shift along (W, H), as a fraction of the slice, in both directions."""
    scale: tuple[float, float] = (1.0, 1.0)
    """Smallest and largest magnification."""
    horizontal_flip: bool = False
    """Mirror left and right with probability 1/2."""
    gamma: float = 0.0
    """Probability of another contrast, with the authors of cDDPM 0.5."""
    bias_field: float = 0.0
    """Probability of an uneven brightness, with the authors of cDDPM 0.25."""
    blur: float = 0.0
    """Probability of a blur, with the authors of cDDPM 0.25."""
    ghosting: float = 0.0
    """Probability of ghosts, as of a patient who moves, with the authors of cDDPM 0.5."""


@dataclass
class DataOptions:
    """The prepared data set."""

    path: str = "phantom-mini"
    """Folder or Hub id of a prepared data set, the name of a phantom, which is made on first use, or `heads:FOLDER`:
    synthetic heads of the label maps in a folder, a new one for every slice, as the block `processor` says."""
    train_split: str = "train"
    """Split to learn from. Methods that learn from healthy slices leave out those that are known to be anomalous."""
    validation_split: str = "validation"
    """Split of the validation loss: its healthy slices, or those with a label where a method learns from labels."""
    streaming: bool = False
    """Read the training split from the Hub in every epoch, every process all of it, instead of downloading it."""
    shuffle_buffer: int = 256
    """With streaming: slices in memory that the next one is drawn from."""
    num_workers: int = 0
    """Processes that read slices; with streaming, 0 or 1."""
    augmentation: AugmentationOptions = field(default_factory=AugmentationOptions)


@dataclass
class OptimOptions:
    """The optimizer and its learning rate, counted in optimizer steps."""

    algorithm: str = "adamw"
    """adamw, or adam, whose weight decay is part of the gradient."""
    amsgrad: bool = False
    """Divide by the largest second moment so far (Reddi et al. 2018)."""
    learning_rate: float = 1e-4
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the moments."""
    weight_decay: float = 0.0
    """Weight decay, decoupled with adamw."""
    max_grad_norm: float = 1.0
    """Norm that gradients are clipped to; 0 for no clipping."""
    lr_scheduler: str = "constant_with_warmup"
    """A schedule of diffusers: constant, constant_with_warmup, linear, cosine, cosine_with_restarts, polynomial."""
    warmup_steps: int = 0
    """Optimizer steps until the peak."""
    start_lr: float = 0.0
    """Where the schedule begins and ends instead of 0, as ANDi's: with `cosine`, up from it and down to it."""
    lr_total_steps: int | None = None
    """Optimizer steps of the whole schedule; `train.max_steps` by default."""


@dataclass
class EMAOptions:
    """The moving average of the weights, which is what a run saves."""

    enabled: bool = True
    """Without it, the last weights are saved."""
    decay: float = 0.9999
    """Largest decay."""
    warmup: bool = True
    """Decay min(decay, (1 + step) / (10 + step)), so that short runs forget their start; off: `decay` from step 1."""
    start_step: int = 0
    """Steps at first in which the average is a copy of the weights; the warm-up counts from there."""


@dataclass
class LoopOptions:
    """The loop."""

    output_dir: str = "outputs/train"
    """Folder of checkpoints, logs, pictures and the finished pipeline."""
    init_from: str | None = None
    """Pipeline whose network, scheduler and inference values a new run begins with: folder, Hub id, or the name of a
    checkpoint that comes with the library."""
    max_steps: int = 1000
    """Optimizer steps."""
    batch_size: int = 16
    """Slices per process and forward pass; one optimizer step sees batch_size x processes x accumulation of them."""
    gradient_accumulation_steps: int = 1
    """Forward passes per optimizer step."""
    mixed_precision: str | None = None
    """no, fp16 or bf16, on a CPU only where it has instructions for it; what `accelerate launch` was told by default."""
    compile: bool = False
    """Compile the network with torch's inductor; what `accelerate launch --dynamo_backend` was told by default."""
    gradient_checkpointing: bool = False
    """Compute activations again on the way back instead of keeping them: less memory, a third more time."""
    seed: int = 0
    """Seed of weights, order, augmentation, timesteps and noise."""
    ema: EMAOptions = field(default_factory=EMAOptions)
    log_every: int = 10
    """Steps between log entries."""
    validate_every: int = 250
    """Steps between validations, each with its picture; 0 for none."""
    validation_slices: int = 64
    """Slices of a validation."""
    checkpoint_every: int = 500
    """Steps between checkpoints; 0 for none but the last."""
    checkpoint_limit: int = 2
    """Checkpoints that are kept."""
    resume: str | None = None
    """`latest`, a checkpoint folder, or `auto`: the latest one, and a new run where there is none."""
    report_to: str = "tensorboard"
    """Tracker of accelerate: tensorboard, trackio, wandb, ... or none."""
    push_to_hub: str | None = None
    """Hub id that the pipeline is pushed to."""
    hub_strategy: Literal["end", "every_save"] = "end"
    """When: once it is finished, or in the background at every checkpoint as well."""
    hub_private: bool | None = None
    """Visibility of a new repository; the account's default if not given."""
    hub_licence: str = "other"
    """Licence of the weights, an identifier of the Hub such as cc-by-nc-sa-4.0."""
    hub_picture: str | None = None
    """Example picture of the card; phantoms get one by themselves, scans only where you give it."""


@dataclass
class TrainOptions:
    """One run. Keys of unet, scheduler, processor and inference are those of the files of a checkpoint."""

    method: str = "anoddpm"
    """What is trained."""
    unet: dict[str, Any] = field(default_factory=dict)
    """Arguments of the network; `_class_name` is UNet2DModel unless given."""
    scheduler: dict[str, Any] = field(default_factory=dict)
    """Arguments of the method's scheduler."""
    processor: dict[str, Any] = field(default_factory=dict)
    """Settings that the prepared data set must have; a difference is an error."""
    inference: dict[str, Any] = field(default_factory=dict)
    """Inference values that are stored in the pipeline."""
    objective: dict[str, Any] = field(default_factory=dict)
    """Arguments of the method's objective."""
    data: DataOptions = field(default_factory=DataOptions)
    optim: OptimOptions = field(default_factory=OptimOptions)
    train: LoopOptions = field(default_factory=LoopOptions)


def check_options(options: TrainOptions) -> None:
    """Raises a `ValueError` for a value that no run can have; the keys of the blocks are checked by the objective."""
    loop, data = options.train, options.data
    at_least_one = ("max_steps", "batch_size", "gradient_accumulation_steps", "log_every", "validation_slices")
    for name in (*at_least_one, "checkpoint_limit"):
        check_integer(f"train.{name}", vars(loop)[name], 1)
    for name in ("validate_every", "checkpoint_every"):
        check_integer(f"train.{name}", vars(loop)[name], 0)
    check_integer("train.seed", loop.seed, 0, 2**32 - 1)
    check_integer("train.ema.start_step", loop.ema.start_step, 0)
    for name in ("gamma", "bias_field", "blur", "ghosting"):
        check_number(f"data.augmentation.{name}", vars(data.augmentation)[name], least=0, most=1)
    if data.streaming:
        if data.num_workers not in (0, 1):
            raise ValueError(
                f"`data.num_workers` must be 0 or 1 with `data.streaming`, got {data.num_workers}: every worker would"
                " read the whole data set."
            )
        check_integer("data.shuffle_buffer", data.shuffle_buffer, 1)


def check_resumed(checkpoint: str, saved: dict, own: dict) -> None:
    """
    Raises a `ValueError` if a training would go on with other options than shaped its checkpoint, and names each.

    Args:
        checkpoint (`str`): Its folder, for the message.
        saved (`dict`): Options that the checkpoint was trained with, as JSON values in their blocks.
        own (`dict`): Options of this run.
    """
    saved, own = _fixed(saved), _fixed(own)
    differences = []
    for name in dict.fromkeys([*saved, *own]):
        # What a version before this one did not have was not recorded.
        if name not in saved and name.split(".")[0] not in _OPEN_BLOCKS:
            continue
        if saved.get(name) != own.get(name):
            values = ["not given" if name not in options else repr(options[name]) for options in (saved, own)]
            default = " (`train.max_steps` by default)" if name == "optim.lr_total_steps" else ""
            differences.append(f"`{name}`{default} was {values[0]}, is {values[1]}")
    if differences:
        raise ValueError(
            f"{checkpoint} was trained with other options: {'; '.join(differences)}. Give what it was trained with, or"
            " start a new run with another `--train.output_dir`."
        )


def _fixed(options: dict) -> dict:
    """Options that have shaped a checkpoint, by their full names."""
    flat, pending = {}, list(options.items())
    while pending:
        name, value = pending.pop(0)
        if isinstance(value, dict):
            pending = [(f"{name}.{key}", inner) for key, inner in value.items()] + pending
        elif name in _TRAINED or not any(f"{name}.".startswith(f"{free}.") for free in MAY_CHANGE):
            flat[name] = value
    optim = options["optim"]
    total = optim["lr_total_steps"] or options["train"]["max_steps"]
    return flat | {"optim.lr_total_steps": None if optim["lr_scheduler"] in ENDLESS else total}
