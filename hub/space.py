"""Makes the Space of the Hub that serves the checkpoints: the pages of `space/`, and the package beside them."""

from __future__ import annotations

import configparser
import os
import shutil
from pathlib import Path

from ..files import read_text, write_text


_ROOT = Path(__file__).parents[1]


def write_space(folder: str | os.PathLike) -> None:
    """
    Writes the files of the Space: those of `space/`, the package with its checkpoints as `anodiff/`, of which nothing
    has to be installed there, and `requirements.txt`, what `setup.cfg` says that the package and its extra `app` need.
    The Hub installs gradio itself, as the `sdk_version` of the card says.

    Args:
        folder (`str` or `os.PathLike`): Where to; must not exist.

    Raises:
        FileNotFoundError: This is an installation from a wheel, which has no `space/`.
    """
    folder, pages = Path(folder), _ROOT / "space"
    if not pages.is_dir():
        raise FileNotFoundError(f"There is no folder {pages}: publish the Space from the source tree of anodiff.")
    settings = configparser.ConfigParser()
    settings.read_string(read_text(_ROOT / "setup.cfg"))

    def listed(section: str, key: str) -> list[str]:
        lines = (line.strip() for line in settings[section][key].splitlines())
        return [line for line in lines if line and not line.startswith("#")]

    shutil.copytree(pages, folder, ignore=shutil.ignore_patterns("__pycache__"))
    wanted = {package: ["*.py"] for package in listed("options", "packages")}
    for package in settings["options.package_data"]:
        wanted[package] = [*wanted[package], *listed("options.package_data", package)]
    for package, patterns in wanted.items():
        source = _ROOT.joinpath(*package.split(".")[1:])
        for path in (path for pattern in patterns for path in source.glob(pattern) if path.is_file()):
            target = folder / "anodiff" / path.relative_to(_ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
    shutil.copyfile(_ROOT / "LICENSE", folder / "anodiff" / "LICENSE")
    needed = [*listed("options", "install_requires"), *listed("options.extras_require", "app")]
    write_text(folder / "requirements.txt", "\n".join([*(x for x in needed if not x.startswith("gradio")), ""]))
