"""Phantom data sets by name: made, prepared, and kept in the cache of `datasets` once they were asked for."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import datasets

from ...checks import check_choice
from ...files import lock_folder, rename_folder
from ..prepare import prepare_recipe, read_recipe, read_rules
from ..shards import code_digest
from .brains import PHANTOM_SETS, SET_SEED, write_phantom
from .head_files import write_heads
from .head_maps import write_head_maps
from .heads import HEADS
from .nodules import RATER_SETS, write_rater_phantom


# Every set that is made and not read; those with several annotations are pictures.
PHANTOMS = (*PHANTOM_SETS, *RATER_SETS)
# Label maps that need no folder.
BUILTIN = "builtin"


def prepare_phantom(
    name: str,
    out: str | Path,
    *,
    recipe: dict | None = None,
    anatomy: str | None = None,
    raw: str | Path | None = None,
    template: str | Path | None = None,
    reference: str | Path | None = None,
    num_proc: int = 1,
    scheduler: str | None = None,
    progress: bool = True,
) -> dict[str, str]:
    """
    Makes a phantom of `PHANTOMS` and prepares it, as [`~data.prepare.prepare_recipe`] does. `"phantom-mini"` and
    `"phantom-std"` are brains, `"phantom-raters"` are pictures with several annotations.

    Args:
        recipe: Instead of the packaged one, see [`phantom_recipe`].
        anatomy: Of brains, as in [`~data.phantoms.brains.make_subject`], "mni152" by default.
        raw: Where the raw volumes are kept; must not exist. They are not kept by default. If the run is interrupted,
            those that are finished wait in `.NAME-raw` beside this or `out`, and the same call goes on from there.
    """
    out = Path(out)
    if out.exists():
        raise FileExistsError(f"`out` {out} exists: choose another folder or delete it first.")
    check_choice("name", name, PHANTOMS)
    brains = name in PHANTOM_SETS
    if anatomy is not None and not brains:
        raise ValueError(
            f"`anatomy` is of phantoms of brains, {', '.join(PHANTOM_SETS)}, and {name} is none: leave it out."
        )
    anatomy = anatomy or "mni152"
    recipe = dict(recipe or phantom_recipe(name))
    recipe["source"] = f"{name} of anodiff, {f'anatomy {anatomy}, ' if brains else ''}seed {SET_SEED}"
    files = {"template": template, "reference": reference}
    _, rules = read_rules(recipe, **files)
    if "correction" in rules:
        rules["correction"].check()  # before the work

    def make(folder: Path) -> None:
        if brains:
            write_phantom(folder, name, anatomy=anatomy, progress=progress)
        else:
            write_rater_phantom(folder, name, progress=progress)

    sharing = {"num_proc": num_proc, "scheduler": scheduler}
    return _prepare_made(make, f"{name}-{anatomy}", recipe, out, raw, **files, **sharing, progress=progress)


def prepare_heads(
    label_maps: str | Path,
    out: str | Path,
    *,
    subjects: int,
    contrasts: Sequence[str] = ("flair",),
    recipe: dict | None = None,
    raw: str | Path | None = None,
    num_proc: int = 1,
    scheduler: str | None = None,
    progress: bool = True,
    **options,
) -> dict[str, str]:
    """
    Makes synthetic heads of label maps and prepares them, as [`~data.prepare.prepare_recipe`] does.

    Args:
        label_maps: As in [`~data.phantoms.head_files.write_heads`], or `"builtin"`, see [`locate_label_maps`].
        subjects, contrasts: As in [`~data.phantoms.head_files.write_heads`].
        recipe: Instead of the packaged one, `heads`, whose modalities are the contrasts.
        raw: As in [`prepare_phantom`].
        options: `skull`, `tested`, `seed` and `device` of [`~data.phantoms.head_files.write_heads`].
    """
    out = Path(out)
    if out.exists():
        raise FileExistsError(f"`out` {out} exists: choose another folder or delete it first.")
    recipe = dict(recipe or read_recipe("heads"))
    files = {contrast: f"{contrast}.nii.gz" for contrast in contrasts}
    recipe["reader_options"] = {**recipe["reader_options"], "modalities": files}
    recipe["processor"] = {**recipe["processor"], "modalities": list(contrasts)}
    recipe["source"] = f"{HEADS} of anodiff, {', '.join(contrasts)}, label maps {Path(label_maps).resolve().name}"
    options = {"subjects": subjects, "contrasts": tuple(contrasts), **options}
    label_maps = locate_label_maps(label_maps)
    key = hashlib.sha256(json.dumps([str(label_maps.resolve()), repr(options)]).encode()).hexdigest()[:16]

    def make(folder: Path) -> None:
        write_heads(folder, label_maps, **options, progress=progress)

    sharing = {"num_proc": num_proc, "scheduler": scheduler}
    return _prepare_made(make, f"heads-{key}", recipe, out, raw, **sharing, progress=progress)


def _prepare_made(
    make: Callable[[Path], None], key: str, recipe: dict, out: Path, raw: str | Path | None, **options
) -> dict[str, str]:
    """Makes raw volumes and prepares them. They are named after what makes them: if a run was interrupted, the next
    one finds those that it finished."""
    kept = None if raw is None else Path(raw)
    if kept is not None and os.path.lexists(kept):
        raise FileExistsError(f"`raw` {kept} exists: choose another folder or delete it first.")
    target = kept or out
    home = target.with_name(f".{target.name}-raw")
    made = home / f"{key}-{code_digest()[:16]}"
    with lock_folder(home):
        for left in set(home.iterdir()) - {made}:
            if left.is_dir():
                shutil.rmtree(left)
        if not made.exists():
            make(made)
        failures = prepare_recipe(recipe, made, out, **options)
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


def locate_label_maps(label_maps: str | Path, progress: bool = True) -> Path:
    """Returns the folder of label maps that is named; of `"builtin"`, unless there is a folder of that name, one in the
    cache of `datasets` with four maps of [`~data.phantoms.head_maps.write_head_maps`], which is made first if it is not
    there."""
    if str(label_maps) != BUILTIN or Path(label_maps).is_dir():
        return Path(label_maps)
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "anodiff" / f"label-maps-{code_digest()[:16]}"
    while not folder.is_dir():
        try:
            write_head_maps(folder, 4, progress=progress)
        except BlockingIOError:
            time.sleep(1)  # another process is making them
        except FileExistsError:
            if not folder.is_dir():
                raise
    return folder


def is_phantom(recipe: dict) -> bool:
    """Returns whether the images that were prepared with `recipe` are of a phantom, so that they may be shown to
    everybody. The rule is the start of `source`, as [`prepare_phantom`] and [`prepare_heads`] write it."""
    return re.match(rf"(phantom-\w+|{HEADS}) of anodiff\b", recipe.get("source", "")) is not None
