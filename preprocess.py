"""Turns a raw data set into a prepared one: the slices that networks see, with a card, in a folder for `load_dataset`.

python preprocess.py --phantom phantom-mini --out prepared/phantom-mini
python preprocess.py --heads builtin --contrast t1 --subjects 20 --out prepared/demo
python preprocess.py --heads label_maps --contrast flair --subjects 200 --out prepared/heads
python preprocess.py --recipe tcga_lgg_flair --root raw/tcga_lgg_flair --out prepared/tcga-lgg
python preprocess.py --recipe my_recipe.yaml --root raw/mine --out prepared/mine --num_proc 8 --push_to_hub owner/mine
python preprocess.py --recipe my_recipe.yaml --root raw/mine --out prepared/mine --scheduler tcp://node1:8786
python preprocess.py --recipe shifts_andi --root raw/shifts --template T1.nii --reference raw/BraTS --out prepared/s
python preprocess.py --check prepared/mine prepared/other

An interrupted run goes on where it was if the same command is given again.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import Literal

from anodiff.configs import parse_options
from anodiff.running import run_script


# What a user does after a stop.
GO_ON = "The same command goes on from here."


_WHY_PRIVATE = (
    "\nAs a private repository only: the licence of the images forbids to offer them for download. Keep it private,"
    " and share the recipe instead."
)


@dataclass
class PreprocessOptions:
    """What to prepare, or to check."""

    out: str | None = None
    """Folder to write; must not exist. Of `--check`: table of what was found (leaks.csv by default)."""
    recipe: str | None = None
    """YAML file, or the name of a recipe of the package (configs/recipes); a phantom has its own."""
    root: str | None = None
    """Folder of the raw data set; with `phantom`, where its raw volumes are kept (they are thrown away by default)."""
    num_proc: int = 1
    """Processes that subjects are shared out to; each holds one subject in memory. The result is the same."""
    scheduler: str | None = None
    """Dask cluster that subjects are shared out to instead, tcp://HOST:PORT; its workers must see the same files."""
    template: str | None = None
    """Volume that subjects are registered to, if the recipe's `correction` does."""
    reference: str | None = None
    """Scan whose histograms subjects are matched to, if `correction` does: a file, or a folder, one per modality."""
    phantom: str | None = None
    """Make this phantom (phantom-mini, phantom-std, phantom-raters) instead of reading a raw data set."""
    phantom_anatomy: Literal["mni152", "geometric"] | None = None
    """Anatomy of a phantom of brains, mni152 (default), which needs the extra `phantom`, or geometric."""
    heads: str | None = None
    """Folder of label maps with FreeSurfer's numbers, or builtin for those of the phantom (extra `phantom`); makes
    synthetic heads of them instead of reading scans."""
    contrast: list[str] = field(default_factory=list)
    """Of the heads: flair (default), t1, t2, or any, another at random for every head; given several times, several
    modalities of every head."""
    subjects: int | None = None
    """Healthy heads of the training split, 200 by default."""
    tested: int | None = None
    """Heads of the validation split, and of the test split, 12 each by default; three quarters of them have lesions."""
    skull: bool = False
    """Keep the skull around the heads; their brain masks lie beside them, so that a recipe can use them."""
    push_to_hub: str | None = None
    """Hub id of a data set that the result is pushed to."""
    hub_private: bool = True
    """Visibility of a new repository: private unless you say otherwise, as images of people are not yours to give."""
    check: bool = False
    """Find subjects and nearly equal slices in two splits of the prepared data sets that follow; status 1 if any."""
    prepared: list[str] = field(default_factory=list)


# Sources, and the options that are of others alone.
_OF_HEADS = ("contrast", "subjects", "tested", "skull")
_OF_OTHERS = {
    "heads": ("phantom_anatomy", "template", "reference"),
    "phantom": _OF_HEADS,
    "recipe": (*_OF_HEADS, "phantom_anatomy"),
}


def main(argv: list[str] | None = None) -> int:
    """Prepares one data set, or checks some. Returns 0, or 1 if something was left out, found or went wrong."""
    # `--check A B`: the folders are no value of the switch.
    argv = ["--check=true" if word == "--check" else word for word in (sys.argv[1:] if argv is None else argv)]
    options = parse_options(
        PreprocessOptions,
        argv,
        prog="preprocess.py",
        description=__doc__,
        positional="prepared",
        shorthands={"--contrast": "--contrast+"},
    )
    if options.check:
        return _check(options)
    from anodiff.hub.publishing import open_repository, push_folder

    if options.prepared:
        raise ValueError(f"{options.prepared[0]} is no option. Prepared data sets are named after `--check` only.")
    if options.out is None:
        raise ValueError("Give `--out`, the folder to write.")
    _check_source(options)

    from anodiff.data.layout import VARYING
    from anodiff.data.phantoms.sets import prepare_heads, prepare_phantom
    from anodiff.data.prepare import prepare_recipe, read_recipe

    recipe = None if options.recipe is None else read_recipe(options.recipe)
    public = options.push_to_hub and not options.hub_private
    if public and recipe is not None and "license" not in recipe:
        raise ValueError("A public data set needs `license` in the recipe: who may do what with the images?")
    forbidden = recipe is not None and recipe.get("rehosting") == "forbidden"
    if public and forbidden:
        raise ValueError(
            "`--hub_private false` is refused: by `rehosting: forbidden` of the recipe, the licence forbids to offer"
            " the images for download."
        )
    if options.push_to_hub:
        # Whatever a push would fail at, before the work.
        open_repository(options.push_to_hub, private=options.hub_private, repo_type="dataset")
    sharing = {"num_proc": options.num_proc, "scheduler": options.scheduler}
    common = {"template": options.template, "reference": options.reference, **sharing}
    if options.heads is not None:
        own = {"recipe": recipe, "raw": options.root, **sharing}
        own |= {"subjects": 200 if options.subjects is None else options.subjects, "skull": options.skull}
        own |= {} if options.tested is None else {"tested": options.tested}
        failures = prepare_heads(options.heads, options.out, contrasts=options.contrast or ["flair"], **own)
    elif options.phantom is None:
        failures = prepare_recipe(recipe, options.root, options.out, **common)
    else:
        own = {"recipe": recipe, "anatomy": options.phantom_anatomy, "raw": options.root}
        failures = prepare_phantom(options.phantom, options.out, **own, **common)
    print(f"Wrote {options.out}.")
    for subject, reason in failures.items():
        print(f"Left out {subject}: {reason}", file=sys.stderr)
    if options.push_to_hub:
        kind = {"private": options.hub_private, "repo_type": "dataset", "replaced": VARYING}
        url = push_folder(options.out, options.push_to_hub, **kind)
        print(f"Pushed to {url}" + _WHY_PRIVATE * forbidden)
    return 1 if failures else 0


def _check_source(options: PreprocessOptions) -> None:
    """Raises a `ValueError` unless one source is given, with no option that is of another one alone."""
    if options.phantom is not None and options.heads is not None:
        raise ValueError("Give `--phantom` or `--heads`, not both.")
    source = next((name for name in _OF_OTHERS if getattr(options, name) is not None), None)
    if source is None or (source == "recipe" and options.root is None):
        raise ValueError("Give `--recipe` and `--root` of a raw data set, or `--phantom`, or `--heads`.")
    others = [f"`--{name}`" for name in _OF_OTHERS[source] if getattr(options, name) not in (None, False, [])]
    if others:
        raise ValueError(f"{', '.join(others)} would change nothing in what `--{source}` makes: leave it out.")


def _check(options: PreprocessOptions) -> int:
    from anodiff.data.leaks import find_leaks, write_leaks

    table = options.out or "leaks.csv"
    if not options.prepared:
        raise ValueError("Give the prepared data sets to compare: `--check PREPARED...`.")
    leaks = find_leaks(options.prepared)
    for leak in leaks:
        print(f"Leak: {leak}")
    write_leaks(leaks, table)
    print(f"{len(leaks)} leaks found. Wrote {table}." if leaks else f"No leak found. Wrote {table}.")
    return 1 if leaks else 0


if __name__ == "__main__":
    sys.exit(run_script(main, GO_ON))
