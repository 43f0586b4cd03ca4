"""Brings a saved pipeline to the Hub. No torch here."""

from __future__ import annotations

import json
import os
import shlex
from pathlib import Path

import yaml
from huggingface_hub import (
    EvalResultEntry,
    ModelCard,
    create_repo,
    eval_result_entries_to_yaml,
    get_token,
    upload_folder,
)


class PublishingError(RuntimeError):
    """A push that failed. The message says what failed, where the files are, and how to push them later."""


def complete_folder(folder: str | os.PathLike, card: str) -> None:
    """
    Adds to a saved pipeline what every repository holds besides: the card; a `pipeline.py` of one line, with which
    `DiffusionPipeline.from_pretrained(id, custom_pipeline=id, trust_remote_code=True)` gives our class; and the results of the
    card's metadata as `.eval_results/*.yaml`, if they are of a data set on the Hub, whose leaderboard then shows them.

    Args:
        folder (`str` or `os.PathLike`): What `save_pretrained` wrote.
        card (`str`): Text of `README.md`, such as `str(make_card(pipeline))`.

    Raises:
        FileNotFoundError: `folder` holds no `model_index.json`.
    """
    folder = Path(folder)
    index = folder / "model_index.json"
    if not index.exists():
        raise FileNotFoundError(f"{folder} is no saved pipeline: there is no {index.name} in it.")
    class_name = json.loads(index.read_text())["_class_name"]
    (folder / "README.md").write_text(card, encoding="utf-8")
    (folder / "pipeline.py").write_text(f"from anodiff import {class_name}  # noqa: F401\n")

    entries: dict[str, list[EvalResultEntry]] = {}
    for result in ModelCard(card).data.eval_results or []:
        # A local folder or the bare name of a phantom would claim the results for somebody else's data set.
        if result.dataset_type.count("/") == 1 and not Path(result.dataset_type).exists():
            protocol = "; ".join(f"{key}: {value}" for key, value in (result.metric_args or {}).items())
            entry = EvalResultEntry(result.dataset_type, result.metric_type, result.metric_value, notes=protocol)
            entries.setdefault(result.dataset_type, []).append(entry)
    for data_set, results in entries.items():
        target = folder / ".eval_results" / f"{data_set.replace('/', '--')}.yaml"
        target.parent.mkdir(exist_ok=True)
        rows = eval_result_entries_to_yaml(results)
        target.write_text(yaml.safe_dump(rows, sort_keys=False, allow_unicode=True), encoding="utf-8")


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
    Uploads a folder as one repository, which is created if need be. The folder itself is not touched.

    Args:
        folder (`str` or `os.PathLike`): What is uploaded.
        repo_id (`str`): `"owner/name"`.
        private (`bool`, *optional*): Visibility of a new repository; the account's default if not given.
        token (`str`, *optional*): Write token; by default `HF_TOKEN`, or that of `hf auth login`.
        commit_message (`str`): Title of the commit.
        repo_type (`str`): `"model"` or `"dataset"`.

    Returns:
        `str`: URL of the repository.

    Raises:
        FileNotFoundError: There is no such folder.
        PublishingError: Anything else: no token, no connection, a server that refuses or breaks off.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder {folder}.")
    command = ["hf", "upload", repo_id, str(folder.resolve())]
    command += ["--repo-type", repo_type] if repo_type != "model" else []
    command += ["--private"] if private else []
    later = f"All files are safe in {folder.resolve()}. To push them later:\n\n    {shlex.join(command)}\n"
    if token is None and get_token() is None:
        raise PublishingError(
            f"{repo_id} was not pushed: there is no token. Log in with `hf auth login`, or set HF_TOKEN to a token that may"
            f" write. {later}"
        )
    try:
        url = create_repo(repo_id, repo_type=repo_type, private=private, token=token, exist_ok=True)
        upload_folder(
            repo_id=repo_id, folder_path=folder, repo_type=repo_type, token=token, commit_message=commit_message
        )
    except Exception as error:
        # Whatever broke, from a name that the Hub refuses to a cable: hours of training must not end in a stack of HTTP calls.
        reason = " ".join(str(error).split())
        raise PublishingError(f"{repo_id} was not pushed: {type(error).__name__}: {reason} {later}") from error
    return str(url)
