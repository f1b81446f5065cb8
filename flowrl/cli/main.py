"""The `flowrl` command: finds the subcommand and turns a user's mistake into one message and exit code 2.

Each command is a file beside this one with `configure(parser)` and `run(arguments)`. Nothing is imported before it is
needed, so that `--help` is instant.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import importlib.util
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from flowrl import __version__

COMMANDS = {
    "run": "train a model as a recipe says",
    "sweep": "run a recipe at many points and compare them",
    "graph": "draw the stages of a recipe",
    "engines": "have engines join or leave a run that goes on",
    "replay": "retrain a recorded run, bit for bit",
    "export": "turn a checkpoint into a Hugging Face directory",
    "simulate": "say what staleness bounds would cost, in virtual time",
    "report": "draw and check what a run left",
    "check": "try an episode, environment or reward of your own",
    "doctor": "say what a recipe needs and what this machine lacks",
    "init-model": "make a small model and its tokenizer",
}


def main(arguments: Sequence[str] | None = None) -> int:
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or given[0] not in COMMANDS:
        return _without_command(given)
    name = given[0]
    command = importlib.import_module(f"flowrl.cli.{name.replace('-', '_')}")
    parser = argparse.ArgumentParser(prog=f"flowrl {name}", description=COMMANDS[name])
    command.configure(parser)
    parsed = parser.parse_intermixed_args(given[1:])
    try:
        refuse_foreign_packages()
        code = command.run(parsed)
        sys.stdout.flush()
        return code
    except ValueError as error:
        print(f"flowrl: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # whoever read the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE


def _without_command(given: Sequence[str]) -> int:
    lines = "\n".join(f"  {name:<12} {text}" for name, text in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="flowrl",
        usage="flowrl COMMAND …",
        description="Asynchronous reinforcement learning for language models.",
        epilog=f"commands:\n{lines}\n\n`flowrl COMMAND --help` says more.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"flowrl {__version__}")
    _, unknown = parser.parse_known_args(given)
    if unknown:
        near = difflib.get_close_matches(unknown[0], COMMANDS, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        parser.error(f"{unknown[0]!r} is no command; they are {', '.join(COMMANDS)}{hint}")
    parser.print_help()
    return 2


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
