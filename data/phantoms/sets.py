"""Phantom data sets by name: made, prepared, and kept in the cache of `datasets` once they were asked for."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import time
from pathlib import Path

import datasets

from ...checks import check_choice
from ...files import lock_folder, rename_folder
from ..prepare import prepare_recipe, read_recipe, read_rules
from ..shards import code_digest
from .brains import PHANTOM_SETS, SET_SEED, write_phantom
from .nodules import RATER_SETS, write_rater_phantom


# Every set that is made and not read; those with several annotations are pictures.
PHANTOMS = (*PHANTOM_SETS, *RATER_SETS)


def prepare_phantom(
    name: str,
    out: str | Path,
    *,
    recipe: dict | None = None,
    anatomy: str = "mni152",
    raw: str | Path | None = None,
    template: str | Path | None = None,
    reference: str | Path | None = None,
    num_proc: int = 1,
    progress: bool = True,
) -> dict[str, str]:
    """
    Makes a phantom of `PHANTOMS` and prepares it, as [`~data.prepare.prepare_recipe`] does. `"phantom-mini"` and
    `"phantom-std"` are brains, `"phantom-raters"` are pictures with several annotations.

    Args:
        recipe: Instead of the packaged one, see [`phantom_recipe`].
        anatomy: Of brains, as in [`~data.phantoms.brains.make_subject`].
        raw: Where the raw volumes are kept; must not exist. They are not kept by default. If the run is interrupted,
            those that are finished wait in `.NAME-raw` beside this or `out`, and the same call goes on from there.
    """
    out = Path(out)
    if out.exists():
        raise FileExistsError(f"`out` {out} exists: choose another folder or delete it first.")
    check_choice("name", name, PHANTOMS)
    brains = name in PHANTOM_SETS
    recipe = dict(recipe or phantom_recipe(name))
    recipe["source"] = f"{name} of anodiff, {f'anatomy {anatomy}, ' if brains else ''}seed {SET_SEED}"
    files = {"template": template, "reference": reference}
    _, rules = read_rules(recipe, **files)
    if "correction" in rules:
        rules["correction"].check()  # before the work
    # Named after what makes them: if a run was interrupted, the next one finds the volumes that it finished.
    kept = None if raw is None else Path(raw)
    if kept is not None and os.path.lexists(kept):
        raise FileExistsError(f"`raw` {kept} exists: choose another folder or delete it first.")
    target = kept or out
    home = target.with_name(f".{target.name}-raw")
    made = home / f"{name}-{anatomy}-{code_digest()[:16]}"
    with lock_folder(home):
        for left in set(home.iterdir()) - {made}:
            if left.is_dir():
                shutil.rmtree(left)
        if brains and not made.exists():
            write_phantom(made, name, anatomy=anatomy, progress=progress)
        elif not made.exists():
            write_rater_phantom(made, name, progress=progress)
        failures = prepare_recipe(recipe, made, out, **files, num_proc=num_proc, progress=progress)
        if kept is not None:
            rename_folder(made, kept)
        shutil.rmtree(home, ignore_errors=True)
    return failures


def phantom_recipe(name: str) -> dict:
    """Returns the packaged recipe of a phantom of `PHANTOMS`."""
    return read_recipe("phantom_raters" if name in RATER_SETS else "phantom_mini")


def cached_phantom(name: str) -> Path:
    """Returns the folder of a prepared phantom in the cache of `datasets`; makes it first if it is not there."""
    recipe = phantom_recipe(name)
    # Named after the recipe and the code that makes it: what is there never goes stale.
    made_by = hashlib.sha256((json.dumps(recipe) + code_digest()).encode())
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "anodiff" / f"{name}-{made_by.hexdigest()[:16]}"
    while not folder.is_dir():
        try:
            prepare_phantom(name, folder, recipe=recipe)
        except BlockingIOError:
            time.sleep(1)  # another process is making it
        except FileExistsError:
            if not folder.is_dir():
                raise
    return folder


def is_phantom(recipe: dict) -> bool:
    """Returns whether the images that were prepared with `recipe` are of a phantom, so that they may be shown to
    everybody. The rule is the start of `source`, as [`prepare_phantom`] writes it."""
    return re.match(r"phantom-\w+ of anodiff\b", recipe.get("source", "")) is not None
