"""Brings pipelines, data sets and results to the Hub. No torch here."""

from __future__ import annotations

import json
import os
import shlex
import sys
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
    hf_hub_download,
    upload_folder,
)


class PublishingError(RuntimeError):
    """Reports a push that failed: what failed, where the files are, and how to push them later."""


def complete_folder(folder: str | os.PathLike, card: str) -> None:
    """Adds to the folder of a saved pipeline what every repository also holds: the card, the text of `README.md`, and
    its results ([`write_card`]), and a `pipeline.py` of one line, with which `DiffusionPipeline.from_pretrained(id,
    custom_pipeline=id, trust_remote_code=True)` gives our class."""
    folder = Path(folder)
    index = folder / "model_index.json"
    if not index.exists():
        raise FileNotFoundError(f"{folder} is no saved pipeline: there is no {index.name} in it.")
    class_name = json.loads(index.read_text())["_class_name"]
    (folder / "pipeline.py").write_text(f"from anodiff import {class_name}  # noqa: F401\n")
    for config in (index, *folder.glob("*/config.json")):
        values = json.loads(config.read_text())
        # Where diffusers loaded the component from, a folder of this machine, is nobody's business.
        if values.pop("_name_or_path", None) is not None:
            config.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")
    write_card(folder, card)


def write_card(folder: str | os.PathLike, card: str) -> None:
    """Writes the card as `README.md` of a folder, and as `.eval_results/*.yaml` those results of its metadata that
    belong to a data set on the Hub, whose leaderboard then shows them."""
    folder = Path(folder)
    (folder / "README.md").write_text(card, encoding="utf-8")
    entries: dict[str, list[EvalResultEntry]] = {}
    for result in ModelCard(card).data.eval_results or []:
        # A local folder or the bare name of a phantom would claim the results for somebody else's data set.
        if result.dataset_type.count("/") == 1 and not Path(result.dataset_type).exists():
            protocol = "; ".join(f"{key}: {value}" for key, value in (result.dataset_args or {}).items())
            entry = EvalResultEntry(result.dataset_type, result.metric_type, result.metric_value, notes=protocol)
            entries.setdefault(result.dataset_type, []).append(entry)
    for data_set, results in entries.items():
        target = folder / ".eval_results" / f"{data_set.replace('/', '--')}.yaml"
        target.parent.mkdir(exist_ok=True)
        rows = eval_result_entries_to_yaml(results)
        target.write_text(yaml.safe_dump(rows, sort_keys=False, allow_unicode=True), encoding="utf-8")


def read_card(repo_id: str, *, token: str | None = None) -> str | None:
    """Reads the card of a repository `"owner/name"` as it is on the Hub now; `None` if there is none, or if the Hub
    does not answer."""
    try:
        # Not from the cache: somebody may have changed it.
        return Path(hf_hub_download(repo_id, "README.md", token=token)).read_text(encoding="utf-8")
    except (errors.HfHubHTTPError, errors.EntryNotFoundError, errors.HFValidationError):
        return None


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
        repo_type (`str`): `"model"` or `"dataset"`.
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
        url = api.create_repo(repo_id, repo_type=repo_type, private=private, exist_ok=True)
        # An existing repository is no error above even if it is somebody else's.
        api.auth_check(repo_id, repo_type=repo_type, write=True)
        is_public = private and not api.repo_info(repo_id, repo_type=repo_type).private
        if licence is not None:
            ModelCard(f"---\n{ModelCardData(license=licence).to_yaml()}\n---\n").validate(repo_type=repo_type)
    except Exception as error:
        # Whatever broke, from a name that the Hub refuses to a cable: nobody wants to read a stack of HTTP calls.
        raise PublishingError(f"{type(error).__name__}: {' '.join(str(error).split())}") from error
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
) -> str:
    """
    Uploads a folder as one repository, which is created if it does not exist, and returns its URL. The folder itself
    is not changed. Arguments as of [`open_repository`].

    Raises:
        FileNotFoundError: There is no such folder.
        PublishingError: Anything else: no token, no connection, a server that refuses or breaks off.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder {folder}.")
    try:
        url = open_repository(repo_id, private=private, token=token, repo_type=repo_type)
        upload_folder(
            repo_id=repo_id, folder_path=folder, repo_type=repo_type, token=token, commit_message=commit_message
        )
    except Exception as error:
        # Hours of training must not end in a stack of HTTP calls.
        reason = " ".join(str(error).split())
        if not isinstance(error, PublishingError):
            reason = f"{type(error).__name__}: {reason}"
        command = ["hf", "upload", repo_id, str(folder.resolve())]
        command += ["--repo-type", repo_type] if repo_type != "model" else []
        command += ["--private"] if private else []
        raise PublishingError(
            f"{repo_id} was not pushed: {reason} All files are safe in {folder.resolve()}. To push them later:\n\n"
            f"    {shlex.join(command)}\n"
        ) from error
    return url


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
