"""The way of a report into the model card on the Hub."""

from __future__ import annotations

import tempfile
from pathlib import Path

from huggingface_hub import ModelCard

from ..data.phantoms.sets import is_phantom
from ..files import read_text, write_text
from ..hub.model_card import add_evaluation, make_card
from ..hub.publishing import PublishingError, copy_picture, open_repository, push_folder
from ..pipelines.base import AnomalyPipeline
from .options import EvalOptions


# In the output folder: the card of a pushed folder, if that of the repository took its place.
FORMER_CARD = "former-card.md"


def check_hub(options: EvalOptions, is_main_process: bool) -> None:
    """Raises before the evaluation what a push at its end would fail at."""
    remote = [model for model in options.model if not Path(model).is_dir()]
    if options.push_to_hub not in remote and not (len(options.model) == 1 and not remote):
        raise ValueError(
            f"`push_to_hub` must be the one of `model` that is a Hub id, or the id for the only folder in `model`, got"
            f" {options.push_to_hub} for {', '.join(options.model) or 'no model'}."
        )
    if options.hub_picture and not Path(options.hub_picture).is_file():
        raise FileNotFoundError(f"`hub_picture`: there is no file {options.hub_picture}.")
    if options.hub_picture:
        with tempfile.TemporaryDirectory() as folder:
            copy_picture(options.hub_picture, Path(folder, f"picture{Path(options.hub_picture).suffix}"))
    if is_main_process:
        try:
            open_repository(options.push_to_hub, private=options.hub_private)
        except PublishingError as error:
            raise PublishingError(
                f"{options.push_to_hub} cannot be pushed to: {error} Nothing was evaluated."
            ) from error


def push_report(options: EvalOptions, report: dict, recipe: dict, output_dir: Path) -> str:
    """Adds the report to the card of the model: a folder goes up as a whole, of a repository only what changes. The
    card that the repository has stays; a folder whose own one was another gets it, and its own is kept in
    `output_dir`."""
    local = options.push_to_hub not in options.model
    folder = Path(options.model[0]) if local else output_dir / "card"
    folder.mkdir(exist_ok=True)
    name, split = report["data"]["name"], report["data"]["split"]
    picture, source = None, options.hub_picture
    if source is None and is_phantom(recipe) and (output_dir / "cases.png").exists():
        source = output_dir / "cases.png"
    if source is not None:
        picture = f"evaluation-{name.replace('/', '--')}-{split}{Path(source).suffix}"
        copy_picture(source, folder / picture)
    own = read_text(folder / "README.md") if local and (folder / "README.md").exists() else None

    def make_new_card(there: str | None) -> str:
        if own is not None and there is not None and own != there:
            write_text(output_dir / FORMER_CARD, own)
            print(
                f"{folder} gets the card of {options.push_to_hub}; its own one is kept in {output_dir / FORMER_CARD}"
            )
        card = there or own
        if card is None:
            card = str(make_card(AnomalyPipeline.from_pretrained(options.model[0]), repo_id=options.push_to_hub))
        return str(add_evaluation(ModelCard(card), report, repo_id=options.push_to_hub, picture=picture))

    return push_folder(
        folder,
        options.push_to_hub,
        private=options.hub_private,
        commit_message=f"Results on {name}, {split}",
        make_card=make_new_card,
    )
