"""Reads configurations: a YAML file sets values, flags of the command line win over it, an unknown key is an error."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import TypeVar


Options = TypeVar("Options")


def parse_options(
    options_class: type[Options],
    argv: list[str] | None,
    *,
    prog: str,
    description: str,
    positional: str | None = None,
    shorthands: dict[str, str] | None = None,
    default_config: str | None = None,
) -> Options:
    """
    Fills an options dataclass from `--config FILE` and the command line.

    Args:
        options_class (`type`):
            Dataclass; nested dataclasses are blocks of the file, docstrings of the fields are the help.
        argv (`list[str]`, *optional*): Arguments without the program's name; those of the process by default.
        prog (`str`): Program name in messages.
        description (`str`): First lines of `--help`.
        positional (`str`, *optional*): A list-valued field that takes the arguments without a flag.
        shorthands (`dict[str, str]`, *optional*): Flags that stand for others, such as `{"--data": "--data.path"}`.
        default_config (`str`, *optional*): File that is read where no `--config` is given.
    """
    import jsonargparse

    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = jsonargparse.ArgumentParser(prog=prog, description=description)
    parser.add_argument(
        "--config",
        action="config",
        help="YAML file; a bare name is looked up in the package"
        + (f" (default: {default_config})" if default_config else ""),
    )
    parser.add_class_arguments(options_class, skip={positional} if positional else None)
    if positional:
        parser.add_argument(positional, nargs="*", default=[])

    # jsonargparse lets the later of file and flag win; a file that comes first never overrides a flag.
    # A switch may stand alone: `--overwrite` is `--overwrite=true`.
    switches = {f"--{field.name}" for field in dataclasses.fields(options_class) if field.type in (bool, "bool")}
    files, flags = [], []
    arguments = iter(sys.argv[1:] if argv is None else argv)
    for argument in arguments:
        flag, equals, value = argument.partition("=")
        if flag == "--config":
            files += ["--config", str(config_path(value if equals else next(arguments, "")))]
        else:
            flags.append((shorthands or {}).get(flag, flag) + equals + value)
    flags = [
        f"{flag}=true" if flag in switches and following.startswith("-") else flag
        for flag, following in zip(flags, [*flags[1:], "-"], strict=False)
    ]
    if default_config and not files:
        files = ["--config", str(config_path(default_config))]
    options = parser.instantiate(parser.parse_args(files + flags))
    return options_class(**{field.name: options[field.name] for field in dataclasses.fields(options_class)})


def packaged_config(name: str) -> Path:
    """Returns a configuration file of the package, whatever lies in the working directory."""
    return Path(__file__).parent / name


def config_path(name: str | Path) -> Path:
    """Finds a configuration file on disk or, for a bare name such as `anoddpm_nfbs.yaml`, in the package."""
    path = Path(name)
    if path.exists():
        return path
    if packaged_config(path.name).exists() and path.parent.name in ("", "configs"):
        return packaged_config(path.name)
    available = sorted(file.name for file in Path(__file__).parent.glob("*.yaml"))
    raise FileNotFoundError(f"There is no configuration {name}. The package comes with {', '.join(available)}.")
