"""Reads what a pipeline folder or repository says of itself, before anything of it is loaded, and completes it after
a save. No torch here."""

from __future__ import annotations

import os
import re
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

from huggingface_hub import ModelCard, errors, hf_hub_download
from packaging.version import Version

from .. import __version__
from ..files import read_json, read_text, sha256, write_json
from .connection import broken_off, persist
from .shipped import locate, shared_folders


# In model_index.json: the SHA-256 of the files of the components, by their paths. diffusers leaves the key alone.
SUMS = "_sha256"
_SUFFIXES = (".safetensors", ".bin", ".json")
# Files of weights, in one piece or in shards, and the indices of shards.
_SHARD, _KIND = r"(-\d{5}-of-\d{5})?", r"\.(safetensors|bin)"
_WEIGHTS = re.compile(
    rf"[a-z_]*model({_SHARD}(\.(?P<variant>[\w-]+?))?{_SHARD}{_KIND}|{_KIND}\.index(\.(?P<of_index>[\w-]+))?\.json)"
)
# What a cached pipeline can do without where the Hub cannot be reached.
_DISPENSABLE = ("README.md", "recipe.yaml")


def read_model_index(source: str | os.PathLike, **hub_arguments) -> dict:
    """
    Reads `model_index.json` of a saved pipeline and makes sure that this version of the library may load it.

    Args:
        source (`str` or `os.PathLike`): Folder, id of a Hub repository, or name of a shipped checkpoint.
        hub_arguments: `revision`, `token`, `cache_dir`, ... of `huggingface_hub.hf_hub_download`.

    Raises:
        FileNotFoundError: There is no such folder or repository, it may not be read, or it holds no pipeline.
        ValueError:
            The card says that the pipeline was made by a newer version of the library, or `model_index.json` is
            damaged.
        ConnectionError: The download broke off again and again.
    """
    path = fetch(source, "model_index.json", **hub_arguments)
    if path is None:
        raise FileNotFoundError(
            f"{source} holds no pipeline: there is no model_index.json in it. `--model` and `from_pretrained` take"
            " what `save_pretrained` or train.py wrote."
        )
    index = read_json(path)
    if not isinstance(index, dict) or not isinstance(index.get(SUMS, {}), dict):
        raise ValueError(f"{path} is damaged: it must hold the values of a pipeline by their names.")

    card = fetch(source, "README.md", **hub_arguments)
    made_by = None if card is None else ModelCard(read_text(card)).data.get("anodiff_version")
    # A patch release changes no file format.
    if made_by is not None and Version(str(made_by)).release[:2] > Version(__version__).release[:2]:
        raise ValueError(
            f"{source} was made by anodiff {made_by}, and this is anodiff {__version__}, which may not understand it:"
            f" pip install 'anodiff>={made_by}'."
        )
    return index


def check_processor(source: str | os.PathLike, index: dict, **hub_arguments) -> None:
    """Raises a `ValueError` unless a saved pipeline with this `model_index.json` has a processor: nobody could know
    without one what its network wants to see. Other arguments as of [`read_model_index`]."""
    named = index.get("processor", [None])[0]
    if not named or fetch(source, "processor/processor_config.json", **hub_arguments) is None:
        raise ValueError(
            f"{source} has no processor, so nobody can know which modalities, size and intensities its network wants."
            " Save the pipeline with its `processor`, or give one:"
            " `from_pretrained(..., processor=VolumeProcessor(...))`."
        )


def find_stale_weights(folder: str | os.PathLike, earlier: str | os.PathLike, variant: str | None = None) -> list[str]:
    """Returns the weight files of an `earlier` folder that those of a new save, in `folder`, take the place of, and that
    have other names: diffusers would still load them, as it prefers one format to another. Those of another `variant`
    stay."""
    stale = []
    for path in Path(earlier).glob("*/*"):
        saved = Path(folder, path.parent.name)
        match = _WEIGHTS.fullmatch(path.name)
        if match is None or (saved / path.name).exists() or (match["variant"] or match["of_index"]) != variant:
            continue
        if saved.is_dir() and any(_WEIGHTS.fullmatch(other.name) for other in saved.iterdir()):
            stale.append(path.relative_to(earlier).as_posix())
    return stale


def complete_index(
    folder: str | os.PathLike, earlier: str | os.PathLike | None = None, stale: Collection[str] = ()
) -> None:
    """
    Completes `model_index.json` of a saved pipeline by the SHA-256 of those files of its components whose it does not
    have yet, and takes out of it and of their configurations the folder that diffusers loaded them from, which is
    nobody's business.

    Args:
        folder (`str` or `os.PathLike`): Of the pipeline.
        earlier (`str` or `os.PathLike`, *optional*):
            Folder that the files are moved to next. What an earlier save left there beside them, weights of another
            `variant`, keeps its SHA-256.
        stale (collection of `str`): What of that is about to be removed, and has none any more.
    """
    folder = Path(folder)
    index = read_json(folder / "model_index.json")
    sums = dict(index.get(SUMS, {}))
    for config in folder.glob("*/config.json"):
        values = read_json(config)
        if values.pop("_name_or_path", None) is not None:
            write_json(config, values)
            sums.pop(config.relative_to(folder).as_posix(), None)
    for component in (name for name, value in index.items() if isinstance(value, list)):
        for path in folder.glob(f"{component}/*"):
            name = path.relative_to(folder).as_posix()
            if path.suffix in _SUFFIXES and name not in sums:
                sums[name] = sha256(path)
    if earlier is not None:
        # A damaged index is about to be replaced.
        with suppress(OSError, ValueError, AttributeError):
            there = read_json(Path(earlier, "model_index.json")).get(SUMS, {})
            kept = {
                name: value for name, value in there.items() if Path(earlier, name).is_file() and name not in stale
            }
            sums = kept | sums
    completed = {key: value for key, value in index.items() if key != "_name_or_path"} | {SUMS: sums}
    if completed != index:
        write_json(folder / "model_index.json", dict(sorted(completed.items())))


def check_sums(source: str | os.PathLike, folder: str | os.PathLike, given: Collection[str] = ()) -> None:
    """
    Makes sure that the files of a pipeline are those that were saved: that they have the SHA-256 that
    `model_index.json` names. Pipelines of earlier versions name none.

    Args:
        source (`str` or `os.PathLike`): What the user calls it, for the message.
        folder (`str` or `os.PathLike`): Where its files are. Those that are not there are not looked for.
        given (collection of `str`): Components that are not read from the folder.

    Raises:
        ValueError: A file is another one.
    """
    shared = shared_folders(folder)
    for name, wanted in read_json(Path(folder) / "model_index.json").get(SUMS, {}).items():
        component, _, file = name.partition("/")
        path = shared[component] / file if component in shared else Path(folder, name)
        if component not in given and path.is_file() and sha256(path) != wanted:
            raise ValueError(
                f"{name} of {source} is not the file that was saved with it: its SHA-256 differs from that in"
                " model_index.json. It was damaged or altered: fetch it again (`force_download=True`), or take another"
                f" copy. If you changed it yourself, remove its line from `{SUMS}` there."
            )


def fetch(source: str | os.PathLike, name: str, **hub_arguments) -> Path | None:
    """Returns the path of a file of a saved pipeline, or `None` where the pipeline has no such file. Arguments and
    errors as of [`read_model_index`]."""
    folder = locate(source)
    if Path(folder).is_dir():
        path = Path(folder) / name
        return path if path.is_file() else None
    # The order matters: some of these errors are kinds of others.
    try:
        return Path(persist(hf_hub_download, str(source), name, **hub_arguments))
    except errors.HFValidationError as error:
        raise FileNotFoundError(f"There is no folder {source}, and it is no id of the Hub (owner/name).") from error
    except errors.GatedRepoError as error:
        raise FileNotFoundError(
            f"{source} is gated: ask for access on its page, then log in with `hf auth login`."
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"There is neither a folder nor a Hub repository {source}. If it is private, log in with `hf auth login`,"
            " or set HF_TOKEN to a token that may read it."
        ) from error
    except errors.RevisionNotFoundError as error:
        raise FileNotFoundError(f"{source} has no revision {hub_arguments.get('revision')!r}.") from error
    except errors.LocalEntryNotFoundError as error:
        # Offline, or no connection.
        if name in _DISPENSABLE:
            return None
        raise FileNotFoundError(
            f"There is no folder {source}, the Hub cannot be reached (or HF_HUB_OFFLINE is set), and {name} of such a"
            " repository is not in the cache."
        ) from error
    except errors.EntryNotFoundError:
        return None
    except Exception as error:
        told = broken_off(str(source), error)
        if told is None:
            raise
        raise told from None
