"""Writes what shells complete the command line with."""

from __future__ import annotations

from collections.abc import Callable, Mapping


def write_completion(shell: str, prog: str, commands: Mapping[str, tuple[str, Callable[[], int]]]) -> str:
    """
    Writes the script of a shell that completes a command, its sub-commands, their options and file names.

    Args:
        shell (`str`): `"bash"`, `"zsh"`, or another one that shtab knows.
        prog (`str`): Name of the command.
        commands (mapping): Name to purpose and main function, which is stopped where it parses its arguments.

    Returns:
        `str`: the script; it needs no Python.
    """
    import jsonargparse
    import shtab

    parser = jsonargparse.ArgumentParser(prog=prog)
    subcommands = parser.add_subcommands()
    for name, (purpose, main) in commands.items():
        command = jsonargparse.capture_parser(main)
        command.description = purpose
        for action in command._actions:
            if action.nargs != 0 and not action.choices:
                action.complete = shtab.FILE
        subcommands.add_subcommand(name, command, help=purpose)
    return shtab.complete(parser, shell)
