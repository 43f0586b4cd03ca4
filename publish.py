"""Pushes the checkpoints that come with the package to the Hub, each as a repository OWNER/NAME with its card, and the
Space that shows them.

python publish.py --owner OWNER                      # all of them
python publish.py --owner OWNER anoddpm-flair
python publish.py --owner OWNER --space              # the Space OWNER/anodiff, which serves them in a browser

What is on the Hub already is not sent again, so that the same command goes on after an interruption.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from anodiff.configs import parse_options
from anodiff.running import run_script


# What a user does after a stop.
GO_ON = "The same command goes on."

# Name of the Space.
_SPACE = "anodiff"


@dataclass
class PublishOptions:
    """Which checkpoints, where to."""

    names: list[str] = field(default_factory=list)
    owner: str = ""
    """User or organisation on the Hub."""
    space: bool = False
    """Push the Space, and of the checkpoints only those that are named."""
    private: bool | None = None
    """Visibility of new repositories; the account's default if not given."""


def main(argv: list[str] | None = None) -> int:
    """Pushes checkpoints; returns 0, or 1 if one failed."""
    options = parse_options(PublishOptions, argv, prog="publish.py", description=__doc__, positional="names")
    if not options.owner:
        raise ValueError("`--owner` is missing: a user or an organisation on the Hub.")

    from anodiff.checks import check_choice
    from anodiff.hub import shipped
    from anodiff.hub.publishing import PublishingError

    known = shipped.list_shipped()
    for name in options.names:
        check_choice("names", name, known)
    pushes = {name: push for name in options.names or (() if options.space else known)}
    if options.space:
        pushes[_SPACE] = push_space
    failed = []
    for name, bring in pushes.items():
        try:
            print(f"{name}: {bring(name, f'{options.owner}/{name}', options.private)}", flush=True)
        except PublishingError as error:
            failed.append(name)
            print(f"FAILED {name}: {str(error).partition(' All files are safe')[0]}", file=sys.stderr)
    if failed:
        print(f"Not pushed: {', '.join(failed)}. {GO_ON}", file=sys.stderr)
    return 1 if failed else 0


def push(name: str, repo_id: str, private: bool | None) -> str:
    """Pushes one checkpoint, complete with what it shares with others; returns the URL. A card that somebody has
    changed on the Hub stays, and a line says so."""
    import torch

    from anodiff import AnomalyPipeline
    from anodiff.files import read_json, read_text, write_json
    from anodiff.hub import shipped
    from anodiff.hub.model_card import move_card
    from anodiff.hub.publishing import push_folder
    from anodiff.training.export import seal

    source = shipped.SHIPPED / name
    card = seal(move_card(read_text(source / "README.md"), name, repo_id))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary, name)
        shutil.copytree(source, folder)
        record = read_json(folder / shipped.RECORD)
        if record["shares"]:
            # The stored weights, in their own precision, as they are.
            AnomalyPipeline.from_pretrained(source, dtype=torch.float16).save_pretrained(folder)
            write_json(folder / shipped.RECORD, {**record, "shares": {}})
        message = f"Checkpoint {name} of anodiff"
        return push_folder(
            folder, repo_id, private=private, commit_message=message, make_card=partial(_choose, card, repo_id)
        )


def push_space(name: str, repo_id: str, private: bool | None) -> str:
    """Pushes the Space, as [`push`] does a checkpoint."""
    from anodiff.files import read_text
    from anodiff.hub.publishing import push_folder
    from anodiff.hub.space import write_space
    from anodiff.training.export import seal

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary, name)
        write_space(folder)
        make_card = partial(_choose, seal(read_text(folder / "README.md")), repo_id)
        message = "Pages and package of anodiff"
        return push_folder(
            folder, repo_id, private=private, commit_message=message, repo_type="space", make_card=make_card
        )


def _choose(card: str, repo_id: str, there: str | None) -> str:
    """Ours, or that of the repository, `there`, if somebody has changed it."""
    from anodiff.training.export import is_untouched

    if there is None or is_untouched(there):
        return card
    print(f"The card of {repo_id} was changed there: it stays.", file=sys.stderr)
    return there


if __name__ == "__main__":
    sys.exit(run_script(main, GO_ON))
