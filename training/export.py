"""What a training leaves: the pipeline folder with its card, on disk and on the Hub."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import yaml
from PIL import Image

from ..data.card import describe_population
from ..data.phantoms.drawn_heads import DRAWN
from ..data.phantoms.sets import is_phantom
from ..files import read_json, read_text, sha256, sync_folder, write_json, write_text
from ..hub.model_card import CURVE, describe_curve, make_card
from ..hub.publishing import PublishingError, complete_folder, copy_picture, open_repository
from ..pipelines.base import device_name
from .checkpoints import make_place, unfinished_name
from .curve import draw_curve, read_losses
from .options import LoopOptions, TrainOptions
from .state import Run, plain


# Last line of a card that a training, or `publish.py`, wrote: the SHA-256 of what stands above, by which it knows that nobody has
# changed it.
_SEAL = "<!-- written by anodiff, SHA-256 {} -->\n"


def check_picture(loop: LoopOptions) -> None:
    """Raises an error if `train.hub_picture` is no picture."""
    if not loop.hub_picture:
        return
    if not Path(loop.hub_picture).is_file():
        raise FileNotFoundError(f"`train.hub_picture`: there is no file {loop.hub_picture}.")
    try:
        Image.open(loop.hub_picture).close()
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"`train.hub_picture`: {loop.hub_picture} is no picture, {error}.") from error


def check_hub(loop: LoopOptions) -> None:
    """Opens the repository of `train.push_to_hub`, so that what a push would fail at is found before the training."""
    try:
        open_repository(loop.push_to_hub, private=loop.hub_private, licence=loop.hub_licence)
    except PublishingError as error:
        raise PublishingError(
            f"{loop.push_to_hub} cannot be pushed to: {error} Nothing was trained; repair it, or leave"
            " `--push_to_hub` out and push later."
        ) from error


def export(run: Run) -> Path:
    """
    Writes the pipeline with the averaged weights, and what somebody who finds the folder wants to know of its
    training: configuration, recipe of the data and card. Returns the folder.

    It is written beside its place and takes that of an earlier one as a whole. Files that are not of a training stay
    in it, a card that somebody has changed among them; an earlier pipeline that was changed otherwise is set aside.
    """
    folder = run.folder / "pipeline"
    unfinished, old = unfinished_name(folder), _old_name(folder)
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    with run.averaged_model() as model:
        _write(run, model, unfinished)
    written = {name: sha256(path) for name, path in _files(unfinished).items()}
    aside = _take_over(folder, unfinished, _read_written(run.folder))
    if aside:
        place = make_place(run.folder, f"before-step-{run.progress.step:07d}")
        print(f"{', '.join(aside)} in {folder} were changed: the earlier folder was moved to {place}.")
        shutil.move(folder, place)
    for path in _files(unfinished).values():
        with open(path, "rb+") as file:
            os.fsync(file.fileno())
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    unfinished.rename(folder)
    sync_folder(run.folder)
    write_json(run.folder / "pipeline.json", written)
    shutil.rmtree(old, ignore_errors=True)
    return folder


def restore_pipeline(output_dir: Path) -> None:
    """Puts the pipeline in its place again that a run took away when it was killed before it had put the new one
    there, and removes what it left. For whoever holds the folder."""
    folder = output_dir / "pipeline"
    old = _old_name(folder)
    if old.is_dir() and not folder.exists():
        old.rename(folder)
    for path in (old, unfinished_name(folder)):
        shutil.rmtree(path, ignore_errors=True)


def choose_card(folder: Path) -> Callable[[str | None], str]:
    """Makes the function that chooses the card of a push, as of [`~hub.publishing.push_folder`]: that of the folder,
    unless the repository has one that no training wrote, or that was changed since."""
    own = read_text(folder / "README.md")

    def choose(there: str | None) -> str:
        if there is None or there == own or is_untouched(there):
            return own
        print(
            f"The card that the repository has is not, or not as it is, of a training: it stays, also in {folder}. For"
            " a new one, remove README.md in both places.",
            file=sys.stderr,
        )
        return there

    return choose


def _write(run: Run, model: torch.nn.Module, folder: Path) -> None:
    options, objective = run.options, run.objective
    pipeline = objective.export(model, folder)
    curve = read_losses(run.folder / "log.jsonl", "validation_loss")
    training = _training_record(run)
    if curve:
        write_text(folder / CURVE, "".join(json.dumps(line) + "\n" for line in curve))
        draw_curve(run.folder / "log.jsonl", run.folder / "losses.png")
        training += "\n\n" + describe_curve(curve)
    config = _without_folders(_published(options))
    write_text(folder / "config.yaml", yaml.safe_dump(config, sort_keys=False, allow_unicode=True))
    recipe = _without_folders(dict(run.train_split.recipe))
    if objective.trains_on == "healthy" and recipe.get("slices", {}).get("train", "all") == "all":
        recipe["trained_on"] = "not_anomalous"
    write_text(folder / "recipe.yaml", yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True))
    if pipeline is None:
        parts = ", ".join(sorted(path.parent.name for path in folder.glob("*/*.json"))) or "A model"
        card = (
            f"---\nlicense: {options.train.hub_licence}\ntags:\n- anodiff\n---\n\n# Part of a pipeline:"
            f" {options.method}\n\n{parts}, made by anodiff. Research use only, not a medical device.\n\n{training}\n"
        )
        write_text(folder / "README.md", seal(card))
        return
    splits = {"train": run.train_split, "validation": run.validation_split}
    card = make_card(
        pipeline,
        repo_id=options.train.push_to_hub,
        config=config,
        recipe=recipe,
        population=describe_population(recipe) if recipe else None,
        data_summary={
            name: {"subjects": len(split.subjects), "slices": split.count_rows(objective.trains_on)}
            for name, split in splits.items()
            if split is not None
        },
        training=training,
        picture=_example(run, folder),
        licence=options.train.hub_licence,
    )
    complete_folder(folder, seal(str(card)))


def _take_over(old: Path, new: Path, written: dict[str, str]) -> list[str]:
    """Copies from an earlier pipeline what is not of a training (`written`: the files of one, and their SHA-256), and
    returns those of its other files that were changed since, with which it must be kept. Then a changed card is kept
    with it, too, as it speaks of it."""
    coming = _files(new)
    theirs = {name: path for name, path in _files(old).items() if written.get(name) != sha256(path)}
    if "README.md" in theirs and is_untouched(read_text(theirs["README.md"])):
        del theirs["README.md"]
    changed = [name for name in theirs if name in coming and name != "README.md"]
    taken = {name: path for name, path in theirs.items() if name not in coming}
    if "README.md" in theirs and not changed:
        taken["README.md"] = theirs["README.md"]
    for name, path in taken.items():
        (new / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, new / name)
    if taken:
        print(f"{', '.join(taken)} in {old} are not, or not as they are, of a training: they stay.")
    return changed


def _files(folder: Path) -> dict[str, Path]:
    return {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}


def _read_written(output_dir: Path) -> dict[str, str]:
    """Files of the last pipeline that a training wrote here, and their SHA-256; none if that is not known."""
    try:
        return dict(read_json(output_dir / "pipeline.json"))
    except (FileNotFoundError, ValueError, TypeError):
        return {}


def _old_name(folder: Path) -> Path:
    return folder.with_name(f".old.{folder.name}")


def seal(card: str) -> str:
    """Returns a card with the last line that says that nobody has changed it, as [`is_untouched`] finds out."""
    text = card.rstrip() + "\n\n"
    return text + _SEAL.format(hashlib.sha256(text.encode()).hexdigest())


def is_untouched(card: str) -> bool:
    """Tells whether a card is as it was sealed."""
    text = re.sub(rf"{_SEAL.format('[0-9a-f]{64}').strip()}\s*\Z", "", card)
    return card.rstrip() == seal(text).rstrip()


def _training_record(run: Run) -> str:
    start = run.options.train.init_from
    begun = "" if start is None else f"Begun with the weights of {_without_folders(start)}. "
    minutes = (time.perf_counter() - run.started) / 60
    return (
        f"{begun}Trained to step {run.progress.step} with {run.progress.samples_per_step} slices a step; the steps from"
        f" {run.first_step} on took {minutes:.3g} minutes on {run.accelerator.num_processes} x"
        f" {device_name(run.accelerator.device)}."
    )


def _published(options: TrainOptions) -> dict:
    """The configuration as it travels with the weights."""
    config = plain(options)
    config["train"] |= {"output_dir": Path(options.train.output_dir).name, "resume": None, "hub_picture": None}
    if options.data.path.startswith(DRAWN):
        config["data"]["path"] = DRAWN + Path(options.data.path.removeprefix(DRAWN)).name
    return config


def _without_folders(value):
    """Values of a configuration without folders of this machine: of a path only its name is left."""
    if isinstance(value, dict):
        return {key: _without_folders(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_without_folders(inner) for inner in value]
    if isinstance(value, str) and "\n" not in value and len(value) < 1000:
        if value.startswith(("~", "..")) or Path(value).is_absolute() or Path(value).exists():
            return Path(value).name
    return value


def _example(run: Run, folder: Path) -> tuple[str, str] | None:
    """Copies the picture of the card: the user's, or the last validation of a phantom. Scans of people are nobody's
    example."""
    given, samples = run.options.train.hub_picture, sorted((run.folder / "samples").glob("*.png"))
    if given:
        copy_picture(given, folder / "example.png")
        return "example.png", "An example"
    if not is_phantom(run.train_split.recipe) or not samples:
        return None
    shutil.copy(samples[-1], folder / "example.png")
    slices = "Healthy slices" if run.objective.validates_on == "healthy" else "Slices"
    return "example.png", f"{slices} of the phantom that the network has not seen in training"
