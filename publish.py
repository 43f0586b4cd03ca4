"""Pushes the checkpoints that come with the package to the Hub, each as a repository OWNER/NAME with its card.

python publish.py --owner OWNER                      # all of them
python publish.py --owner OWNER anoddpm-flair

What is on the Hub already is not sent again, so that the same command goes on after an interruption.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from anodiff.configs import parse_options
from anodiff.running import run_script


# What a user does after a stop.
GO_ON = "The same command goes on."


@dataclass
class PublishOptions:
    """Which checkpoints, where to."""

    names: list[str] = field(default_factory=list)
    owner: str = ""
    """User or organisation on the Hub."""
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
    failed = []
    for name in options.names or known:
        try:
            print(f"{name}: {push(name, f'{options.owner}/{name}', options.private)}", flush=True)
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
    from anodiff.training.export import is_untouched, seal

    source = shipped.SHIPPED / name
    card = seal(move_card(read_text(source / "README.md"), name, repo_id))

    def choose_card(there: str | None) -> str:
        if there is None or is_untouched(there):
            return card
        print(f"The card of {repo_id} was changed there: it stays.", file=sys.stderr)
        return there

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary, name)
        shutil.copytree(source, folder)
        record = read_json(folder / shipped.RECORD)
        if record["shares"]:
            # The stored weights, in their own precision, as they are.
            AnomalyPipeline.from_pretrained(source, dtype=torch.float16).save_pretrained(folder)
            write_json(folder / shipped.RECORD, {**record, "shares": {}})
        message = f"Checkpoint {name} of anodiff"
        return push_folder(folder, repo_id, private=private, commit_message=message, make_card=choose_card)


if __name__ == "__main__":
    sys.exit(run_script(main, GO_ON))
