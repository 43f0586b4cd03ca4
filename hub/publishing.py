"""Brings pipelines, data sets and results to the Hub. No torch here."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import yaml
from huggingface_hub import (
    EvalResultEntry,
    HfApi,
    ModelCard,
    ModelCardData,
    errors,
    eval_result_entries_to_yaml,
    get_token,
)
from huggingface_hub.utils import validate_repo_id
from PIL import Image, ImageOps

from ..files import read_json, read_text, replacing, write_text
from .connection import persist
from .model_index import complete_index
from .shipped import shared_folders


# What a run leaves in a folder for itself.
_NOT_PUSHED = [".run.*", ".*.partial.*", "*/.*.partial.*"]
# How often a card is read again because somebody has changed the repository meanwhile.
_TRIES = 5


class PublishingError(RuntimeError):
    """Reports a push that failed: what failed, where the files are, and how to push them later."""


class _UnknownCard(PublishingError):
    """Reports that nobody knows which card a repository is to have."""


def complete_folder(folder: str | os.PathLike, card: str) -> None:
    """Adds to the folder of a saved pipeline what every repository also holds: the card, the text of `README.md`, and
    its results ([`write_card`]), and a `pipeline.py` of one line, with which `DiffusionPipeline.from_pretrained(id,
    custom_pipeline=id, trust_remote_code=True)` gives our class."""
    folder = Path(folder)
    index = folder / "model_index.json"
    if not index.exists():
        raise FileNotFoundError(f"{folder} is no saved pipeline: there is no {index.name} in it.")
    write_text(folder / "pipeline.py", f"from anodiff import {read_json(index)['_class_name']}  # noqa: F401\n")
    complete_index(folder)
    write_card(folder, card)


def write_card(folder: str | os.PathLike, card: str) -> None:
    """Writes the card as `README.md` of a folder, and as `.eval_results/*.yaml` those results of its metadata that
    belong to a data set on the Hub, whose leaderboard then shows them."""
    folder = Path(folder)
    write_text(folder / "README.md", card)
    entries: dict[str, list[EvalResultEntry]] = {}
    for result in ModelCard(card).data.eval_results or []:
        # A local folder or the bare name of a phantom would claim the results for somebody else's data set.
        if _is_id(result.dataset_type) and not Path(result.dataset_type).exists():
            protocol = "; ".join(f"{key}: {value}" for key, value in (result.dataset_args or {}).items())
            entry = EvalResultEntry(result.dataset_type, result.metric_type, result.metric_value, notes=protocol)
            entries.setdefault(result.dataset_type, []).append(entry)
    for data_set, results in entries.items():
        target = folder / ".eval_results" / f"{data_set.replace('/', '--')}.yaml"
        target.parent.mkdir(exist_ok=True)
        rows = eval_result_entries_to_yaml(results)
        write_text(target, yaml.safe_dump(rows, sort_keys=False, allow_unicode=True))


def _is_id(name: str) -> bool:
    """Whether a name that a card gives to a data set is an id of the Hub, which may become the name of a file."""
    try:
        validate_repo_id(name)
    except errors.HFValidationError:
        return False
    return "/" in name


def copy_picture(source: str | os.PathLike, target: str | os.PathLike) -> None:
    """Copies a picture for a card: its first frame, upright, and nothing but pixels. Comments, places, dates and names
    of programs stay behind.

    Raises:
        ValueError: `source` is no picture, or one of a format that cannot be written.
    """
    try:
        with Image.open(source) as opened:
            image = ImageOps.exif_transpose(opened)
            if image.mode not in ("1", "L", "LA", "I;16", "RGB", "RGBA"):
                image = image.convert("RGBA" if image.has_transparency_data else "RGB")
            pixels = Image.frombytes(image.mode, image.size, image.tobytes())
            with replacing(target) as unfinished:
                pixels.save(unfinished)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise ValueError(f"{source} is no picture that can be shown in a card (PNG, JPEG, ...): {error}.") from error


def read_card(
    repo_id: str, *, token: str | None = None, revision: str | None = None, repo_type: str = "model"
) -> str | None:
    """Reads the card of a repository `"owner/name"` as it is on the Hub now, or was at the commit `revision`; `None`
    if there is none. Raises a `PublishingError` if nobody can know: whoever pushes a new one would lose it."""
    api = HfApi(token=token)
    try:
        # The file of a commit, never what a cache believes to be the newest: somebody may have changed it.
        commit = revision or persist(api.repo_info, repo_id, repo_type=repo_type).sha
        return read_text(persist(api.hf_hub_download, repo_id, "README.md", revision=commit, repo_type=repo_type))
    except errors.RemoteEntryNotFoundError:
        return None
    except Exception as error:
        if isinstance(error, errors.RepositoryNotFoundError) and not isinstance(error, errors.GatedRepoError):
            return None
        raise PublishingError(
            f"The card of {repo_id} could not be read, and is not to be lost: {_say(error)}"
        ) from error


def _say(error: Exception) -> str:
    """An error in one line."""
    reason = " ".join(str(error).split())
    return reason if isinstance(error, (PublishingError, ValueError)) else f"{type(error).__name__}: {reason}"


def open_repository(
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    repo_type: str = "model",
    licence: str | None = None,
) -> str:
    """
    Creates a repository if it does not exist, and makes sure that a push to it will be accepted. Called before hours
    of work.

    Args:
        repo_id (`str`): `"owner/name"`.
        private (`bool`, *optional*):
            Visibility of a new repository, the account's default if not given. `True` refuses a public one.
        token (`str`, *optional*): Write token; by default `HF_TOKEN`, or that of `hf auth login`.
        repo_type (`str`): `"model"`, `"dataset"` or `"space"`.
        licence (`str`, *optional*): Licence that the card will name; the Hub must know it.

    Returns:
        `str`: URL of the repository.

    Raises:
        PublishingError: No token, no right to write, no connection, a public repository, an unknown licence.
    """
    if token is None and get_token() is None:
        raise PublishingError(
            "There is no token. Log in with `hf auth login`, or set HF_TOKEN to a token that may write."
        )
    api = HfApi(token=token)
    try:
        kind = {"repo_type": repo_type, "space_sdk": "gradio" if repo_type == "space" else None}
        url = persist(api.create_repo, repo_id, private=private, exist_ok=True, **kind)
        # An existing repository is no error above even if it is somebody else's.
        persist(api.auth_check, repo_id, repo_type=repo_type, write=True)
        is_public = private and not persist(api.repo_info, repo_id, repo_type=repo_type).private
        if licence is not None:
            card = ModelCard(f"---\n{ModelCardData(license=licence).to_yaml()}\n---\n")
            persist(card.validate, repo_type=repo_type)
    except Exception as error:
        # Whatever broke, from a name that the Hub refuses to a cable: nobody wants to read a stack of HTTP calls.
        raise PublishingError(_say(error)) from error
    if is_public:
        raise PublishingError(
            f"{repo_id} exists and is public, and a private repository was asked for. Choose another name, or make it"
            " private in its settings."
        )
    return str(url)


def push_folder(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    commit_message: str = "Upload with anodiff",
    repo_type: str = "model",
    make_card: Callable[[str | None], str] | None = None,
    replaced: Sequence[str] = (),
) -> str:
    """
    Uploads a folder as one repository, which is created if it does not exist, in one commit, and returns its URL. A
    data set whose repository has another card keeps that, and a line says so. Where the Hub stumbles it is asked again
    ([`~hub.connection.persist`]). Arguments as of [`open_repository`], and:

    Args:
        folder (`str` or `os.PathLike`): It is not changed without `make_card`.
        commit_message (`str`): Title of the commit.
        make_card (callable, *optional*):
            Of a model or Space: the text of the card that the repository has, or `None`, to the text that it is to have. The
            folder gets that card ([`complete_folder`], or [`write_card`] if it is no pipeline) and is pushed. A change
            of the repository in between is not overwritten: the card is made anew of the changed one.
        replaced (sequence of `str`):
            Patterns: files of a data set's repository that match one and are not in the folder are deleted in the same
            commit, as those of an earlier version. Other files stay.

    Raises:
        FileNotFoundError: There is no such folder.
        ValueError: It is a shipped checkpoint that shares components with others, so not whole.
        PublishingError: Anything else: no token, no connection, a server that refuses or breaks off, no card.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder {folder}.")
    shared = shared_folders(folder)
    if shared:
        raise ValueError(f"{folder} has no {', '.join(shared)} of its own: `publish.py` pushes it whole.")
    arguments = {"repo_id": repo_id, "folder_path": folder, "repo_type": repo_type, "commit_message": commit_message}
    try:
        url = open_repository(repo_id, private=private, token=token, repo_type=repo_type)
        if make_card is None:
            kept = repo_type == "dataset" and _has_other_card(folder, repo_id, token)
            ignored = [*_NOT_PUSHED, *(["README.md"] if kept else [])]
            patterns = {"ignore_patterns": ignored, "delete_patterns": list(replaced) or None}
            persist(HfApi(token=token).upload_folder, **arguments, **patterns)
        else:
            _upload_with_card(HfApi(token=token), make_card, **arguments)
    except Exception as error:
        # Hours of training must not end in a stack of HTTP calls.
        command = ["hf", "upload", repo_id, str(folder.resolve())]
        command += ["--repo-type", repo_type] if repo_type != "model" else []
        command += ["--private"] if private else []
        command += [word for pattern in replaced for word in ("--delete", pattern)]
        if isinstance(error, _UnknownCard):
            # Whatever card is in the folder knows nothing of that of the repository.
            command += ["--exclude", "README.md"]
        raise PublishingError(
            f"{repo_id} was not pushed: {_say(error)} All files are safe in {folder.resolve()}. To push them later:\n\n"
            f"    {shlex.join(command)}\n"
        ) from error
    return url


def _has_other_card(folder: Path, repo_id: str, token: str | None) -> bool:
    """Tells whether the repository of a data set has a card that is not that of the folder, which is said."""
    own, there = folder / "README.md", read_card(repo_id, token=token, repo_type="dataset")
    if there is None or (own.is_file() and read_text(own) == there):
        return False
    print(f"The card that {repo_id} has stays. For that of this data set: {own}.", file=sys.stderr)
    return True


def _upload_with_card(api: HfApi, make_card: Callable[[str | None], str], **arguments) -> None:
    repo_id, folder, repo_type = (arguments[name] for name in ("repo_id", "folder_path", "repo_type"))
    complete = complete_folder if (folder / "model_index.json").exists() else write_card
    for left in reversed(range(_TRIES)):
        try:
            commit = persist(api.repo_info, repo_id, repo_type=repo_type).sha
            card = make_card(read_card(repo_id, token=api.token, revision=commit, repo_type=repo_type))
        except Exception as error:
            raise _UnknownCard(_say(error)) from error
        complete(folder, card)
        try:
            persist(api.upload_folder, **arguments, parent_commit=commit, ignore_patterns=_NOT_PUSHED)
            return
        except errors.HfHubHTTPError as error:
            # 412: the commit is not the newest one any more.
            if error.response.status_code != 412 or not left:
                raise


class BackgroundPush:
    """Pushes folders in a thread, one at a time, while a training goes on. A push that fails is reported and not
    repeated, because the next one brings everything again."""

    def __init__(self):
        self._pool = ThreadPoolExecutor(1)
        self._running: Future | None = None

    @property
    def busy(self) -> bool:
        """Tells whether a push is under way; its folder must not be changed then."""
        return self._running is not None and not self._running.done()

    def start(self, folder: str | os.PathLike, repo_id: str, **arguments) -> None:
        """Starts [`push_folder`] with these arguments, after the push under way, and does not wait for its end."""
        self.wait()
        self._running = self._pool.submit(push_folder, folder, repo_id, **arguments)

    def wait(self) -> None:
        """Waits until no push is under way."""
        try:
            if self._running is not None:
                self._running.result()
        except PublishingError as error:
            print(f"warning: {error}The training goes on.", file=sys.stderr)
        self._running = None
