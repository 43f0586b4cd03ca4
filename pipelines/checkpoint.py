"""Pipelines from folders and the Hub, and back: the right class, whole files, cards."""

from __future__ import annotations

import os
import shutil
import tempfile
import typing
from pathlib import Path

from diffusers import DiffusionPipeline
from diffusers.utils.torch_utils import get_device

from ..files import read_text, replacing
from ..hub.configuration import PlainConfigMixin
from ..hub.connection import broken_off, persist
from ..hub.model_index import check_processor, check_sums, complete_index, find_stale_weights, read_model_index
from ..hub.shipped import load_shared, locate


if typing.TYPE_CHECKING:
    from typing import Self


class CheckpointPipeline(PlainConfigMixin, DiffusionPipeline):
    """Loads, saves and pushes the pipelines of this library as diffusers does its own, and makes sure that what is
    loaded is what was saved."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs) -> Self:
        """
        Loads a pipeline as `DiffusionPipeline.from_pretrained`; on this base class, the subclass that the checkpoint
        names.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`):
                Folder, id of a Hub repository (`"owner/name"`), or the bare name of a checkpoint that comes with the
                package (`"anoddpm-flair"`; `anodiff models` lists them), for which no request is made. A folder of
                that name wins.
            kwargs:
                As of diffusers: components, `dtype` (float32 by default, whatever the weights are stored in),
                `device_map` (one device, `"cuda"` or `"cpu"`), `revision`, `token`, `local_files_only`, ...

        Raises:
            FileNotFoundError: There is no such folder, repository or shipped checkpoint, or no pipeline in it.
            ValueError:
                The checkpoint is no pipeline of this library, has no processor, was made by a newer version, or holds
                a file that is not the one that was saved; there is no such device.
            ConnectionError: The download broke off again and again.
        """
        import anodiff

        if "torch_dtype" in kwargs:  # as older versions of diffusers call it
            kwargs.setdefault("dtype", kwargs.pop("torch_dtype"))
        device_map, devices = kwargs.get("device_map"), sorted({"cpu", get_device()})
        if device_map is not None and device_map not in devices:
            raise ValueError(
                f"`device_map` must be the name of a device of this machine, {' or '.join(devices)}, got {device_map!r}: the networks"
                " of a pipeline share one. `.to(...)` moves a pipeline to any other, such as cuda:1."
            )
        known = ("cache_dir", "force_download", "token", "local_files_only", "revision")
        hub_arguments = {key: kwargs[key] for key in known if key in kwargs}
        index = read_model_index(pretrained_model_name_or_path, **hub_arguments)
        name = index.get("_class_name")
        if cls is not anodiff.AnomalyPipeline:
            if name != cls.__name__:
                raise ValueError(
                    f"{pretrained_model_name_or_path} holds a {name}, not a {cls.__name__}; `AnomalyPipeline.from_pretrained`"
                    " loads whatever pipeline of this library a checkpoint names."
                )
            if "processor" not in kwargs:
                check_processor(pretrained_model_name_or_path, index, **hub_arguments)
            source = locate(pretrained_model_name_or_path)
            if Path(source).is_dir():
                check_sums(pretrained_model_name_or_path, source, kwargs)
                loading = {key: kwargs[key] for key in ("dtype", "device_map") if key in kwargs}
                kwargs |= load_shared(source, index, kwargs, **loading)
            return super().from_pretrained(source, **kwargs)
        pipelines = [public for public in anodiff.__all__ if public.endswith("Pipeline") and public != cls.__name__]
        if name not in pipelines:
            raise ValueError(
                f"{pretrained_model_name_or_path} holds a {name}, which is no pipeline of anodiff {anodiff.__version__}"
                f" ({', '.join(pipelines)}). Load it with the library that made it, or update anodiff."
            )
        return getattr(anodiff, name).from_pretrained(pretrained_model_name_or_path, **kwargs)

    @classmethod
    def download(cls, pretrained_model_name: str, **kwargs) -> str | os.PathLike:
        """Downloads as `DiffusionPipeline.download`, asks again where the Hub stumbles, and makes sure that the files
        are those that were saved. Raises a `ConnectionError` or `ValueError` as [`from_pretrained`]."""
        try:
            folder = persist(super().download, pretrained_model_name, **kwargs)
        except Exception as error:
            told = broken_off(pretrained_model_name, error)
            if told is None:
                raise
            raise told from None
        check_sums(pretrained_model_name, folder, kwargs)
        return folder

    def save_pretrained(self, save_directory: str | os.PathLike, *, push_to_hub: bool = False, **kwargs) -> None:
        """Saves as `DiffusionPipeline.save_pretrained`, with the SHA-256 of every file of the components. With
        `push_to_hub=True` and `repo_id` the folder gets a card and is pushed; the other arguments of [`push_to_hub`]
        are taken as well.

        Everything is written beside its place first. A save that is interrupted leaves an earlier pipeline of the
        folder as it is; only while the finished files are moved, `model_index.json` last, they are not of one save,
        and [`from_pretrained`] would say so. Weights of the earlier pipeline in another format or in shards go, those of
        another `variant` stay."""
        hub_arguments = ("repo_id", "card", "licence", "private", "token", "commit_message")
        pushing = {key: kwargs.pop(key) for key in hub_arguments if key in kwargs}
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob(".*.partial.pipeline"):  # by a save that was killed
            shutil.rmtree(left)
        with tempfile.TemporaryDirectory(prefix=".", suffix=".partial.pipeline", dir=folder) as unfinished:
            super().save_pretrained(unfinished, **kwargs)
            stale = find_stale_weights(unfinished, folder, kwargs.get("variant"))
            complete_index(unfinished, folder, stale)
            made = Path(unfinished, "model_index.json")
            files = [path for path in Path(unfinished).rglob("*") if path.is_file() and path != made]

            def move(path: Path) -> None:
                target = folder / path.relative_to(unfinished)
                target.parent.mkdir(parents=True, exist_ok=True)
                with replacing(target) as beside:
                    path.replace(beside)

            for path in files:
                move(path)
            for name in stale:
                (folder / name).unlink()
            move(made)
        if push_to_hub:
            self._push(folder, **{"repo_id": folder.name, **pushing})

    def push_to_hub(
        self,
        repo_id: str,
        *,
        card: str | None = None,
        licence: str = "other",
        private: bool | None = None,
        token: str | None = None,
        commit_message: str = "Upload with anodiff",
        variant: str | None = None,
    ) -> str:
        """
        Pushes weights, scheduler, processor, configuration and card as one repository, which is created if need be.

        Args:
            repo_id (`str`): `"owner/name"`.
            card (`str`, *optional*):
                Text of `README.md`. By default the one that the repository has, or one made of this pipeline
                ([`~hub.model_card.make_card`]).
            licence (`str`): Of the weights, for a card that is made.
            private (`bool`, *optional*): Visibility of a new repository; the account's default if not given.
            token (`str`, *optional*): Write token; by default `HF_TOKEN`, or that of `hf auth login`.
            commit_message (`str`): Title of the commit.
            variant (`str`, *optional*): Part of the names of the weight files, such as `"fp16"`.

        Returns:
            `str`: URL of the repository.

        Raises:
            PublishingError: The push failed; the message names the folder that everything was saved to.
        """
        folder = tempfile.mkdtemp(prefix=f"{type(self).__name__}-")
        self.save_pretrained(folder, variant=variant)
        url = self._push(folder, repo_id, card, licence, private, token, commit_message)
        shutil.rmtree(folder)
        return url

    def _push(
        self,
        folder: str | os.PathLike,
        repo_id: str,
        card: str | None = None,
        licence: str = "other",
        private: bool | None = None,
        token: str | None = None,
        commit_message: str = "Upload with anodiff",
    ) -> str:
        from ..hub.model_card import make_card
        from ..hub.publishing import push_folder

        path = Path(folder, "README.md")
        own = read_text(path) if path.is_file() else None

        def choose_card(there: str | None) -> str:
            # A card that somebody has written, or that holds results, is not replaced by another one.
            if card is None and own is not None and there is not None and own != there:
                raise ValueError(
                    f"{path} and the card of {repo_id} differ. Say by `card` which text the card is to have, or make"
                    f" them alike: hf download {repo_id} README.md --local-dir {folder}"
                )
            return card or there or own or str(make_card(self, repo_id=repo_id, licence=licence))

        return push_folder(
            folder,
            repo_id,
            private=private,
            token=token,
            commit_message=commit_message,
            make_card=choose_card,
        )

    def register_modules(self, **components) -> None:
        """Registers as `DiffusionPipeline.register_modules`, for components of the classes that the signature of
        `__init__` names.

        Raises:
            TypeError: A component has a wrong class.
        """
        hints = typing.get_type_hints(type(self).__init__)
        for name, component in components.items():
            allowed = typing.get_args(hints[name]) or (hints[name],)
            if not isinstance(component, allowed):
                names = " or ".join("None" if kind is type(None) else kind.__name__ for kind in allowed)
                raise TypeError(f"`{name}` must be a {names}, got {type(component).__name__}.")
        super().register_modules(**components)
