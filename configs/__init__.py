"""Reads configurations: a YAML file sets values, flags of the command line win over it, an unknown key is an error."""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TypeVar

import yaml

from ..files import read_text


Options = TypeVar("Options")


def parse_options(
    options_class: type[Options],
    argv: list[str] | None,
    *,
    prog: str,
    description: str,
    positional: str | None = None,
    shorthands: dict[str, str] | None = None,
    lists: Collection[str] = (),
    default_config: str | None = None,
) -> Options:
    """
    Fills an options dataclass from `--config FILE` and the command line. Ends the program with status 2 and one line
    if a flag or the file is wrong.

    Args:
        options_class (`type`):
            Dataclass; nested dataclasses are blocks of the file, docstrings of the fields are the help.
        argv (`list[str]`, *optional*): Arguments without the program's name; those of the process by default.
        prog (`str`): Program name in messages.
        description (`str`): First lines of `--help`.
        positional (`str`, *optional*): A list-valued field that takes the arguments without a flag.
        shorthands (`dict[str, str]`, *optional*): Flags that stand for others, such as `{"--data": "--data.path"}`.
        lists (collection of `str`): List-valued fields whose flags take all arguments up to the next flag.
        default_config (`str`, *optional*): File that is read where no `--config` is given.
    """
    import jsonargparse

    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = jsonargparse.ArgumentParser(prog=prog, description=description, exit_on_error=False)
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
            files.append(_read_config(value if equals else next(arguments, "")))
        else:
            flags.append((shorthands or {}).get(flag, flag) + equals + value)
    flags = [
        f"{flag}=true" if flag in switches and following.startswith("-") else flag
        for flag, following in zip(flags, [*flags[1:], "-"], strict=False)
    ]
    flags = list(_expand_lists(flags, {f"--{name}" for name in lists}))
    if default_config and not files:
        files = [_read_config(default_config)]
    try:
        # The content and not the file's name, which would be read in the encoding of the locale.
        values = jsonargparse.Namespace()
        for file in files:
            values.update(parser.parse_string(file, defaults=False))
        options = parser.instantiate(parser.parse_args(flags, namespace=values))
    except jsonargparse.ArgumentError as error:
        reason = re.sub(r'Parser key "([^"]+)":', r"`\1`:", " ".join(str(error).split()))
        print(f"error: {reason} (`{prog} --help` lists the options.)", file=sys.stderr)
        raise SystemExit(2) from None
    return options_class(**{field.name: options[field.name] for field in dataclasses.fields(options_class)})


def _expand_lists(flags: list[str], lists: Collection[str]) -> Iterator[str]:
    """Yields arguments, with a flag of its own for each value of a list: `--x 01 02` is `--x+=01`, `--x+=02`."""
    current = None
    for argument in flags:
        flag, equals, value = argument.partition("=")
        if flag in lists:
            current = flag
            yield from [f"{flag}+={value}"] if equals else []
        elif argument.startswith("-"):
            current = None
            yield argument
        else:
            yield argument if current is None else f"{current}+={argument}"


def read_yaml(path: str | Path) -> dict:
    """Reads a YAML file of `key: value` pairs; raises a `ValueError` that names the file and line if it is none, or
    gives a key twice, of which YAML would take the last."""
    text = read_text(path)
    try:
        values = yaml.load(text, _Loader)  # noqa: S506 (a SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line, problem = mark.line + 1, error.problem or error.context
        if "\t" in "".join(text.splitlines()[mark.line : line]):
            problem = "YAML is indented by spaces, and there is a tab"
        raise ValueError(f"{path}, line {line}: the file is no YAML: {problem}.") from None
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: the file is no YAML: {' '.join(str(error).split())}.") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold `key: value` pairs, got {str(values)[:100]!r}.")
    return values


class _Loader(yaml.SafeLoader):
    """Refuses a key that a block has twice."""

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key, _ in node.value:
            if (key.tag, str(key.value)) in seen:
                raise yaml.constructor.ConstructorError(
                    problem=f"`{key.value}` is there twice", problem_mark=key.start_mark
                )
            seen.add((key.tag, str(key.value)))
        return super().construct_mapping(node, deep)


def _read_config(name: str | Path) -> str:
    """Returns the text of a configuration file, which is YAML."""
    path = config_path(name)
    read_yaml(path)
    return read_text(path)


def packaged_config(name: str) -> Path:
    """Returns a configuration file of the package, whatever lies in the working directory."""
    return Path(__file__).parent / name


def config_path(name: str | Path) -> Path:
    """Finds a configuration file on disk or, for a bare name such as `anoddpm_nfbs.yaml`, in the package."""
    path = Path(name)
    if path.is_file():
        return path
    if packaged_config(path.name).is_file() and path.parent.name in ("", "configs"):
        return packaged_config(path.name)
    available = sorted(file.name for file in Path(__file__).parent.glob("*.yaml"))
    raise FileNotFoundError(f"There is no configuration {name}. The package comes with {', '.join(available)}.")
