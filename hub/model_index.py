"""Reads what a pipeline folder or repository says of itself, before anything of it is loaded. No torch here."""

from __future__ import annotations

import json
import os
from pathlib import Path

from huggingface_hub import ModelCard, errors, hf_hub_download
from packaging.version import Version

from .. import __version__


def read_model_index(source: str | os.PathLike, **hub_arguments) -> dict:
    """
    Reads `model_index.json` of a saved pipeline and makes sure that this version of the library may load it.

    Args:
        source (`str` or `os.PathLike`): Folder, or id of a Hub repository.
        hub_arguments: `revision`, `token`, `cache_dir`, ... of `huggingface_hub.hf_hub_download`.

    Raises:
        FileNotFoundError: There is no such folder or repository, it may not be read, or it holds no pipeline.
        ValueError: The card says that the pipeline was made by a newer version of the library.
    """
    index = _fetch(source, "model_index.json", **hub_arguments)
    if index is None:
        raise FileNotFoundError(
            f"{source} holds no pipeline: there is no model_index.json in it. `--model` and `from_pretrained` take"
            " what `save_pretrained` or train.py wrote."
        )
    index = json.loads(index.read_text())

    card = _fetch(source, "README.md", **hub_arguments)
    made_by = None if card is None else ModelCard(card.read_text(encoding="utf-8")).data.get("anodiff_version")
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
    if not named or _fetch(source, "processor/processor_config.json", **hub_arguments) is None:
        raise ValueError(
            f"{source} has no processor, so nobody can know which modalities, size and intensities its network wants."
            " Save the pipeline with its `processor`, or give one:"
            " `from_pretrained(..., processor=VolumeProcessor(...))`."
        )


def _fetch(source: str | os.PathLike, name: str, **hub_arguments) -> Path | None:
    """Returns the path of a file of a saved pipeline, or `None` where the pipeline has no such file."""
    if Path(source).is_dir():
        path = Path(source) / name
        return path if path.is_file() else None
    # The order matters: some of these errors are kinds of others.
    try:
        return Path(hf_hub_download(str(source), name, **hub_arguments))
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
        if name == "README.md":
            return None
        raise FileNotFoundError(
            f"There is no folder {source}, the Hub cannot be reached (or HF_HUB_OFFLINE is set), and {name} of such a"
            " repository is not in the cache."
        ) from error
    except errors.EntryNotFoundError:
        return None
