"""The `flowrl` command: finds the subcommand and turns a user's mistake into one message and exit code 2.

Each command is a file beside this one with `configure(parser)` and `run(arguments)`. Nothing is imported before it is
needed, so that `--help` is instant.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

COMMANDS = {
    "run": "train a model as a recipe says",
    "graph": "draw the stages of a recipe",
    "report": "draw and check what a run left",
    "init-model": "make a small model and its tokenizer",
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = _parser()
    given = list(sys.argv[1:] if arguments is None else arguments)
    name = next((word for word in given if not word.startswith("-")), None)
    if name in COMMANDS:
        command = importlib.import_module(f"flowrl.cli.{name.replace('-', '_')}")
        command.configure(parser.commands[name])
    parsed = parser.parse_args(given)
    if parsed.command is None:
        parser.print_help()
        return 2
    try:
        refuse_foreign_packages()
        return command.run(parsed)
    except ValueError as error:
        print(f"flowrl: {error}", file=sys.stderr)
        return 2


class _Parser(argparse.ArgumentParser):
    commands: dict[str, argparse.ArgumentParser]


def _parser() -> _Parser:
    parser = _Parser(prog="flowrl", description="Asynchronous reinforcement learning for language models.")
    parser.set_defaults(command=None)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", parser_class=argparse.ArgumentParser)
    parser.commands = {}
    for name, text in COMMANDS.items():
        parser.commands[name] = commands.add_parser(name, help=text, description=text)
        parser.commands[name].set_defaults(command=name)
    return parser


def refuse_foreign_packages() -> None:
    """Our packages must be those installed beside this one: a folder called `controllers` where one happens to stand,
    or another project's `transfer_queue`, would otherwise run in their place."""
    home = Path(__file__).resolve().parents[2]
    for package in ("controllers", "transfer_queue"):
        spec = importlib.util.find_spec(package)
        origin = Path(spec.origin).resolve() if spec is not None and spec.origin else None
        if origin != home / package / "__init__.py" or not (home / package / _OWN_FILE[package]).is_file():
            folders = spec.submodule_search_locations if spec is not None else None
            found = origin or next(iter(folders or ()), "nowhere")
            raise ValueError(
                f"{package}: imported from {found}; FlowRL needs its own, at {home / package} "
                "(another package or folder of that name comes first on sys.path)"
            )


_OWN_FILE = {"controllers": "stage.py", "transfer_queue": "ledger.py"}
