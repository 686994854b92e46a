"""The command line: parses, calls, prints."""

import contextlib
import io
import re
import sys
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of `paceline`.

    Returns:
        The exit status: 0, 1 where a run failed, 2 after input that cannot be used, 130 after
        Ctrl-C.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments == ["--version"]:
        print(f"paceline {version('paceline')}")
        return 0
    try:
        from rich.console import Console

        from .study.bench import Bench, bench
        from .study.compare import Comparison, compare
        from .train import InputError
        from .train.merge import Merge, merge
    except ModuleNotFoundError as error:
        print(f"paceline: {error}; pip install 'paceline[train]'", file=sys.stderr)
        return 2
    try:
        commands = {"compare": Comparison, "bench": Bench, "average": Merge}
        options = _parse(commands, arguments or ["--help"])
        if isinstance(options, Bench):
            bench(options, Console())
            return 0
        if isinstance(options, Merge):
            merge(options, Console())
            return 0
        results = compare(options, Console())
    except InputError as error:
        print(f"paceline: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("paceline: interrupted before there were results", file=sys.stderr)
        return 130
    return 130 if results.interrupted else 1 if results.failed else 0


def _parse(commands: dict[str, Any], arguments: Sequence[str]) -> Any:
    """The options of the command named by the first argument.

    Raises:
        InputError: with tyro's boxed message condensed to one line.
    """
    import tyro

    from .train import InputError

    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.extras.subcommand_cli_from_dict(
                commands,
                prog="paceline",
                description="Train the model you return.",
                args=arguments,
                config=(tyro.conf.OmitArgPrefixes,),
            )
    except SystemExit as stop:
        if stop.code != 2:
            raise
    # A title, then sections between rules, all in a frame of │ and ─ or of blanks and -.
    _, *lines = [line.strip("╭╮╰╯│ ") for line in said.getvalue().splitlines()]
    text = "\n".join("" if not line.strip("─-") else line for line in lines)
    message, *hints = [" ".join(part.split()) for part in re.split(r"\n\n+", text.strip())]
    near = re.search(r"Perhaps you meant: (--[\w-]+)", " ".join(hints))
    raise InputError(message + (f"; did you mean {near[1]}?" if near else ""))
