"""What a training leaves: the pipeline folder with its card, on disk and on the Hub."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import yaml

from ..data.card import describe_population
from ..data.phantoms.sets import is_phantom
from ..hub.model_card import make_card
from ..hub.publishing import PublishingError, complete_folder, open_repository
from ..pipelines.base import device_name
from .options import LoopOptions, TrainOptions
from .state import Run, plain


def check_hub(loop: LoopOptions) -> None:
    """Opens the repository of `train.push_to_hub`, so that what a push would fail at is found before the training."""
    if loop.hub_picture and not Path(loop.hub_picture).is_file():
        raise FileNotFoundError(f"`train.hub_picture`: there is no file {loop.hub_picture}.")
    try:
        open_repository(loop.push_to_hub, private=loop.hub_private, licence=loop.hub_licence)
    except PublishingError as error:
        raise PublishingError(
            f"{loop.push_to_hub} cannot be pushed to: {error} Nothing was trained; repair it, or leave"
            " `--push_to_hub` out and push later."
        ) from error


def export(run: Run) -> Path:
    """Writes the pipeline with the averaged weights, and what somebody who finds the folder wants to know of its
    training: configuration, recipe of the data and card. Returns the folder."""
    options, objective, folder = run.options, run.objective, run.folder / "pipeline"
    with run.averaged_model() as model:
        pipeline = objective.export(model, folder)
        config = _published(options)
        (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
        recipe = dict(run.train_split.recipe)
        if objective.trains_on == "healthy" and recipe.get("slices", {}).get("train", "all") == "all":
            recipe["trained_on"] = "not_anomalous"
        (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
        if pipeline is None:
            parts = ", ".join(sorted(path.parent.name for path in folder.glob("*/*.json")))
            card = (
                f"---\nlicense: {options.train.hub_licence}\ntags:\n- anodiff\n---\n\n# Part of a pipeline:"
                f" {options.method}\n\n{parts}, made by anodiff. {_training_record(run)} Research use only, not a"
                " medical device.\n"
            )
            (folder / "README.md").write_text(card, encoding="utf-8")
            return folder
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
            training=_training_record(run),
            picture=_example(run, folder),
            licence=options.train.hub_licence,
        )
    complete_folder(folder, str(card))
    return folder


def _training_record(run: Run) -> str:
    minutes = (time.perf_counter() - run.started) / 60
    return (
        f"Trained to step {run.progress.step} with {run.progress.samples_per_step} slices a step; the steps from"
        f" {run.first_step} on took {minutes:.3g} minutes on {run.accelerator.num_processes} x"
        f" {device_name(run.accelerator.device)}."
    )


def _published(options: TrainOptions) -> dict:
    """The configuration as it travels with the weights: without folders of this machine."""
    config = plain(options)
    if Path(options.data.path).exists():
        config["data"]["path"] = Path(options.data.path).name
    # A part that was trained before.
    for name, value in options.objective.items():
        if name.endswith("_path") and Path(value).exists():
            config["objective"][name] = Path(value).name
    config["train"] |= {"output_dir": Path(options.train.output_dir).name, "resume": None}
    return config


def _example(run: Run, folder: Path) -> tuple[str, str] | None:
    """Copies the picture of the card: the user's, or the last validation of a phantom. Scans of people are nobody's
    example."""
    given, samples = run.options.train.hub_picture, sorted((run.folder / "samples").glob("*.png"))
    if given:
        shutil.copy(given, folder / f"example{Path(given).suffix}")
        return f"example{Path(given).suffix}", "An example"
    if not is_phantom(run.train_split.recipe) or not samples:
        return None
    shutil.copy(samples[-1], folder / "example.png")
    slices = "Healthy slices" if run.objective.validates_on == "healthy" else "Slices"
    return "example.png", f"{slices} of the phantom that the network has not seen in training"
