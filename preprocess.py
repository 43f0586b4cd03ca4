"""Turns a raw data set into a prepared one: the slices that networks see, with a card, in a folder that `load_dataset` reads.

python preprocess.py --phantom phantom-mini --out prepared/phantom-mini
python preprocess.py --recipe tcga_lgg_flair --root raw/tcga_lgg_flair --out prepared/tcga-lgg
python preprocess.py --recipe my_recipe.yaml --root raw/mine --out prepared/mine --push_to_hub owner/mine
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Literal

from anodiff.configs import parse_options


@dataclass
class PreprocessOptions:
    """What to prepare."""

    out: str
    """Folder to write; must not exist."""
    recipe: str | None = None
    """YAML file, or the name of a recipe of the package (configs/recipes); a phantom has its own."""
    root: str | None = None
    """Folder of the raw data set; with `phantom`, where its raw volumes are kept (they are thrown away by default)."""
    phantom: str | None = None
    """Make this phantom (phantom-mini, phantom-std, phantom-raters) instead of reading a raw data set."""
    phantom_anatomy: Literal["mni152", "geometric"] = "mni152"
    """Anatomy of a phantom of brains; mni152 needs the extra `phantom`."""
    push_to_hub: str | None = None
    """Hub id of a data set that the result is pushed to."""
    hub_private: bool = True
    """Visibility of a new repository: private unless you say otherwise, because images of people are not yours to give."""


def main(argv: list[str] | None = None) -> int:
    """Prepares one data set. Returns 0, or 1 if something was left out or nothing could be written."""
    options = parse_options(PreprocessOptions, argv, prog="preprocess.py", description=__doc__)
    from anodiff.hub.publishing import PublishingError, open_repository, push_folder

    try:
        if options.phantom is None and (options.recipe is None or options.root is None):
            raise ValueError("Give `--recipe` and `--root` of a raw data set, or `--phantom`.")

        from anodiff.data.preparation import prepare_phantom, prepare_recipe, read_recipe

        recipe = None if options.recipe is None else read_recipe(options.recipe)
        if options.push_to_hub and not options.hub_private and recipe is not None and "license" not in recipe:
            raise ValueError("A public data set needs `license` in the recipe: who may do what with the images?")
        if options.push_to_hub:
            # Whatever a push would fail at, before the work.
            open_repository(options.push_to_hub, private=options.hub_private, repo_type="dataset")
        if options.phantom is not None:
            failures = prepare_phantom(
                options.phantom, options.out, recipe=recipe, anatomy=options.phantom_anatomy, raw=options.root
            )
        else:
            failures = prepare_recipe(recipe, options.root, options.out)
    except (ValueError, OSError, ImportError, PublishingError) as error:
        print(f"preprocess.py: {error}", file=sys.stderr)
        return 1
    print(f"Wrote {options.out}.")
    for subject, reason in failures.items():
        print(f"Left out {subject}: {reason}", file=sys.stderr)
    if options.push_to_hub:
        try:
            url = push_folder(options.out, options.push_to_hub, private=options.hub_private, repo_type="dataset")
        except PublishingError as error:
            print(f"preprocess.py: {error}", file=sys.stderr)
            return 1
        print(f"Pushed to {url}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
